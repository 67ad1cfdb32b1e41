//! Containers that run to their end.

use std::fs;
use std::path::Path;
use std::process::Command;

use bulkhead_tests::{Host, run};

use super::{BOTH, Podman, nothing_left};

#[test]
fn podman_runs_containers_to_their_statuses() {
    let podman = Podman::get();
    let host = Host::now();
    for runtime in BOTH {
        let ran = podman.run_in(
            runtime,
            &[
                "--rm",
                "busybox",
                "sh",
                "-c",
                "echo out; echo err >&2; exit 42",
            ],
        );
        assert_eq!(
            (ran.status, ran.text().as_str(), ran.errors().as_str()),
            (42, "out", "err\n"),
            "{runtime}"
        );
        let ran = podman.run_in(runtime, &["--rm", "busybox", "no-such-program"]);
        assert_eq!(ran.status, 127, "{runtime}: {ran}");
        let ran = podman.run_in(runtime, &["--rm", "busybox", "/etc/passwd"]);
        assert_eq!(ran.status, 126, "{runtime}: {ran}");
    }
    nothing_left(&host);
}

#[test]
fn runs_in_a_row_leave_nothing() {
    let podman = Podman::get();
    let host = Host::now();
    for _ in 0..4 {
        let ran = podman.run_in("bulkhead", &["--rm", "busybox", "true"]);
        assert_eq!(ran.status, 0, "{ran}");
    }
    assert!(!Path::new("/run/bulkhead-oci").exists());
    nothing_left(&host);
}

#[test]
fn bulkhead_runs_an_image_that_podman_keeps() {
    let podman = Podman::get();
    let host = Host::now();
    let storage = podman.path("storage.conf");
    let text = format!(
        "[storage]\ndriver = {:?}\ngraphroot = {:?}\nrunroot = {:?}\n",
        podman.ok(&["info", "--format", "{{.Store.GraphDriverName}}"]),
        podman.path("root"),
        podman.path("run")
    );
    fs::write(&storage, text).expect("writable");
    let config = podman.path("images.toml");
    let text = format!("data_dir = {:?}\n", podman.path("data"));
    fs::write(&config, text).expect("writable");
    let bulkhead = |words: &[&str]| {
        let mut command = Command::new("bulkhead");
        command.env("CONTAINERS_STORAGE_CONF", &storage);
        run(command.args(["--config", &config]).args(words))
    };
    for first in [true, false] {
        let ran = bulkhead(&["run", "podman:localhost/busybox", "echo", "hello"]);
        assert_eq!(ran.ok(), "hello");
        assert_eq!(ran.errors().contains("exports"), first, "{ran}");
    }
    let ran = bulkhead(&["run", "containers-storage:no/such:image"]);
    assert_eq!(ran.status, 125, "{ran}");
    assert!(
        ran.errors()
            .contains("podman cannot export \"no/such:image\""),
        "{ran}"
    );
    bulkhead(&["image", "rm", "--all"]).ok();
    nothing_left(&host);
}
