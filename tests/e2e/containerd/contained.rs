//! A VMM or an fs process that fell to its guest: it holds up nobody, and has little of the host's to hold.

use std::fs;
use std::time::{Duration, Instant};

use bulkhead_tests::{BULKHEAD, Engine, Host};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Running, pods, processes, shim_of, shims_end};

/// What a removal must be done in, with all that a stopped process can hold up: a handful of waits of 10 s, on an emulated host that
/// others keep busy. Without an end there is none.
const BOUND: Duration = Duration::from_secs(150);

fn the_one(words: &[&str]) -> i32 {
    let found = processes(words);
    assert_eq!(found.len(), 1, "one process with {words:?}, not {found:?}");
    found[0]
}

fn stop(role: &str) {
    let pid = the_one(&[&format!("bulkhead-vmm {role}")]);
    kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("it runs");
}

#[test]
fn a_stopped_process_holds_up_neither_kill_nor_delete() {
    Engine::get();
    for role in ["run", "fs"] {
        let host = Host::now();
        let running = Running::start(BULKHEAD, &[], "sleep 1000");
        stop(role);
        let since = Instant::now();
        running.remove();
        let took = since.elapsed();
        assert!(took < BOUND, "{role}: {took:?}");
        shims_end();
        host.assert_nothing_left();
    }
}

/// The member's Delete waits for the fs process, under the lock that the pod's end needs.
#[test]
fn a_stopped_fs_process_holds_up_neither_a_member_nor_the_pod() {
    Engine::get();
    let host = Host::now();
    let pod = pods::Pod::start(BULKHEAD, &[]);
    let member = pod.member(&["ipc", "uts", "network"], "sleep 1000");
    // It is in the guest's memory: its end needs no file.
    assert_eq!(member.exec("true").status, 0);
    stop("fs");
    let since = Instant::now();
    member.remove();
    let took = since.elapsed();
    assert!(took < BOUND, "the member: {took:?}");
    let since = Instant::now();
    pod.remove();
    let took = since.elapsed();
    assert!(took < BOUND, "the pod: {took:?}");
    host.assert_nothing_left();
}

#[test]
fn what_a_pods_processes_have_of_the_host_is_little() {
    Engine::get();
    let running = Running::start(BULKHEAD, &[], "sleep 1000");
    let stub = running.pid() as i32;
    let roles = ["run", "fs"].map(|role| the_one(&[&format!("bulkhead-vmm {role}")]));
    let read = |pid: i32, name: &str| {
        let path = format!("/proc/{pid}/{name}");
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    // The shim has containerd's score and one more; a container that says nothing has 0.
    let shim = read(shim_of(&running), "oom_score_adj");
    assert_ne!(shim.trim(), "0");
    for pid in [roles[0], roles[1], stub] {
        assert_eq!(read(pid, "oom_score_adj").trim(), "0");
    }
    // Even root of the host, which the fs process is, cannot write the program through them.
    for pid in roles {
        let exe = format!("/proc/{pid}/exe");
        let error = fs::File::options().write(true).open(exe).unwrap_err();
        // Some kernels say first that it runs.
        let refused = [nix::libc::EROFS, nix::libc::ETXTBSY].map(Some);
        assert!(refused.contains(&error.raw_os_error()), "{error}");
    }
    // What was put into the share after the jail was closed is data there.
    let mounts = read(roles[1], "mountinfo");
    let shared: Vec<&str> = mounts
        .lines()
        .filter(|line| {
            let point = line.split(' ').nth(4);
            point.is_some_and(|point| point.starts_with("/share/"))
        })
        .collect();
    assert!(!shared.is_empty(), "{mounts}");
    for line in shared {
        let options = line.split(' ').nth(5).expect("options");
        for word in ["nosuid", "nodev", "noexec", "nosymfollow"] {
            assert!(options.split(',').any(|option| option == word), "{line}");
        }
    }
    // In the guest they are what they are.
    let script = "ln -s /bin/busybox /busybox && cp /bin/busybox /busybox2 && chmod 4755 /busybox2 \
                  && /busybox true && /busybox2 true && echo all";
    assert_eq!(running.exec(script).ok(), "all");
    // Threads are counted: by the cgroup, and by the VMM's user.
    let cgroup = read(roles[0], "cgroup");
    let cgroup = cgroup.trim().strip_prefix("0::/").expect("cgroup v2");
    let limit = |name: &str| {
        let path = format!("/sys/fs/cgroup/{cgroup}/{name}");
        let text = fs::read_to_string(path).expect("the pids controller");
        text.trim().parse::<u64>().expect("a number")
    };
    assert!(limit("pids.max") < 256 && limit("pids.current") < limit("pids.max"));
    let limits = read(roles[0], "limits");
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max processes"));
    let most = line.and_then(|line| line.split_whitespace().nth(2));
    let most: u64 = most.expect("proc(5)").parse().expect("a number");
    assert!(most < 256, "{limits}");
    running.remove();
    shims_end();
}
