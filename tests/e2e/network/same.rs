//! What a container sees of its network is what runc's sees.

use std::process::Command;

use std::io::Write;
use std::path::Path;

use super::*;

/// What `ip` and sysfs say, without what is the guest's own: indices, and the other end of a wire. Whether an
/// address is still being tried depends on the moment. A host that has loaded the bonding driver has a file
/// `bonding_masters` among the interfaces: only directories are interfaces.
const LOOK: &str = r"
    for name in $(cd /sys/class/net && ls -d */ | tr -d /); do
        echo $name $(cat /sys/class/net/$name/address) $(cat /sys/class/net/$name/mtu) $(cat /sys/class/net/$name/tx_queue_len)
    done
    ip -o addr show | sed -e 's/^[0-9]*: //' -e 's/@[a-z0-9]*//' -e 's/valid_lft.*//' -e 's/tentative\|nodad//' -e 's/  */ /g'
    ip -4 route show table all | sort
    ip -6 route show table all | grep -v -e ff00:: -e '^local' -e '^anycast' | sort
    ip neigh show nud permanent
    ip -6 neigh show nud permanent
    ip rule; ip -6 rule
";

#[track_caller]
fn same(pod: &Netns, script: &str) -> String {
    let [control, ours] = BOTH.map(|runtime| {
        let bundle = Bundle::tools().network(pod).script(script);
        bundle.run_with(runtime, &[])
    });
    assert_eq!(control.status, 0, "a bad test: {control}");
    assert_eq!(ours.text(), control.text(), "left: Bulkhead: {ours}");
    ours.text()
}

#[test]
fn addresses_routes_neighbours_rules_and_links() {
    let Pair { pod, peer } = Pair::new().mtu(1400);
    pod.ip("link set eth0 address 02:aa:bb:cc:dd:01");
    pod.address("eth0", &["10.77.0.9/32", "fd77::9/128"]);
    pod.ip("route add 10.1.0.0/16 via 192.168.50.9 metric 50 mtu lock 1300 src 10.77.0.9");
    pod.ip("route add 10.2.0.0/16 dev eth0 scope link");
    pod.ip("route add 10.3.0.0/16 via 172.31.0.1 dev eth0 onlink");
    pod.ip(
        "route add 10.4.0.0/16 nexthop via 192.168.50.7 weight 2 nexthop via 192.168.50.8 weight 1",
    );
    pod.ip("route add blackhole 10.5.0.0/16");
    pod.ip("route add 10.6.0.0/16 via 192.168.50.6 table 100");
    pod.ip("-6 route add fd01::/32 via fd50::9 metric 77");
    pod.ip("-6 route add fd02::/32 nexthop via fd50::7 nexthop via fd50::8");
    pod.ip("-6 route add unreachable fd03::/32");
    pod.ip("neigh add 192.168.50.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent");
    pod.ip("-6 neigh add fd50::77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent");
    pod.ip("rule add from 10.77.0.9 table 100 priority 1000");
    pod.ip("-6 rule add to fd99::/16 table 100 priority 1001");
    let seen = same(&pod, LOOK);
    for word in [
        "02:aa:bb:cc:dd:01",
        "1400",
        "10.77.0.9",
        "onlink",
        "blackhole",
        "weight 2",
        "fd03::",
    ] {
        assert!(seen.contains(word), "{word} in {seen}");
    }
    drop(peer);
}

#[test]
fn two_interfaces_with_their_names_in_any_order() {
    let (pod, peer) = (Netns::new(), Netns::new());
    // The first one that a guest finds is called eth0 by its kernel.
    pod.wire("eth1", &peer, "peer1");
    pod.wire("eth0", &peer, "peer0");
    pod.wire("storage", &peer, "peer2");
    pod.address("eth1", &["10.8.1.2/24"]);
    pod.address("eth0", &["10.8.0.2/24", "fd08::2/64"]);
    let seen = same(&pod, LOOK);
    assert!(
        seen.contains("storage") && seen.contains("10.8.1.2"),
        "{seen}"
    );
}

