//! Making, removing and moving names.

use std::ffi::CStr;
use std::os::fd::AsFd;

use nix::errno::Errno;

use super::inodes::Inode;
use super::sys::{self, Result};
use super::{Call, Engine, reply, sockets};
use crate::fs::wire::{MkdirIn, MknodIn};

impl Engine {
    pub(super) fn mkdir(&self, call: &mut Call<'_>, body: &MkdirIn, name: &CStr) -> Result<()> {
        let parent = self.parent_with_room(call)?;
        call.worker.become_caller(call.uid, call.gid, body.umask)?;
        sys::make_directory(parent.as_fd(), name, body.mode)?;
        self.reply_made(call, &parent, name)
    }

    pub(super) fn mknod(&self, call: &mut Call<'_>, body: &MknodIn, name: &CStr) -> Result<()> {
        let parent = self.parent_with_room(call)?;
        if let Some(socket) = sockets::listened_at(body, call.uid, name) {
            return self.listen(call, &parent, &socket);
        }
        call.worker.become_caller(call.uid, call.gid, body.umask)?;
        // The guard lets through no device but 0:0.
        sys::make_node(parent.as_fd(), name, body.mode, 0)?;
        self.reply_made(call, &parent, name)
    }

    pub(super) fn symlink(&self, call: &mut Call<'_>, name: &CStr, target: &CStr) -> Result<()> {
        let parent = self.parent_with_room(call)?;
        call.worker.become_caller(call.uid, call.gid, 0)?;
        sys::make_symlink(target, parent.as_fd(), name)?;
        self.reply_made(call, &parent, name)
    }

    pub(super) fn link(&self, call: &mut Call<'_>, object: u64, name: &CStr) -> Result<()> {
        let parent = self.parent_with_room(call)?;
        let object = self.inodes.get(object)?;
        object.seen.changed_by_guest();
        sys::make_link(&call.worker.name(object.as_fd()), parent.as_fd(), name)?;
        self.reply_made(call, &parent, name)
    }

    /// The directory of a request that makes a name. That its node fits is checked first, so that nothing is made which then
    /// cannot be told.
    fn parent_with_room(&self, call: &Call<'_>) -> Result<std::sync::Arc<Inode>> {
        if self.inodes.has_room() {
            self.inodes.get(call.node)
        } else {
            Err(Errno::ENFILE)
        }
    }

    fn reply_made(&self, call: &mut Call<'_>, parent: &Inode, name: &CStr) -> Result<()> {
        let entry = self.entry_named(parent, name)?;
        reply(call, &entry);
        Ok(())
    }

    /// `flags` is 0 or `AT_REMOVEDIR`.
    pub(super) fn unlink(&self, call: &mut Call<'_>, name: &CStr, flags: i32) -> Result<()> {
        let parent = self.inodes.get(call.node)?;
        sys::unlink(parent.as_fd(), name, flags)
    }

    pub(super) fn rename(
        &self,
        call: &mut Call<'_>,
        name: &CStr,
        (to, new_name): (u64, &CStr),
        flags: u32,
    ) -> Result<()> {
        let parent = self.inodes.get(call.node)?;
        let to = self.inodes.get(to)?;
        if flags & libc::RENAME_WHITEOUT != 0 {
            // The whiteout is a new object.
            call.worker.become_caller(call.uid, call.gid, 0)?;
        }
        sys::rename(parent.as_fd(), name, to.as_fd(), new_name, flags)?;
        self.renamed(&to, new_name);
        if flags & libc::RENAME_EXCHANGE != 0 {
            self.renamed(&parent, name);
        }
        Ok(())
    }

    /// A rename changes the object's change time, which is no reason to drop what the guest has
    /// cached of it.
    fn renamed(&self, parent: &Inode, name: &CStr) {
        let found = sys::open_beneath(parent.as_fd(), name, libc::O_PATH | libc::O_NOFOLLOW, 0)
            .and_then(|fd| sys::status(fd.as_fd()));
        if let Ok(status) = found
            && let Some(inode) = self.inodes.known(&status)
        {
            inode.seen.changed_by_guest();
        }
    }

    pub(super) fn readlink(&self, call: &mut Call<'_>) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        if inode.kind != libc::S_IFLNK {
            return Err(Errno::EINVAL);
        }
        sys::read_link(inode.as_fd(), call.out)
    }
}
