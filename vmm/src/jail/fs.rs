//! The jail of the process that serves files: the share, and nothing else of the host.
#![cfg_attr(not(test), forbid(unsafe_code))] // the tests attack by raw system calls

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use bulkhead_vmm_config::Layer;
use landlock::AccessFs;
use linux::capability;
use linux::mount::{Depth, MountAttr, attr, mount_setattr, move_mount, open_tree};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use nix::unistd::mkdir;

use super::user_namespace::{EVERYONE, UserNamespace};
use super::{JailError, step, steps};

/// Where the share is in the jail.
pub const SHARE: &str = "/share";

/// Descriptors beside those of inodes and handles: sockets, queues, memory, and those open for the
/// length of a request.
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

/// Enters the jail around `share`, a directory of the host; returns it as a descriptor, and what
/// [`steps::landlock`] returns.
///
/// # Errors
/// Any step's; the process is half jailed then and must end.
pub fn enter(share: &str, accepted: &[Layer]) -> Result<(OwnedFd, Option<u32>), JailError> {
    steps::be_isolated()?;
    steps::limit(&[steps::NO_CORE])?;
    // What the shim mounts beneath the share later still appears; nothing goes back.
    steps::propagate(MsFlags::MS_SLAVE)?;
    let tree = take(share)?;
    let namespace = UserNamespace::prepare()?;
    // The share's own place will do to mount the root on: it exists, and what is mounted there
    // stays in this namespace.
    steps::change_root(share, 4, || fill_root(&tree))?;
    namespace.enter(EVERYONE, EVERYONE)?;
    steps::limit_bounding_set(KEPT)?;
    // Workers change uid from request to request and keep their capabilities; nothing regains any
    // by being root.
    steps::add_secure_bits(capability::NO_SETUID_FIXUP)?;
    steps::keep_capabilities(KEPT)?;
    steps::no_new_privileges()?;
    // Workers repeat this when they change ids.
    steps::forbid_attaching()?;
    let landlock = leave_only_the_share(accepted)?;
    Ok((open_directory(SHARE)?, landlock))
}

/// The share with all that is mounted beneath it, detached, without devices and set-id programs.
fn take(share: &str) -> Result<OwnedFd, JailError> {
    let path = CString::new(share)
        .map_err(|_| step(format!("take the share {share:?}"))(Errno::EINVAL))?;
    let tree = open_tree(AT_FDCWD, &path, Depth::Whole)
        .map_err(step(format!("take the share {share}")))?;
    let inert = MountAttr::setting(attr::NOSUID | attr::NODEV);
    mount_setattr(tree.as_fd(), Depth::Whole, inert)
        .map_err(step("forbid devices and set-id programs"))?;
    Ok(tree)
}

/// Beneath the share every right but to execute files and to speak to devices, which are never
/// opened; a device of an image may be renamed and linked. The mounts and names of this process are
/// read in `/proc`: a name in `/proc/self/fd` is followed without a right of its own.
fn leave_only_the_share(accepted: &[Layer]) -> Result<Option<u32>, JailError> {
    let served = steps::every_right() & !(AccessFs::Execute | AccessFs::IoctlDev);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    steps::landlock(accepted, &[(SHARE, served), ("/proc", read)])
}

/// The share, and a `/proc` that shows nothing but this process.
fn fill_root(tree: &OwnedFd) -> Result<(), JailError> {
    for directory in ["share", "proc"] {
        mkdir(directory, Mode::from_bits_truncate(0o555)).map_err(step("make directories"))?;
    }
    move_mount(tree.as_fd(), open_directory("share")?.as_fd()).map_err(step("bind the share"))?;
    let only_self = Some("hidepid=2,subset=pid");
    mount(Some("proc"), "proc", Some("proc"), steps::PLAIN, only_self).map_err(step("mount /proc"))
}

fn open_directory(path: &str) -> Result<OwnedFd, JailError> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty()).map_err(step("open the share"))
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

#[cfg(test)]
mod tests;
