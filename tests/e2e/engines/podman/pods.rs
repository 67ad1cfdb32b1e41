//! Pods: their members join the machine of the infra container.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;

use bulkhead_tests::{Host, PATIENCE, eventually};
use tempfile::TempDir;

use super::{BOTH, Podman, nothing_left};

const PORT: u16 = 18080;

/// An init container that fills an emptyDir, and two members: a server, and one that asks it.
const POD: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: configuration}
data: {key: configured}
---
apiVersion: v1
kind: Pod
metadata: {name: pod}
spec:
  initContainers:
  - name: first
    image: localhost/busybox
    command: [sh, -c, "cat /configuration/key >/empty/index.html"]
    volumeMounts: [{name: empty, mountPath: /empty}, {name: map, mountPath: /configuration}]
  containers:
  - name: server
    image: localhost/busybox
    command: [httpd, -f, -p, "80", -h, /empty]
    ports: [{containerPort: 80, hostPort: 18080}]
    volumeMounts: [{name: empty, mountPath: /empty}]
    resources: {limits: {memory: 64Mi}}
  - name: other
    image: localhost/busybox
    command: [sh, -c, "echo shared >/dev/shm/file; sleep 1000"]
  volumes: [{name: empty, emptyDir: {}}, {name: map, configMap: {name: configuration}}]
"#;

/// What the published port says, once it does.
fn fetch() -> String {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", PORT))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    let mut said = String::new();
    let answered = || {
        said = ask().unwrap_or_default();
        !said.is_empty()
    };
    eventually("the published port answers", answered, String::new);
    said
}

#[test]
fn a_pod_is_played_joined_and_taken_down() {
    let podman = Podman::get();
    let host = Host::now();
    let dir = TempDir::new().expect("a temporary directory");
    let file = dir.path().join("pod.yaml").display().to_string();
    fs::write(&file, POD).expect("writable");
    for runtime in BOTH {
        let runtime_flag = ["--runtime", runtime];
        let play = ["kube", "play", "--network", "podman", &file];
        podman.ok(&[&runtime_flag[..], &play].concat());
        let said = fetch();
        assert!(said.ends_with("\r\n\r\nconfigured"), "{runtime}: {said}");
        let script = "wget -qO- http://127.0.0.1; echo; cat /dev/shm/file; hostname";
        let join = ["run", "--rm", "--pod", "pod", "busybox", "sh", "-c", script];
        let said = podman.ok(&[&runtime_flag[..], &join].concat());
        assert_eq!(said, "configured\nshared\npod", "{runtime}");
        // conmon removes the member that was run when the command has ended.
        let top = || podman.ok(&["pod", "top", "pod", "args"]);
        let expected = if runtime == "crun" { 0 } else { 3 };
        let counted = || top().matches("virtual machine").count() == expected;
        eventually("each container of the pod is listed once", counted, top);
        podman.ok(&["pod", "pause", "pod"]);
        podman.ok(&["pod", "unpause", "pod"]);
        assert!(fetch().ends_with("configured"), "{runtime}");
        podman.ok(&["kube", "down", &file]);
        // Nobody holds what the members would share: each has a machine of its own.
        podman.ok(&["pod", "create", "--infra=false", "--name", "loose"]);
        let join = [
            "run",
            "--rm",
            "--network",
            "none",
            "--pod",
            "loose",
            "busybox",
            "true",
        ];
        podman.ok(&[&runtime_flag[..], &join].concat());
        podman.ok(&["pod", "rm", "loose"]);
    }
    nothing_left(&host);
}
