//! What Kubernetes does with pods.

use std::fs;
use std::thread;

use bulkhead_tests::cri::messages::{
    ContainerState, ContainerStatsResponse, Empty, NamespaceMode, NamespaceOption,
};
use bulkhead_tests::{Engine, Host};
use tempfile::TempDir;

use super::{Pod, config, connect, container, handlers, run};
use crate::shims_end;

#[test]
fn a_pod_lives_as_kubernetes_wants_it() {
    let cri = connect();
    for &handler in handlers() {
        let host = Host::now();
        let volume = TempDir::new().expect("a temporary directory");
        let data = volume.path().to_str().expect("plain");
        let pod = Pod::start(&cri, handler, NamespaceMode::CONTAINER);
        // An init container, then two that share a volume and memory.
        let init = pod.container("echo made > /data/init; exit 0", &[(data, "/data")]);
        assert_eq!(pod.wait(&init), (0, "Completed".into()), "{handler}");
        let first = pod.container("sleep 1000", &[(data, "/data")]);
        let second = pod.container("sleep 1000", &[(data, "/data")]);
        assert_eq!(
            pod.exec(&first, "cat /data/init; hostname"),
            (0, "made\npodname".into()),
            "{handler}"
        );
        assert_eq!(
            pod.exec(&second, "echo x > /dev/shm/y; exit 3").0,
            3,
            "{handler}"
        );
        assert_eq!(
            pod.exec(&first, "cat /dev/shm/y"),
            (0, "x".into()),
            "{handler}"
        );
        let inside = pod
            .exec(
                &first,
                "cat /etc/hostname; cat /proc/1/cmdline | tr '\\0' ' '",
            )
            .1;
        assert_eq!(inside, "podname\nsleep 1000", "{handler}");
        let stats: ContainerStatsResponse = cri.ok("ContainerStats", &container(&first));
        let used = stats.stats.memory.working_set_bytes.value;
        assert!(used > 0 && used < 64 << 20, "{handler}: {used}");
        // A container that is restarted is a new one in the same pod.
        let _: Empty = cri.ok("StopContainer", &container(&first));
        assert_eq!(pod.wait(&first).0, 137, "{handler}");
        let _: Empty = cri.ok("RemoveContainer", &container(&first));
        let again = pod.container("exit 5", &[]);
        assert_eq!(pod.wait(&again), (5, "Error".into()), "{handler}");
        pod.remove();
        shims_end();
        host.assert_nothing_left();
    }
}

#[test]
fn processes_of_a_pod_are_shared_when_asked() {
    let cri = connect();
    for &handler in handlers() {
        let pod = Pod::start(&cri, handler, NamespaceMode::POD);
        let first = pod.container("exec sleep 1234", &[]);
        let second = pod.container("exec sleep 1000", &[]);
        let seen = pod.exec(&second, "ps | grep -c '[s]leep 1234'");
        assert_eq!(seen, (0, "1".into()), "{handler}");
        let _: Empty = cri.ok("StopContainer", &container(&first));
        // Not pid 1, and so not deaf to SIGTERM.
        assert_eq!(pod.wait(&first).0, 143, "{handler}");
        assert_eq!(
            pod.status(&second).0,
            ContainerState::CONTAINER_RUNNING,
            "{handler}"
        );
        pod.remove();
    }
}

#[test]
fn running_out_of_memory_is_the_reason() {
    let cri = connect();
    for &handler in handlers() {
        let pod = Pod::start(&cri, handler, NamespaceMode::CONTAINER);
        let greedy = pod.container("exec dd if=/dev/zero of=/dev/null bs=200M count=1", &[]);
        let (status, reason) = pod.wait(&greedy);
        assert_eq!(status, 137, "{handler}");
        // runc's shim loses the reason now and then (see `ends`).
        if handler == "bulkhead" {
            assert_eq!(reason, "OOMKilled");
        }
        pod.remove();
    }
}

#[test]
fn a_pod_outlives_containerd() {
    for &handler in handlers() {
        let host = Host::now();
        let first = connect();
        let pod = Pod::start(&first, handler, NamespaceMode::CONTAINER);
        let id = pod.container("sleep 1000", &[]);
        Engine::get().restart();
        let cri = connect();
        let pod = Pod { cri: &cri, ..pod };
        assert_eq!(
            pod.status(&id).0,
            ContainerState::CONTAINER_RUNNING,
            "{handler}"
        );
        assert_eq!(pod.exec(&id, "exit 4").0, 4, "{handler}");
        pod.remove();
        shims_end();
        // containerd itself is a new process.
        host.assert_nothing_left_but(&["containerd --config"]);
    }
}

#[test]
fn what_a_machine_cannot_give_is_refused_and_nothing_is_left() {
    let cri = connect();
    let host = Host::now();
    for (options, reason) in [
        (
            NamespaceOption {
                network: NamespaceMode::NODE.into(),
                ..Default::default()
            },
            "hostNetwork",
        ),
        (
            NamespaceOption {
                pid: NamespaceMode::NODE.into(),
                ..Default::default()
            },
            "hostPID",
        ),
        (
            NamespaceOption {
                ipc: NamespaceMode::NODE.into(),
                ..Default::default()
            },
            "hostIPC",
        ),
    ] {
        let mut config = config(NamespaceMode::CONTAINER);
        let security = config
            .linux
            .mut_or_insert_default()
            .security_context
            .mut_or_insert_default();
        security.namespace_options = Some(options).into();
        let error = run(&cri, "bulkhead", config).expect_err(reason);
        assert!(error.contains(reason), "{error}");
    }
    shims_end();
    host.assert_nothing_left();
}

#[test]
fn a_privileged_container_is_privileged_in_its_machine_and_has_no_device_of_the_host() {
    let cri = connect();
    let host = Host::now();
    let pod = Pod::privileged(&cri, "bulkhead");
    let id = pod.container("sleep 1000", &[]);
    let script = "mkdir /new && mount -t tmpfs new /new && echo mounted; ls /dev/vda /dev/kvm 2>&1 | grep -c 'No such'";
    let seen = pod.exec(&id, script);
    assert_eq!(seen, (0, "mounted\n2".into()));
    pod.remove();
    // An operator who has left privileged_without_host_devices out.
    let pod = Pod::privileged(&cri, "bulkhead-with-host-devices");
    let id = pod.create("sleep 1000", &[]).expect("it only notes it");
    let started: Result<Empty, String> = cri.call("StartContainer", &container(&id));
    let error = started.expect_err("the host's devices are not in a guest");
    assert!(
        error.contains("linux.devices: /dev/") && error.contains("device of the host"),
        "{error}"
    );
    pod.remove();
    shims_end();
    host.assert_nothing_left();
}

#[test]
fn pods_at_once_leave_nothing() {
    let cri = connect();
    let host = Host::now();
    thread::scope(|scope| {
        for n in 0..4 {
            let cri = &cri;
            scope.spawn(move || {
                let pod = Pod::start(cri, "bulkhead", NamespaceMode::CONTAINER);
                let id = pod.container(&format!("exit {n}"), &[]);
                assert_eq!(pod.wait(&id).0, n);
                pod.remove();
            });
        }
    });
    shims_end();
    host.assert_nothing_left();
    assert_eq!(fs::read_dir("/run/netns").map_or(0, Iterator::count), 0);
}
