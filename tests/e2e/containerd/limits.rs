//! Limits, numbers and pauses by the Task service, runc's shim and ours alike.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use bulkhead_tests::{BULKHEAD, Engine, PATIENCE, RUNC};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::Client;
use serde_json::{Value, json};
use ttrpc::r#async::transport::Socket;

use crate::pods::Pod;
use crate::rpc::block_on;
use crate::{Running, eventually};

const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// A call of `containerd.task.v2.Task`, which both shims serve; the error's text.
fn call<A: Message>(running: &Running, method: &str, request: &impl Message) -> Result<A, String> {
    let request = ttrpc::Request {
        service: "containerd.task.v2.Task".into(),
        method: method.into(),
        payload: request.write_to_bytes().expect("a message"),
        timeout_nano: PATIENCE.as_nanos() as i64,
        ..Default::default()
    };
    let path = Engine::get().shim_socket(&running.id);
    let answer = block_on(async {
        let stream = tokio::net::UnixStream::connect(path).await;
        let client = Client::new(Socket::new(stream.expect("the shim listens")));
        client.request(request).await
    });
    let answer = answer.map_err(|error| error.to_string())?;
    Ok(A::parse_from_bytes(&answer.payload).expect("a message"))
}

/// Task.Update; the error's text.
pub(crate) fn update(running: &Running, resources: &Value) -> Result<(), String> {
    let request = api::UpdateTaskRequest {
        id: running.id.clone(),
        resources: Some(Any {
            type_url: RESOURCES.into(),
            value: resources.to_string().into_bytes(),
            ..Any::default()
        })
        .into(),
        ..Default::default()
    };
    call::<api::Empty>(running, "Update", &request).map(drop)
}

/// Task.Stats.
#[track_caller]
fn stats(running: &Running) -> Metrics {
    let request = api::StatsRequest {
        id: running.id.clone(),
        ..Default::default()
    };
    let answer = call::<api::StatsResponse>(running, "Stats", &request);
    let any = answer.expect("it is counted").stats.unwrap_or_default();
    assert!(
        any.type_url.ends_with("cgroups.v2.Metrics"),
        "{}",
        any.type_url
    );
    Metrics::parse_from_bytes(&any.value).expect("metrics")
}

/// Words of `ctr run` for a container that sees all cgroups, its own among them: it has no
/// namespace for them.
const CGROUP: [&str; 2] = [
    "--mount",
    "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:noexec:nodev",
];

const FILES: &str = "cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup); for f in memory.max memory.low memory.swap.max cpu.max cpu.max.burst cpu.weight pids.max cpuset.cpus; \
                     do echo $f $(cat $f); done";

#[test]
fn an_update_changes_what_it_names_and_nothing_else() {
    for runtime in [RUNC, BULKHEAD] {
        let running = Running::start(
            runtime,
            &[
                &CGROUP[..],
                &["--memory-limit", "67108864"],
                &["--cpu-quota", "150000", "--cpu-period", "200000"],
            ]
            .concat(),
            "while :; do :; done",
        );
        let files = || running.exec(FILES).ok();
        let before = files();
        let of = |text: &str, name: &str| {
            let words = text.lines().filter_map(|line| line.split_once(' '));
            let mut found = words.filter(|(word, _)| *word == name);
            found
                .next()
                .map(|(_, value)| value.to_owned())
                .unwrap_or_default()
        };
        assert_eq!(
            of(&before, "cpu.max"),
            "150000 200000",
            "{runtime}: {before}"
        );
        update(&running, &json!({"cpu": {"quota": 180_000}})).expect(runtime);
        assert_eq!(of(&files(), "cpu.max"), "180000 200000", "{runtime}");
        update(&running, &json!({"cpu": {"period": 240_000}})).expect(runtime);
        assert_eq!(of(&files(), "cpu.max"), "180000 240000", "{runtime}");
        // Up and down, while it computes.
        for _ in 0..2 {
            for (limit, pids) in [(256 << 20, 300), (64 << 20, 30)] {
                let wanted = json!({
                    "memory": {"limit": limit, "swap": limit, "reservation": limit / 2}, "pids": {"limit": pids},
                });
                update(&running, &wanted).expect(runtime);
                let now = files();
                assert_eq!(of(&now, "memory.max"), limit.to_string(), "{runtime}");
                assert_eq!(of(&now, "memory.low"), (limit / 2).to_string(), "{runtime}");
                assert_eq!(of(&now, "memory.swap.max"), "0", "{runtime}");
                assert_eq!(of(&now, "pids.max"), pids.to_string(), "{runtime}");
                assert_eq!(of(&now, "cpu.max"), "180000 240000", "{runtime}");
            }
        }
        // Debian's runc has no bursts.
        if runtime == BULKHEAD {
            // Above the quota that goes, and below the one that comes.
            for (quota, burst) in [(120_000, 40_000), (200_000, 150_000), (100_000, 80_000)] {
                let wanted = json!({"cpu": {"quota": quota, "burst": burst}});
                update(&running, &wanted).expect("an update");
                assert_eq!(of(&files(), "cpu.max.burst"), burst.to_string());
            }
        }
        running.remove();
    }
}

