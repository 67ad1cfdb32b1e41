//! The Task service to the letter: which call is answered how, in which state, and how fast.

use std::future::Future;
use std::time::{Duration, Instant};

use bulkhead_tests::{BULKHEAD, Engine, PATIENCE, RUNC};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::types::task::Status;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ttrpc::r#async::transport::Socket;
use ttrpc::{Code, context::with_duration};

use crate::{Running, processes};

pub(super) fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("an event loop").block_on(work)
}

/// A client of a container's shim, beside containerd.
pub(super) async fn shim(running: &Running) -> TaskClient {
    let path = Engine::get().shim_socket(&running.id);
    let stream = tokio::net::UnixStream::connect(path)
        .await
        .expect("the shim listens");
    TaskClient::new(Client::new(Socket::new(stream)))
}

pub(super) fn context() -> ttrpc::context::Context {
    with_duration(PATIENCE)
}

#[track_caller]
pub(super) fn code<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> Code {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        other => panic!("an RPC status expected, not {other:?}"),
    }
}

/// What an answer may take that does not wait for the guest: the fifth of a second that a busy machine makes of 100 ms, and more.
pub(super) const UNMOVED: Duration = Duration::from_millis(500);

fn exec(id: &str, exec_id: &str, script: &str) -> api::ExecProcessRequest {
    let process = serde_json::json!({
        "args": ["/bin/sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
    });
    let spec = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
        value: process.to_string().into_bytes(),
        ..Any::default()
    };
    api::ExecProcessRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        spec: Some(spec).into(),
        ..Default::default()
    }
}

pub(super) fn start(id: &str, exec_id: &str) -> api::StartRequest {
    api::StartRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    }
}

fn kill_request(id: &str, exec_id: &str, signal: Signal) -> api::KillRequest {
    api::KillRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        signal: signal as u32,
        ..Default::default()
    }
}

pub(super) fn delete(id: &str, exec_id: &str) -> api::DeleteRequest {
    api::DeleteRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    }
}

pub(super) fn wait(id: &str, exec_id: &str) -> api::WaitRequest {
    api::WaitRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    }
}

pub(super) fn state(id: &str, exec_id: &str) -> api::StateRequest {
    api::StateRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    }
}

#[test]
fn errors_have_the_codes_that_containerd_expects() {
    let running = Running::start(BULKHEAD, &[], "sleep 1000");
    let id = running.id.as_str();
    block_on(async {
        let shim = shim(&running).await;
        assert_eq!(
            code(shim.state(context(), &state("none", "")).await),
            Code::NOT_FOUND
        );
        assert_eq!(
            code(shim.state(context(), &state(id, "none")).await),
            Code::NOT_FOUND
        );
        assert_eq!(
            code(
                shim.kill(context(), &kill_request("none", "", Signal::SIGKILL))
                    .await
            ),
            Code::NOT_FOUND
        );
        assert_eq!(
            code(shim.delete(context(), &delete("none", "")).await),
            Code::NOT_FOUND
        );
        assert_eq!(
            code(shim.delete(context(), &delete(id, "")).await),
            Code::FAILED_PRECONDITION
        );
        assert_eq!(
            code(shim.start(context(), &start(id, "")).await),
            Code::FAILED_PRECONDITION
        );
        assert_eq!(
            code(shim.wait(context(), &wait(id, "none")).await),
            Code::NOT_FOUND
        );
        let checkpoint = api::CheckpointTaskRequest {
            id: id.into(),
            ..Default::default()
        };
        assert_eq!(
            code(shim.checkpoint(context(), &checkpoint).await),
            Code::UNIMPLEMENTED
        );
        let again = api::CreateTaskRequest {
            id: id.into(),
            bundle: Engine::get().bundle(id).to_str().expect("plain").into(),
            ..Default::default()
        };
        assert_eq!(
            code(shim.create(context(), &again).await),
            Code::ALREADY_EXISTS
        );
        let unknown = shim
            .connect(
                context(),
                &api::ConnectRequest {
                    id: "later".into(),
                    ..Default::default()
                },
            )
            .await;
        assert_eq!(unknown.expect("no error for a member to come").task_pid, 0);
        // The shim does not go while it has something to look after.
        shim.shutdown(
            context(),
            &api::ShutdownRequest {
                id: id.into(),
                ..Default::default()
            },
        )
        .await
        .expect("ignored");
        assert_eq!(
            shim.state(context(), &state(id, ""))
                .await
                .expect("it goes on")
                .status,
            Status::RUNNING.into()
        );
    });
    running.remove();
}

