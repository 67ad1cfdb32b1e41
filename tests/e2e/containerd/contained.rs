//! A VMM or an fs process that fell to its guest: it holds up nobody, and has little of the host's to hold.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::{BULKHEAD, Engine, Host, IMAGE, fresh_id, run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::{Running, eventually, pods, processes, shim_of, shims_end};

/// What a removal must be done in, with all that a stopped process can hold up: a handful of waits of 10 s, on an emulated host that
/// others keep busy. Without an end there is none.
const BOUND: Duration = Duration::from_secs(150);

fn the_one(words: &[&str]) -> i32 {
    let found = processes(words);
    assert_eq!(found.len(), 1, "one process with {words:?}, not {found:?}");
    found[0]
}

/// The threads of a process.
fn threads(pid: i32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    entries
        .map(|entry| {
            let name = entry.expect("it is readable").file_name();
            name.to_str().and_then(|name| name.parse().ok())
        })
        .map(|thread| thread.expect("proc(5): a number"))
        .collect()
}

/// Makes a thread that waits in a system call make another one, as whoever has taken it over would.
fn force_call(thread: i32, call: i64) {
    use nix::libc;
    /// The length of the instruction `syscall`.
    const SYSCALL: u64 = 2;
    let nothing = std::ptr::null_mut::<libc::c_void>();
    let ptrace = |request, data: *mut libc::c_void| {
        // SAFETY: `data` is null, or points to registers that are alive.
        let result = unsafe { libc::ptrace(request, thread, nothing, data) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    };
    ptrace(libc::PTRACE_ATTACH, nothing);
    let mut status = 0;
    // SAFETY: the status is alive.
    let stopped = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) };
    assert!(stopped == thread && libc::WIFSTOPPED(status), "{status:#x}");
    // SAFETY: the registers are integers; zero is a valid value of each.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETREGS, (&raw mut registers).cast());
    registers.rip -= SYSCALL;
    registers.rax = call as u64;
    // The call that was interrupted is not taken up again.
    registers.orig_rax = u64::MAX;
    ptrace(libc::PTRACE_SETREGS, (&raw mut registers).cast());
    ptrace(libc::PTRACE_DETACH, nothing);
}

#[test]
fn a_call_that_a_thread_has_no_use_for_ends_the_pod_and_is_named() {
    Engine::get();
    for (role, thread, named, call, number) in [
        ("run", "vcpu0", "vcpu", "execve", nix::libc::SYS_execve),
        (
            "run",
            "bulkhead-vmm",
            "vmm",
            "socket",
            nix::libc::SYS_socket,
        ),
        (
            "fs",
            "fs-queue-1",
            "fs-queue",
            "open_by_handle_at",
            nix::libc::SYS_open_by_handle_at,
        ),
        ("fs", "fs-vhost", "fs-vhost", "mount", nix::libc::SYS_mount),
    ] {
        let host = Host::now();
        let running = Running::start(BULKHEAD, &[], "sleep 1000");
        let pid = the_one(&[&format!("bulkhead-vmm {role}")]);
        let name = |tid: &i32| fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm"));
        let found = threads(pid).into_iter();
        let mut found = found.filter(|tid| name(tid).is_ok_and(|name| name.trim() == thread));
        force_call(found.next().expect("the thread is there"), number);
        eventually("the process ends", || {
            processes(&[&format!("bulkhead-vmm {role}")]).is_empty()
        });
        let words =
            format!("the {named} thread was stopped: it made the system call {call} ({number})");
        eventually("the log names the call", || {
            Engine::get().log().contains(&words)
        });
        running.remove();
        shims_end();
        host.assert_nothing_left();
    }
}

/// What `bulkhead events` has of a pod, as programs read it.
fn events(pod: &str) -> Vec<Value> {
    let mut command = Command::new("bulkhead");
    let words = ["events", "--no-follow", "--json", "--pod", pod];
    let lines = run(command.args(words)).ok();
    let lines = lines.lines();
    lines
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

fn of_kind<'a>(events: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    events.iter().filter(move |event| event["kind"] == kind)
}

