//! A pod's life, good and bad.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_tests::cri::messages::{NamespaceMode, NamespaceOption, PodSandboxConfig};
use bulkhead_tests::{Bundle, Host, run};
use containerd_shim_protos::api::{CreateTaskRequest, KillRequest, PidsRequest, ShutdownRequest};
use containerd_shim_protos::sandbox_api as api;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::TempDir;
use ttrpc::Code;

use super::{SHIM, Shim, member};
use crate::rpc::{UNMOVED, block_on, code, context, state};
use crate::{cgroup_of, eventually, processes, shims_end};

#[test]
fn a_pods_resources_make_its_machine() {
    let host = Host::now();
    let shim = Shim::start();
    let id = shim.id.as_str();
    block_on(async {
        let services = shim.services().await;
        let asked = |cpu_quota, memory_limit_in_bytes| {
            let mut config = PodSandboxConfig::default();
            let linux = config.linux.mut_or_insert_default();
            linux.overhead.mut_or_insert_default().memory_limit_in_bytes = 128 << 20;
            let resources = linux.resources.mut_or_insert_default();
            resources.cpu_quota = cpu_quota;
            resources.memory_limit_in_bytes = memory_limit_in_bytes;
            shim.create(&config)
        };
        for (quota, memory, name) in [
            (-5, 0, "linux.resources.cpu_quota is -5"),
            (1 << 50, 0, "linux.resources.cpu_quota"),
            (0, -5, "linux.resources.memory_limit_in_bytes is -5"),
        ] {
            let create = asked(quota, memory);
            let refused = services.sandbox.create_sandbox(context(), &create).await;
            let text = refused.as_ref().unwrap_err().to_string();
            assert!(text.contains(name), "{text}");
            assert_eq!(code(refused), Code::INVALID_ARGUMENT);
        }
        let create = asked(100_000, 100 << 20);
        let created = services.sandbox.create_sandbox(context(), &create).await;
        created.expect("created");
        services.start(id).await.expect("it boots");
        let verbose = api::SandboxStatusRequest {
            sandbox_id: id.into(),
            verbose: true,
            ..Default::default()
        };
        let verbose = services.sandbox.sandbox_status(context(), &verbose).await;
        let info = verbose.expect("known").info;
        assert_eq!(info["vcpus"], "1");
        assert_eq!(info["memory_bytes"], ((100 + 2 + 64) << 20).to_string());
        let shim_group = Path::new(&info["cgroup"]).join("shim/cgroup.procs");
        let inside = fs::read_to_string(shim_group).expect("the shim's group");
        assert_eq!(inside.trim(), info["shim_pid"]);
        // It has come from where this test is, and goes back when the pod ends, which it outlives.
        services.stop(id).await.expect("it stops");
        let shim_pid = info["shim_pid"].parse().expect("a pid");
        assert_eq!(cgroup_of(shim_pid), cgroup_of(std::process::id() as i32));
        assert!(!Path::new(&info["cgroup"]).exists());
        services.shut_down(id).await.expect("it ends");
    });
    shims_end();
    host.assert_nothing_left();
}

