//! Interfaces that come when the task's machine runs. Docker's order of doing things: the engine names no network namespace, and fills
//! the one that the task's pid is in, by a hook or between Create and Start. One that it names is filled before, or by a hook.

use std::fs;
use std::process::Command;

use bulkhead_tests::{Bundle, Netns, must};
use containerd_shim_protos::api::{CreateTaskRequest, ShutdownRequest};
use serde_json::json;
use tempfile::TempDir;

use crate::rpc::{block_on, context, start};
use crate::sandbox::Shim;

const SCRIPT: &str = "ip -4 -o addr show eth0 | grep -o 'inet [0-9./]*'; ping -q -c2 -W5 10.55.0.1 >/dev/null && echo reached";
const SEEN: &str = "inet 10.55.0.2/24\nreached\n";

/// Puts one end of a wire into the namespace of a process.
fn fill(peer: &Netns, pid: u32) -> Vec<String> {
    let name = peer.name();
    let inside = format!("nsenter -t {pid} -n");
    vec![
        format!("ip -n {name} link add peer0 type veth peer name eth0 netns {pid}"),
        format!("ip -n {name} addr add 10.55.0.1/24 dev peer0"),
        format!("ip -n {name} link set peer0 up"),
        format!("{inside} ip addr add 10.55.0.2/24 dev eth0"),
        format!("{inside} ip link set eth0 up"),
    ]
}

fn sh(script: &str) {
    must(Command::new("sh").args(["-ec", script]));
}

/// Runs a bundle under a shim of its own, filling its namespace between Create and Start; what it wrote.
fn run(bundle: &Bundle, between: impl FnOnce(u32)) -> String {
    let (started, status, text) = try_run(bundle, between);
    started.expect("started");
    assert_eq!(status, 0, "{text}");
    text
}

/// What Start says, the exit status and what it wrote.
fn try_run(bundle: &Bundle, between: impl FnOnce(u32)) -> (ttrpc::Result<()>, u32, String) {
    bundle.write();
    let shim = Shim::start();
    let output = TempDir::new().expect("a temporary directory");
    let output = output.path().join("output");
    let request = CreateTaskRequest {
        id: shim.id.clone(),
        bundle: bundle.path().to_str().expect("plain").into(),
        stdout: format!("file://{}", output.display()),
        ..Default::default()
    };
    let (started, status) = block_on(async {
        let services = shim.services().await;
        let created = services.task.create(context(), &request).await;
        between(created.expect("created").pid);
        let started = services.task.start(context(), &start(&shim.id, "")).await;
        let status = services.end(&shim.id).await;
        let shutdown = ShutdownRequest {
            id: shim.id.clone(),
            ..Default::default()
        };
        let _ = services.task.shutdown(context(), &shutdown).await;
        (started.map(drop), status)
    });
    let text = fs::read_to_string(&output).expect("its output");
    (started, status, text)
}

fn with_filling_hook(bundle: Bundle, kind: &str, peer: &Netns) -> Bundle {
    let commands = fill(peer, 0)
        .join("\n")
        .replace("netns 0", "netns $pid")
        .replace("-t 0", "-t $pid");
    let script = format!("pid=$(jq .pid)\n{commands}");
    bundle.edit(|config| {
        config["hooks"] = json!({kind: [
            {"path": "/bin/sh", "args": ["sh", "-ec", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}
        ]});
    })
}

#[test]
fn a_namespace_filled_between_create_and_start_is_the_containers() {
    let peer = Netns::new();
    let bundle = Bundle::tools().script(SCRIPT);
    let text = run(&bundle, |pid| sh(&fill(&peer, pid).join("\n")));
    assert_eq!(text, SEEN);
}

#[test]
fn a_namespace_filled_by_a_hook_is_the_containers() {
    let peer = Netns::new();
    let bundle = Bundle::tools().script(SCRIPT);
    let bundle = with_filling_hook(bundle, "prestart", &peer);
    assert_eq!(run(&bundle, |_| {}), SEEN);
}

/// A namespace with an interface, on a wire.
fn named() -> (Netns, Netns) {
    let (pod, other) = (Netns::new(), Netns::new());
    pod.wire("net1", &other, "other1");
    pod.address("net1", &["10.56.0.2/24"]);
    other.address("other1", &["10.56.0.1/24"]);
    (pod, other)
}

#[test]
fn a_hook_adds_an_interface_to_a_named_namespace() {
    let ((pod, _other), peer) = (named(), Netns::new());
    let script = format!("{SCRIPT}; ping -q -c2 -W5 10.56.0.1 >/dev/null && echo the other, too");
    let bundle = Bundle::tools().network(&pod).script(&script);
    let bundle = with_filling_hook(bundle, "createRuntime", &peer);
    assert_eq!(run(&bundle, |_| {}), format!("{SEEN}the other, too\n"));
}

#[test]
fn an_interface_that_comes_into_a_named_namespace_without_a_hook_is_there_or_told() {
    let ((pod, _other), peer) = (named(), Netns::new());
    let bundle = Bundle::tools().network(&pod).script(SCRIPT);
    let (started, status, text) = try_run(&bundle, |pid| sh(&fill(&peer, pid).join("\n")));
    let Err(error) = started else {
        // Machines that go on from a template have places for all.
        assert_eq!((status, text.as_str()), (0, SEEN));
        return;
    };
    let error = error.to_string();
    for word in ["interface eth0", "came too late", "createRuntime hook"] {
        assert!(error.contains(word), "{word}: {error}");
    }
    assert_eq!((status, text.as_str()), (255, ""));
}

#[test]
fn a_namespace_that_nobody_fills_has_lo_alone() {
    let bundle = Bundle::tools().script("ls /sys/class/net");
    assert_eq!(run(&bundle, |_| {}), "lo\n");
}
