//! A pod in the hands of `crictl`, the tool of those who look after nodes. It is built by `make test-containerd2`, and nowhere else.

use std::fs;

use bulkhead_tests::{Engine, Host, IMAGE, Started, fresh_id};
use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::shims_end;

#[track_caller]
fn crictl(words: &[&str]) -> String {
    let command = Engine::get().crictl(words).expect("it was asked for");
    Started::spawn(command).finish().ok()
}

#[test]
fn crictl_walks_through_the_life_of_a_pod() {
    let engine = Engine::get();
    if engine.crictl::<&str>(&[]).is_none() {
        println!("NOT RUN: crictl is there by `make test-containerd2` only");
        return;
    }
    let host = Host::now();
    let dir = TempDir::new().expect("a temporary directory");
    let write = |name: &str, value: serde_json::Value| {
        let path = dir.path().join(name);
        fs::write(&path, value.to_string()).expect("writable");
        path.to_str().expect("plain").to_owned()
    };
    let name = fresh_id();
    let pod = write(
        "pod.json",
        json!({
            "metadata": {"name": name, "uid": name, "namespace": "default"},
            "hostname": "podname",
            "log_directory": dir.path(),
            "linux": {"cgroup_parent": "/kubepods-test"},
        }),
    );
    let container = write(
        "container.json",
        json!({
            "metadata": {"name": "c"},
            "image": {"image": IMAGE},
            "command": ["/bin/sh", "-c", "echo logged; while :; do sleep 1; [ ! -e /ticks ] || echo tick; done"],
            "log_path": "c.log",
            "linux": {},
        }),
    );
    let pod_id = crictl(&["runp", "--runtime", "bulkhead", &pod]);
    let listed = crictl(&["pods", "--quiet", "--no-trunc", "--state", "ready"]);
    assert_eq!(listed, pod_id);
    let inspected = crictl(&["inspectp", &pod_id]);
    assert!(inspected.contains("SANDBOX_READY"), "{inspected}");
    let id = crictl(&["create", &pod_id, &container, &pod]);
    crictl(&["start", &id]);
    assert_eq!(crictl(&["exec", "--sync", &id, "hostname"]), "podname");
    // By the streaming server, as `kubectl exec` comes.
    assert_eq!(crictl(&["exec", &id, "echo", "streamed"]), "streamed");
    assert_eq!(crictl(&["logs", &id]), "logged");
    crictl(&["exec", "--sync", &id, "touch", "/ticks"]);
    // `kubectl attach`, twice.
    for _ in 0..2 {
        let command = engine.crictl(&["attach", &id]).expect("it was built");
        let attached = Started::spawn(command);
        attached.wait_for_output("tick");
        attached.signal(Signal::SIGKILL);
        attached.finish();
    }
    crictl(&["stop", "--timeout", "1", &id]);
    crictl(&["rm", &id]);
    crictl(&["stopp", &pod_id]);
    crictl(&["rmp", &pod_id]);
    assert_eq!(crictl(&["pods", "--quiet"]), "");
    shims_end();
    host.assert_nothing_left();
}