#[test]
fn a_pod_is_made_asked_about_and_ended_by_its_service() {
    let host = Host::now();
    let shim = Shim::start();
    let id = shim.id.as_str();
    let output = TempDir::new().expect("a temporary directory");
    let file = |name: &str| output.path().join(name);
    block_on(async {
        let services = shim.services().await;
        // Before there is one.
        assert_eq!(code(services.status(id).await), Code::NOT_FOUND);
        assert_eq!(code(services.stop(id).await), Code::NOT_FOUND);
        assert_eq!(code(services.start(id).await), Code::FAILED_PRECONDITION);

        let mut config = PodSandboxConfig {
            hostname: "podname".into(),
            ..Default::default()
        };
        config.dns_config.mut_or_insert_default().servers = vec!["192.0.2.1".into()];
        let create = shim.create(&config);
        let created = services.sandbox.create_sandbox(context(), &create).await;
        created.expect("created");
        let again = services.sandbox.create_sandbox(context(), &create).await;
        assert_eq!(code(again), Code::ALREADY_EXISTS);
        let mut other = create.clone();
        other.sandbox_id = "other".into();
        let other = services.sandbox.create_sandbox(context(), &other).await;
        assert_eq!(code(other), Code::ALREADY_EXISTS);
        let status = services.status(id).await.expect("known");
        assert!(status.info.is_empty());
        assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_NOTREADY", 0));
        assert_eq!(code(services.ping(id).await), Code::FAILED_PRECONDITION);
        assert_eq!(code(services.metrics(id).await), Code::FAILED_PRECONDITION);

        let pid = services.start(id).await.expect("it boots").pid;
        assert_eq!(code(services.start(id).await), Code::FAILED_PRECONDITION);
        let status = services.status(id).await.expect("known");
        assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_READY", pid));
        assert!(pid != 0 && Path::new(&format!("/proc/{pid}/ns/net")).exists());
        let verbose = api::SandboxStatusRequest {
            sandbox_id: id.into(),
            verbose: true,
            ..Default::default()
        };
        let verbose = services.sandbox.sandbox_status(context(), &verbose).await;
        let info = verbose.expect("known").info;
        assert_eq!(info["pid"], pid.to_string());
        assert_eq!(info["state"], "SANDBOX_READY");
        assert!(Path::new(&info["cgroup"]).is_dir(), "{info:?}");
        services.ping(id).await.expect("it is there");
        let platform = services.platform(id).await.expect("known").platform;
        assert_eq!(
            (platform.os.as_str(), platform.architecture.as_str()),
            ("linux", "amd64")
        );
        let used = services.metrics(id).await.expect("counted");
        assert!(used.memory.usage > 0 && used.cpu.usage_usec > 0);
        for unknown in [
            code(services.status("other").await),
            code(services.ping("other").await),
            code(services.metrics("other").await),
            code(services.stop("other").await),
            code(services.wait("other").await),
            code(services.platform("other").await),
            code(services.shut_down("other").await),
        ] {
            assert_eq!(unknown, Code::NOT_FOUND);
        }
        // No task stands for the pod.
        let pids = PidsRequest {
            id: id.into(),
            ..Default::default()
        };
        assert_eq!(
            code(services.task.pids(context(), &pids).await),
            Code::NOT_FOUND
        );

        let script = "hostname; cat /etc/hostname /etc/resolv.conf; grep -c localhost /etc/hosts; echo shared > /dev/shm/x; df -m /dev/shm | tail -n 1 | awk '{print $2}'";
        let first = member(&shim, pid, script);
        let first = services.container(&shim, pid, &first, &file("first")).await;
        assert_eq!(services.end(&first).await, 0);
        let text = fs::read_to_string(file("first")).expect("it wrote");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..3],
            ["podname", "podname", "nameserver 192.0.2.1"],
            "{text}"
        );
        assert!(lines[3].parse::<u32>().expect("a count") > 0, "{text}");
        assert_eq!(lines[4], "64", "{text}");
        let second = member(&shim, pid, "cat /dev/shm/x; exit 3");
        let second = services
            .container(&shim, pid, &second, &file("second"))
            .await;
        assert_eq!(services.end(&second).await, 3);
        assert_eq!(
            fs::read_to_string(file("second")).expect("it wrote"),
            "shared\n"
        );
        // Without the pod's ipc namespace a tmpfs on /dev/shm is the member's own.
        let private = |script: &str| {
            member(&shim, pid, script).edit(|config| {
                let listed = config["linux"]["namespaces"].as_array_mut();
                listed
                    .expect("a list")
                    .retain(|namespace| namespace["type"] != "ipc");
            })
        };
        let third =
            private("cat /dev/shm/x 2>&1; echo mine > /dev/shm/x; echo ready; exec sleep 1000");
        let third = services.container(&shim, pid, &third, &file("third")).await;
        eventually("it has written", || {
            fs::read_to_string(file("third")).is_ok_and(|text| text.ends_with("ready\n"))
        });
        let fourth = private("ls /dev/shm; echo other > /dev/shm/x; cat /dev/shm/x");
        let fourth = services
            .container(&shim, pid, &fourth, &file("fourth"))
            .await;
        assert_eq!(services.end(&fourth).await, 0);
        let read = |name: &str| fs::read_to_string(file(name)).expect("it wrote");
        assert_eq!(read("fourth"), "other\n");
        assert!(read("third").contains("No such file"), "{}", read("third"));
        let killed = KillRequest {
            id: third.clone(),
            signal: Signal::SIGKILL as u32,
            ..Default::default()
        };
        services
            .task
            .kill(context(), &killed)
            .await
            .expect("killed");
        assert_eq!(services.end(&third).await, 137);
        let fifth = member(&shim, pid, "cat /dev/shm/x");
        let fifth = services.container(&shim, pid, &fifth, &file("fifth")).await;
        assert_eq!(services.end(&fifth).await, 0);
        assert_eq!(read("fifth"), "shared\n");
        // One shim is one pod: a container without the engine's annotations is a member, too. Another pod is none.
        let plain = Bundle::busybox().script("cat /etc/hostname");
        let plain = services.container(&shim, pid, &plain, &file("plain")).await;
        assert_eq!(services.end(&plain).await, 0);
        let text = fs::read_to_string(file("plain")).expect("it wrote");
        assert_eq!(text, "podname\n");
        // Nobody else is in the guest: what it does not list is the guest's. Beside another container it is refused.
        let bare = || {
            Bundle::busybox().script("sleep 1000").edit(|config| {
                config["linux"]["namespaces"] = json!([{"type": "mount"}]);
                config["hostname"] = json!("");
            })
        };
        let (first, second) = (bare(), bare());
        let sleeper = services.container(&shim, pid, &first, &file("bare")).await;
        second.write();
        let request = CreateTaskRequest {
            id: "second-bare".into(),
            bundle: second.path().to_str().expect("plain").into(),
            ..Default::default()
        };
        let refused = services.task.create(context(), &request).await;
        assert_eq!(code(refused), Code::INVALID_ARGUMENT);
        // Nor does one come beside it that has its own: the first one would see its processes.
        let listed = member(&shim, pid, "true");
        listed.write();
        let request = CreateTaskRequest {
            id: "listed".into(),
            bundle: listed.path().to_str().expect("plain").into(),
            ..Default::default()
        };
        let refused = services.task.create(context(), &request).await;
        assert_eq!(code(refused), Code::FAILED_PRECONDITION);
        let kill_sleeper = KillRequest {
            id: sleeper.clone(),
            signal: Signal::SIGKILL as u32,
            ..Default::default()
        };
        let killed = services.task.kill(context(), &kill_sleeper).await;
        killed.expect("killed");
        assert_eq!(services.end(&sleeper).await, 137);
        // When it has gone they may come again.
        let sixth = member(&shim, pid, "true");
        let sixth = services.container(&shim, pid, &sixth, &file("sixth")).await;
        assert_eq!(services.end(&sixth).await, 0);
        for (kind, sandbox) in [("container", "elsewhere"), ("sandbox", id)] {
            let stranger = Bundle::busybox().script("true").edit(|config| {
                config["annotations"] = json!({
                    "io.kubernetes.cri.container-type": kind,
                    "io.kubernetes.cri.sandbox-id": sandbox,
                });
            });
            stranger.write();
            let request = CreateTaskRequest {
                id: "stranger".into(),
                bundle: stranger.path().to_str().expect("plain").into(),
                ..Default::default()
            };
            let refused = services.task.create(context(), &request).await;
            assert_eq!(code(refused), Code::FAILED_PRECONDITION, "{kind}");
        }
        let shutdown = ShutdownRequest {
            id: "gone".into(),
            ..Default::default()
        };
        let ignored = services.task.shutdown(context(), &shutdown).await;
        ignored.expect("ignored");

        let long = member(&shim, pid, "sleep 1000");
        let long = services.container(&shim, pid, &long, &file("long")).await;
        let (waited, stopped) = tokio::join!(services.wait(id), services.stop(id));
        stopped.expect("it stops");
        let waited = waited.expect("it has ended");
        assert!(waited.exit_status == 0 && waited.exited_at.is_some());
        services.stop(id).await.expect("it has stopped");
        let status = services.status(id).await.expect("known");
        assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_NOTREADY", 0));
        assert!(status.exited_at.is_some());
        assert_eq!(code(services.ping(id).await), Code::FAILED_PRECONDITION);
        assert!(services.metrics(id).await.expect("kept").cpu.usage_usec > 0);
        services
            .task
            .state(context(), &state(&long, ""))
            .await
            .expect("known");
        assert_eq!(services.end(&long).await, 137);
        services.shut_down(id).await.expect("it ends");
    });
    shims_end();
    drop(shim);
    host.assert_nothing_left();
}