#[test]
fn a_namespace_without_interfaces_has_lo_only() {
    let pod = Netns::new();
    let seen = same(
        &pod,
        "cd /sys/class/net; ls -d */ | tr -d /; ip -o addr show lo | grep -c inet; ping -c1 -W2 127.0.0.1 >/dev/null && echo up",
    );
    assert_eq!(seen, "lo\n2\nup");
}

#[test]
fn without_a_network_there_is_lo_and_no_device() {
    let script = "ls /sys/class/net; ls /sys/bus/virtio/devices 2>/dev/null | wc -l";
    let ran = Bundle::tools().script(script).run();
    let text = ran.ok();
    // vsock, the share, random numbers and the balloon.
    assert_eq!(text, "lo\n4");
}

#[test]
fn the_hosts_own_network_is_refused() {
    for path in ["/proc/self/ns/net", "/proc/1/ns/net"] {
        let bundle = Bundle::busybox().args(&["true"]);
        let ran = bundle.network_at(Path::new(path)).run();
        ran.refused(&["network", path]);
    }
}

#[test]
fn a_link_goes_down_and_up_as_outside() {
    let wait = |carrier: u8| {
        format!(
            "until [ \"$(cat /sys/class/net/eth0/carrier)\" = {carrier} ]; do sleep 0.05; done; echo {carrier}; "
        )
    };
    let script = format!("{}read line; {}read line; {}", wait(1), wait(0), wait(1));
    for runtime in BOTH {
        let pair = Pair::new();
        let mut inside = pair.start(runtime, &script);
        let mut stdin = inside.started.stdin();
        inside.started.wait_for_output("1\n");
        for (change, seen) in [("down", "1\n0\n"), ("up", "1\n0\n1\n")] {
            pair.peer.ip(&format!("link set peer0 {change}"));
            writeln!(stdin).expect("it reads");
            inside.started.wait_for_output(seen);
        }
        inside.finish().ok();
    }
}

#[test]
fn a_link_that_is_down_at_first_is_down_inside() {
    let pair = Pair::new();
    pair.peer.ip("link set peer0 down");
    let script =
        "until [ \"$(cat /sys/class/net/eth0/carrier)\" = 0 ]; do sleep 0.05; done; echo down";
    for runtime in BOTH {
        assert_eq!(pair.run(runtime, script).ok(), "down", "{runtime:?}");
    }
}

#[test]
fn each_processor_has_a_pair_of_queues() {
    let pair = Pair::new();
    let script = format!(
        "ls /sys/class/net/eth0/queues | tr '\\n' ' '; ping -q -c2 -W60 {PEER} >/dev/null && echo reached"
    );
    let bundle = Bundle::tools().network(&pair.pod).script(&script);
    let ran = bundle.run_with(Runtime::Bulkhead, &["--vcpus", "2"]);
    assert_eq!(ran.ok(), "rx-0 rx-1 tx-0 tx-1 reached");
}

#[test]
fn the_command_shows_what_has_passed_through() {
    let pair = Pair::new();
    let mut inside = pair.start(Runtime::Bulkhead, "echo ready; read line; true");
    inside.started.wait_for_output("ready");
    pair.peer
        .run(&format!("ping -q -c50 -i0.01 -s1000 {POD}"))
        .ok();
    let show = |words: &[&str]| {
        let mut command = Command::new("bulkhead");
        run(command.arg("network").args(words)).ok()
    };
    let pods: serde_json::Value = serde_json::from_str(&show(&["--json"])).expect("JSON");
    let interface = &pods[0]["interfaces"][0];
    assert_eq!(interface["interface"], "eth0", "{pods}");
    for side in ["outside", "inside"] {
        for counter in ["rx_bytes", "tx_bytes"] {
            let bytes = interface[side][counter].as_u64().expect("a number");
            assert!(
                (50_000..100_000).contains(&bytes),
                "{side} {counter}: {pods}"
            );
        }
    }
    let id = pods[0]["id"].as_str().expect("an id");
    let table = show(&[id]);
    assert_eq!(table.lines().count(), 2, "{table}");
    assert!(
        table.contains(&format!("default/{id}")) && table.contains("eth0"),
        "{table}"
    );
    let unknown = run(Command::new("bulkhead").args(["network", "none"]));
    assert_eq!(unknown.status, 125, "{unknown}");
    drop(inside.started.stdin());
    inside.finish().ok();
}