#[test]
fn an_update_that_is_refused_changes_nothing() {
    let words = [&CGROUP[..], &["--memory-limit", "67108864"]].concat();
    let running = Running::start(BULKHEAD, &words, "sleep 1000");
    let files = || running.exec(FILES).ok();
    update(
        &running,
        &json!({"cpu": {"quota": 50_000, "burst": 20_000}}),
    )
    .expect("an update");
    let before = files();
    for (resources, words) in [
        (
            json!({"memory": {"limit": 100 << 20}, "cpu": {"cpus": "0-99"}}),
            vec!["cpu.cpus", "which this host does not have"],
        ),
        (
            json!({"pids": {"limit": 9}, "cpu": {"mems": "3"}}),
            vec!["cpuset.mems", "Invalid argument"],
        ),
        (
            json!({"pids": {"limit": 9}, "cpu": {"cpus": "none"}}),
            vec!["cpu.cpus", "not a list"],
        ),
        (
            json!({"memory": {"limit": 4096, "checkBeforeUpdate": true}, "pids": {"limit": 9}}),
            vec!["memory.limit", "4096", "uses"],
        ),
        (json!({"memory": {"limit": -7}}), vec!["memory.limit", "-7"]),
        (
            json!({"memory": {"swap": 4096}, "pids": {"limit": 9}}),
            vec!["memory.swap", "67108864"],
        ),
        (
            json!({"pids": {"limit": 9}, "unified": {"nothing.max": "1"}}),
            vec!["nothing.max", "unified", "no controller"],
        ),
        (
            json!({"pids": {"limit": 9}, "unified": {"pids.nothing": "1"}}),
            vec!["pids.nothing", "no such file"],
        ),
        (
            json!({"cpu": {"shares": 7}, "unified": {"memory.max": "lots"}}),
            vec!["memory.max", "lots"],
        ),
        (
            json!({"cpu": {"quota": 10_000}, "pids": {"limit": 9}}),
            vec!["cpu.quota", "cpu.max"],
        ),
        (
            json!({"cpu": {"idle": 1}, "unified": {"nothing.max": "1"}}),
            vec!["nothing.max"],
        ),
        (
            json!({"pids": {"limit": 9}, "hugepageLimits": [{"pageSize": "2MB", "limit": 1_i64 << 40}]}),
            vec!["hugepageLimits", "memory"],
        ),
        (json!({"rdma": {"mlx5_0": {"hcaHandles": 1}}}), vec!["rdma"]),
        (
            json!({"pids": {"limit": 9}, "blockIO": {"throttleReadBpsDevice": [{"major": 511, "minor": 9, "rate": 1}]}}),
            vec!["io.max", "511:9"],
        ),
    ] {
        let error = update(&running, &resources).expect_err(&resources.to_string());
        for word in words {
            assert!(
                error.contains(word),
                "{word:?} expected of {resources}: {error}"
            );
        }
        assert!(!error.contains('\n'), "{error}");
        assert_eq!(files(), before, "{resources}");
    }
    running.remove();
}