#[test]
fn what_is_asked_about_a_pod_does_not_wait_for_its_guest() {
    let host = Host::now();
    let shim = Shim::start();
    let id = shim.id.as_str();
    block_on(async {
        let services = shim.services().await;
        services.boot(&shim).await;
        let machine: Vec<Pid> = processes(&["bulkhead-vmm run"])
            .into_iter()
            .map(Pid::from_raw)
            .collect();
        let signal = |signal| {
            for pid in &machine {
                kill(*pid, signal).expect("it runs");
            }
        };
        // Of each call the quickest of five, as in rpc.rs.
        let unmoved = async |state: &str| {
            let mut quickest = [Duration::MAX; 3];
            for _ in 0..5 {
                let mut timed = |call: usize, since: Instant| {
                    quickest[call] = quickest[call].min(since.elapsed());
                };
                let since = Instant::now();
                let status = services.status(id).await.expect("answered");
                timed(0, since);
                assert_eq!(status.state, state);
                let since = Instant::now();
                assert_eq!(services.ping(id).await.is_ok(), state == "SANDBOX_READY");
                timed(1, since);
                let since = Instant::now();
                services.metrics(id).await.expect("answered");
                timed(2, since);
            }
            println!("status, ping, metrics with {state}: {quickest:?}");
            for took in quickest {
                assert!(took < UNMOVED, "{quickest:?}");
            }
        };
        signal(Signal::SIGSTOP);
        unmoved("SANDBOX_READY").await;
        signal(Signal::SIGKILL);
        let waited = services.wait(id).await.expect("it has ended");
        assert_eq!(waited.exit_status, 137);
        unmoved("SANDBOX_NOTREADY").await;
        services.stop(id).await.expect("nothing is left to stop");
        services.shut_down(id).await.expect("it ends");
    });
    shims_end();
    drop(shim);
    host.assert_nothing_left();
}

