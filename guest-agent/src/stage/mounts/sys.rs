//! The mount system calls that work on descriptors (Linux 5.2 and later), which neither libc nor nix wrap.
//!
//! Numbers are those of include/uapi/linux/mount.h; they are ABI and never change.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

/// `MOUNT_ATTR_*`: what a mount (not its file system) forbids or how it keeps access times.
pub mod attr {
    /// Read-only.
    pub const RDONLY: u64 = 0x1;
    /// Set-user-ID and file capabilities are ignored.
    pub const NOSUID: u64 = 0x2;
    /// Device nodes cannot be opened.
    pub const NODEV: u64 = 0x4;
    /// Nothing can be executed.
    pub const NOEXEC: u64 = 0x8;
    /// The field of the three access time modes; it must be cleared whenever one of them is set.
    pub const ATIME: u64 = 0x70;
    /// Access times relative to modification (the default, and numerically zero).
    pub const RELATIME: u64 = 0;
    /// Access times never written.
    pub const NOATIME: u64 = 0x10;
    /// Access times always written.
    pub const STRICTATIME: u64 = 0x20;
    /// Access times of directories never written.
    pub const NODIRATIME: u64 = 0x80;
    /// The mount translates owners by a user namespace.
    pub const IDMAP: u64 = 0x10_0000;
    /// Symbolic links are not followed.
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
    /// All of them that a mount shows in mountinfo.
    pub const OF_MOUNTS: u64 = RDONLY | NOSUID | NODEV | NOEXEC | ATIME | NODIRATIME | NOSYMFOLLOW;
}

const OPEN_TREE_CLONE: u32 = 1;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;
const FSOPEN_CLOEXEC: u32 = 1;
const FSMOUNT_CLOEXEC: u32 = 1;
const FSPICK_CLOEXEC: u32 = 1;
const FSPICK_EMPTY_PATH: u32 = 8;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const FSCONFIG_CMD_RECONFIGURE: u32 = 7;

/// `struct mount_attr`, the argument of mount_setattr(2).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct MountAttr {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear, before `set`.
    pub clear: u64,
    /// One of MS_SHARED, MS_SLAVE, MS_PRIVATE, MS_UNBINDABLE; 0 leaves the propagation.
    pub propagation: u64,
    /// With `attr::IDMAP`: the user namespace's descriptor.
    pub userns_fd: u64,
}

fn check(result: libc::c_long) -> Result<libc::c_long, Errno> {
    if result < 0 {
        Err(Errno::last())
    } else {
        Ok(result)
    }
}

fn new_fd(result: libc::c_long) -> Result<OwnedFd, Errno> {
    let fd = check(result)?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the system call that succeeded returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Copies the mount at `dir`/`path` (with `recursive`, all mounts beneath) into a detached mount.
/// An empty `path` means `dir` itself. Symbolic links at the end of `path` are not followed.
pub fn open_tree(dir: BorrowedFd, path: &CStr, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as u32 | libc::AT_SYMLINK_NOFOLLOW as u32;
    if path.is_empty() {
        flags |= libc::AT_EMPTY_PATH as u32;
    }
    if recursive {
        flags |= libc::AT_RECURSIVE as u32;
    }
    // SAFETY: `path` is NUL-terminated and outlives the call, which only reads it.
    new_fd(unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            dir.as_raw_fd(),
            path.as_ptr(),
            flags as libc::c_ulong,
        )
    })
}

/// Attaches the detached mount `from` on the file that `to` refers to (above what is mounted there).
pub fn move_mount(from: BorrowedFd, to: BorrowedFd) -> Result<(), Errno> {
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both paths are static empty strings; the descriptors are open for the length of the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            from.as_raw_fd(),
            c"".as_ptr(),
            to.as_raw_fd(),
            c"".as_ptr(),
            flags as libc::c_ulong,
        )
    })?;
    Ok(())
}

