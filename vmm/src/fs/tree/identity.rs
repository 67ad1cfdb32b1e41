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
//! Uid, gid, umask and working directory belong to a thread in Linux. A worker changes them by raw
//! system calls, because the C library's wrappers would change every thread, and remembers them,
//! because most requests come from the same caller as the one before.
#![forbid(unsafe_code)]

use std::io;
use std::marker::PhantomData;

use linux::{capability, thread};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::stat::Mode;

use super::sys::{FdName, Result};

/// The identity of the current thread; proof that the thread was set up to serve requests.
///
/// Its working directory is `/proc/self/fd`, so that [`FdName`] means something.
pub struct Worker {
    uid: u32,
    gid: u32,
    umask: u32,
    /// A thread's identity does not travel.
    here: PhantomData<*const ()>,
}

impl Worker {
    /// Makes the current thread a worker, for good.
    ///
    /// # Errors
    /// The thread is not root's, or `/proc` is missing.
    pub fn new() -> io::Result<Worker> {
        // First of all, so that umask and working directory are the thread's own.
        unshare(CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(c"/proc/self/fd")?;
        set_umask(0);
        thread::set_groups(&[])?;
        let bits = capability::secure_bits()?;
        if bits & capability::NO_SETUID_FIXUP == 0 {
            capability::set_secure_bits(bits | capability::NO_SETUID_FIXUP)?;
        }
        thread::set_gids(None, Some(0), None)?;
        thread::set_uids(None, Some(0), None)?;
        Ok(Worker {
            uid: 0,
            gid: 0,
            umask: 0,
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
            thread::set_uids(None, Some(uid), None)?;
            self.uid = uid;
            stay_undumpable()?;
        }
        let umask = umask & 0o777;
        if self.umask != umask {
            set_umask(umask);
            self.umask = umask;
        }
        Ok(())
    }

    fn change_group(&mut self, gid: u32) -> Result<()> {
        if gid == u32::MAX {
            return Err(Errno::EOVERFLOW);
        }
        if self.gid != gid {
            thread::set_gids(None, Some(gid), None)?;
            self.gid = gid;
            stay_undumpable()?;
        }
        Ok(())
    }
}

/// A change of ids gives the process back the dumpable attribute of `fs.suid_dumpable`, which
/// systemd-coredump sets to 2: root's core dumps are written (credentials are in prctl(2),
/// `PR_SET_DUMPABLE`).
fn stay_undumpable() -> Result<()> {
    prctl::set_dumpable(false)
}

/// The thread has a umask of its own.
fn set_umask(umask: u32) {
    nix::sys::stat::umask(Mode::from_bits_truncate(umask));
}
