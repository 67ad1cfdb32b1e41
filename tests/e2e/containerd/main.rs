//! The shim against a real containerd, which the tests start themselves: `ctr`, and the shim's own services.
//!
//! Where it makes sense a case runs under runc too: what runc fails is a bad test.

mod contained;
mod cri;
mod crictl;
mod ctr;
mod ends;
mod figures;
mod guest;
mod limits;
mod network;
mod pods;
mod regressions;
mod rpc;
mod sandbox;
mod sizes;
mod volumes;

use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::{Engine, IMAGE, Ran, fresh_id, run, tail};

/// Waits for the end of every shim, which comes a moment after it was let go.
#[track_caller]
fn shims_end() {
    eventually("the shims end", || {
        processes(&["containerd-shim-"]).is_empty()
    });
}

/// `ctr run --rm` of a script, to its end.
fn run_once(runtime: &str, words: &[&str], script: &str) -> Ran {
    let id = fresh_id();
    let mut all = vec!["run", "--rm", "--runtime", runtime];
    all.extend(words);
    all.extend([IMAGE, &id, "/bin/sh", "-c", script]);
    Engine::get().run(&all)
}

/// A container that runs detached; it is killed and removed when this is dropped.
struct Running {
    id: String,
}

impl Running {
    /// `ctr run --detach` of a script.
    #[track_caller]
    fn start(runtime: &str, words: &[&str], script: &str) -> Running {
        let id = fresh_id();
        let mut all = vec!["run", "--detach", "--runtime", runtime];
        all.extend(words);
        all.extend([IMAGE, &id, "/bin/sh", "-c", script]);
        Engine::get().ok(&all);
        Running { id }
    }

    /// STATUS of `ctr task ls`; `None`: no such task.
    fn status(&self) -> Option<String> {
        let listed = Engine::get().ok(&["task", "ls"]);
        let line = listed
            .lines()
            .find(|line| line.split_whitespace().next() == Some(&self.id))?;
        line.split_whitespace().nth(2).map(str::to_owned)
    }

    /// PID of `ctr task ls`.
    fn pid(&self) -> u32 {
        let listed = Engine::get().ok(&["task", "ls"]);
        let line = listed
            .lines()
            .find(|line| line.split_whitespace().next() == Some(&self.id))
            .expect("it is listed");
        let pid = line.split_whitespace().nth(1).expect("a pid");
        pid.parse().expect("a number")
    }

    /// `ctr task exec` of a script, to its end.
    fn exec(&self, script: &str) -> Ran {
        let exec_id = fresh_id();
        let words = [
            "task",
            "exec",
            "--exec-id",
            &exec_id,
            &self.id,
            "/bin/sh",
            "-c",
            script,
        ];
        Engine::get().run(&words)
    }

    /// `ctr task delete`; the status that it tells of.
    #[track_caller]
    fn delete_task(&self) -> i32 {
        let ran = Engine::get().run(&["task", "delete", &self.id]);
        assert_eq!(ran.status, 0, "{ran}");
        let errors = ran.errors();
        match errors.split_once("exit with non-zero exit code ") {
            Some((_, rest)) => {
                let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
                digits.parse().expect("a number")
            }
            None => 0,
        }
    }

    /// Kills and removes it; nothing of it may be left.
    #[track_caller]
    fn remove(self) {
        let engine = Engine::get();
        let _ = engine.run(&["task", "kill", "--signal", "SIGKILL", &self.id]);
        eventually("the task stops", || {
            self.status().is_none_or(|status| status == "STOPPED")
        });
        // containerd itself deletes the task of a shim that has died.
        if self.status().is_some() {
            engine.run(&["task", "delete", &self.id]);
        }
        engine.ok(&["container", "delete", &self.id]);
    }
}

/// Waits for something that must come.
#[track_caller]
fn eventually(what: &str, happened: impl FnMut() -> bool) {
    bulkhead_tests::eventually(what, happened, || {
        format!("--- containerd\n{}", tail(&Engine::get().log()))
    });
}

/// Pids of the processes whose command line has all these words, children of this test's containerd or not.
fn processes(words: &[&str]) -> Vec<i32> {
    let text = run(Command::new("ps").args(["-eo", "pid=,args="])).ok();
    let matching = text
        .lines()
        .filter(|line| words.iter().all(|word| line.contains(word)));
    matching
        .filter_map(|line| line.split_whitespace().next()?.parse().ok())
        .collect()
}

/// The shim of a container, which is not the process behind its pid.
fn shim_of(running: &Running) -> i32 {
    let stub = running.pid() as i32;
    let shims = processes(&["containerd-shim-bulkhead-v1", &running.id]);
    let shim = shims.into_iter().find(|pid| *pid != stub);
    shim.expect("it lives as long as its container")
}

/// The cgroup of a process on the host.
fn cgroup_of(pid: i32) -> PathBuf {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("it runs");
    let path = text.trim().strip_prefix("0::/").expect("cgroup v2");
    Path::new("/sys/fs/cgroup").join(path)
}

/// The cgroup of the one pod that runs: its machine is in a group beneath.
fn pods_cgroup() -> PathBuf {
    let found = processes(&["bulkhead-vmm run"]);
    assert_eq!(found.len(), 1, "one machine, not {found:?}");
    let machine = cgroup_of(found[0]);
    assert!(machine.ends_with("machine"), "{}", machine.display());
    machine.parent().expect("the pod's").to_path_buf()
}

/// Proportional set size of a process, in KiB.
fn pss_kib(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.expect("proc(5)").parse().expect("a number")
}
