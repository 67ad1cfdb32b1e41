//! What the process gives up before the guest's first instruction.
//!
//! The shim starts it as PID 1 of new mount, PID, network, IPC, UTS and cgroup namespaces, with uid 0 and with descriptor 3.
//! [`close_inherited`] comes first in `main`, [`enter`] when everything that needs a path or a privilege is done and before
//! there is a second thread:
//!
//! 1. limits: few descriptors, no core dumps, no file may grow, no more threads than the machine has;
//! 2. the root directory becomes an empty read-only tmpfs, everything else is unmounted;
//! 3. capabilities leave the bounding set, groups and users are changed for good, no capability remains;
//! 4. no_new_privs, and no way to attach a debugger as the same user.
//!
//! Landlock and seccomp close what remains; they belong behind step 4, seccomp once for each thread.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, chdir, getpid, pivot_root, setgroups, setresgid, setresuid};
use thiserror::Error;

/// Open files: vsock connections (1024), an eventfd a queue, two descriptors a vCPU.
const MAX_FILES: u64 = 4096;

/// A step of the jail failed; the process must not go on.
#[derive(Debug, Error)]
pub enum JailError {
    /// Not started as it must be: what follows would change the host's own mounts.
    #[error("not started by the shim: this process is no PID 1 of a namespace of its own")]
    NotIsolated,
    /// A system call failed.
    #[error("entering the jail failed: {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Step {
        step,
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

/// Enters the jail as `uid` and `gid`, which are not 0. `file_limit` is the longest that a regular file may become, `threads` how
/// many threads and processes `uid` may have: no other process of the host has it, so that these are ours.
///
/// # Errors
/// Any step's; the process is half jailed then and must end.
pub fn enter(uid: u32, gid: u32, file_limit: u64, threads: u64) -> Result<(), JailError> {
    if getpid().as_raw() != 1 {
        return Err(JailError::NotIsolated);
    }
    limit_resources(file_limit, threads)?;
    empty_root()?;
    drop_privileges(uid, gid)?;
    // SAFETY: both calls take plain numbers.
    unsafe {
        check(
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            "set no_new_privs",
        )?;
    }
    prctl::set_dumpable(false).map_err(step("forbid attaching"))
}

fn limit_resources(file_limit: u64, threads: u64) -> Result<(), JailError> {
    let limits = [
        (Resource::RLIMIT_NOFILE, MAX_FILES),
        // core(5): a limit of 0 does not stop a dump that goes to a program; 1 stops both kinds.
        (Resource::RLIMIT_CORE, 1),
        (Resource::RLIMIT_FSIZE, file_limit),
        (Resource::RLIMIT_NPROC, threads),
    ];
    for (resource, value) in limits {
        setrlimit(resource, value, value).map_err(step("set resource limits"))?;
    }
    Ok(())
}

/// Makes an empty tmpfs the root directory and forgets every other mount.
fn empty_root() -> Result<(), JailError> {
    const NONE: Option<&str> = None;
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(NONE, "/", NONE, private, NONE).map_err(step("make mounts private"))?;
    // Any directory will do as the place to mount on; every Linux system has this one.
    const PLACE: &str = "/proc";
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = Some("mode=0555,size=4k,nr_inodes=2");
    mount(Some("jail"), PLACE, Some("tmpfs"), flags, options).map_err(step("mount the root"))?;
    chdir(PLACE).map_err(step("enter the root"))?;
    // pivot_root(2), "pivot_root(".", ".")": the old root ends up on top of the new one, and goes.
    pivot_root(".", ".").map_err(step("change the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("detach the old root"))?;
    chdir("/").map_err(step("enter the new root"))?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | flags;
    mount(NONE, "/", NONE, read_only, NONE).map_err(step("make the root read-only"))
}

fn drop_privileges(uid: u32, gid: u32) -> Result<(), JailError> {
    /// No user gets capabilities by being 0 or by executing a file, and these rules are locked (capabilities(7)).
    const SECURE_BITS: libc::c_ulong = 0x2f;
    for capability in 0..=last_capability() {
        // SAFETY: the call takes plain numbers.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        check(result, "empty the bounding set")?;
    }
    // SAFETY: the call takes plain numbers.
    let result = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECURE_BITS, 0, 0, 0) };
    check(result, "set securebits")?;
    setgroups(&[]).map_err(step("drop supplementary groups"))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid).map_err(step("change the group"))?;
    setresuid(uid, uid, uid).map_err(step("change the user"))?;
    // NO_SETUID_FIXUP is not set, but say it once more in the one call that cannot be misread.
    clear_capabilities()
}

/// The highest capability that this kernel knows.
fn last_capability() -> libc::c_ulong {
    // SAFETY: the call takes plain numbers.
    let known = |capability: libc::c_ulong| unsafe {
        libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) >= 0
    };
    (0..64)
        .take_while(|&capability| known(capability))
        .last()
        .unwrap_or(0)
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn clear_capabilities() -> Result<(), JailError> {
    // _LINUX_CAPABILITY_VERSION_3: two elements.
    let header = CapHeader {
        version: 0x2008_0522,
        pid: 0,
    };
    let data = [CapData {
        effective: 0,
        permitted: 0,
        inheritable: 0,
    }; 2];
    // SAFETY: both pointers are to structures of the layout that capset(2) wants, alive during the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    check(result as libc::c_int, "drop capabilities")
}

/// The name that `ps` shows for the calling thread.
pub fn set_name(name: &CStr) {
    // A name is only for people.
    let _ = prctl::set_name(name);
}

#[cfg(test)]
pub(crate) mod tests;
