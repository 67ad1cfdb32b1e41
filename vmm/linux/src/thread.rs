//! The ids of the calling thread. glibc's functions change those of every thread of the process;
//! these do not.

use nix::Result;

use crate::done;

/// setresuid(2): real, effective and saved uid; `None` leaves one as it is.
///
/// # Errors
/// `EPERM` without CAP_SETUID.
pub fn set_uids(real: Option<u32>, effective: Option<u32>, saved: Option<u32>) -> Result<()> {
    let [real, effective, saved] = [real, effective, saved].map(number);
    // SAFETY: takes numbers only.
    done(unsafe { libc::syscall(libc::SYS_setresuid, real, effective, saved) })
}

/// setresgid(2): real, effective and saved gid; `None` leaves one as it is.
///
/// # Errors
/// `EPERM` without CAP_SETGID.
pub fn set_gids(real: Option<u32>, effective: Option<u32>, saved: Option<u32>) -> Result<()> {
    let [real, effective, saved] = [real, effective, saved].map(number);
    // SAFETY: takes numbers only.
    done(unsafe { libc::syscall(libc::SYS_setresgid, real, effective, saved) })
}

/// -1, which is nobody's id, stands for no change.
fn number(id: Option<u32>) -> libc::c_long {
    id.unwrap_or(u32::MAX).into()
}

/// setgroups(2).
///
/// # Errors
/// `EPERM` without CAP_SETGID or in a user namespace that denies it.
pub fn set_groups(groups: &[u32]) -> Result<()> {
    // SAFETY: the kernel reads as many numbers as the slice has, which outlives the call.
    done(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })
}
