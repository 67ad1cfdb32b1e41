//! `podman build`: buildah calls the runtime for each `RUN`, without conmon.

use std::fs;

use bulkhead_tests::Host;
use tempfile::TempDir;

use super::{BOTH, Podman, nothing_left};

/// Each `RUN` is a machine: few of them, and much in each.
const STEPS: &str = "\
FROM localhost/busybox
COPY given /given
RUN --mount=type=cache,target=/cache cat /given && echo told >&2 && cp /given /cache/kept && uname -r >/kernel
USER 99
RUN --mount=type=cache,target=/cache test -e /cache/kept && id -u && ! touch /no && exit 7
";

#[test]
fn an_images_steps_run_in_machines() {
    let podman = Podman::get();
    let host = Host::now();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").expect("Linux");
    for runtime in BOTH {
        let dir = TempDir::new().expect("a temporary directory");
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::write(path("given"), "from the context\n").expect("writable");
        fs::write(path("Containerfile"), STEPS).expect("writable");
        let build = |words: &[&str]| {
            let first = ["--runtime", runtime, "build", "--network", "none"];
            podman.run(&[&first[..], words, &[&path("")]].concat())
        };
        // The last step fails with a status of its own, which is told.
        let ran = build(&[]);
        let (output, errors) = (ran.text(), ran.errors());
        assert_eq!(ran.status, 7, "{ran}");
        assert!(output.contains("from the context\n"), "{runtime}: {ran}");
        assert!(output.ends_with("\n99"), "{runtime}: {ran}");
        assert!(errors.contains("told\n"), "{runtime}: {ran}");
        fs::write(path("Containerfile"), STEPS.replace(" && exit 7", "")).expect("writable");
        build(&["--tag", "built"]).ok();
        let made = podman.run_in("crun", &["--rm", "built", "cat", "/kernel"]);
        assert_eq!(made.ok() == kernel.trim(), runtime == "crun", "{runtime}");
        podman.ok(&["rmi", "--force", "built"]);
    }
    nothing_left(&host);
}
