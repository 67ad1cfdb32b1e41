//! Nothing is left in the pod's namespace, however the pod ends, and what was there works again.

use std::process::Command;

use bulkhead_tests::Host;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;

/// The namespace as it must be afterwards: no tap, no qdisc of ours, and its own traffic flows.
#[track_caller]
fn assert_clean(pair: &Pair) {
    let left = pair.pod.run("ip -o link show | grep -v -e ' lo:' -e ' eth0@'; tc qdisc show | grep -e ingress -e clsact; tc filter show dev eth0 ingress");
    assert_eq!(left.text(), "", "{left}");
    for to in [POD, POD6] {
        let ran = pair.peer.run(&format!("ping -q -c1 -W60 {to}"));
        assert_eq!(ran.status, 0, "{ran}");
    }
}

fn running(pair: &Pair) -> Inside {
    let inside = pair.start(Runtime::Bulkhead, "echo ready; exec sleep 1000");
    inside.started.wait_for_output("ready");
    inside
}

fn vmm() -> Pid {
    let text = run(Command::new("pgrep").args(["--full", "bulkhead-vmm run"])).ok();
    Pid::from_raw(text.trim().parse().expect("one machine"))
}

#[test]
fn an_ordinary_end_leaves_the_namespace_as_it_was() {
    drop(Netns::new());
    let host = Host::now();
    let pair = Pair::new();
    pair.run(Runtime::Bulkhead, "true").ok();
    assert_clean(&pair);
    drop(pair);
    host.assert_nothing_left();
}

#[test]
fn the_machines_death_leaves_the_namespace_as_it_was() {
    let pair = Pair::new();
    let inside = running(&pair);
    kill(vmm(), Signal::SIGKILL).expect("it runs");
    assert_eq!(inside.finish().status, 125);
    assert_clean(&pair);
}

#[test]
fn the_commands_death_leaves_what_gc_takes_back() {
    drop(Netns::new());
    let host = Host::now();
    let pair = Pair::new();
    let inside = running(&pair);
    inside.started.signal(Signal::SIGKILL);
    drop(inside.finish());
    must(Command::new("bulkhead").arg("gc"));
    assert_clean(&pair);
    drop(pair);
    host.assert_nothing_left();
}

#[test]
fn a_namespace_that_goes_first_is_no_trouble() {
    // `ip` mounts its directory at the first use.
    drop(Netns::new());
    let host = Host::now();
    let pair = Pair::new();
    let mut inside = pair.start(Runtime::Bulkhead, "echo ready; read line; true");
    inside.started.wait_for_output("ready");
    drop(pair);
    drop(inside.started.stdin());
    let ran = inside.finish();
    assert_eq!(ran.errors(), "", "{ran}");
    host.assert_nothing_left();
}

#[test]
fn an_interface_that_goes_while_it_is_used_leaves_the_rest_working() {
    let (pod, peer) = (Netns::new(), Netns::new());
    pod.wire("eth0", &peer, "peer0");
    pod.wire("eth1", &peer, "peer1");
    pod.address("eth0", &["10.8.0.2/24"]);
    pod.address("eth1", &["10.8.1.2/24"]);
    peer.address("peer0", &["10.8.0.1/24"]);
    peer.address("peer1", &["10.8.1.1/24"]);
    let script = "echo ready; read line; ping -q -c1 -W1 10.8.0.1 >/dev/null 2>&1 || echo gone; ping -q -c2 -W60 10.8.1.1 >/dev/null && echo works";
    let bundle = Bundle::tools().network(&pod).script(script);
    let mut started = bundle.start(Runtime::Bulkhead, &[]);
    started.wait_for_output("ready");
    pod.ip("link del eth0");
    drop(started.stdin());
    let ran = started.finish();
    assert_eq!(ran.ok(), "ready\ngone\nworks");
    assert_eq!(ran.errors(), "");
    let left = pod.run("ip -o link show | grep -c bulkhead").text();
    assert_eq!(left, "0");
}