#[test]
fn what_a_machine_cannot_give_is_refused_when_the_pod_is_created() {
    let host = Host::now();
    type Ask = fn(&mut NamespaceOption);
    let cases: [(Ask, &str); 3] = [
        (
            |asked| asked.network = NamespaceMode::NODE.into(),
            "hostNetwork",
        ),
        (|asked| asked.pid = NamespaceMode::NODE.into(), "hostPID"),
        (|asked| asked.ipc = NamespaceMode::NODE.into(), "hostIPC"),
    ];
    for (ask, field) in cases {
        let shim = Shim::start();
        let mut config = PodSandboxConfig::default();
        let linux = config.linux.mut_or_insert_default();
        let context_of = linux.security_context.mut_or_insert_default();
        ask(context_of.namespace_options.mut_or_insert_default());
        block_on(async {
            let services = shim.services().await;
            let create = shim.create(&config);
            let refused = services.sandbox.create_sandbox(context(), &create).await;
            let error = refused.expect_err(field);
            assert!(error.to_string().contains(field), "{error}");
            assert_eq!(code::<()>(Err(error)), Code::INVALID_ARGUMENT);
            assert_eq!(code(services.status(&shim.id).await), Code::NOT_FOUND);
            // As containerd cleans up.
            services.shut_down(&shim.id).await.expect("it ends");
        });
        shims_end();
    }
    host.assert_nothing_left();
}

