//! From a name to a node.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::inodes::{Found, Inode};
use super::sys::{self, Result, Status};
use super::{Call, Engine, reply};
use crate::fs::wire::{self, ATTR_SUBMOUNT, Attr, EntryOut, ForgetOne, init};

/// Bits of a mount's number in the inode numbers of mounted files.
const TAG_SHIFT: u32 = 48;

impl Engine {
    pub(super) fn lookup(&self, call: &mut Call<'_>, name: &CStr) -> Result<()> {
        let parent = self.inodes.get(call.node)?;
        let entry = self.entry_named(&parent, name)?;
        reply(call, &entry);
        Ok(())
    }

    pub(super) fn batch_forget(&self, mut items: &[u8]) {
        while let Some(ForgetOne { nodeid, nlookup }) = wire::take(&mut items) {
            self.inodes.forget(nodeid, nlookup);
        }
    }

    /// Finds a name in a directory; the guest remembers the object once more.
    pub(super) fn entry_named(&self, parent: &Inode, name: &CStr) -> Result<EntryOut> {
        let fd = sys::open_beneath(parent.as_fd(), name, libc::O_PATH | libc::O_NOFOLLOW, 0)?;
        self.entry(parent, fd).map(|(entry, _)| entry)
    }

    /// Makes an `O_PATH` descriptor of something in `parent` a node.
    pub(super) fn entry(&self, parent: &Inode, fd: OwnedFd) -> Result<(EntryOut, Arc<Inode>)> {
        let status = sys::status(fd.as_fd())?;
        let mut submount = false;
        let mut number_tag = parent.number_tag;
        if status.mount != parent.key.mount {
            let number = self.mounts.enter(fd.as_fd(), &status)?;
            // The guest gives a mounted directory a device number of its own, and nothing to a mounted file.
            submount = status.kind() == libc::S_IFDIR && self.agreed_to(init::SUBMOUNTS);
            number_tag = if submount { 0 } else { number << TAG_SHIFT };
        }
        let inode = self.inodes.remember(Found {
            fd,
            status,
            submount,
            number_tag,
        })?;
        let known_otherwise = parent.is_aliased() || inode.is_aliased();
        let (entry_valid, entry_valid_nsec) = match known_otherwise {
            true => (0, 0),
            false => validity(self.cache.entry_ms),
        };
        let (attr_valid, attr_valid_nsec) = self.attribute_validity(&inode);
        let entry = EntryOut {
            nodeid: inode.id,
            generation: 0,
            entry_valid,
            attr_valid,
            entry_valid_nsec,
            attr_valid_nsec,
            attr: attributes(&inode, &status),
        };
        Ok((entry, inode))
    }

    /// How long the guest may keep attributes. What it knows as another inode too it has to ask about each time: it may have
    /// changed it there itself.
    pub(super) fn attribute_validity(&self, inode: &Inode) -> (u64, u32) {
        match inode.is_aliased() {
            true => (0, 0),
            false => validity(self.cache.attr_ms),
        }
    }
}

fn validity(ms: u64) -> (u64, u32) {
    let time = Duration::from_millis(ms);
    (time.as_secs(), time.subsec_nanos())
}

/// The attributes of an inode as FUSE says them.
pub(super) fn attributes(inode: &Inode, status: &Status) -> Attr {
    let raw = &status.raw;
    Attr {
        ino: raw.stx_ino ^ inode.number_tag,
        size: raw.stx_size,
        blocks: raw.stx_blocks,
        atime: raw.stx_atime.tv_sec as u64,
        mtime: raw.stx_mtime.tv_sec as u64,
        ctime: raw.stx_ctime.tv_sec as u64,
        atimensec: raw.stx_atime.tv_nsec,
        mtimensec: raw.stx_mtime.tv_nsec,
        ctimensec: raw.stx_ctime.tv_nsec,
        mode: u32::from(raw.stx_mode),
        nlink: raw.stx_nlink,
        uid: raw.stx_uid,
        gid: raw.stx_gid,
        // FUSE carries a device as the kernel's new_encode_dev(): minor's low byte, major, minor's rest.
        rdev: raw.stx_rdev_minor & 0xff
            | raw.stx_rdev_major << 8
            | (raw.stx_rdev_minor & !0xff) << 12,
        blksize: raw.stx_blksize,
        flags: if inode.submount { ATTR_SUBMOUNT } else { 0 },
    }
}