/// Changes the attributes of the mount whose root `mount` is, with `recursive` of all mounts beneath it too.
pub fn mount_setattr(mount: BorrowedFd, recursive: bool, attr: MountAttr) -> Result<(), Errno> {
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: `attr` is a live `struct mount_attr` of exactly the size passed; the kernel only reads it.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags as libc::c_ulong,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })?;
    Ok(())
}

/// Whether `fd` is the root of the mount that it is on.
pub fn is_mount_root(fd: BorrowedFd) -> Result<bool, Errno> {
    // SAFETY: all bytes zero are a valid statx.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a static empty string, and the kernel writes one statx, which outlives the call.
    check(libc::c_long::from(unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_TYPE,
            &raw mut found,
        )
    }))?;
    Ok(found.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0)
}

/// A file system that is being configured (fsopen(2), fsconfig(2)).
#[derive(Debug)]
pub struct FsContext(OwnedFd);

impl FsContext {
    /// Begins a new file system of type `fstype`.
    pub fn open(fstype: &CStr) -> Result<Self, Errno> {
        // SAFETY: `fstype` is NUL-terminated and outlives the call.
        new_fd(unsafe {
            libc::syscall(
                libc::SYS_fsopen,
                fstype.as_ptr(),
                FSOPEN_CLOEXEC as libc::c_ulong,
            )
        })
        .map(Self)
    }

    /// Begins to reconfigure the file system of the mount whose root `mount` is.
    pub fn pick(mount: BorrowedFd) -> Result<Self, Errno> {
        // SAFETY: the path is a static empty string.
        new_fd(unsafe {
            libc::syscall(
                libc::SYS_fspick,
                mount.as_raw_fd(),
                c"".as_ptr(),
                (FSPICK_CLOEXEC | FSPICK_EMPTY_PATH) as libc::c_ulong,
            )
        })
        .map(Self)
    }

    fn config(&self, command: u32, key: Option<&CStr>, value: Option<&CStr>) -> Result<(), Errno> {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: `key` and `value` are NUL-terminated or null, as the command wants them, and outlive the call.
        check(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                command as libc::c_ulong,
                pointer(key),
                pointer(value),
                0 as libc::c_long,
            )
        })?;
        Ok(())
    }

    /// Sets `key` to `value`, or switches it on.
    pub fn set(&self, key: &CStr, value: Option<&CStr>) -> Result<(), Errno> {
        let command = match value {
            Some(_) => FSCONFIG_SET_STRING,
            None => FSCONFIG_SET_FLAG,
        };
        self.config(command, Some(key), value)
    }

    /// Makes the file system.
    pub fn create(&self) -> Result<(), Errno> {
        self.config(FSCONFIG_CMD_CREATE, None, None)
    }

    /// Applies the settings to the existing file system.
    pub fn reconfigure(&self) -> Result<(), Errno> {
        self.config(FSCONFIG_CMD_RECONFIGURE, None, None)
    }

    /// A detached mount of the file system made.
    pub fn mount(&self, attributes: u64) -> Result<OwnedFd, Errno> {
        // SAFETY: no pointers are passed.
        new_fd(unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.0.as_raw_fd(),
                FSMOUNT_CLOEXEC as libc::c_ulong,
                attributes as libc::c_ulong,
            )
        })
    }

    /// What the kernel says about the last failure; empty when it says nothing.
    pub fn message(&self) -> String {
        let mut text = String::new();
        let mut line = [0u8; 512];
        // Each read returns one message ("e tmpfs: Bad value for 'size'"); ENODATA ends them.
        while let Ok(length @ 1..) = nix::unistd::read(self.0.as_fd(), &mut line) {
            if !text.is_empty() {
                text.push_str("; ");
            }
            let message = String::from_utf8_lossy(&line[..length]);
            let message = message.trim_end();
            text.push_str(message.strip_prefix("e ").unwrap_or(message));
        }
        text
    }
}
