use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, setresuid};

use linux::capability;

use super::*;
use crate::jail::tests::{ACCEPTED, expect, isolated};

mod landlock;

#[test]
fn nothing_is_left_inside() {
    isolated(|| {
        // Opened before, as the real process has only descriptors too.
        let proc = std::fs::File::open("/proc/self/status");
        enter((54321, 54322), 0, 1, ACCEPTED).map_err(|error| format!("{error:?}"))?;
        expect(shows_nothing("/"), "the root is not empty")?;
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
        expect(shows_nothing("."), "the parent of the root is not the root")?;
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
        // By system call: fork(3) would wait for locks that another thread of the test program held
        // when we were cloned.
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
        let namespace = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER);
        expect(namespace == Err(Errno::ENOSPC), "a user namespace")?;
        drop(proc);
        capabilities_are_zero()
    });
}

/// An empty directory, or one that Landlock does not open.
fn shows_nothing(directory: &str) -> bool {
    match std::fs::read_dir(directory) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.raw_os_error() == Some(libc::EACCES),
    }
}

/// By system calls, as /proc is gone.
fn capabilities_are_zero() -> Result<(), String> {
    expect(
        capability::get() == Ok(capability::Sets::default()),
        "capabilities are left",
    )?;
    for number in 0..=capability::LAST {
        expect(
            capability::is_bounding(number) != Some(true),
            "the bounding set is not empty",
        )?;
    }
    Ok(())
}

#[test]
fn outside_of_a_namespace_of_its_own_nothing_is_done() {
    assert!(matches!(
        enter((1000, 1000), 0, 1, ACCEPTED),
        Err(JailError::NotIsolated)
    ));
}
