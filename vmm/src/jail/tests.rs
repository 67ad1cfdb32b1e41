use super::*;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// Runs `inside` as PID 1 of namespaces of its own, as the shim starts us. `None` where this may not be done, said loudly.
pub(crate) fn isolated(inside: fn() -> Result<(), String>) -> Option<Result<(), String>> {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    // Not clone(2) at once: fork(3) alone leaves the child an allocator whose locks no other thread of the test program holds.
    // SAFETY: the child works on what it has a copy of, and leaves by _exit.
    let pid = match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let code = match nix::sched::unshare(namespaces) {
                Ok(()) => in_namespaces(inside, &writer),
                Err(_) => NO_NAMESPACES,
            };
            // SAFETY: ends the fork without running the test harness' own end.
            unsafe { libc::_exit(code) }
        }
    };
    drop(writer);
    let text = io::read_to_string(std::fs::File::from(reader)).unwrap();
    let ended = waitpid(pid, None);
    if ended == Ok(WaitStatus::Exited(pid, NO_NAMESPACES)) {
        eprintln!("SKIPPED: namespaces cannot be made");
        return None;
    }
    assert_eq!(ended, Ok(WaitStatus::Exited(pid, 0)), "{text}");
    Some(if text.is_empty() { Ok(()) } else { Err(text) })
}

/// What the child that could not make namespaces exits with.
const NO_NAMESPACES: i32 = 42;

/// Runs it in a child, which is PID 1 there; its exit code.
fn in_namespaces(inside: fn() -> Result<(), String>, output: &std::os::fd::OwnedFd) -> i32 {
    // SAFETY: as in `isolated`; this process has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            let text = inside().err().unwrap_or_default();
            // SAFETY: the pointer and the length are those of `text`; the rest of this process is not run.
            unsafe {
                libc::write(output.as_raw_fd(), text.as_ptr().cast(), text.len());
                libc::_exit(0)
            }
        }
        Ok(ForkResult::Parent { child }) => match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, code)) => code,
            _ => 1,
        },
        Err(_) => 1,
    }
}

fn expect(condition: bool, what: &str) -> Result<(), String> {
    condition.then_some(()).ok_or_else(|| what.to_owned())
}

#[test]
fn nothing_is_left_inside() {
    let outcome = isolated(|| {
        // Opened before, as the real process has only descriptors too.
        let proc = std::fs::File::open("/proc/self/status");
        enter(54321, 54322, 0, 1).map_err(|error| format!("{error:?}"))?;
        let listing: Vec<_> = std::fs::read_dir("/").map_err(|e| e.to_string())?.collect();
        expect(listing.is_empty(), "the root is not empty")?;
        expect(
            std::fs::File::open("/proc/self/status").is_err(),
            "/proc is reachable",
        )?;
        expect(std::fs::write("/x", "").is_err(), "the root can be written")?;
        expect(
            std::fs::create_dir("/x").is_err(),
            "directories can be made",
        )?;
        expect(
            std::env::set_current_dir("..").is_ok(),
            "the root has a parent",
        )?;
        let above: Vec<_> = std::fs::read_dir(".").map_err(|e| e.to_string())?.collect();
        expect(above.is_empty(), "the parent of the root is not the root")?;
        let ids = nix::unistd::getresuid().map_err(|e| e.to_string())?;
        expect(
            [ids.real, ids.effective, ids.saved] == [Uid::from_raw(54321); 3],
            "user ids",
        )?;
        let ids = nix::unistd::getresgid().map_err(|e| e.to_string())?;
        expect(
            [ids.real, ids.effective, ids.saved] == [Gid::from_raw(54322); 3],
            "group ids",
        )?;
        let groups = nix::unistd::getgroups().map_err(|e| e.to_string())?;
        expect(groups.is_empty(), "supplementary groups")?;
        expect(
            setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).is_err(),
            "back to root",
        )?;
        expect(
            mount(
                Some("x"),
                "/",
                Some("tmpfs"),
                MsFlags::empty(),
                None::<&str>,
            )
            .is_err(),
            "mounting",
        )?;
        expect(
            prctl::get_no_new_privs() == Ok(true) && prctl::get_dumpable() == Ok(false),
            "no_new_privs and dumpable",
        )?;
        let (soft, hard) =
            nix::sys::resource::getrlimit(Resource::RLIMIT_CORE).map_err(|e| e.to_string())?;
        expect((soft, hard) == (1, 1), "core dumps")?;
        // SAFETY: were a child made, it would have a copy of this memory, and leave at once.
        let forked = unsafe {
            libc::syscall(
                libc::SYS_clone,
                i64::from(libc::SIGCHLD),
                0_i64,
                0_i64,
                0_i64,
                0_i64,
            )
        };
        if forked == 0 {
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) };
        }
        expect(
            forked < 0 && Errno::last() == Errno::EAGAIN,
            "another process than the limit has",
        )?;
        drop(proc);
        capabilities_are_zero()
    });
    if let Some(outcome) = outcome {
        outcome.unwrap();
    }
}

/// By capget(2) and the bounding set, as /proc is gone.
fn capabilities_are_zero() -> Result<(), String> {
    let header = CapHeader {
        version: 0x2008_0522,
        pid: 0,
    };
    let mut data = [CapData {
        effective: 1,
        permitted: 1,
        inheritable: 1,
    }; 2];
    // SAFETY: both pointers are to structures of the layout that capget(2) wants, alive during the call.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) };
    expect(result == 0, "capget")?;
    let none = |data: &CapData| (data.effective | data.permitted | data.inheritable) == 0;
    expect(data.iter().all(none), "capabilities are left")?;
    for capability in 0..=last_capability() {
        // SAFETY: the call takes plain numbers.
        let bounding = unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) };
        expect(bounding == 0, "the bounding set is not empty")?;
    }
    Ok(())
}

#[test]
fn outside_of_a_namespace_of_its_own_nothing_is_done() {
    assert!(matches!(
        enter(1000, 1000, 0, 1),
        Err(JailError::NotIsolated)
    ));
}

#[test]
fn only_the_kept_descriptor_survives() {
    let outcome = isolated(|| {
        for _ in 0..20 {
            // SAFETY: the call takes plain numbers.
            expect(unsafe { libc::dup(1) } >= 0, "dup")?;
        }
        // The test's pipe is behind it: report through a kept copy.
        // SAFETY: this is a process of its own that ends without using any other descriptor.
        unsafe {
            close_inherited(5).map_err(|error| error.to_string())?;
            for fd in 0..64 {
                let open = libc::fcntl(fd, libc::F_GETFD) >= 0;
                if open != (fd < 3 || fd == 5) {
                    libc::_exit(100 + fd);
                }
            }
        }
        Ok(())
    });
    if let Some(outcome) = outcome {
        outcome.unwrap();
    }
}
