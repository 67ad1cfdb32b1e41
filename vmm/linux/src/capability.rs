//! What a thread may do (capabilities(7)). All of it concerns the calling thread and those that it
//! starts later.

use nix::Result;
use nix::errno::Errno;

use crate::done;

/// The highest number that a 64-bit set can hold.
pub const LAST: u32 = 63;

/// Changes of user ids change no capability.
pub const NO_SETUID_FIXUP: u32 = libc::SECBIT_NO_SETUID_FIXUP as u32;

/// The sets that capset(2) takes; bit N is capability N.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    /// Used in permission checks.
    pub effective: u64,
    /// The limit of the effective set.
    pub permitted: u64,
    /// Kept over execve where the file agrees.
    pub inheritable: u64,
}

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3` of the calling thread: the sets come in two halves.
const HEADER: Header = Header {
    version: 0x2008_0522,
    pid: 0,
};

/// capget(2).
///
/// # Errors
/// None that a kernel with capabilities gives.
pub fn get() -> Result<Sets> {
    let mut header = HEADER;
    let mut halves = [Half::default(); 2];
    // SAFETY: version 3 reads the header and writes exactly two halves; both outlive the call.
    done(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, halves.as_mut_ptr()) })?;
    let join = |of: fn(&Half) -> u32| u64::from(of(&halves[0])) | u64::from(of(&halves[1])) << 32;
    Ok(Sets {
        effective: join(|half| half.effective),
        permitted: join(|half| half.permitted),
        inheritable: join(|half| half.inheritable),
    })
}

/// capset(2). The kernel ignores bits beyond its last capability.
///
/// # Errors
/// `EPERM`: the sets have something that the thread may not add.
pub fn set(sets: Sets) -> Result<()> {
    let mut header = HEADER;
    let halves = [0, 32].map(|shift| Half {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    });
    // SAFETY: version 3 reads the header and exactly two halves; both outlive the call.
    done(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, halves.as_ptr()) })
}

/// prctl(2) with numbers.
fn prctl(option: libc::c_int, arg2: libc::c_ulong, arg3: libc::c_ulong) -> Result<i32> {
    const NONE: libc::c_ulong = 0;
    // SAFETY: the options of this module take numbers only.
    Errno::result(unsafe { libc::prctl(option, arg2, arg3, NONE, NONE) })
}

/// Whether the bounding set has a capability; `None` where the kernel knows none of this number,
/// nor of a higher one.
pub fn is_bounding(capability: u32) -> Option<bool> {
    let known = prctl(libc::PR_CAPBSET_READ, capability.into(), 0).ok()?;
    Some(known == 1)
}

/// Takes from the bounding set what `kept` does not have.
///
/// # Errors
/// `EPERM` without CAP_SETPCAP, and the capability that could not be dropped.
pub fn limit_bounding(kept: u64) -> std::result::Result<(), (u32, Errno)> {
    for capability in 0..=LAST {
        match is_bounding(capability) {
            None => break,
            Some(true) if kept & 1 << capability == 0 => {
                prctl(libc::PR_CAPBSET_DROP, capability.into(), 0)
                    .map_err(|errno| (capability, errno))?;
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Empties the ambient set.
///
/// # Errors
/// None on Linux 4.3 and later.
pub fn clear_ambient() -> Result<()> {
    let all = libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong;
    prctl(libc::PR_CAP_AMBIENT, all, 0).map(drop)
}

/// Adds to the ambient set.
///
/// # Errors
/// `EPERM`: the capability is not permitted and inheritable, or securebits forbid it.
pub fn raise_ambient(capability: u32) -> Result<()> {
    let raise = libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong;
    prctl(libc::PR_CAP_AMBIENT, raise, capability.into()).map(drop)
}

/// The securebits (`SECBIT_*`).
///
/// # Errors
/// None that a kernel with capabilities gives.
pub fn secure_bits() -> Result<u32> {
    prctl(libc::PR_GET_SECUREBITS, 0, 0).map(|bits| bits as u32)
}

/// Sets the securebits, all of them.
///
/// # Errors
/// `EPERM` without CAP_SETPCAP, or one of them is locked.
pub fn set_secure_bits(bits: u32) -> Result<()> {
    prctl(libc::PR_SET_SECUREBITS, bits.into(), 0).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_written_as_they_were_read() {
        let sets = get().unwrap();
        assert_eq!(sets.effective & !sets.permitted, 0);
        // What a thread has it may set again.
        set(sets).unwrap();
        assert_eq!(get().unwrap(), sets);
    }

    #[test]
    fn the_bounding_set_ends_with_the_kernels_last_capability() {
        let last = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap").unwrap();
        let last: u32 = last.trim().parse().unwrap();
        assert!(is_bounding(last).is_some());
        assert_eq!(is_bounding(last + 1), None);
    }
}
