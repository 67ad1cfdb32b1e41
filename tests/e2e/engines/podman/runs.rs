//! Containers that run to their end.

use std::path::Path;

use bulkhead_tests::Host;

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
