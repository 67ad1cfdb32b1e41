//! From create to delete, and what is refused on the way.

use std::time::Instant;

use crate::guest::{Guest, PATIENCE, context, shell, status};
use bulkhead_agent_protocol::{
    PROTOCOL_VERSION, SEED,
    agent::{self, namespaces::Kind},
};
use ttrpc::Code;

#[tokio::test]
async fn a_container_runs_and_leaves_its_output_and_status() {
    let guest = Guest::start().await;
    let output = guest
        .run("one", guest.spec("one", "echo out; echo err >&2; exit 7"))
        .await;
    assert_eq!(
        (output.out.as_str(), output.err.as_str()),
        ("out\n", "err\n")
    );
    assert_eq!(
        (
            output.exit.exit_status,
            output.exit.signal,
            output.exit.oom_killed
        ),
        (7, 0, false)
    );
    assert!(output.exit.exited_at_ns > 1_600_000_000_000_000_000);
}

#[tokio::test]
async fn nothing_runs_before_start() {
    let guest = Guest::start().await;
    let mut streams = guest
        .create("one", guest.spec("one", "touch /tmp/ran; echo ran"))
        .await
        .unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    assert!(!guest.root.join("tmp/ran").exists());
    guest.start_process("one", "").await.unwrap();
    streams.expect("ran").await;
    let (code, text) = status(guest.start_process("one", "").await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
    guest.wait("one", "").await;
    guest.delete("one", "").await.unwrap();
}

#[tokio::test]
async fn an_id_is_free_again_after_delete_and_not_before() {
    let guest = Guest::start().await;
    let _streams = guest.sleeper("one", guest.spec("one", "")).await;
    let (code, text) = status(guest.create("one", guest.spec("two", "")).await.map(|_| ()));
    assert_eq!(
        (code, text.contains("\"one\"")),
        (Code::ALREADY_EXISTS, true),
        "{text}"
    );
    let (code, _) = status(guest.delete("one", "").await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    guest.end("one").await;
    assert_eq!(
        guest
            .run("one", guest.spec("one", "echo again"))
            .await
            .text(),
        "again"
    );
}

#[tokio::test]
async fn what_is_unknown_is_not_found() {
    let guest = Guest::start().await;
    assert_eq!(
        status(guest.start_process("none", "").await).0,
        Code::NOT_FOUND
    );
    assert_eq!(
        status(guest.signal("none", "", 9, false).await).0,
        Code::NOT_FOUND
    );
    let _streams = guest.sleeper("one", guest.spec("one", "")).await;
    assert_eq!(
        status(guest.start_process("one", "none").await).0,
        Code::NOT_FOUND
    );
    guest.signal("one", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.wait("one", "").await.exit_status, 137);
    assert_eq!(
        status(guest.signal("one", "", libc::SIGTERM, false).await).0,
        Code::NOT_FOUND
    );
    let late = guest.exec("one", "late", shell("true")).await.map(|_| ());
    assert_eq!(status(late).0, Code::FAILED_PRECONDITION);
    guest.delete("one", "").await.unwrap();
    assert_eq!(status(guest.delete("one", "").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn a_failed_create_leaves_nothing() {
    let guest = Guest::start().await;
    let before = Holdings::of(&guest);
    for _ in 0..5 {
        let mut spec = guest.spec("bad", "true");
        spec.mounts.push(agent::Mount {
            destination: "/tmp".into(),
            fstype: "no-such-fs".into(),
            source: "none".into(),
            ..Default::default()
        });
        let (code, text) = status(guest.create("bad", spec).await.map(|_| ()));
        assert_eq!(code, Code::INTERNAL);
        assert!(
            text.contains("/tmp") && text.contains("no-such-fs"),
            "{text}"
        );
    }
    assert_eq!(
        guest.run("bad", guest.spec("bad", "echo ok")).await.text(),
        "ok"
    );
    before.assert_unchanged(&guest).await;
}

#[tokio::test]
async fn fifty_containers_leave_no_descriptor_and_no_process() {
    let guest = Guest::start().await;
    guest.run("warm", guest.spec("warm", "true")).await;
    let before = Holdings::of(&guest);
    for n in 0..50 {
        let id = format!("c{n}");
        assert_eq!(
            guest
                .run(&id, guest.spec(&id, &format!("exit {n}")))
                .await
                .exit
                .exit_status,
            n
        );
    }
    before.assert_unchanged(&guest).await;
}

/// Descriptors, children and mounts of the agent.
#[derive(Debug, PartialEq)]
struct Holdings {
    descriptors: usize,
    children: String,
    mounts: String,
}

impl Holdings {
    fn of(guest: &Guest) -> Self {
        let pid = guest.pid();
        Self {
            descriptors: std::fs::read_dir(format!("/proc/{pid}/fd"))
                .unwrap()
                .count(),
            children: std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap(),
            mounts: std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap(),
        }
    }

    /// Streams end a moment after the process.
    async fn assert_unchanged(&self, guest: &Guest) {
        let end = Instant::now() + PATIENCE;
        while Self::of(guest) != *self && Instant::now() < end {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert_eq!(Self::of(guest), *self, "after {PATIENCE:?}");
    }
}

#[tokio::test]
async fn members_of_a_pod_share_what_they_ask_for() {
    let guest = Guest::start().await;
    let share = |id: &str, script: &str| {
        let mut spec = guest.spec(id, script);
        let namespaces = spec.namespaces.as_mut().unwrap();
        namespaces.pid = Kind::SANDBOX.into();
        namespaces.ipc = Kind::SANDBOX.into();
        namespaces.uts = Kind::SANDBOX.into();
        namespaces.network = Kind::SANDBOX.into();
        spec
    };
    let script =
        "for n in pid ipc uts net mnt cgroup; do readlink /proc/self/ns/$n; done; hostname";
    let mut named = share("one", script);
    named.hostname = "pod".into();
    named.process.as_mut().unwrap().args[2].push_str("; sleep 1000");
    let mut first = guest.create("one", named).await.unwrap();
    guest.start_process("one", "").await.unwrap();
    let one = first.expect("pod\n").await;
    let two = guest.run("two", share("two", script)).await;
    guest.end("one").await;
    let (one, two): (Vec<&str>, Vec<&str>) = (one.lines().collect(), two.text().lines().collect());
    assert_eq!(one[..4], two[..4]);
    assert_eq!(two[6], "pod");
    assert_ne!(one[4], two[4]);

    // A sibling in a shared pid namespace outlives nobody: what it leaves behind is killed with its container.
    let _streams = guest.sleeper("long", share("long", "")).await;
    guest
        .run("brief", share("brief", "(setsid sleep 999 &) ; sleep 0.1"))
        .await;
    let seen = guest.run("look", share("look", "ps -o args")).await;
    assert!(
        seen.out.contains("sleep 1000") && !seen.out.contains("sleep 999"),
        "{}",
        seen.out
    );
    // The holder of the namespace has nothing to give away.
    let holder = guest
        .run(
            "holder",
            share(
                "holder",
                "readlink /proc/1/root; readlink /proc/1/exe; cat /proc/1/status",
            ),
        )
        .await;
    assert!(!holder.out.contains("bulkhead-agent\n/"), "{}", holder.out);
    assert_eq!(
        crate::guest::fields(&holder.out)["CapPrm"],
        "0000000000000000"
    );
    guest.end("long").await;
}

#[tokio::test]
async fn pause_stops_and_resume_goes_on() {
    let guest = Guest::start().await;
    let mut streams = guest
        .create(
            "one",
            guest.spec("one", "while :; do echo tick; usleep 10000; done"),
        )
        .await
        .unwrap();
    guest.start_process("one", "").await.unwrap();
    streams.expect("tick").await;
    let name = agent::ContainerRequest {
        container_id: "one".into(),
        ..Default::default()
    };
    guest
        .client
        .pause_container(context(), &name)
        .await
        .unwrap();
    let pids = guest
        .client
        .list_processes(context(), &name)
        .await
        .unwrap()
        .pids;
    assert!(!pids.is_empty());
    let quiet = async {
        loop {
            streams.expect("tick").await;
        }
    };
    assert!(
        tokio::time::timeout(std::time::Duration::from_millis(500), quiet)
            .await
            .is_err()
    );
    guest
        .client
        .resume_container(context(), &name)
        .await
        .unwrap();
    streams.expect("tick").await;
    guest.end("one").await;
}

#[tokio::test]
async fn a_wrong_protocol_version_a_wrong_seed_and_a_second_sandbox_are_refused() {
    let guest = Guest::before_sandbox().await;
    let request = agent::StartSandboxRequest {
        version: 999,
        ..Default::default()
    };
    let (code, text) = status(guest.client.start_sandbox(context(), &request).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("999"), "{text}");
    for length in [0, SEED - 1, SEED + 1] {
        let request = agent::StartSandboxRequest {
            version: PROTOCOL_VERSION,
            seed: vec![1; length],
            ..Default::default()
        };
        let (code, text) = status(guest.client.start_sandbox(context(), &request).await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        let wanted = format!("the seed has {length} bytes, and must have 64");
        assert!(text.contains(&wanted), "{text}");
    }
    guest.start_sandbox().await.unwrap();
    assert_eq!(
        status(guest.start_sandbox().await).0,
        Code::FAILED_PRECONDITION
    );
}
