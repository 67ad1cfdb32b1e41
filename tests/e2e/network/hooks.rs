//! Interfaces that hooks of the host put into the network namespace, the one that the bundle names or a fresh one: by the pid that
//! they are told, as Docker's and CNI's do.

use bulkhead_tests::Host;
use serde_json::json;

use super::*;

/// What hooks of the host are to add: interfaces NAME with 10.60.N.2/24, each with a peer at 10.60.N.1.
fn adding(peer: &Netns, names: &[&str]) -> String {
    let peer = peer.name();
    let one = |(number, name): (usize, &&str)| {
        format!(
            "ip -n {peer} link add hook{number} type veth peer name {name} netns $pid
            ip -n {peer} addr add 10.60.{number}.1/24 dev hook{number}
            ip -n {peer} link set hook{number} up
            nsenter -t $pid -n ip addr add 10.60.{number}.2/24 dev {name}
            nsenter -t $pid -n ip link set {name} up
            "
        )
    };
    let commands: String = names.iter().enumerate().map(one).collect();
    format!("pid=$(jq .pid)\n{commands}")
}

fn with_hook(bundle: Bundle, kind: &str, script: &str) -> Bundle {
    let hook = json!({"path": "/bin/sh", "args": ["sh", "-ec", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]});
    bundle.edit(|config| config["hooks"] = json!({kind: [hook]}))
}

/// Each interface with its address, and the peers that answer.
fn look(peers: &[&str]) -> String {
    let ping = |to: &&str| format!("ping -q -c2 -W60 {to} >/dev/null && echo {to} answers;");
    let pings: String = peers.iter().map(ping).collect();
    format!(
        "ip -4 -o addr show | sed 's/@[a-z0-9]*//' | grep -o '[a-z0-9]* *inet [0-9./]*' | tr -s ' ' | sort; {pings}"
    )
}

#[test]
fn a_hook_adds_an_interface_to_a_namespace_that_has_one() {
    drop(Netns::new());
    let host = Host::now();
    for runtime in BOTH {
        let (pair, peer) = (Pair::new(), Netns::new());
        let bundle = Bundle::tools()
            .network(&pair.pod)
            .script(&look(&["10.60.0.1", PEER]));
        let bundle = with_hook(bundle, "createRuntime", &adding(&peer, &["net1"]));
        let ran = bundle.run_with(runtime, &[]);
        assert_eq!(
            ran.ok(),
            format!(
                "eth0 inet {POD}/24\nlo inet 127.0.0.1/8\nnet1 inet 10.60.0.2/24\n10.60.0.1 answers\n{PEER} answers"
            ),
            "{runtime:?}"
        );
        // It is the namespace's that was there before, and stays as the hook has left it.
        let left = pair.pod.run("ip -o link show | grep -c bulkhead; tc qdisc show | grep -c ingress; ip -4 -o addr show net1 | grep -o 10.60.0.2");
        assert_eq!(left.text(), "0\n0\n10.60.0.2", "{runtime:?}");
    }
    host.assert_nothing_left();
}

#[test]
fn a_hook_fills_a_namespace_that_nobody_has_named() {
    drop(Netns::new());
    let host = Host::now();
    for runtime in BOTH {
        let peer = Netns::new();
        let bundle = Bundle::tools().script(&look(&["10.60.0.1", "10.60.1.1"]));
        let bundle = with_hook(bundle, "prestart", &adding(&peer, &["eth0", "net1"]));
        let seen = bundle.run_with(runtime, &[]).ok();
        assert!(
            seen.contains("eth0 inet 10.60.0.2/24\n")
                && seen.contains("net1 inet 10.60.1.2/24\n10.60.0.1 answers\n10.60.1.1 answers"),
            "{runtime:?}: {seen}"
        );
    }
    host.assert_nothing_left();
}

#[test]
fn a_hook_that_adds_nothing_is_no_network() {
    for runtime in BOTH {
        let bundle = Bundle::tools().script("cd /sys/class/net; ls -d */ | tr -d /");
        let bundle = with_hook(bundle, "createRuntime", "true");
        assert_eq!(bundle.run_with(runtime, &[]).ok(), "lo", "{runtime:?}");
    }
}

#[test]
fn more_than_the_machine_has_places_for_are_refused_by_name() {
    drop(Netns::new());
    let host = Host::now();
    let (pod, peer) = (Netns::new(), Netns::new());
    let names = ["net0", "net1", "net2", "net3", "net4"];
    let bundle = Bundle::tools().network(&pod).script("true");
    let bundle = with_hook(bundle, "createRuntime", &adding(&peer, &names));
    // One from a template has places for 12.
    let ran = bundle.boot(&[]);
    ran.refused(&["interface net4", "came too late", "the 4"]);
    drop((pod, peer));
    host.assert_nothing_left();
}
