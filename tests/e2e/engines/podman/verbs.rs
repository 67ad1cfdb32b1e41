//! What is done with a container that runs.

use std::fs;
use std::path::Path;

use bulkhead_tests::Host;
use tempfile::TempDir;

use super::terminal::Terminal;
use super::{BOTH, Podman, nothing_left};

/// Ends by SIGTERM, with a status of its own.
const WAITS: &str = "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done";

/// What `podman inspect` says of the container.
fn state(podman: &Podman, field: &str) -> String {
    podman.ok(&[
        "inspect",
        "--format",
        &format!("{{{{.State.{field}}}}}"),
        "c",
    ])
}

#[test]
fn podmans_verbs_work_on_a_container_that_runs() {
    let podman = Podman::get();
    let host = Host::now();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").expect("Linux");
    for runtime in BOTH {
        let words = ["--detach", "--name", "c", "busybox", "sh", "-c", WAITS];
        podman.run_in(runtime, &words).ok();
        let uname = podman.ok(&["exec", "c", "uname", "-r"]);
        assert_eq!(
            uname == kernel.trim(),
            runtime == "crun",
            "{runtime}: {uname}"
        );
        let words = ["exec", "--interactive", "--tty", "c", "sh", "-c"];
        let script = "stty size; exit 9";
        let mut terminal = Terminal::start(podman, &[&words[..], &[script]].concat());
        terminal.read("33 99");
        assert_eq!(terminal.end(), Some(9), "{runtime}");
        podman.ok(&["pause", "c"]);
        assert_eq!(state(podman, "Status"), "paused", "{runtime}");
        podman.ok(&["unpause", "c"]);
        assert_eq!(state(podman, "Status"), "running", "{runtime}");
        podman.ok(&["stop", "c"]);
        assert_eq!(state(podman, "ExitCode"), "3", "{runtime}");
        assert_eq!(podman.ok(&["logs", "c"]), "up\nbye", "{runtime}");
        podman.ok(&["start", "c"]);
        podman.ok(&["kill", "c"]);
        podman.ok(&["rm", "--force", "--time", "0", "c"]);
    }
    nothing_left(&host);
}

/// Makes a container with an init, a volume, a tmpfs and a health check.
fn make(podman: &Podman, runtime: &str, volume: &Path) {
    let volume = format!("{}:/volume", volume.display());
    let words = [
        "--detach",
        "--name",
        "c",
        "--init",
        "--volume",
        &volume,
        "--tmpfs",
        "/tmpfs",
        "--health-cmd",
        "test -e /well",
        "--health-interval",
        "disable",
        "busybox",
        "sleep",
        "1000",
    ];
    podman.run_in(runtime, &words).ok();
}

/// `podman cp` enters the mount namespace of the container's pid.
fn files_are_copied(podman: &Podman, runtime: &str, dir: &Path) {
    let path = |name: &str| dir.join(name).display().to_string();
    fs::write(path("in"), "of the host").expect("writable");
    for place in ["c:/in", "c:/volume/in"] {
        podman.ok(&["cp", &path("in"), place]);
    }
    let copied = podman.ok(&["exec", "c", "cat", "/in", "/volume/in"]);
    assert_eq!(copied, "of the hostof the host", "{runtime}");
    let on_host = fs::read_to_string(path("volume/in")).expect("copied");
    assert_eq!(on_host, "of the host", "{runtime}");
    podman.ok(&["exec", "c", "sh", "-c", "echo inner >/out"]);
    podman.ok(&["cp", "c:/out", &path("out")]);
    assert_eq!(fs::read_to_string(path("out")).expect("copied"), "inner\n");
    // A tmpfs is in the guest: nothing is written beneath it.
    let ran = podman.run(&["cp", &path("in"), "c:/tmpfs/in"]);
    assert_eq!(ran.status == 0, runtime == "crun", "{runtime}: {ran}");
    if runtime == "bulkhead" {
        assert!(ran.errors().contains("read-only file system"), "{ran}");
        assert_eq!(podman.ok(&["exec", "c", "ls", "/tmpfs"]), "");
    }
}

#[test]
fn a_container_is_looked_after() {
    let podman = Podman::get();
    let host = Host::now();
    for runtime in BOTH {
        let dir = TempDir::new().expect("a temporary directory");
        fs::create_dir(dir.path().join("volume")).expect("writable");
        make(podman, runtime, &dir.path().join("volume"));
        files_are_copied(podman, runtime, dir.path());
        // Its processes are in the guest, and top says so.
        let top = podman.ok(&["top", "c", "args"]);
        let word = match runtime {
            "crun" => "sleep 1000",
            _ => "(its processes are in its virtual machine)",
        };
        assert!(top.contains(word), "{runtime}: {top}");
        let processes = podman.ok(&["exec", "c", "ps", "-o", "pid,args"]);
        assert!(processes.contains("1 /run/podman-init"), "{processes}");
        let stats = podman.ok(&["stats", "--no-stream", "--format", "{{.PIDs}}", "c"]);
        assert!(stats.parse::<u32>().is_ok_and(|n| n > 1), "{stats}");
        assert_eq!(podman.run(&["healthcheck", "run", "c"]).status, 1);
        podman.ok(&["exec", "c", "touch", "/well"]);
        podman.ok(&["healthcheck", "run", "c"]);
        let join = |flag: &str| podman.run_in(runtime, &["--rm", flag, "busybox", "true"]);
        for flag in ["--pid=container:c", "--ipc=container:c"] {
            let ran = join(flag);
            assert_eq!(ran.status == 0, runtime == "crun", "{runtime}: {ran}");
            assert!(
                ran.status == 0 || ran.errors().contains("podman pod create"),
                "{ran}"
            );
        }
        podman.ok(&["update", "--pids-limit", "55", "c"]);
        let limit = podman.ok(&["exec", "c", "cat", "/sys/fs/cgroup/pids.max"]);
        assert_eq!(limit, "55", "{runtime}");
        podman.ok(&["rm", "--force", "--time", "0", "c"]);
    }
    nothing_left(&host);
}

#[test]
fn what_a_guest_cannot_have_is_refused_by_podmans_flag() {
    let podman = Podman::get();
    let host = Host::now();
    for flag in [
        "--network=host",
        "--pid=host",
        "--ipc=host",
        "--uts=host",
        "--privileged",
    ] {
        let words = [
            "--runtime",
            "bulkhead",
            "run",
            "--rm",
            flag,
            "busybox",
            "true",
        ];
        let ran = podman.run(&words);
        let word = format!("{flag} is not supported: ");
        assert!(ran.status == 126 && ran.errors().contains(&word), "{ran}");
    }
    // What is named in place of --privileged.
    let words = "--rm --cap-add=all --security-opt seccomp=unconfined --security-opt unmask=all busybox \
        mount -t tmpfs mine /tmp";
    let words: Vec<&str> = words.split_ascii_whitespace().collect();
    podman.run_in("bulkhead", &words).ok();
    nothing_left(&host);
}
