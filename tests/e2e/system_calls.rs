//! The lists of system calls beside what a run really makes: nothing is on them for nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use bulkhead_tests::{Bundle, Netns, Runtime, Started, run};
use tempfile::TempDir;

use crate::templates::Node;

/// Every kind of request of files that a program makes; without an interpreter's own.
const WORK: &str = r#"
import os, socket, subprocess, sys
os.mkdir("/w"); os.chdir("/w")
with open("a", "w") as file: file.write("x" * 200000)
with open("a", "a") as file: file.write("more")
with open("a") as file: file.read()
os.link("a", "b"); os.symlink("a", "c"); os.readlink("c"); os.rename("b", "d")
os.chmod("a", 0o2755); os.chown("a", 1, 2); os.utime("a", (1, 1)); os.truncate("a", 100)
os.mkfifo("p"); socket.socket(socket.AF_UNIX).bind("s")
fd = os.open("d", os.O_RDWR); os.ftruncate(fd, 50); os.posix_fallocate(fd, 0, 8192); os.fsync(fd); os.fdatasync(fd)
os.lseek(fd, 0, os.SEEK_DATA); other = os.open("e", os.O_RDWR | os.O_CREAT); os.copy_file_range(fd, other, 100)
os.setxattr("a", "user.x", b"1"); os.getxattr("a", "user.x"); os.listxattr("a"); os.removexattr("a", "user.x")
os.statvfs("."); os.sync(); os.listdir("/usr/bin"); os.close(other); os.close(fd)
def other_user():
    os.setgid(1000); os.setuid(1000); os.umask(0o027)
os.chmod(".", 0o777)
subprocess.run(["touch", "of-another"], preexec_fn=other_user, check=True)
open("shared", "w").close(); os.chmod("shared", 0o6777)
subprocess.run(["sh", "-c", "echo x >> shared"], preexec_fn=other_user, check=True)
with open("a", "r+") as file: file.write("set-id goes")
for name in os.listdir("."): os.unlink(name)
os.chdir("/"); os.rmdir("/w")
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(50): udp.sendto(b"x" * 1000, ("10.9.8.1", 9))
print("done")
"#;

/// Every role.
const ALL: &str = "vmm template device vcpu net fs-control fs-vhost fs-queue";

/// What is listed for what this run does not do: why it stays, whose it is, the calls.
const NOT_HERE: &[(&str, &str, &str)] = &[
    (
        "abort(3), the last word",
        ALL,
        "getpid gettid tgkill sendto writev",
    ),
    ("the process is stopped and goes on", ALL, "restart_syscall"),
    ("a clock in the vDSO", ALL, "clock_gettime"),
    (
        "what the allocator, locks and the log may do at any time",
        ALL,
        "brk mmap mprotect munmap mremap madvise futex close write getrandom",
    ),
    (
        "how threads and processes end",
        ALL,
        "exit exit_group rt_sigprocmask sigaltstack",
    ),
    ("a kick that comes late", "vcpu", "rt_sigreturn"),
    (
        "KVM gives its counters where it has them",
        "vmm template vcpu",
        "pread64",
    ),
    ("a tap that is plugged", "vmm", "ioctl fcntl"),
    (
        "memory that comes back some seconds after it is free",
        "vmm template",
        "fallocate",
    ),
    (
        "a driver that changes offloads or queues",
        "net",
        "ioctl clock_nanosleep",
    ),
    (
        "a rate limit",
        "device net",
        "timerfd_create timerfd_settime",
    ),
    (
        "a driver that starts a device again at once",
        "device",
        "clock_nanosleep",
    ),
    ("a queue of the device that is reset", "device", "read"),
    (
        "a stream that is open when the device is reset",
        "device",
        "shutdown recvfrom",
    ),
    ("a tap that is full, a pair that stops", "net", "epoll_ctl"),
    (
        "offers that come later, streams that end early",
        "vmm template",
        "getsockname getsockopt recvfrom shutdown",
    ),
    (
        "a stream that the guest's answers go to",
        "template",
        "sendto sendmsg",
    ),
    (
        "a tree that is detached",
        "fs-control",
        "openat statx readlinkat lseek read",
    ),
    (
        "a request of the shim's, or its end",
        "fs-control",
        "recvmsg",
    ),
    ("a file that only a path leads to", "fs-queue", "truncate"),
    ("a page that a template lends", "fs-vhost fs-queue", "read"),
];

