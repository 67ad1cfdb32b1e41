//! What the fs process gives up before it serves.
//!
//! The shim starts it as PID 1 of new mount, PID, network, IPC, UTS and cgroup namespaces, uid 0 of the host's user namespace
//! (whose files it serves). [`enter`] runs before there is a second thread:
//!
//! 1. mounts become slaves: what the shim mounts beneath the share later still appears, nothing goes back;
//! 2. the root becomes a read-only tmpfs of two directories: `/share`, a recursive bind of the share without devices and set-id
//!    programs, and `/proc`, which shows nothing but this process;
//! 3. [`drop_privileges`]: capabilities for files remain, and only those; no_new_privs; no core dumps.

use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, getpid, mkdir, pivot_root};
use thiserror::Error;

use super::tree::identity;

/// Where the share is in the jail.
pub const SHARE: &str = "/share";

/// Descriptors beside those of inodes and handles: sockets, queues, memory, and those open for the length of a request.
const OTHER_FILES: u64 = 256;

/// capabilities(7), each for what the guest's root may do with its own files. No MKNOD: pipes,
/// sockets and whiteouts need none. No DAC_READ_SEARCH: DAC_OVERRIDE has all of it but
/// open_by_handle_at(2), which opens any file of the host that is on a file system of the share,
/// whatever the root directory is.
const KEPT: u64 = 1 << 0 // CHOWN
    | 1 << 1 // DAC_OVERRIDE: the guest's kernel has checked permissions, and knows groups that the host does not
    | 1 << 3 // FOWNER
    | 1 << 4 // FSETID
    | 1 << 6 // SETGID
    | 1 << 7 // SETUID
    | 1 << 31; // SETFCAP: file capabilities of the container's images and installers

