//! A pod's limits make its machine, each container's own hold in it.

use std::fs;

use bulkhead_tests::cri::messages::{Empty, LinuxContainerResources, PodSandboxConfig};
use bulkhead_tests::{Engine, Host};

use super::{Pod, config, connect, container, handlers, private_pids, run};
use crate::{pods_cgroup, processes, shims_end};

const MIB: i64 = 1 << 20;

fn limits(cpu_quota: i64, memory_mib: i64, oom_score_adj: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_quota,
        cpu_period: 100_000,
        memory_limit_in_bytes: memory_mib * MIB,
        oom_score_adj,
        ..Default::default()
    }
}

fn pod_config(resources: LinuxContainerResources) -> PodSandboxConfig {
    let mut config = config(private_pids());
    config.linux.mut_or_insert_default().resources = Some(resources).into();
    config
}

#[test]
fn three_containers_see_what_each_should() {
    let cri = connect();
    // As kubelet has them: a guaranteed one, a burstable one and one of the best effort.
    let asked = [
        limits(50_000, 100, -997),
        limits(100_000, 200, 900),
        limits(0, 0, 1000),
    ];
    let mut seen = Vec::new();
    for &handler in handlers() {
        let host = Host::now();
        let config = pod_config(limits(150_000, 300, 0));
        let pod = Pod::of(&cri, handler, config, private_pids());
        let ids = asked.clone().map(|resources| {
            let created = pod.create_with("sleep 1000", &[], resources);
            let id = created.expect("it is created");
            let _: Empty = cri.ok("StartContainer", &container(&id));
            id
        });
        let script = "cd /sys/fs/cgroup; cat memory.max cpu.max /proc/self/oom_score_adj";
        seen.push(ids.each_ref().map(|id| pod.exec(id, script)));
        let count = |id: &String| pod.exec(id, "nproc").1.parse::<usize>().expect("a number");
        let counts = ids.each_ref().map(count);
        let here = std::thread::available_parallelism()
            .expect("it is known")
            .get();
        if handler == "bulkhead" {
            assert_eq!(counts, [2.min(here); 3]);
            let total = pod.exec(
                &ids[2],
                "awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo",
            );
            let total: i64 = total.1.parse().expect("MiB");
            assert!((301..300 + 5 + 64).contains(&total), "{total}");
            let most =
                fs::read_to_string(pods_cgroup().join("machine/memory.max")).expect("a file");
            let machine = 300 + 5 + 64 + counts[0] as i64 - 1;
            let most: i64 = most.trim().parse().expect("bytes");
            assert_eq!(most, (machine + machine / 8 + 64) * MIB);
            // The machine is taken as readily as the readiest of them.
            for role in ["bulkhead-vmm run", "bulkhead-vmm fs"] {
                let pid = processes(&[role])[0];
                let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"));
                assert_eq!(score.expect("it runs").trim(), "1000", "{role}");
            }
        }
        pod.remove();
        shims_end();
        host.assert_nothing_left();
    }
    assert!(seen.iter().all(|of| *of == seen[0]), "{seen:?}");
}

#[test]
fn limits_that_cannot_be_meant_are_refused_by_their_names() {
    let cri = connect();
    Engine::get();
    let host = Host::now();
    for (resources, word) in [
        (limits(-5, 0, 0), "quota"),
        (limits(500, 0, 0), "quota"),
        (limits(0, -5, 0), "memory"),
    ] {
        let error = run(&cri, "bulkhead", pod_config(resources)).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
    shims_end();
    host.assert_nothing_left();
}
