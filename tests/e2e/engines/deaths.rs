//! What is true after each of the processes of a container has been killed.

use std::fs;
use std::time::Duration;

use bulkhead_tests::{Bundle, Host, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::caller::{Caller, Container};

const WAITS: &str = "echo ready; while :; do sleep 1; done";

fn slay(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it lives");
}

/// Waits until a monitor has ended that nobody can name any more.
fn no_monitor(caller: &Caller) {
    eventually(
        "no monitor is left",
        || {
            caller.collect();
            !fs::exists(caller.root()).expect("it can be looked for")
        },
        || format!("{:?}", fs::read_dir(caller.root()).map(Iterator::count)),
    );
    caller.collect();
}

fn monitor_of(container: &Container<'_>) -> i32 {
    let path = container
        .caller
        .root()
        .join(&container.id)
        .join("state.json");
    let record: Value = serde_json::from_slice(&fs::read(path).expect("it is made")).expect("JSON");
    let pid = record["monitor"]["pid"].as_i64().expect("a pid");
    pid.try_into().expect("a pid")
}

/// Does it to a container that was created and to one that runs; nothing of them is left.
fn to_each(act: impl Fn(&Container<'_>)) {
    let host = Host::now();
    let caller = Caller::new("bulkhead");
    let bundle = Bundle::busybox().script(WAITS);
    for start in [false, true] {
        let container = caller.create(&bundle);
        if start {
            container.verb("start").ok();
        }
        act(&container);
    }
    caller.collect();
    drop(caller);
    host.assert_nothing_left();
}

#[test]
fn a_killed_keeper_is_a_killed_process() {
    to_each(|container| {
        slay(container.pid());
        assert_eq!(container.wait(), 137);
        eventually(
            "it stops",
            || container.state()["status"] == "stopped",
            || container.state().to_string(),
        );
        container.verb("delete").ok();
    });
}

#[test]
fn a_killed_monitor_takes_the_container_with_it_and_delete_gives_back() {
    to_each(|container| {
        slay(monitor_of(container));
        assert_eq!(container.wait(), 255);
        container.is("stopped");
        container
            .verb_with("kill", &["9"])
            .refused(&["not running"]);
        container.verb("start").refused(&["stopped"]);
        container.verb("delete").ok();
        container.verb("state").refused(&["does not exist"]);
    });
}

#[test]
fn a_killed_create_leaves_nothing_at_whatever_moment() {
    let host = Host::now();
    let caller = Caller::new("bulkhead");
    let bundle = Bundle::busybox().script(WAITS);
    for wait_ms in [5, 40, 150, 400, 900, 1500] {
        let container = caller.name(&bundle);
        let mut create = container.create_command().spawn().expect("installed");
        std::thread::sleep(Duration::from_millis(wait_ms));
        let _ = create.kill();
        create.wait().expect("our child");
        // As Podman does after a create that failed.
        let deleted = || {
            let said = caller.call(&["delete", "--force", &container.id]);
            caller.collect();
            said.status == 0
        };
        eventually("it can be deleted", deleted, String::new);
        container.verb("state").refused(&["does not exist"]);
        no_monitor(&caller);
    }
    drop(caller);
    host.assert_nothing_left();
}

#[test]
fn a_killed_exec_ends_its_process_and_nothing_else() {
    let caller = Caller::new("bulkhead");
    let bundle = Bundle::busybox().script(WAITS);
    let container = caller.create(&bundle);
    container.verb("start").ok();
    let mut exec = caller.start(&[
        "exec",
        &container.id,
        "sh",
        "-c",
        "echo $$ > /tmp/pid; sleep 1000",
    ]);
    let has = |words: &str| {
        let said = caller.finish(caller.start(&["exec", &container.id, "sh", "-c", words]));
        said.status == 0
    };
    eventually("it runs", || has("test -s /tmp/pid"), String::new);
    exec.kill().expect("it runs");
    exec.wait().expect("our child");
    eventually(
        "it is killed",
        || has("! kill -0 $(cat /tmp/pid)"),
        String::new,
    );
    container.is("running");
    caller.call(&["delete", "--force", &container.id]).ok();
    container.wait();
    caller.collect();
}
