//! How a thread is scheduled, and what its process may take.

use nix::Result;

use crate::done;

/// `struct sched_attr` of sched_setattr(2), SCHED_ATTR_SIZE_VER0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Attributes {
    /// Size of this struct; set by [`set_attributes`].
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// For SCHED_OTHER and SCHED_BATCH.
    pub nice: i32,
    /// For SCHED_FIFO and SCHED_RR.
    pub priority: u32,
    /// ns, for SCHED_DEADLINE, as are the next two.
    pub runtime: u64,
    /// ns.
    pub deadline: u64,
    /// ns.
    pub period: u64,
}

/// sched_setattr(2) of the calling thread.
///
/// # Errors
/// `EINVAL`, `EPERM`, `EBUSY`.
pub fn set_attributes(mut attributes: Attributes) -> Result<()> {
    attributes.size = size_of::<Attributes>() as u32;
    // SAFETY: the kernel reads `size` bytes of a struct that outlives the call.
    done(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })
}

/// ioprio_set(2) of the calling thread; the class stands in the upper three of 16 bits.
///
/// # Errors
/// `EINVAL`, `EPERM`.
pub fn set_io_priority(value: u32) -> Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: takes numbers only.
    done(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) })
}

/// prlimit(2) of another process; `u64::MAX` is RLIM_INFINITY.
///
/// # Errors
/// `EINVAL`, `EPERM`, `ESRCH`.
pub fn set_limit_of(pid: i32, resource: u32, soft: u64, hard: u64) -> Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: reads a struct that outlives the call; the old limit is not asked for.
    done(unsafe { libc::prlimit64(pid, resource, &raw const limit, std::ptr::null_mut()) })
}
