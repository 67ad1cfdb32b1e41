//! Mounts by descriptors (Linux 5.2 and later): trees that are copied, changed and only then
//! attached; file systems set up step by step.
//!
//! Numbers are those of include/uapi/linux/mount.h; they are ABI and never change.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{
    FSCONFIG_CMD_CREATE, FSCONFIG_CMD_RECONFIGURE, FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING,
    FSMOUNT_CLOEXEC, FSOPEN_CLOEXEC, FSPICK_CLOEXEC, FSPICK_EMPTY_PATH, MOVE_MOUNT_F_EMPTY_PATH,
    MOVE_MOUNT_T_EMPTY_PATH, OPEN_TREE_CLONE,
};
use nix::Result;

use crate::{descriptor, done, new_descriptor};

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

impl MountAttr {
    /// A change that only sets `MOUNT_ATTR_*`.
    pub fn setting(set: u64) -> MountAttr {
        MountAttr {
            set,
            ..MountAttr::default()
        }
    }
}

/// How much of a tree is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// The mount alone.
    Top,
    /// The mount and all beneath it.
    Whole,
}

impl Depth {
    /// All of it where it is `recursive`.
    pub fn of(recursive: bool) -> Depth {
        match recursive {
            true => Depth::Whole,
            false => Depth::Top,
        }
    }

    fn flag(self) -> u32 {
        match self {
            Depth::Top => 0,
            Depth::Whole => libc::AT_RECURSIVE as u32,
        }
    }
}

/// Copies the mount at `path` in `dir`, or what `dir` refers to where `path` is empty, into a
/// detached mount, which vanishes when it is dropped. A symbolic link at the path's end is
/// followed, as mount(2) with MS_BIND does.
///
/// # Errors
/// `EINVAL`: the mount cannot be copied (it is unbindable, or of another mount namespace).
pub fn open_tree(dir: BorrowedFd<'_>, path: &CStr, depth: Depth) -> Result<OwnedFd> {
    let mut flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as u32 | depth.flag();
    if path.is_empty() {
        flags |= libc::AT_EMPTY_PATH as u32;
    }
    // SAFETY: `path` is NUL-terminated and outlives the call, which only reads it.
    new_descriptor(unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            dir.as_raw_fd(),
            path.as_ptr(),
            flags as libc::c_ulong,
        )
    })
}

/// Attaches the detached mount `from` on the file that `to` refers to (above what is mounted there).
///
/// # Errors
/// `EINVAL`: `from` is not detached, or `to` is in another mount namespace; `ENOTDIR`: they are of
/// two kinds.
pub fn move_mount(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both paths are static empty strings; the descriptors are open for the length of the call.
    done(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            from.as_raw_fd(),
            c"".as_ptr(),
            to.as_raw_fd(),
            c"".as_ptr(),
            flags as libc::c_ulong,
        )
    })
}

/// Changes the attributes of the mount whose root `mount` is, and with [`Depth::Whole`] of all
/// mounts beneath it.
///
/// # Errors
/// `EINVAL`: the attributes exclude each other; `EPERM`: one is locked.
pub fn mount_setattr(mount: BorrowedFd<'_>, depth: Depth, change: MountAttr) -> Result<()> {
    let flags = libc::AT_EMPTY_PATH as u32 | depth.flag();
    // SAFETY: `change` is a live `struct mount_attr` of exactly the size passed; the kernel only
    // reads it.
    done(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags as libc::c_ulong,
            &raw const change,
            size_of::<MountAttr>(),
        )
    })
}

/// Whether `fd` is the root of the mount that it is on.
///
/// # Errors
/// The file system's.
pub fn is_mount_root(fd: BorrowedFd<'_>) -> Result<bool> {
    let found = descriptor::status(fd, libc::STATX_TYPE)?;
    Ok(found.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0)
}

/// A file system that is being configured (fsopen(2), fsconfig(2)).
#[derive(Debug)]
pub struct FsContext(OwnedFd);

impl FsContext {
    /// Begins a new file system of type `fstype`.
    ///
    /// # Errors
    /// `ENODEV`: the kernel has none of this type.
    pub fn open(fstype: &CStr) -> Result<Self> {
        // SAFETY: `fstype` is NUL-terminated and outlives the call.
        new_descriptor(unsafe {
            libc::syscall(
                libc::SYS_fsopen,
                fstype.as_ptr(),
                FSOPEN_CLOEXEC as libc::c_ulong,
            )
        })
        .map(Self)
    }

    /// Begins to reconfigure the file system of the mount whose root `mount` is.
    ///
    /// # Errors
    /// `EINVAL`: it is no root of a mount.
    pub fn pick(mount: BorrowedFd) -> Result<Self> {
        // SAFETY: the path is a static empty string.
        new_descriptor(unsafe {
            libc::syscall(
                libc::SYS_fspick,
                mount.as_raw_fd(),
                c"".as_ptr(),
                (FSPICK_CLOEXEC | FSPICK_EMPTY_PATH) as libc::c_ulong,
            )
        })
        .map(Self)
    }

    fn config(&self, command: u32, key: Option<&CStr>, value: Option<&CStr>) -> Result<()> {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: `key` and `value` are NUL-terminated or null, as the command wants them, and outlive the call.
        done(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                command as libc::c_ulong,
                pointer(key),
                pointer(value),
                0 as libc::c_long,
            )
        })
    }

    /// Sets `key` to `value`, or switches it on.
    ///
    /// # Errors
    /// The file system's; [`FsContext::message`] may say more.
    pub fn set(&self, key: &CStr, value: Option<&CStr>) -> Result<()> {
        let command = match value {
            Some(_) => FSCONFIG_SET_STRING,
            None => FSCONFIG_SET_FLAG,
        };
        self.config(command, Some(key), value)
    }

    /// Makes the file system.
    ///
    /// # Errors
    /// The file system's; [`FsContext::message`] may say more.
    pub fn create(&self) -> Result<()> {
        self.config(FSCONFIG_CMD_CREATE, None, None)
    }

    /// Applies the settings to the existing file system.
    ///
    /// # Errors
    /// The file system's; [`FsContext::message`] may say more.
    pub fn reconfigure(&self) -> Result<()> {
        self.config(FSCONFIG_CMD_RECONFIGURE, None, None)
    }

    /// A detached mount of the file system made, with `MOUNT_ATTR_*`.
    ///
    /// # Errors
    /// `EPERM`, `EBUSY`: it was not made.
    pub fn mount(&self, attributes: u64) -> Result<OwnedFd> {
        // SAFETY: no pointers are passed.
        new_descriptor(unsafe {
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