/// Pages come into the guest with the limit and go with it.
#[test]
fn huge_pages_follow_the_limit() {
    let running = Running::start(BULKHEAD, &CGROUP, "sleep 1000");
    let pool = || running.exec("cat /proc/sys/vm/nr_hugepages").ok();
    // Kubernetes writes 0 for a size that nobody asked for, whether the guest has it or not.
    let limit = |mib: i64| {
        let limits = [("2MB", mib << 20), ("1GB", 0), ("64KB", 0)];
        let limits = limits.map(|(size, limit)| json!({"pageSize": size, "limit": limit}));
        json!({"hugepageLimits": limits})
    };
    assert_eq!(pool(), "0");
    for (mib, pages) in [(16, "8"), (40, "20"), (8, "4"), (0, "0")] {
        update(&running, &limit(mib)).expect("an update");
        assert_eq!(pool(), pages);
        let text = running
            .exec("cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/hugetlb.2MB.max")
            .ok();
        assert_eq!(text, (mib << 20).to_string());
    }
    running.remove();
    // Those of members add up, and go with each.
    let pod = Pod::start(BULKHEAD, &[]);
    let shared = ["ipc", "uts", "network"];
    let [one, other] = [(); 2].map(|()| pod.member(&shared, "sleep 1000"));
    let pool = || one.exec("cat /proc/sys/vm/nr_hugepages").ok();
    update(&one, &limit(8)).expect("an update");
    update(&other, &limit(16)).expect("an update");
    assert_eq!(pool(), "12");
    other.remove();
    assert_eq!(pool(), "4");
    one.remove();
    pod.remove();
}

/// Which numbers there are; what they are is each one's own. Kernel stacks are not among them: they
/// count for who forks, which for an init is the agent, and runc's has threads.
fn shape(metrics: &Metrics) -> Vec<String> {
    let mut shape = Vec::new();
    let mut has = |name: &str, there: bool| shape.push(format!("{name} {there}"));
    has("pids", metrics.pids.is_some());
    has("pids.current", metrics.pids.current > 0);
    has("cpu.usage", metrics.cpu.usage_usec > 0);
    has("cpu.user", metrics.cpu.user_usec > 0);
    has("cpu.system", metrics.cpu.system_usec > 0);
    has("cpu.periods", metrics.cpu.nr_periods > 0);
    has("cpu.throttled", metrics.cpu.nr_throttled > 0);
    has("cpu.throttled_usec", metrics.cpu.throttled_usec > 0);
    has("memory.usage", metrics.memory.usage > 0);
    has("memory.max_usage", metrics.memory.max_usage > 0);
    has("memory.anon", metrics.memory.anon > 0);
    has("memory.pgfault", metrics.memory.pgfault > 0);
    has("memory_events", metrics.memory_events.is_some());
    has("io", metrics.io.is_some());
    has("rdma", metrics.rdma.is_some());
    shape
}

#[test]
fn numbers_are_those_that_runc_tells() {
    let mut shapes = Vec::new();
    for runtime in [RUNC, BULKHEAD] {
        let words = [
            "--memory-limit",
            "67108864",
            "--cpu-quota",
            "20000",
            "--cpu-period",
            "100000",
        ];
        let script = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; cat /proc/mounts >/dev/null; sleep 1000";
        let running = Running::start(runtime, &words, script);
        update(
            &running,
            &json!({"pids": {"limit": 33}, "memory": {"limit": 67_108_864, "swap": 67_108_864}}),
        )
        .expect(runtime);
        // From the first call on.
        let first = stats(&running);
        assert!(
            first.memory.usage > 0 && first.pids.current > 0,
            "{runtime}: {first}"
        );
        assert_eq!(first.memory.usage_limit, 67_108_864, "{runtime}: {first}");
        // A guest that is slower than an answer may be is heard by the next one.
        eventually("the new limit is told, and that it is throttled", || {
            let now = stats(&running);
            now.cpu.nr_throttled > 0 && now.pids.limit == 33 && now.memory.swap_limit == 0
        });
        let metrics = stats(&running);
        assert_eq!(metrics.memory.swap_limit, 0, "{runtime}");
        let huge: Vec<(&str, u64)> = metrics
            .hugetlb
            .iter()
            .map(|huge| (huge.pagesize.as_str(), huge.max))
            .collect();
        assert!(huge.contains(&("2MB", u64::MAX)), "{runtime}: {huge:?}");
        // Field 40 of MemoryStat is one that this crate does not know, and old runc's shims do not
        // have.
        shapes.push(shape(&metrics));
        running.remove();
    }
    assert_eq!(shapes[1], shapes[0], "left: Bulkhead, right: runc");
}

/// What a container has used can be asked until it is deleted, whoever hears first of its end.
#[test]
fn numbers_stay_after_the_exit() {
    let running = Running::start(
        BULKHEAD,
        &[],
        "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo x > /x; sleep 2",
    );
    let before = stats(&running);
    eventually("it exits", || {
        running.status().as_deref() == Some("STOPPED")
    });
    let after = stats(&running);
    assert!(after.cpu.usage_usec >= before.cpu.usage_usec, "{after}");
    assert_eq!(after.pids.current, 0, "{after}");
    assert!(
        after.memory_events.is_some() && after.memory_events.oom_kill == 0,
        "{after}"
    );
    // The files of the root are on the host, and so is their device.
    assert!(after.io.is_some(), "{after}");
    assert_eq!(stats(&running).cpu, after.cpu);
    running.remove();
}

