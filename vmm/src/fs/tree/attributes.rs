//! Attributes of an inode.

use std::os::fd::AsFd;

use nix::errno::Errno;

use super::inodes::Inode;
use super::lookup::attributes;
use super::set_id::SetId;
use super::sys::{self, Result};
use super::{Call, Engine, reply};
use crate::fs::wire::{AttrOut, FATTR_FH, SetattrIn, SetattrValid};

impl Engine {
    pub(super) fn getattr(&self, call: &mut Call<'_>) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        self.reply_attributes(call, &inode)
    }

    fn reply_attributes(&self, call: &mut Call<'_>, inode: &Inode) -> Result<()> {
        let status = sys::status(inode.as_fd())?;
        inode.seen.told(&status);
        let (attr_valid, attr_valid_nsec) = self.attribute_validity(inode);
        let attr = attributes(inode, &status);
        reply(
            call,
            &AttrOut {
                attr_valid,
                attr_valid_nsec,
                dummy: 0,
                attr,
            },
        );
        Ok(())
    }

    pub(super) fn setattr(&self, call: &mut Call<'_>, body: &SetattrIn) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        let valid = SetattrValid::from_bits_truncate(body.valid);
        inode.seen.changed_by_guest();
        if !valid.intersects(changes()) {
            // Linux sends it where set-id bits have to go and the request that follows has no flag
            // for it, FALLOCATE and COPY_FILE_RANGE by somebody without CAP_FSETID; and for a
            // chown(2) of no id. It also sends it where only a file capability has to go, which it
            // removes itself: who has that has no set-id bits.
            self.drop_set_id(call, &inode)?;
        }
        // The owner first: changing it clears set-id bits, and a mode that comes with it is meant to stay.
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let id = |flag, id| if valid.contains(flag) { id } else { u32::MAX };
            let uid = id(SetattrValid::UID, body.uid);
            sys::change_owner(inode.as_fd(), uid, id(SetattrValid::GID, body.gid))?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let bits = SetId::of(valid.contains(SetattrValid::KILL_SUIDGID));
            self.change_content(call, &inode, bits, |call| self.set_size(call, &inode, body))?;
        }
        if valid.contains(SetattrValid::MODE) {
            self.set_mode(call, &inode, body.mode & 0o7777)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let times = [
                time(
                    valid,
                    [SetattrValid::ATIME, SetattrValid::ATIME_NOW],
                    body.atime,
                    body.atimensec,
                )?,
                time(
                    valid,
                    [SetattrValid::MTIME, SetattrValid::MTIME_NOW],
                    body.mtime,
                    body.mtimensec,
                )?,
            ];
            sys::change_times(&call.worker.name(inode.as_fd()), &times)?;
        }
        self.reply_attributes(call, &inode)
    }

    fn set_size(&self, call: &mut Call<'_>, inode: &Inode, body: &SetattrIn) -> Result<()> {
        let size = i64::try_from(body.size).map_err(|_| Errno::EFBIG)?;
        if body.valid & FATTR_FH != 0 {
            let handle = self.handles.get(body.fh)?;
            if handle.inode.id != inode.id {
                return Err(Errno::EBADF);
            }
            return sys::truncate(handle.as_fd(), size);
        }
        self.check_regular(inode)?;
        sys::truncate_object(&call.worker.name(inode.as_fd()), size)
    }

    /// access(2) by mode bits alone; the guest's kernel asks only where it does not decide itself.
    pub(super) fn access(&self, call: &mut Call<'_>, mask: u32) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        let raw = sys::status(inode.as_fd())?.raw;
        let mode = u32::from(raw.stx_mode);
        let wanted = mask & 7;
        let execute = libc::X_OK as u32;
        let granted = if call.uid == 0 {
            let any_execute = mode & 0o111 != 0 || inode.kind == libc::S_IFDIR;
            if any_execute { 7 } else { 7 & !execute }
        } else if call.uid == raw.stx_uid {
            mode >> 6 & 7
        } else if call.gid == raw.stx_gid {
            mode >> 3 & 7
        } else {
            mode & 7
        };
        if wanted & !granted == 0 {
            Ok(())
        } else {
            Err(Errno::EACCES)
        }
    }
}

/// The bits of a SETATTR that change something.
fn changes() -> SetattrValid {
    SetattrValid::MODE
        | SetattrValid::UID
        | SetattrValid::GID
        | SetattrValid::SIZE
        | SetattrValid::ATIME
        | SetattrValid::MTIME
        | SetattrValid::ATIME_NOW
        | SetattrValid::MTIME_NOW
}

/// `[given, now]` of one time.
fn time(
    valid: SetattrValid,
    [given, now]: [SetattrValid; 2],
    seconds: u64,
    nanoseconds: u32,
) -> Result<libc::timespec> {
    let (tv_sec, tv_nsec) = if valid.contains(now) {
        (0, libc::UTIME_NOW)
    } else if !valid.contains(given) {
        (0, libc::UTIME_OMIT)
    } else if nanoseconds < 1_000_000_000 {
        (seconds as i64, i64::from(nanoseconds))
    } else {
        return Err(Errno::EINVAL);
    };
    Ok(libc::timespec { tv_sec, tv_nsec })
}