#[test]
fn an_interface_that_a_members_hook_adds_is_told_and_the_pod_goes_on() {
    let host = Host::now();
    let shim = Shim::start();
    let output = TempDir::new().expect("a temporary directory");
    let hooked = |pid: u32, script: &str| {
        let hook = serde_json::json!({"path": "/bin/sh", "args": ["sh", "-ec", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]});
        let bundle = member(&shim, pid, "ls /sys/class/net");
        bundle.edit(|config| config["hooks"] = serde_json::json!({"createRuntime": [hook]}))
    };
    block_on(async {
        let services = shim.services().await;
        let pid = services.boot(&shim).await;
        let late = hooked(
            pid,
            "nsenter -t $(jq .pid) -n ip link add late0 type veth peer name late1",
        );
        late.write();
        let request = CreateTaskRequest {
            id: "late".into(),
            bundle: late.path().to_str().expect("plain").into(),
            ..Default::default()
        };
        let refused = services.task.create(context(), &request).await;
        let error = refused
            .expect_err("an interface would be missing")
            .to_string();
        assert!(
            error.contains("interface late") && error.contains("came too late"),
            "{error}"
        );
        let again = hooked(pid, "nsenter -t $(jq .pid) -n ip link del late0");
        let file = output.path().join("again");
        let again = services.container(&shim, pid, &again, &file).await;
        assert_eq!(services.end(&again).await, 0);
        assert_eq!(fs::read_to_string(&file).expect("it wrote"), "lo\n");
        services.stop(&shim.id).await.expect("it stops");
        services.shut_down(&shim.id).await.expect("it ends");
    });
    shims_end();
    drop(shim);
    host.assert_nothing_left();
}

#[test]
fn a_machine_that_does_not_boot_is_an_error_and_leaves_nothing() {
    does_not_start("kernel = \"/dev/null\"\n", || {});
}

#[test]
fn a_machine_that_hangs_in_its_boot_is_an_error_in_time() {
    let since = Instant::now();
    does_not_start("boot_timeout_secs = 3\n", || {
        let mut vmm = Vec::new();
        eventually("the machine is there", || {
            vmm = processes(&["bulkhead-vmm run"]);
            !vmm.is_empty()
        });
        kill(Pid::from_raw(vmm[0]), Signal::SIGSTOP).expect("it runs");
    });
    // The 3 s of the configuration, and what a busy machine makes of the rest; never the usual 60 s for a boot.
    let took = since.elapsed();
    assert!(took < Duration::from_secs(50), "{took:?}");
}

/// StartSandbox with this configuration, and `meanwhile` beside it, is an error, and nothing is left.
fn does_not_start(config: &str, meanwhile: impl FnOnce() + Send) {
    let host = Host::now();
    let shim = Shim::start();
    let id = shim.id.as_str();
    let file = shim.bundle.path().join("config.toml");
    fs::write(&file, config).expect("writable");
    // Where `start` leaves the name of the configuration that the runtime options have.
    let note = shim.bundle.path().join("bulkhead-config");
    fs::write(note, file.to_str().expect("plain")).expect("writable");
    std::thread::scope(|scope| {
        scope.spawn(meanwhile);
        block_on(async {
            let services = shim.services().await;
            let create = shim.create(&PodSandboxConfig::default());
            let created = services.sandbox.create_sandbox(context(), &create).await;
            created.expect("created");
            let started = services.start(id).await;
            started.expect_err("it cannot");
            let waited = services.wait(id).await.expect("it has ended");
            assert_eq!(waited.exit_status, 255);
            let status = services.status(id).await.expect("known");
            assert_eq!(status.state, "SANDBOX_NOTREADY");
            services.shut_down(id).await.expect("it ends");
        });
    });
    shims_end();
    drop(shim);
    host.assert_nothing_left();
}

#[test]
fn a_killed_shim_leaves_its_pod_to_delete() {
    let host = Host::now();
    let shim = Shim::start();
    block_on(async { shim.services().await.boot(&shim).await });
    for pid in processes(&[SHIM]) {
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it runs");
    }
    shims_end();
    let deleted = run(&mut shim.command("delete"));
    assert_eq!(deleted.status, 0, "{deleted}");
    eventually("the machine ends", || {
        processes(&["bulkhead-vmm"]).is_empty()
    });
    drop(shim);
    host.assert_nothing_left();
}

#[test]
fn a_pod_that_containerd_has_lost_ends_by_the_task_service() {
    let host = Host::now();
    let shim = Shim::start();
    block_on(async {
        let services = shim.services().await;
        services.boot(&shim).await;
        let shutdown = ShutdownRequest {
            id: shim.id.clone(),
            ..Default::default()
        };
        let ended = services.task.shutdown(context(), &shutdown).await;
        ended.expect("it ends");
    });
    shims_end();
    drop(shim);
    host.assert_nothing_left();
}
