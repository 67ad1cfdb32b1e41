//! Exit statuses, signals, exec, programs and hooks.

use std::time::Duration;

use crate::guest::{Guest, context, fields, shell, status};
use bulkhead_agent_protocol::agent::{self, ProgramProblem};
use ttrpc::Code;

#[tokio::test]
async fn every_exit_code_is_exact() {
    let guest = Guest::start().await;
    let _streams = guest.sleeper("one", guest.spec("one", "")).await;
    for code in 0..=255 {
        let exit = guest
            .run_exec("one", &format!("e{code}"), shell(&format!("exit {code}")))
            .await
            .exit;
        assert_eq!((exit.exit_status, exit.signal), (code, 0));
    }
    guest.end("one").await;
}

#[tokio::test]
async fn every_signal_is_exact() {
    let guest = Guest::start().await;
    let _streams = guest.sleeper("one", guest.spec("one", "")).await;
    // 34 is the first real-time signal, which libraries like to forget.
    for signal in [1, 2, 3, 6, 8, 9, 11, 13, 14, 15, 34, 64] {
        let id = format!("e{signal}");
        let _streams = guest
            .exec(
                "one",
                &id,
                agent::Process {
                    args: vec!["/bin/sleep".into(), "1000".into()],
                    ..shell("")
                },
            )
            .await;
        guest.start_process("one", &id).await.unwrap();
        guest.signal("one", &id, signal, false).await.unwrap();
        let exit = guest.wait("one", &id).await;
        assert_eq!(
            (exit.exit_status, exit.signal),
            (128 + signal as u32, signal as u32)
        );
    }
    guest.end("one").await;
}

#[tokio::test]
async fn two_hundred_children_are_all_reaped() {
    let guest = Guest::start().await;
    let script = "i=0; while [ $i -lt 200 ]; do (exit 0) & i=$((i+1)); done; wait; echo $i";
    assert_eq!(
        guest.run("one", guest.spec("one", script)).await.text(),
        "200"
    );
}

#[tokio::test]
async fn a_shell_pipeline_runs() {
    let guest = Guest::start().await;
    let script = "seq 1 1000 | grep 7 | busybox sort -rn | head -n 3 | tr '\\n' ' '";
    assert_eq!(
        guest.run("one", guest.spec("one", script)).await.text(),
        "997 987 979"
    );
}

#[tokio::test]
async fn any_number_of_callers_can_wait() {
    let guest = Guest::start().await;
    let _streams = guest.sleeper("one", guest.spec("one", "")).await;
    let waits: Vec<_> = (0..5)
        .map(|_| {
            let client = guest.client.clone();
            let name = agent::ProcessRequest {
                container_id: "one".into(),
                ..Default::default()
            };
            tokio::spawn(async move { client.wait_process(context(), &name).await.unwrap() })
        })
        .collect();
    guest.signal("one", "", libc::SIGKILL, false).await.unwrap();
    for wait in waits {
        assert_eq!(wait.await.unwrap().exit_status, 137);
    }
    assert_eq!(guest.wait("one", "").await.exit_status, 137);
    guest.delete("one", "").await.unwrap();
}

#[tokio::test]
async fn exec_enters_the_container_and_dies_with_it() {
    let guest = Guest::start().await;
    let mut spec = guest.spec("one", "");
    spec.hostname = "box".into();
    let _streams = guest.sleeper("one", spec).await;
    let mut process = shell(
        "pwd; hostname; echo $FOO $HOME; for n in pid ipc uts net mnt cgroup; do \
        [ $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) ] && echo same $n; done; cat /proc/self/cgroup",
    );
    process.cwd = "/tmp".into();
    process.env.push("FOO=bar".into());
    // Looking at the namespaces of pid 1 needs CAP_SYS_PTRACE or equal capabilities: both have none.
    let output = guest.run_exec("one", "a", process).await;
    assert!(
        output.out.starts_with("/tmp\nbox\nbar /root\n"),
        "{output:?}"
    );
    assert_eq!(output.out.matches("same ").count(), 6, "{output:?}");
    assert!(output.out.ends_with("0::/\n"), "{output:?}");

    let mut left = guest
        .exec("one", "b", shell("echo here; sleep 1000"))
        .await
        .unwrap();
    guest.start_process("one", "b").await.unwrap();
    left.expect("here").await;
    guest.signal("one", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.wait("one", "b").await.exit_status, 137);
    guest.wait("one", "").await;
    guest.delete("one", "").await.unwrap();
}

#[tokio::test]
async fn a_program_that_is_not_there_is_named() {
    let guest = Guest::start().await;
    let run = async |id: &str, program: &str| {
        let mut spec = guest.spec(id, "");
        spec.process.as_mut().unwrap().args = vec![program.to_owned()];
        guest.create_badly(id, spec).await
    };
    let (problem, text) = run("one", "foo").await;
    assert_eq!(problem, ProgramProblem::NOT_FOUND);
    assert_eq!(text, "exec: \"foo\": executable file not found in $PATH");
    let (problem, text) = run("two", "/bin/foo").await;
    assert_eq!(problem, ProgramProblem::NOT_FOUND);
    assert_eq!(text, "exec: \"/bin/foo\": no such file or directory");
    // The same id again: nothing of the first is left.
    let (problem, text) = run("two", "/etc/passwd").await;
    assert_eq!(problem, ProgramProblem::NOT_EXECUTABLE);
    assert_eq!(text, "exec: \"/etc/passwd\": permission denied");
}

