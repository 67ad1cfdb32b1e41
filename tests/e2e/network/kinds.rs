//! Interfaces of every kind that CNI plugins make, and those that cannot be served.

use super::*;

/// An interface `eth0` of a kind, on a wire's end in a namespace between pod and peer.
fn upper(kind: &str) -> (Netns, Netns, Netns) {
    let (pod, node, peer) = (Netns::new(), Netns::new(), Netns::new());
    node.wire("up0", &peer, "peer0");
    peer.address("peer0", &[&format!("{PEER}/24"), &format!("{PEER6}/64")]);
    node.ip(&format!(
        "link add eth0 link up0 netns {} type {kind}",
        pod.name()
    ));
    pod.ip("link set eth0 up");
    pod.address("eth0", &[&format!("{POD}/24"), &format!("{POD6}/64")]);
    (pod, node, peer)
}

#[test]
fn macvlan_and_ipvlan_carry_traffic_both_ways() {
    for kind in ["macvlan mode bridge", "ipvlan mode l2"] {
        for runtime in BOTH {
            let (pod, _node, peer) = upper(kind);
            let script = format!(
                "ping -q -c2 -W60 {PEER} >/dev/null && ping -q -c2 -W60 {PEER6} >/dev/null && echo out; echo ready; read line; true"
            );
            let bundle = Bundle::tools().network(&pod).script(&script);
            let mut started = bundle.start(runtime, &[]);
            started.wait_for_output("ready");
            for to in [POD, POD6] {
                let ran = peer.run(&format!("ping -q -c2 -W60 {to}"));
                assert_eq!(ran.status, 0, "{kind} {runtime:?} {to}: {ran}");
            }
            drop(started.stdin());
            let ran = started.finish();
            assert_eq!(ran.ok(), "out\nready", "{kind} {runtime:?} {ran}");
        }
    }
}

#[test]
fn a_port_of_a_bridge_on_the_host_carries_what_the_bridge_has() {
    let (one, two, node) = (Netns::new(), Netns::new(), Netns::new());
    node.ip("link add br0 type bridge");
    node.ip("link set br0 up");
    for (pod, port, address) in [
        (&one, "port1", "10.9.0.1/24"),
        (&two, "port2", "10.9.0.2/24"),
    ] {
        pod.wire("eth0", &node, port);
        node.ip(&format!("link set {port} master br0"));
        pod.address("eth0", &[address]);
    }
    let first = Bundle::tools()
        .network(&one)
        .script("echo ready; read line; true");
    let mut first = first.start(Runtime::Bulkhead, &[]);
    first.wait_for_output("ready");
    let script = "ping -q -c2 -W60 10.9.0.1 >/dev/null && echo reached";
    for runtime in BOTH {
        let ran = Bundle::tools()
            .network(&two)
            .script(script)
            .run_with(runtime, &[]);
        assert_eq!(ran.ok(), "reached", "{runtime:?}");
    }
    drop(first.stdin());
    first.finish().ok();
}

#[test]
fn kinds_that_cannot_be_served_are_refused_by_name() {
    for (make, words) in [
        ("link add tun9 type wireguard", ["tun9", "wireguard"]),
        ("tuntap add tun9 mode tun", ["tun9", "tun"]),
    ] {
        let pod = Netns::new();
        pod.ip(make);
        pod.ip("link set tun9 up");
        let ran = Bundle::busybox().args(&["true"]).network(&pod).run();
        ran.refused(&words);
        let left = pod
            .run("ip -o link show | grep -c bulkhead; tc qdisc show | grep -c ingress")
            .text();
        assert_eq!(left, "0\n0", "{make}");
    }
}
