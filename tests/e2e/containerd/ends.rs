//! However a pod ends, containerd learns it, truly and soon, and nothing is left.

use std::fs;
use std::time::Instant;

use bulkhead_tests::{BULKHEAD, Engine, Host, RUNC, SOON};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Running, eventually, guest, pods_cgroup, processes, shims_end};

fn kill_one(words: &[&str]) {
    let found = processes(words);
    assert_eq!(found.len(), 1, "one process with {words:?}, not {found:?}");
    kill(Pid::from_raw(found[0]), Signal::SIGKILL).expect("it runs");
}

/// Ends a running container by `end`; containerd has to see it stopped with `status` soon, and nothing may be left.
fn ends_with(words: &[&str], script: &str, statuses: &[i32], end: impl FnOnce(&Running)) -> String {
    let engine = Engine::get();
    let host = Host::now();
    let logged = engine.log().len();
    let running = Running::start(BULKHEAD, words, script);
    end(&running);
    let since = Instant::now();
    eventually("containerd sees the end", || {
        running.status().is_none_or(|status| status == "STOPPED")
    });
    let took = since.elapsed();
    if running.status().is_some() {
        let status = running.delete_task();
        assert!(statuses.contains(&status), "{status}");
    }
    running.remove();
    shims_end();
    host.assert_nothing_left();
    println!("containerd saw the end after {took:?}");
    assert!(took < SOON, "{took:?}");
    let log = engine.log()[logged..].to_owned();
    // An end goes ways that nothing else does, on every thread.
    assert!(!log.contains("its filter does not allow"), "{log}");
    log
}

#[test]
fn the_machines_process_is_killed() {
    ends_with(&[], "sleep 1000", &[137], |_| {
        kill_one(&["bulkhead-vmm run"])
    });
}

#[test]
fn the_file_shares_process_is_killed() {
    ends_with(&[], "sleep 1000", &[255], |_| {
        kill_one(&["bulkhead-vmm fs"])
    });
}

#[test]
fn the_process_behind_the_pid_is_killed() {
    ends_with(&[], "sleep 1000", &[137], |running| {
        kill(Pid::from_raw(running.pid() as i32), Signal::SIGKILL).expect("it runs");
    });
}

#[test]
fn the_guest_panics() {
    // A proc of its own, whose files are not read-only.
    let script =
        "sleep 2; mkdir /mnt; mount -t proc proc /mnt; echo c > /mnt/sysrq-trigger; sleep 1000";
    ends_with(&["--cap-add", "CAP_SYS_ADMIN"], script, &[255], |_| {
        eventually("the machine ends", || {
            processes(&["bulkhead-vmm run"]).is_empty()
        });
    });
}

/// Nothing in the guest can kill its PID 1: its code in the guest's memory becomes an instruction that no processor knows.
#[test]
fn the_agent_crashes() {
    let log = ends_with(&[], "sleep 1000", &[255], |running| {
        let vmm = processes(&["bulkhead-vmm run"])[0];
        let spoilt = guest::spoil(vmm, &guest::code_of_the_agent());
        assert!(spoilt > 0, "no page of the agent was found");
        // Whoever asks it next is told, and does not wait for ever.
        assert_ne!(running.exec("true").status, 0);
    });
    assert!(log.contains("Attempted to kill init"), "{log}");
}

#[test]
fn the_host_kills_the_machine_for_memory() {
    let listener = Engine::get().listen();
    ends_with(&[], "sleep 1000", &[137], |_| {
        let limit = pods_cgroup().join("machine/memory.max");
        fs::write(limit, "1M").expect("a limit below what it uses");
    });
    listener.wait_for_output("/tasks/oom");
    listener.signal(Signal::SIGINT);
    listener.finish();
}

/// No limit of the container's: all memory of the machine, of which there is little, or filling it takes a minute here.
#[test]
fn the_guest_runs_out_of_memory() {
    let small = tempfile::NamedTempFile::new().expect("a file");
    fs::write(&small, "memory_mib = 80\n").expect("it can be written");
    let small = small.path().to_str().expect("a plain path");
    let listener = Engine::get().listen();
    let script = "sleep 2; exec tail /dev/zero";
    let words = ["--runtime-config-path", small];
    let log = ends_with(&words, script, &[137], |running| {
        let events = fs::File::open(pods_cgroup().join("memory.events")).expect("a file");
        eventually("the kernel of the guest kills it", || {
            running.status().as_deref() == Some("STOPPED")
        });
        // The host's ceiling is above the machine: nobody came to it.
        match std::io::read_to_string(events) {
            Ok(text) => assert!(text.contains("\nmax 0\noom 0\noom_kill 0\n"), "{text}"),
            Err(error) => assert_eq!(error.raw_os_error(), Some(nix::libc::ENODEV), "{error}"),
        }
    });
    listener.wait_for_output("/tasks/oom");
    listener.signal(Signal::SIGINT);
    listener.finish();
    assert!(!log.contains("the pod cannot go on"), "{log}");
}

#[test]
fn the_shim_is_killed() {
    ends_with(&[], "sleep 1000", &[137], |running| {
        let shims = processes(&["containerd-shim-bulkhead-v1", &running.id]);
        let stub = running.pid() as i32;
        for pid in shims.iter().filter(|pid| **pid != stub) {
            kill(Pid::from_raw(*pid), Signal::SIGKILL).expect("it runs");
        }
    });
}

#[test]
fn running_out_of_memory_is_told() {
    for runtime in [RUNC, BULKHEAD] {
        let listener = Engine::get().listen();
        let script = "sleep 1; exec dd if=/dev/zero of=/dev/null bs=200M count=1";
        let running = Running::start(runtime, &["--memory-limit", "33554432"], script);
        eventually("it is killed", || {
            running.status().as_deref() == Some("STOPPED")
        });
        assert_eq!(running.delete_task(), 137, "{runtime}");
        listener.wait_for_output("/tasks/delete");
        listener.signal(Signal::SIGINT);
        let events = listener.finish().text();
        let position = |topic: &str| events.find(topic);
        // runc's shim hears of it beside the exit and loses it now and then, with the cgroup that it watches: nothing to
        // be compared with.
        if runtime == BULKHEAD {
            let told = position("/tasks/oom").expect("it was out of memory");
            assert!(Some(told) < position("/tasks/exit"), "{events}");
        }
        running.remove();
    }
}

#[test]
fn a_machine_that_hangs_is_killed_in_the_end() {
    Engine::get();
    let host = Host::now();
    let running = Running::start(BULKHEAD, &[], "sleep 1000");
    for pid in processes(&["bulkhead-vmm run"]) {
        kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("it runs");
    }
    // What containerd asks is answered all the same.
    assert_eq!(running.status().as_deref(), Some("RUNNING"));
    running.remove();
    shims_end();
    host.assert_nothing_left();
}
