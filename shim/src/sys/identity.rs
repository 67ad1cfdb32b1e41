//! A thread that is another user to whoever asks.

use std::{io, thread};

use caps::{CapSet, Capability, CapsHashSet};

/// Does `work` with this effective uid and gid, no supplementary groups, and the right to reach every file.
///
/// Real and saved uid stay root's: nobody who has `uid` may signal or trace the thread.
pub fn as_user<T: Send + 'static>(
    uid: u32,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let inside = move || {
        become_user(uid)?;
        work()
    };
    let thread = thread::Builder::new().spawn(inside)?;
    let result = thread.join();
    result.unwrap_or_else(|_| Err(io::Error::other("the thread that dials panicked")))
}

/// By system call, unlike glibc's functions these change this thread alone, which ends right after.
fn become_user(uid: u32) -> io::Result<()> {
    const SAME: libc::c_long = -1;
    let id = libc::c_long::from(uid);
    // SAFETY: a list of no groups is read from nowhere.
    check(unsafe {
        libc::syscall(
            libc::SYS_setgroups,
            0 as libc::c_long,
            std::ptr::null::<libc::gid_t>(),
        )
    })?;
    // SAFETY: takes numbers only.
    check(unsafe { libc::syscall(libc::SYS_setresgid, SAME, id, SAME) })?;
    // SAFETY: takes numbers only.
    check(unsafe { libc::syscall(libc::SYS_setresuid, SAME, id, SAME) })?;
    // Leaving uid 0 has cleared the effective set, not the permitted one (capabilities(7)).
    let kept = CapsHashSet::from([Capability::CAP_DAC_OVERRIDE]);
    caps::set(None, CapSet::Effective, &kept).map_err(io::Error::other)
}

fn check(result: libc::c_long) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
