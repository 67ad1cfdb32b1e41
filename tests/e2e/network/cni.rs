//! What Debian's CNI plugins make.

use std::time::{Duration, Instant};

use bulkhead_tests::Attachment;
use serde_json::{Value, json};

use super::*;

fn ranges(first: &str, subnets: &[&str]) -> Value {
    let ranges: Vec<Value> = subnets
        .iter()
        .map(|subnet| json!([{"subnet": subnet}]))
        .collect();
    json!({
        "type": "host-local", "ranges": ranges, "dataDir": format!("/tmp/cni-{first}-{}", std::process::id()),
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    })
}

/// Kubernetes' usual: a bridge that is the pods' gateway, with hostPorts and bandwidth.
fn bridge() -> Value {
    json!({"name": "bridged", "plugins": [
        {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
         "ipam": ranges("bridge", &["10.11.0.0/24", "fd11::/64"])},
        {"type": "portmap", "capabilities": {"portMappings": true}},
        {"type": "bandwidth", "capabilities": {"bandwidth": true}},
    ]})
}

const SERVE: &str = "python3 -c 'import socket
s=socket.create_server((\"\",80),family=socket.AF_INET6,dualstack_ipv6=True); print(\"ready\",flush=True)
for i in range(2):
  c,_=s.accept(); c.sendall(b\"served\"); c.close()'";

fn ask(to: &str, port: u16) -> String {
    format!(
        "python3 -c 'import socket; print(socket.create_connection((\"{to}\",{port}),10).makefile().read())'"
    )
}

#[test]
fn two_pods_on_a_bridge_reach_each_other_and_are_reached_by_a_host_port() {
    for runtime in BOTH {
        let [node, one, two, outside] = [(); 4].map(|()| Netns::new());
        node.wire("ext0", &outside, "eth0");
        node.address("ext0", &["172.20.0.1/24"]);
        outside.address("eth0", &["172.20.0.2/24"]);
        outside.ip("route add 10.11.0.0/24 via 172.20.0.1");
        node.run("sysctl -qw net.ipv4.ip_forward=1").ok();
        let ports =
            json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]});
        let first = Attachment::add(&node, &one, "eth0", bridge(), ports);
        let second = Attachment::add(&node, &two, "eth0", bridge(), json!({}));
        let bundle = Bundle::tools().network(&one).script(SERVE);
        let server = bundle.start(runtime, &[]);
        server.wait_for_output("ready");
        let [ipv4, ipv6] = &first.addresses()[..] else {
            panic!("{:?}", first.addresses())
        };
        let script = format!(
            "ping -q -c2 -W60 {ipv4} >/dev/null && ping -q -c2 -W60 {ipv6} >/dev/null && {}",
            ask(ipv6, 80)
        );
        let ran = Bundle::tools()
            .network(&two)
            .script(&script)
            .run_with(runtime, &[]);
        assert_eq!(ran.ok(), "served", "{runtime:?}");
        assert_eq!(
            outside.run(&ask("172.20.0.1", 8080)).ok(),
            "served",
            "{runtime:?}"
        );
        server.finish().ok();
        drop(second);
    }
}

#[test]
fn a_bandwidth_limit_of_the_host_holds() {
    for runtime in BOTH {
        let [node, pod] = [(); 2].map(|()| Netns::new());
        let limit = json!({"bandwidth": {"ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000, "egressBurst": 800_000}});
        let attached = Attachment::add(&node, &pod, "eth0", bridge(), limit);
        let gateway = &attached.gateways()[0];
        let sink = node.start(
            "python3 -c 'import socket
s=socket.create_server((\"\",9000)); print(\"ready\",flush=True); c,_=s.accept(); n=0
while b:=c.recv(1<<16): n+=len(b)
print(n)'",
        );
        sink.wait_for_output("ready");
        let script = format!(
            "python3 -c 'import socket; s=socket.create_connection((\"{gateway}\",9000)); s.sendall(bytes(3<<20)); s.shutdown(1); s.recv(1)'"
        );
        let began = Instant::now();
        Bundle::tools()
            .network(&pod)
            .script(&script)
            .run_with(runtime, &[])
            .ok();
        // 3 MiB less the burst of 100 kB at 1 MB/s.
        assert!(
            began.elapsed() > Duration::from_millis(2500),
            "{runtime:?} {:?}",
            began.elapsed()
        );
        assert!(sink.finish().ok().ends_with("3145728"));
    }
}

#[test]
fn ptp_macvlan_and_ipvlan_from_their_plugins() {
    for (kind, extra) in [
        ("ptp", json!({})),
        ("macvlan", json!({"master": "up0", "mode": "bridge"})),
        ("ipvlan", json!({"master": "up0", "mode": "l2"})),
    ] {
        for runtime in BOTH {
            let [node, pod, peer] = [(); 3].map(|()| Netns::new());
            node.wire("up0", &peer, "peer0");
            peer.address("peer0", &["10.12.0.1/24", "fd12::1/64"]);
            let mut plugin = extra.clone();
            plugin["type"] = json!(kind);
            plugin["ipam"] = ranges(kind, &["10.12.0.0/24", "fd12::/64"]);
            let list = json!({"name": kind, "plugins": [plugin]});
            let attached = Attachment::add(&node, &pod, "eth0", list, json!({}));
            let addresses = attached.addresses();
            let gateways = attached.gateways();
            let [four, six] = &gateways[..] else {
                panic!("{gateways:?}")
            };
            let script = format!(
                "ping -q -c2 -W60 {four} >/dev/null && ping -q -c2 -W60 {six} >/dev/null && echo out; echo ready; read line; true"
            );
            let bundle = Bundle::tools().network(&pod).script(&script);
            let mut started = bundle.start(runtime, &[]);
            started.wait_for_output("ready");
            let from = if kind == "ptp" { &node } else { &peer };
            for to in &addresses {
                let ran = from.run(&format!("ping -q -c2 -W60 {to}"));
                assert_eq!(ran.status, 0, "{kind} {runtime:?} {to}: {ran}");
            }
            drop(started.stdin());
            assert_eq!(started.finish().ok(), "out\nready", "{kind} {runtime:?}");
        }
    }
}

#[test]
fn two_networks_in_one_pod() {
    for runtime in BOTH {
        let [node, pod, peer] = [(); 3].map(|()| Netns::new());
        node.wire("up0", &peer, "peer0");
        peer.address("peer0", &["10.13.0.1/24"]);
        let first = Attachment::add(&node, &pod, "eth0", bridge(), json!({}));
        let mut ipam = ranges("second", &["10.13.0.0/24"]);
        ipam["routes"] = json!([]);
        let second = json!({"name": "second", "plugins": [{"type": "macvlan", "master": "up0", "mode": "bridge", "ipam": ipam}]});
        let second = Attachment::add(&node, &pod, "net1", second, json!({}));
        let gateway = &first.gateways()[0];
        let script = format!(
            "ls /sys/class/net | tr '\\n' ' '; ping -q -c2 -W60 {gateway} >/dev/null && ping -q -c2 -W60 -I net1 10.13.0.1 >/dev/null && echo both"
        );
        let ran = Bundle::tools()
            .network(&pod)
            .script(&script)
            .run_with(runtime, &[]);
        assert_eq!(ran.ok(), "eth0 lo net1 both", "{runtime:?}");
        drop(second);
    }
}