#[test]
fn the_audit_log_has_a_pods_layers_its_blocked_call_and_its_end() {
    Engine::get();
    let host = Host::now();
    let running = Running::start(BULKHEAD, &[], "sleep 1000");
    let id = running.id.clone();
    eventually("the layers are told", || {
        of_kind(&events(&id), "layers").count() == 2
    });
    for layers in of_kind(&events(&id), "layers") {
        assert!(
            layers["landlock"].as_u64().is_some_and(|abi| abi >= 2),
            "{layers}"
        );
        assert!(
            layers["threads"].as_u64().is_some_and(|all| all > 0),
            "{layers}"
        );
        assert_eq!(layers["threads"], layers["filtered"], "{layers}");
        assert_eq!(layers["user_namespace"], true, "{layers}");
        assert_eq!(layers["namespace"], "default", "{layers}");
    }
    let pid = the_one(&["bulkhead-vmm run"]);
    let vcpu = threads(pid).into_iter().find(|tid| {
        let name = fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm"));
        name.is_ok_and(|name| name.trim() == "vcpu0")
    });
    force_call(vcpu.expect("it has a processor"), nix::libc::SYS_execve);
    eventually("the end is told", || {
        of_kind(&events(&id), "guest_end").count() == 1
    });
    let told = events(&id);
    let blocked = of_kind(&told, "blocked").next().expect("it is told");
    assert_eq!(
        (&blocked["role"], &blocked["call"], &blocked["number"]),
        (
            &"vcpu".into(),
            &"execve".into(),
            &nix::libc::SYS_execve.into()
        )
    );
    let end = of_kind(&told, "guest_end").next().expect("it is told");
    assert_eq!(end["how"], "vmm_failed", "{end}");
    assert!(
        end["reason"]
            .as_str()
            .is_some_and(|why| why.contains("execve")),
        "{end}"
    );
    running.remove();
    shims_end();
    // One that is removed in peace.
    let running = Running::start(BULKHEAD, &[], "sleep 1000");
    let id = running.id.clone();
    running.remove();
    shims_end();
    let told = events(&id);
    let end = of_kind(&told, "guest_end").next().expect("it is told");
    assert_eq!(end["how"], "power_off", "{end}");
    assert_eq!(of_kind(&told, "blocked").count(), 0);
    // And one that there never was.
    let id = fresh_id();
    let words = ["run", "--rm", "--runtime", BULKHEAD];
    let host_pids = ["--with-ns", "pid:/proc/1/ns/pid", IMAGE, &id, "true"];
    let ran = Engine::get().run(&[&words[..], &host_pids].concat());
    assert_ne!(ran.status, 0, "{ran}");
    let _ = Engine::get().run(&["container", "delete", &id]);
    eventually("the refusal is told", || {
        of_kind(&events(&id), "refused").count() == 1
    });
    let told = events(&id);
    let refused = of_kind(&told, "refused").next().expect("it is told");
    let field = refused["field"].as_str().unwrap_or_default();
    assert!(field.contains("linux.namespaces"), "{refused}");
    shims_end();
    host.assert_nothing_left();
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
    // The shim has given up what it does not use.
    let status = read(shim_of(&running), "status");
    let set = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        let digits = line.and_then(|line| line.split_whitespace().nth(1));
        u64::from_str_radix(digits.expect("proc(5)"), 16).expect("a number")
    };
    assert_eq!((set("CapInh:"), set("CapAmb:")), (0, 0), "{status}");
    assert_eq!(set("CapEff:"), set("CapPrm:"), "{status}");
    assert_eq!(set("CapEff:").count_ones(), 16, "{status}");
    assert!(status.contains("Umask:\t0022"), "{status}");
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
    // No thread of theirs is without its filter of system calls.
    for pid in roles {
        for thread in threads(pid) {
            let status = read(pid, &format!("task/{thread}/status"));
            for line in ["Seccomp:\t2", "NoNewPrivs:\t1"] {
                assert!(status.lines().any(|found| found == line), "{status}");
            }
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
