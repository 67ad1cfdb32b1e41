//! What each role of the binary gives up, for good, before it serves a guest.
//!
//! The shim starts both roles as PID 1 of new mount, PID, network, IPC, UTS and cgroup namespaces,
//! with uid 0 and with descriptor 3. [`close_inherited`] comes first in `main`. A role's `enter`
//! comes when everything that needs a path or a privilege is done and before there is a second
//! thread. It is the list of the role's steps, in order:
//!
//! | [`vmm`] | [`fs`] |
//! | --- | --- |
//! | limits: few descriptors, no core dumps, no file may grow, no more threads than the machine has | no core dumps |
//! | the root becomes an empty read-only tmpfs | the root becomes a read-only tmpfs with the share and a `/proc` of this process |
//! | a user namespace in which the pod's user and group are all there is | a user namespace in which everybody is who they are |
//! | no capability in the bounding set, users and groups of the pod's, no capability | the capabilities that serving files needs |
//! | no_new_privs, not dumpable | no_new_privs, not dumpable |
//! | Landlock: no file, no TCP, no socket or process of others | Landlock: the files of the share, reading `/proc`; else as there |
//!
//! [`steps`] has each step once. What a step refuses to do ends the process: it is half jailed
//! then. A filter of system calls for each thread closes what remains ([`crate::seccomp`]).

pub mod fs;
pub mod steps;
pub mod user_namespace;
pub mod vmm;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};

use thiserror::Error;

pub use self::vmm::enter;

/// A step of the jail failed; the process must not go on.
#[derive(Debug, Error)]
pub enum JailError {
    /// Not started as it must be: what follows would change the host's own mounts.
    #[error("not started by the shim: this process is no PID 1 of a namespace of its own")]
    NotIsolated,
    /// The kernel has no Landlock, and nobody has accepted that.
    #[error(
        "Landlock is missing: this host's kernel {0}. Boot Linux 6.1 or newer with landlock in its list of security modules (lsm=landlock,…), or accept it in the configuration: accept_missing = [\"landlock\"]"
    )]
    NoLandlock(String),
    /// A system call failed.
    #[error("entering the jail failed: {step}")]
    Step {
        /// What was tried.
        step: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Names the step that an error ends.
fn step<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Step {
        step: step.into(),
        source: source.into(),
    }
}

fn check(result: libc::c_int, what: &'static str) -> Result<(), JailError> {
    if result < 0 {
        return Err(step(what)(io::Error::last_os_error()));
    }
    Ok(())
}

/// Closes every descriptor but `keep`, and opens 0, 1 and 2 on `/dev/null`.
///
/// # Errors
/// `/dev/null` is missing, or close_range(2) (Linux 5.9).
///
/// # Safety
/// Nothing in the process owns a descriptor other than `keep` yet.
pub unsafe fn close_inherited(keep: libc::c_int) -> Result<(), JailError> {
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(step("open /dev/null"))?;
    for standard in 0..3 {
        // SAFETY: the caller says that nobody owns what 0 to 2 refer to.
        let result = unsafe { libc::dup2(null.as_raw_fd(), standard) };
        check(result, "replace standard streams")?;
    }
    // Closed with the rest, unless it became one of the three itself.
    let _ = null.into_raw_fd();
    for (first, last) in [(3, keep - 1), (keep + 1, libc::c_int::MAX)] {
        if first <= last {
            // SAFETY: the caller says that nobody owns these descriptors.
            let result = unsafe { libc::close_range(first as u32, last as u32, 0) };
            check(result, "close inherited descriptors")?;
        }
    }
    Ok(())
}

/// The name that `ps` shows for the calling thread.
pub fn set_name(name: &CStr) {
    // A name is only for people.
    let _ = nix::sys::prctl::set_name(name);
}

#[cfg(test)]
pub(crate) mod tests;