/// A step of the jail failed; the process must not go on.
#[derive(Debug, Error)]
pub enum JailError {
    /// Not started as it must be: what follows would change the host's own mounts.
    #[error("not started by the shim: this process is no PID 1 of a namespace of its own")]
    NotIsolated,
    /// A system call failed.
    #[error("entering the fs jail failed: {step}")]
    Step {
        /// What was tried.
        step: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn step<E: Into<io::Error>>(step: &str) -> impl FnOnce(E) -> JailError {
    let step = step.to_owned();
    move |source| JailError::Step {
        step,
        source: source.into(),
    }
}

/// Raises the limit of open files towards `inodes + 2 * handles` and says how many of each fit.
///
/// # Errors
/// The limits cannot be read.
pub fn raise_file_limit(inodes: u64, handles: u64) -> Result<(usize, usize), JailError> {
    let wanted = handles
        .saturating_mul(2)
        .saturating_add(inodes)
        .saturating_add(OTHER_FILES);
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(step("read RLIMIT_NOFILE"))?;
    let ceiling = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(hard);
    let wanted = wanted.min(ceiling).max(hard.min(wanted));
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted.max(hard)) {
        Ok(()) => wanted,
        Err(_) => {
            // Without CAP_SYS_RESOURCE the hard limit is all there is.
            let limit = wanted.min(hard);
            setrlimit(Resource::RLIMIT_NOFILE, limit, hard).map_err(step("set RLIMIT_NOFILE"))?;
            limit
        }
    };
    let usable = limit.saturating_sub(OTHER_FILES);
    // A handle keeps its own descriptor, and its inode's when the guest forgets that first.
    let handles = handles.min(usable / 4);
    let inodes = inodes.min(usable - 2 * handles);
    Ok((inodes as usize, handles as usize))
}

/// Enters the jail around `share`, a directory of the host; returns it as a descriptor.
///
/// # Errors
/// Any step's; the process is half jailed then and must end.
pub fn enter(share: &str) -> Result<OwnedFd, JailError> {
    if getpid().as_raw() != 1 {
        return Err(JailError::NotIsolated);
    }
    // core(5): a limit of 0 does not stop a dump that goes to a program; 1 stops both kinds.
    setrlimit(Resource::RLIMIT_CORE, 1, 1).map_err(step("forbid core dumps"))?;
    small_root(share)?;
    drop_privileges()?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    open(SHARE, flags, Mode::empty()).map_err(step("open the share"))
}

fn small_root(share: &str) -> Result<(), JailError> {
    const NONE: Option<&str> = None;
    let slave = MsFlags::MS_SLAVE | MsFlags::MS_REC;
    mount(NONE, "/", NONE, slave, NONE).map_err(step("make mounts slaves"))?;
    let clone = sys::clone_tree(share).map_err(step(&format!("take the share {share}")))?;
    // The share's own place will do to mount the new root on: it exists, and what is mounted there stays in this namespace.
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = Some("mode=0555,size=4k,nr_inodes=4");
    mount(Some("jail"), share, Some("tmpfs"), flags, options).map_err(step("mount the root"))?;
    chdir(share).map_err(step("enter the root"))?;
    for directory in ["share", "proc"] {
        mkdir(directory, Mode::from_bits_truncate(0o555)).map_err(step("make directories"))?;
    }
    sys::attach_tree(&clone, c"share").map_err(step("bind the share"))?;
    sys::restrict_tree(c"share").map_err(step("forbid devices and set-id programs"))?;
    let only_self = Some("hidepid=2,subset=pid");
    mount(Some("proc"), "proc", Some("proc"), flags, only_self).map_err(step("mount /proc"))?;
    // pivot_root(2), "pivot_root(".", ".")": the old root ends up on top of the new one, and goes.
    pivot_root(".", ".").map_err(step("change the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("detach the old root"))?;
    chdir("/").map_err(step("enter the new root"))?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | flags;
    mount(NONE, "/", NONE, read_only, NONE).map_err(step("make the root read-only"))
}

/// Keeps the capabilities for files, for this thread and those it starts.
///
/// # Errors
/// Any step's.
pub fn drop_privileges() -> Result<(), JailError> {
    sys::limit_bounding_set(KEPT).map_err(step("limit the bounding set"))?;
    // Workers change uid from request to request and keep their capabilities; nothing regains any by being root.
    identity::detach_capabilities_from_ids().map_err(step("set securebits"))?;
    identity::limit_capabilities(KEPT).map_err(step("drop capabilities"))?;
    nix::sys::prctl::set_no_new_privs().map_err(step("set no_new_privs"))?;
    // Workers repeat this when they change ids.
    nix::sys::prctl::set_dumpable(false).map_err(step("forbid dumps and attaching"))
}

mod sys {
    //! System calls that nix does not have.

    use std::ffi::{CStr, CString};
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

    use super::Errno;

    const OPEN_TREE_CLONE: u32 = 1;
    const MOVE_MOUNT_F_EMPTY_PATH: u32 = 4;
    const MOUNT_ATTR_NOSUID: u64 = 2;
    const MOUNT_ATTR_NODEV: u64 = 4;

    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }

    /// open_tree(2): a detached recursive bind mount.
    pub fn clone_tree(path: &str) -> Result<OwnedFd, Errno> {
        let path = CString::new(path).map_err(|_| Errno::EINVAL)?;
        let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as u32 | libc::AT_RECURSIVE as u32;
        // SAFETY: the path is NUL-terminated; the descriptor returned is new and ours.
        unsafe {
            let fd = libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags);
            Ok(OwnedFd::from_raw_fd(Errno::result(fd)? as RawFd))
        }
    }

    /// move_mount(2).
    pub fn attach_tree(tree: &OwnedFd, at: &CStr) -> Result<(), Errno> {
        // SAFETY: both paths are NUL-terminated.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                tree.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                at.as_ptr(),
                MOVE_MOUNT_F_EMPTY_PATH,
            )
        })
        .map(drop)
    }

    /// mount_setattr(2) on a mount and all beneath it.
    pub fn restrict_tree(path: &CStr) -> Result<(), Errno> {
        let attributes = MountAttr {
            set: MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV,
            clear: 0,
            propagation: 0,
            user_namespace: 0,
        };
        // SAFETY: the path is NUL-terminated and the attributes have the size that is passed.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                libc::AT_FDCWD,
                path.as_ptr(),
                libc::AT_RECURSIVE,
                &raw const attributes,
                size_of::<MountAttr>(),
            )
        })
        .map(drop)
    }

    /// Drops all but `kept` from the bounding set.
    pub fn limit_bounding_set(kept: u64) -> Result<(), Errno> {
        for capability in 0..64_u64 {
            // SAFETY: no memory is passed.
            let known = unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability) };
            if known < 0 {
                break;
            }
            if known == 1 && kept & 1 << capability == 0 {
                // SAFETY: no memory is passed.
                Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability) })?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