#[test]
fn an_exec_process_goes_through_its_life() {
    for runtime in [RUNC, BULKHEAD] {
        let running = Running::start(runtime, &[], "sleep 1000");
        let id = running.id.clone();
        let id = id.as_str();
        if runtime == RUNC {
            // Its shim of Debian's containerd speaks v2 only, of which the client has no name: ctr covers it.
            running.remove();
            continue;
        }
        block_on(async {
            let shim = shim(&running).await;
            // It runs until it is let go below.
            let script = "until [ -e /go ]; do sleep 0.05; done; exit 3";
            shim.exec(context(), &exec(id, "e", script))
                .await
                .expect("written down");
            assert_eq!(
                code(shim.exec(context(), &exec(id, "e", "true")).await),
                Code::ALREADY_EXISTS
            );
            let added = shim.state(context(), &state(id, "e")).await.expect("known");
            assert_eq!(added.status, Status::CREATED.into());
            assert_eq!(
                code(
                    shim.kill(context(), &kill_request(id, "e", Signal::SIGKILL))
                        .await
                ),
                Code::FAILED_PRECONDITION
            );
            let started = shim
                .start(context(), &start(id, "e"))
                .await
                .expect("it starts");
            assert!(started.pid != 0);
            assert_eq!(
                code(shim.start(context(), &start(id, "e")).await),
                Code::FAILED_PRECONDITION
            );
            assert_eq!(
                code(shim.delete(context(), &delete(id, "e")).await),
                Code::FAILED_PRECONDITION
            );
            let pids = shim
                .pids(
                    context(),
                    &api::PidsRequest {
                        id: id.into(),
                        ..Default::default()
                    },
                )
                .await
                .expect("answered");
            assert_eq!(pids.processes.len(), 2);
            assert!(
                pids.processes
                    .iter()
                    .all(|process| process.pid == started.pid)
            );
            // Any number of waiters.
            running.exec("touch /go").ok();
            let request = wait(id, "e");
            let (first, second) = tokio::join!(
                shim.wait(context(), &request),
                shim.wait(context(), &request)
            );
            assert_eq!(
                (
                    first.expect("ended").exit_status,
                    second.expect("ended").exit_status
                ),
                (3, 3)
            );
            assert_eq!(
                code(
                    shim.kill(context(), &kill_request(id, "e", Signal::SIGKILL))
                        .await
                ),
                Code::NOT_FOUND
            );
            let deleted = shim
                .delete(context(), &delete(id, "e"))
                .await
                .expect("it has ended");
            assert!(deleted.exit_status == 3 && deleted.exited_at.is_some());
            assert_eq!(
                code(shim.delete(context(), &delete(id, "e")).await),
                Code::NOT_FOUND
            );
            // One that never starts, and one that cannot.
            shim.exec(context(), &exec(id, "never", "true"))
                .await
                .expect("written down");
            shim.delete(context(), &delete(id, "never"))
                .await
                .expect("forgotten");
            shim.exec(context(), &exec(id, "late", "true"))
                .await
                .expect("written down");
            shim.kill(context(), &kill_request(id, "", Signal::SIGKILL))
                .await
                .expect("it runs");
            assert_eq!(
                shim.wait(context(), &wait(id, ""))
                    .await
                    .expect("ended")
                    .exit_status,
                137
            );
            assert_eq!(
                code(shim.start(context(), &start(id, "late")).await),
                Code::FAILED_PRECONDITION
            );
            assert_eq!(
                code(shim.exec(context(), &exec(id, "after", "true")).await),
                Code::FAILED_PRECONDITION
            );
            assert_eq!(
                code(
                    shim.kill(context(), &kill_request(id, "", Signal::SIGKILL))
                        .await
                ),
                Code::NOT_FOUND
            );
            let stopped = shim.state(context(), &state(id, "")).await.expect("known");
            assert_eq!(
                (stopped.status, stopped.exit_status),
                (Status::STOPPED.into(), 137)
            );
        });
        running.remove();
    }
}

#[test]
fn answers_do_not_wait_for_a_guest_that_hangs() {
    let running = Running::start(BULKHEAD, &[], "sleep 1000");
    let id = running.id.as_str();
    let stopped = processes(&["bulkhead-vmm run"]);
    let signal = |signal| {
        for pid in &stopped {
            kill(Pid::from_raw(*pid), signal).expect("it runs");
        }
    };
    block_on(async {
        let shim = shim(&running).await;
        signal(Signal::SIGSTOP);
        let pids = api::PidsRequest {
            id: id.into(),
            ..Default::default()
        };
        let connect = api::ConnectRequest {
            id: id.into(),
            ..Default::default()
        };
        let stats = api::StatsRequest {
            id: id.into(),
            ..Default::default()
        };
        // Of each call the quickest of five: whoever waited for the guest would do so each time, and a busy machine may hold up any.
        let mut quickest = [Duration::MAX; 4];
        for _ in 0..5 {
            let mut timed = |call: usize, since: Instant| {
                quickest[call] = quickest[call].min(since.elapsed());
            };
            let since = Instant::now();
            shim.state(context(), &state(id, ""))
                .await
                .expect("answered");
            timed(0, since);
            let since = Instant::now();
            shim.pids(context(), &pids).await.expect("answered");
            timed(1, since);
            let since = Instant::now();
            shim.connect(context(), &connect).await.expect("answered");
            timed(2, since);
            let since = Instant::now();
            shim.stats(context(), &stats).await.expect("answered");
            timed(3, since);
        }
        println!("State, Pids, Connect, Stats: {quickest:?}");
        for took in quickest {
            assert!(took < UNMOVED, "{quickest:?}");
        }
        signal(Signal::SIGCONT);
    });
    running.remove();
}
