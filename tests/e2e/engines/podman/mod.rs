//! Podman with its own conmon, as people use it; crun is the control where the guest's kernel does
//! not matter.

mod builds;
mod pods;
mod runs;
mod terminal;
mod verbs;

use std::fs;
use std::process::Command;
use std::sync::OnceLock;

use bulkhead_tests::{Bundle, Host, Ran, eventually, must, run};
use tempfile::TempDir;

/// The runtimes that a test tries, the control first.
const BOTH: [&str; 2] = ["crun", "bulkhead"];

/// Podman with a store, a configuration and an image of its own.
struct Podman {
    dir: TempDir,
}

impl Podman {
    /// The one of this test program, without a container: what an earlier test has left, when it
    /// failed, is removed. An image takes seconds to import.
    fn get() -> &'static Podman {
        static PODMAN: OnceLock<Podman> = OnceLock::new();
        let podman = PODMAN.get_or_init(Podman::new);
        podman.run(&["pod", "rm", "--all", "--force", "--time", "0"]);
        podman.run(&["rm", "--all", "--force", "--time", "0"]);
        podman
    }

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
        // What Podman makes for all containers, and keeps: its cgroups, its locks, its bridge.
        podman.ok(&["--runtime", "crun", "run", "--rm", "busybox", "true"]);
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

/// After conmon's clean-up, which goes on when the command has ended.
#[track_caller]
fn nothing_left(host: &Host) {
    // proc_pid_stat(5): "PID (NAME) STATE ...". One of theirs that has ended waits for the lab's
    // first process to collect it; one of ours that nobody collects is left behind.
    let works = |stat: &str| match stat.contains(") Z ") {
        true => stat.contains("(bulkhead"),
        false => stat.contains("(conmon)") || stat.contains("(podman)"),
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