#[tokio::test]
async fn a_created_container_can_be_killed() {
    let guest = Guest::start().await;
    let _streams = guest
        .create("one", guest.spec("one", "true"))
        .await
        .unwrap();
    guest.signal("one", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.wait("one", "").await.signal, libc::SIGKILL as u32);
    assert_eq!(
        status(guest.start_process("one", "").await).0,
        Code::FAILED_PRECONDITION
    );
    guest.delete("one", "").await.unwrap();
}

#[tokio::test]
async fn a_signal_to_all_reaches_every_process() {
    let guest = Guest::start().await;
    let mut streams = guest
        .create("one", guest.spec("one", "trap 'echo init' TERM; (trap 'echo child; exit' TERM; echo up; while :; do usleep 1000; done) & wait; wait"))
        .await
        .unwrap();
    guest.start_process("one", "").await.unwrap();
    streams.expect("up").await;
    guest.signal("one", "", libc::SIGTERM, true).await.unwrap();
    let (rest, _) = streams.collect().await;
    assert!(rest.contains("init") && rest.contains("child"), "{rest}");
    guest.wait("one", "").await;
    guest.delete("one", "").await.unwrap();
}

#[tokio::test]
async fn a_process_has_a_session_and_three_descriptors() {
    let guest = Guest::start().await;
    let script = "ls /proc/self/fd; awk '{print $1 == $6, $1 == $5}' /proc/$$/stat";
    let output = guest.run("one", guest.spec("one", script)).await;
    // ls itself holds the directory as 3.
    assert!(
        output.out.starts_with("0\n1\n2\n3\n1 1\n"),
        "{}",
        output.out
    );
    let _streams = guest.sleeper("two", guest.spec("two", "")).await;
    let name = agent::ContainerRequest {
        container_id: "two".into(),
        ..Default::default()
    };
    let pid = guest
        .client
        .list_processes(context(), &name)
        .await
        .unwrap()
        .pids[0];
    let status = fields(&std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap());
    assert_eq!(status["SigBlk"], "0000000000000000");
    assert_eq!(status["SigIgn"], "0000000000000000");
    guest.end("two").await;
}

fn hook(script: &str, timeout_secs: u32) -> agent::Hook {
    agent::Hook {
        path: "/bin/sh".into(),
        args: ["sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec!["PATH=/bin".into(), "WHAT=hook".into()],
        timeout_secs,
        ..Default::default()
    }
}

#[tokio::test]
async fn start_container_hooks_run_inside_and_in_order() {
    let guest = Guest::start().await;
    let mut spec = guest.spec("one", "cat /tmp/log");
    spec.hook_state = br#"{"id":"one"}"#.to_vec();
    spec.start_container_hooks = vec![
        hook("(echo $WHAT; cat; echo) > /tmp/log", 60),
        hook("echo second >> /tmp/log; echo $0 $$ >/dev/null", 0),
    ];
    let streams = guest.create("one", spec).await.unwrap();
    assert!(
        !guest.root.join("tmp/log").exists(),
        "hooks belong to the start"
    );
    guest.start_process("one", "").await.unwrap();
    let (out, _) = streams.collect().await;
    assert_eq!(out, "hook\n{\"id\":\"one\"}\nsecond\n");
    guest.wait("one", "").await;
    guest.delete("one", "").await.unwrap();
}

#[tokio::test]
async fn a_failing_hook_ends_the_start_with_its_words() {
    let guest = Guest::start().await;
    let mut spec = guest.spec("one", "echo never");
    spec.start_container_hooks = vec![hook("echo because >&2; exit 3", 60)];
    let _streams = guest.create("one", spec).await.unwrap();
    let (_, text) = status(guest.start_process("one", "").await);
    assert!(text.contains("because") && text.contains('3'), "{text}");
    assert_ne!(guest.wait("one", "").await.exit_status, 0);
    guest.delete("one", "").await.unwrap();
}

#[tokio::test]
async fn a_hook_that_takes_too_long_is_killed() {
    let guest = Guest::start().await;
    let mut spec = guest.spec("one", "echo never");
    spec.start_container_hooks = vec![hook("sleep 100 & sleep 100", 1)];
    let _streams = guest.create("one", spec).await.unwrap();
    let began = std::time::Instant::now();
    let (_, text) = status(guest.start_process("one", "").await);
    assert!(text.contains("timeout"), "{text}");
    // Long before the 100 s of its two processes, one of which outlives a kill of the other.
    let took = began.elapsed();
    assert!(took < Duration::from_secs(50), "{took:?}");
    guest.wait("one", "").await;
    guest.delete("one", "").await.unwrap();
}