/// Role and call of each line of `bulkhead-vmm calls`.
fn listed() -> BTreeMap<String, BTreeSet<String>> {
    let program = "/usr/local/libexec/bulkhead/bulkhead-vmm";
    let text = run(Command::new(program).arg("calls")).ok();
    let mut lists: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split('\t');
        let (role, call) = (words.next(), words.next());
        let (role, call) = (role.expect("a role"), call.expect("a call"));
        assert!(
            words.next_back().is_some_and(|why| !why.is_empty()),
            "{line}"
        );
        lists
            .entry(role.to_owned())
            .or_default()
            .insert(call.to_owned());
    }
    lists
}

/// The role of a thread by its name.
fn role(name: &str) -> Option<&'static str> {
    match name.trim_end_matches(|last: char| last.is_ascii_digit()) {
        "bulkhead-vmm" => Some("vmm"),
        "device" => Some("device"),
        "vcpu" => Some("vcpu"),
        "net-" => Some("net"),
        "bulkhead-fs" => Some("fs-control"),
        "fs-vhost" => Some("fs-vhost"),
        "fs-queue-" => Some("fs-queue"),
        _ => None,
    }
}

/// What each role called after it had its filter; `trace` has a file for each thread, by strace. `main` is the role
/// of the VMM's first thread.
fn used(trace: &Path, main: &'static str, used: &mut BTreeMap<String, BTreeSet<String>>) {
    for entry in fs::read_dir(trace).expect("strace wrote files") {
        let path = entry.expect("it is readable").path();
        let text = String::from_utf8_lossy(&fs::read(path).expect("it is readable")).into_owned();
        let Some((before, after)) = text.split_once("SECCOMP_SET_MODE_FILTER") else {
            continue;
        };
        let name = before.rsplit_once("PR_SET_NAME, \"").map(|(_, rest)| rest);
        let name = name.and_then(|rest| rest.split('"').next());
        let Some(role) = name.and_then(role) else {
            continue;
        };
        let role = if role == "vmm" { main } else { role };
        let calls = after
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once('('));
        let calls = calls.map(|(call, _)| call.to_owned());
        used.entry(role.to_owned())
            .or_default()
            .extend(calls.filter(|call| {
                call.chars()
                    .all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
            }));
    }
}

/// strace over a command, a file for each thread in `trace`.
fn traced(trace: &TempDir, plain: &Command) -> Command {
    let mut traced = Command::new("strace");
    traced.args(["-f", "-ff", "-o"]).arg(trace.path().join("t"));
    traced.arg(plain.get_program()).args(plain.get_args());
    traced
}

fn trace() -> TempDir {
    TempDir::with_prefix("trace-").expect("a temporary directory")
}

#[test]
fn what_is_listed_is_used() {
    let (pod, peer) = (Netns::new(), Netns::new());
    pod.wire("eth0", &peer, "peer0");
    pod.ip("addr add 10.9.8.2/24 dev eth0");
    peer.ip("addr add 10.9.8.1/24 dev peer0");
    let caps = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_FSETID",
    ];
    let bundle =
        Bundle::debian()
            .network(&pod)
            .capabilities(&caps)
            .args(&["/usr/bin/python3", "-c", WORK]);
    bundle.write();
    let plain = Runtime::Bulkhead.run_command(bundle.path(), &[], "traced");
    let pods = trace();
    let ran = Started::spawn(traced(&pods, &plain)).finish();
    assert_eq!(ran.ok(), "done");
    let templates = trace();
    let node = Node::new("built");
    let build = node.command(&["template", "build", "--run"]);
    let made = Started::spawn(traced(&templates, &build)).finish().ok();
    assert!(made.ends_with(": made"), "{made}");

    let mut used = BTreeMap::new();
    self::used(pods.path(), "vmm", &mut used);
    self::used(templates.path(), "template", &mut used);
    let reason = |role: &str, call: &str| {
        let has = |words: &str, word: &str| words.split(' ').any(|other| other == word);
        let found = NOT_HERE
            .iter()
            .find(|(_, roles, calls)| has(roles, role) && has(calls, call));
        found.map(|(why, _, _)| *why)
    };
    let mut without_reason = Vec::new();
    for (role, calls) in listed() {
        let mine = used
            .get(&role)
            .unwrap_or_else(|| panic!("no thread {role} was traced"));
        for call in calls {
            let state = match (mine.contains(&call), reason(&role, &call)) {
                (true, _) => "used",
                (false, Some(why)) => why,
                (false, None) => {
                    without_reason.push(format!("{role} {call}"));
                    "NOT USED"
                }
            };
            println!("{role:10} {call:18} {state}");
        }
    }
    assert!(
        without_reason.is_empty(),
        "listed, not used, no reason: {without_reason:?}"
    );
}
