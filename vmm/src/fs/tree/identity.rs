//! Who a request runs as.
//!
//! The guest's kernel checks permissions (`default_permissions`): modes, access control lists,
//! groups, user namespaces. It alone knows the caller's supplementary groups and capabilities, so
//! the host decides nothing by them: a worker keeps its own capabilities. It takes on the caller's
//! uid and gid, without supplementary groups (CVE-2022-0358), where it makes something, because
//! they decide whose the new object is and whose quota it takes. Only requests that make something
//! carry a uid and a gid (`ALLOW_IDMAP`). Opens, reads, writes and changes of attributes run as
//! whoever came before.
//!
//! Uid, gid, umask, working directory and capabilities belong to a thread in Linux. A worker changes them by raw system calls,
//! because the C library's wrappers would change every thread, and remembers them, because most requests come from the same
//! caller as the one before.

use std::io;
use std::marker::PhantomData;

use nix::errno::Errno;

use super::sys::{FdName, Result};

/// capabilities(7): keep set-id bits on writes and set the set-group-id bit for foreign groups.
const CAP_FSETID: u32 = 4;
/// capabilities(7): `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// capabilities(7): changing ids changes no capability.
const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The identity of the current thread; proof that the thread was set up to serve requests.
///
/// Its working directory is `/proc/self/fd`, so that [`FdName`] means something.
pub struct Worker {
    uid: u32,
    gid: u32,
    umask: u32,
    set_id: bool,
    capabilities: [CapData; 2],
    /// A thread's identity does not travel.
    here: PhantomData<*const ()>,
}

impl Worker {
    /// Makes the current thread a worker, for good.
    ///
    /// # Errors
    /// The thread is not root's, or `/proc` is missing.
    pub fn new() -> io::Result<Worker> {
        // SAFETY: these calls take no memory of ours but a constant path, and change only this thread's own state:
        // unshare first, so that umask and working directory are its own.
        unsafe {
            Errno::result(libc::unshare(libc::CLONE_FS))?;
            Errno::result(libc::chdir(c"/proc/self/fd".as_ptr()))?;
            libc::umask(0);
            Errno::result(libc::syscall(libc::SYS_setgroups, 0, 0))?;
            let bits = Errno::result(libc::prctl(libc::PR_GET_SECUREBITS))? as libc::c_ulong;
            if bits & SECBIT_NO_SETUID_FIXUP == 0 {
                let bits = bits | SECBIT_NO_SETUID_FIXUP;
                Errno::result(libc::prctl(libc::PR_SET_SECUREBITS, bits, 0, 0, 0))?;
            }
            Errno::result(libc::syscall(libc::SYS_setresgid, -1, 0, -1))?;
            Errno::result(libc::syscall(libc::SYS_setresuid, -1, 0, -1))?;
        }
        let capabilities = read_capabilities()?;
        Ok(Worker {
            uid: 0,
            gid: 0,
            umask: 0,
            set_id: capabilities[0].effective & 1 << CAP_FSETID != 0,
            capabilities,
            here: PhantomData,
        })
    }

    /// The name of a descriptor in this thread's working directory.
    pub fn name(&self, fd: std::os::fd::BorrowedFd<'_>) -> FdName {
        FdName::new(fd)
    }

    /// Takes on the caller of a request that makes something. The mode's set-group-id bit stays:
    /// the guest's kernel knows the caller's groups and has taken the bit away where the caller may
    /// not have it (Linux 6.0, `mode_strip_sgid`).
    pub fn become_caller(&mut self, uid: u32, gid: u32, umask: u32) -> Result<()> {
        // u32::MAX would leave the id of whoever was served before.
        if uid == u32::MAX {
            return Err(Errno::EOVERFLOW);
        }
        self.change_group(gid)?;
        if self.uid != uid {
            // SAFETY: no memory is passed; the raw call changes this thread only.
            Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, -1, uid, -1) })?;
            self.uid = uid;
            stay_undumpable()?;
        }
        let umask = umask & 0o777;
        if self.umask != umask {
            // SAFETY: no memory is passed; the thread has a umask of its own.
            unsafe { libc::umask(umask) };
            self.umask = umask;
        }
        self.keep_set_id()
    }

    fn change_group(&mut self, gid: u32) -> Result<()> {
        if gid == u32::MAX {
            return Err(Errno::EOVERFLOW);
        }
        if self.gid != gid {
            // SAFETY: no memory is passed; the raw call changes this thread only.
            Errno::result(unsafe { libc::syscall(libc::SYS_setresgid, -1, gid, -1) })?;
            self.gid = gid;
            stay_undumpable()?;
        }
        Ok(())
    }

    /// What follows keeps set-id bits, as the writes of root do.
    pub fn keep_set_id(&mut self) -> Result<()> {
        self.set_fsetid(true)
    }

    /// What follows clears set-id bits (`KILL_SUIDGID`) of a file of `group`. As a member of the
    /// group the worker leaves a set-group-id bit without the group's execute bit alone: it gives
    /// no rights.
    pub fn clear_set_id(&mut self, group: u32) -> Result<()> {
        self.change_group(group)?;
        self.set_fsetid(false)
    }

    /// What follows clears the set-group-id bit of an object of `group`, as for a caller outside of
    /// it.
    pub fn leave_group(&mut self, group: u32) -> Result<()> {
        self.change_group(u32::from(group == 0))?;
        self.set_fsetid(false)
    }

    fn set_fsetid(&mut self, keep: bool) -> Result<()> {
        if self.set_id == keep {
            return Ok(());
        }
        let mut wanted = self.capabilities;
        let bit = 1 << CAP_FSETID;
        if keep {
            wanted[0].effective |= bit & wanted[0].permitted;
        } else {
            wanted[0].effective &= !bit;
        }
        write_capabilities(&wanted)?;
        self.set_id = keep;
        Ok(())
    }
}

/// A change of ids gives the process back the dumpable attribute of `fs.suid_dumpable`, which
/// systemd-coredump sets to 2: root's core dumps are written (credentials are in prctl(2),
/// `PR_SET_DUMPABLE`).
fn stay_undumpable() -> Result<()> {
    // SAFETY: no memory is passed.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }).map(drop)
}

fn read_capabilities() -> Result<[CapData; 2]> {
    let mut header = CapHeader {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 reads the header and writes two elements.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    Ok(data)
}

fn write_capabilities(data: &[CapData; 2]) -> Result<()> {
    let mut header = CapHeader {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    // SAFETY: version 3 reads the header and two elements.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) })
        .map(drop)
}

/// Keeps only `mask` in this thread's permitted and effective sets, nothing inheritable.
pub fn limit_capabilities(mask: u64) -> Result<()> {
    let half = |low: u64| CapData {
        effective: low as u32,
        permitted: low as u32,
        inheritable: 0,
    };
    write_capabilities(&[half(mask), half(mask >> 32)])
}

/// Makes changes of uid leave capabilities alone, in this thread and those it starts.
pub fn detach_capabilities_from_ids() -> Result<()> {
    // SAFETY: no memory is passed.
    unsafe {
        let bits = Errno::result(libc::prctl(libc::PR_GET_SECUREBITS))? as libc::c_ulong;
        let bits = bits | SECBIT_NO_SETUID_FIXUP;
        Errno::result(libc::prctl(libc::PR_SET_SECUREBITS, bits, 0, 0, 0)).map(drop)
    }
}
