//! Podman with its own conmon, as people use it; crun is the control where the guest's kernel does
//! not matter.

use std::fs;
use std::path::Path;
use std::process::Command;

use bulkhead_tests::{Bundle, Host, Ran, eventually, must, run};
use tempfile::TempDir;

/// Podman with a store, a configuration and an image of its own.
struct Podman {
    dir: TempDir,
}

impl Podman {
    fn new() -> Podman {
        // Not below /tmp: overlays cannot be stacked on the lab's root.
        let dir = TempDir::with_prefix_in("podman-", "/var/lib/containers").expect("there");
        let podman = Podman { dir };
        let config = "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n\
            [engine.runtimes]\nbulkhead = [\"/usr/local/bin/bulkhead\"]\ncrun = [\"/usr/bin/crun\"]\n\
            [containers]\nlog_driver = \"k8s-file\"\n";
        fs::write(podman.path("containers.conf"), config).expect("writable");
        let bundle = Bundle::busybox();
        let tar = podman.path("root.tar");
        must(
            Command::new("tar")
                .arg("-C")
                .arg(bundle.root())
                .arg("-cf")
                .arg(&tar)
                .arg("."),
        );
        podman.ok(&["import", &tar, "busybox"]);
        // What Podman makes for all containers, and keeps: its cgroups, its locks.
        podman.run_in("crun", &["--rm", "busybox", "true"]).ok();
        podman
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("podman");
        command
            .env("CONTAINERS_CONF", self.path("containers.conf"))
            .args([
                "--root",
                &self.path("root"),
                "--runroot",
                &self.path("run"),
                "--tmpdir",
                &self.path("tmp"),
            ])
            .args(words);
        command
    }

    fn run(&self, words: &[&str]) -> Ran {
        run(&mut self.command(words))
    }

    #[track_caller]
    fn ok(&self, words: &[&str]) -> String {
        self.run(words).ok()
    }

    /// `podman run` without a network, under a runtime.
    fn run_in(&self, runtime: &str, words: &[&str]) -> Ran {
        let all = [
            &["--runtime", runtime, "run", "--network", "none"][..],
            words,
        ]
        .concat();
        self.run(&all)
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.run(&["rm", "--all", "--force", "--time", "0"]);
        let _ = self.run(&["rmi", "--all", "--force"]);
    }
}

/// After conmon's clean-up, which goes on when the command has ended.
#[track_caller]
fn nothing_left(host: &Host) {
    // proc_pid_stat(5): "PID (NAME) STATE ...". One that has ended waits for the lab's first
    // process to collect it.
    let works = |stat: &str| {
        let lives = !stat.contains(") Z ");
        lives
            && ["(conmon)", "(podman)"]
                .iter()
                .any(|name| stat.contains(name))
    };
    let goes_on = || {
        let entries = fs::read_dir("/proc").expect("/proc is mounted");
        let mut stats =
            entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("stat")).ok());
        stats.any(|stat| works(&stat))
    };
    eventually("conmon has ended", || !goes_on(), String::new);
    host.assert_nothing_left();
}

const BOTH: [&str; 2] = ["crun", "bulkhead"];

#[test]
fn podman_runs_containers_to_their_statuses() {
    let podman = Podman::new();
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
fn podmans_verbs_work_on_a_container_that_runs() {
    let podman = Podman::new();
    let host = Host::now();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").expect("Linux");
    for runtime in BOTH {
        let script = "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done";
        podman
            .run_in(
                runtime,
                &["--detach", "--name", "c", "busybox", "sh", "-c", script],
            )
            .ok();
        let uname = podman.ok(&["exec", "c", "uname", "-r"]);
        assert_eq!(
            uname == kernel.trim(),
            runtime == "crun",
            "{runtime}: {uname}"
        );
        let ran = podman.run(&["exec", "c", "sh", "-c", "exit 9"]);
        assert_eq!(ran.status, 9, "{runtime}: {ran}");
        podman.ok(&["pause", "c"]);
        let status =
            |podman: &Podman| podman.ok(&["inspect", "--format", "{{.State.Status}}", "c"]);
        assert_eq!(status(&podman), "paused", "{runtime}");
        podman.ok(&["unpause", "c"]);
        assert_eq!(status(&podman), "running", "{runtime}");
        podman.ok(&["stop", "c"]);
        assert_eq!(
            podman.ok(&["inspect", "--format", "{{.State.ExitCode}}", "c"]),
            "3",
            "{runtime}"
        );
        assert_eq!(podman.ok(&["logs", "c"]), "up\nbye", "{runtime}");
        podman.ok(&["start", "c"]);
        podman.ok(&["kill", "c"]);
        podman.ok(&["rm", "--force", "--time", "0", "c"]);
        podman
            .run_in(
                runtime,
                &["--detach", "--name", "d", "busybox", "sleep", "1000"],
            )
            .ok();
        podman.ok(&["rm", "--force", "--time", "0", "d"]);
    }
    nothing_left(&host);
}

#[test]
fn ten_runs_in_a_row_leave_nothing() {
    let podman = Podman::new();
    let host = Host::now();
    for _ in 0..10 {
        let ran = podman.run_in("bulkhead", &["--rm", "busybox", "true"]);
        assert_eq!(ran.status, 0, "{ran}");
    }
    assert!(!Path::new("/run/bulkhead-oci").exists());
    nothing_left(&host);
}