/// What runc's shim refuses of a container that stands still, ours does; what works there works
/// here.
#[test]
fn a_paused_container_answers_as_under_runc() {
    for runtime in [RUNC, BULKHEAD] {
        let running = Running::start(
            runtime,
            &[],
            "trap 'exit 9' TERM; while :; do sleep 0.1; done",
        );
        let engine = Engine::get();
        engine.ok(&["task", "pause", &running.id]);
        let again = engine.run(&["task", "pause", &running.id]);
        assert_ne!(again.status, 0, "{runtime}: {again}");
        assert_ne!(running.exec("true").status, 0, "{runtime}");
        let deleted = engine.run(&["task", "delete", &running.id]);
        assert_ne!(deleted.status, 0, "{runtime}: {deleted}");
        let usage = stats(&running);
        assert!(usage.pids.current >= 1, "{runtime}: {usage}");
        update(&running, &json!({"pids": {"limit": 44}})).expect(runtime);
        eventually("it is told", || stats(&running).pids.limit == 44);
        // A signal waits until it goes on.
        engine.ok(&["task", "kill", "--signal", "SIGTERM", &running.id]);
        sleep(Duration::from_millis(500));
        assert_eq!(running.status().as_deref(), Some("PAUSED"), "{runtime}");
        engine.ok(&["task", "resume", &running.id]);
        eventually("the signal arrives", || {
            running.status().as_deref() == Some("STOPPED")
        });
        assert_eq!(running.delete_task(), 9, "{runtime}");
        running.remove();
    }
}

/// By the container that only holds it a pod stands still as a whole: its virtual processors do.
#[test]
fn a_pod_stands_still_and_its_clock_is_right_afterwards() {
    let pod = Pod::start(BULKHEAD, &[]);
    let shared = ["ipc", "uts", "network"];
    let member = pod.member(
        &shared,
        "i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.05; done",
    );
    let engine = Engine::get();
    let holder = pod.holder().id.clone();
    let vmm = crate::processes(&["bulkhead-vmm run"])[0];
    // utime and stime of the whole process, in ticks.
    let ticks = || -> u64 {
        let text = fs::read_to_string(format!("/proc/{vmm}/stat")).expect("it runs");
        let (_, rest) = text.rsplit_once(") ").expect("proc(5)");
        let fields: Vec<&str> = rest.split(' ').collect();
        [11, 12]
            .iter()
            .map(|at| fields[*at].parse::<u64>().expect("ticks"))
            .sum()
    };
    engine.ok(&["task", "pause", &holder]);
    let refused = member.exec("true");
    assert!(
        refused.status != 0 && refused.errors().contains("is paused"),
        "{refused}"
    );
    let refused = update(&member, &json!({"pids": {"limit": 44}})).expect_err("it stands still");
    assert!(refused.contains("is paused"), "{refused}");
    let before = ticks();
    sleep(Duration::from_secs(3));
    assert_eq!(ticks(), before, "nothing runs in the guest");
    // What was known is told.
    let usage = stats(&member);
    assert!(usage.cpu.usage_usec > 0, "{usage}");
    engine.ok(&["task", "resume", &holder]);
    let now = || {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.expect("after 1970").as_secs()
    };
    let earliest = now();
    let told = member.exec("date +%s; cat /count").ok();
    let latest = now();
    let (seconds, count) = told.split_once('\n').expect("two lines");
    let seconds: u64 = seconds.parse().expect("seconds");
    // The pause was longer than what this leaves.
    assert!(
        (earliest - 1..=latest + 1).contains(&seconds),
        "{seconds} is not from {earliest} to {latest}"
    );
    eventually("it counts on", || member.exec("cat /count").ok() != count);
    // SIGKILL ends a member of a pod that stands still, as it ends a frozen container.
    engine.ok(&["task", "pause", &holder]);
    engine.ok(&["task", "kill", "--signal", "SIGKILL", &member.id]);
    eventually("it is killed", || {
        member.status().as_deref() == Some("STOPPED")
    });
    member.remove();
    // And the pod itself can go.
    engine.ok(&["task", "pause", &holder]);
    pod.remove();
}
