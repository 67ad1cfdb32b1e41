//! Open files and their data.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;

use super::handles::Handle;
use super::inodes::Inode;
use super::set_id::SetId;
use super::sys::{self, Result};
use super::version::Cache;
use super::{Call, Engine, Payload, reply};
use crate::fs::guard::Rule;
use crate::fs::wire::{
    CopyFileRangeIn, CreateIn, FallocateIn, LseekIn, LseekOut, OPEN_KEEP_CACHE, OPEN_KILL_SUIDGID,
    OPEN_NO_FLUSH, OPEN_PARALLEL_DIRECT_WRITES, OpenIn, OpenOut, ReadIn, WRITE_CACHE,
    WRITE_KILL_SUIDGID, WriteIn, WriteOut,
};

/// What of open(2)'s flags reaches the host. Not among them: `O_APPEND`, which each write brings with it (a handle with it
/// could not write back a mapping in place), and `O_DIRECT`, whose alignment the guest's buffers need not have: it bypasses the
/// guest's cache only.
const OPEN_FLAGS: i32 = libc::O_ACCMODE | libc::O_TRUNC | libc::O_SYNC | libc::O_NOATIME;

impl Engine {
    /// The guest's kernel opens devices, pipes and sockets itself; the host never does (CVE-2020-35517).
    pub(super) fn check_regular(&self, inode: &Inode) -> Result<()> {
        match inode.kind {
            libc::S_IFREG => Ok(()),
            libc::S_IFDIR => Err(Errno::EISDIR),
            _ => {
                self.fault(Rule::Special);
                Err(Errno::EPERM)
            }
        }
    }

    pub(super) fn open(&self, call: &mut Call<'_>, body: &OpenIn) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        let opened = self.open_inode(call, inode, body)?;
        reply(call, &opened);
        Ok(())
    }

    fn open_inode(&self, call: &mut Call<'_>, inode: Arc<Inode>, body: &OpenIn) -> Result<OpenOut> {
        self.check_regular(&inode)?;
        let flags = body.flags as i32;
        let status = sys::status(inode.as_fd())?;
        // An aliased file is never kept: the guest may have changed it by its other inode.
        let keep = !inode.is_aliased()
            && match inode.seen.open(&status) {
                Cache::Keep => true,
                Cache::Drop => false,
                Cache::LookAgain => return Err(Errno::ESTALE),
            };
        let open = |call: &mut Call<'_>| {
            let name = call.worker.name(inode.as_fd());
            match sys::reopen(&name, flags & OPEN_FLAGS) {
                // A file with the append-only attribute opens for nothing else.
                Err(Errno::EPERM) if flags & libc::O_APPEND != 0 => {
                    sys::reopen(&name, flags & OPEN_FLAGS | libc::O_APPEND)
                }
                other => other,
            }
        };
        let file = if flags & libc::O_TRUNC == 0 {
            open(call)?
        } else {
            inode.seen.changed_by_guest();
            let bits = SetId::of(body.fuse_flags & OPEN_KILL_SUIDGID != 0);
            self.change_content(call, &inode, bits, open)?
        };
        if flags & libc::O_ACCMODE != libc::O_RDONLY {
            inode.seen.copied_up(&status, &sys::status(file.as_fd())?);
        }
        self.opened(inode, file, flags, keep)
    }

    fn opened(&self, inode: Arc<Inode>, file: OwnedFd, flags: i32, keep: bool) -> Result<OpenOut> {
        let mut open_flags = OPEN_PARALLEL_DIRECT_WRITES;
        if self.cache.keep_data && keep {
            open_flags |= OPEN_KEEP_CACHE;
        }
        if flags & libc::O_ACCMODE == libc::O_RDONLY {
            open_flags |= OPEN_NO_FLUSH;
        }
        let fh = self.handles.insert(Handle::file(inode, file))?;
        Ok(OpenOut {
            fh,
            open_flags,
            passthrough: 0,
        })
    }

    pub(super) fn create(&self, call: &mut Call<'_>, body: &CreateIn, name: &CStr) -> Result<()> {
        let parent = self.inodes.get(call.node)?;
        self.check_room()?;
        call.worker.become_caller(call.uid, call.gid, body.umask)?;
        let flags = body.flags as i32;
        let making = flags & OPEN_FLAGS | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
        match sys::open_beneath(parent.as_fd(), name, making, body.mode) {
            Ok(file) => self.reply_created(call, &parent, file, flags),
            // Somebody else made it since the guest looked.
            Err(Errno::EEXIST) if flags & libc::O_EXCL == 0 => {
                let found =
                    sys::open_beneath(parent.as_fd(), name, libc::O_PATH | libc::O_NOFOLLOW, 0)?;
                let (entry, inode) = self.entry(&parent, found)?;
                let id = inode.id;
                let open = OpenIn {
                    flags: body.flags,
                    fuse_flags: body.fuse_flags,
                };
                let opened = self
                    .open_inode(call, inode, &open)
                    .inspect_err(|_| self.inodes.forget(id, 1))?;
                reply(call, &entry);
                reply(call, &opened);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// A file without a name (O_TMPFILE); LINK gives it one.
    pub(super) fn tmpfile(&self, call: &mut Call<'_>, body: &CreateIn) -> Result<()> {
        let parent = self.inodes.get(call.node)?;
        self.check_room()?;
        call.worker.become_caller(call.uid, call.gid, body.umask)?;
        let flags = body.flags as i32;
        let exclusive = flags & libc::O_EXCL;
        let making = flags & OPEN_FLAGS & !libc::O_TRUNC | libc::O_TMPFILE | exclusive;
        let file = sys::open_beneath(parent.as_fd(), c".", making, body.mode)?;
        self.reply_created(call, &parent, file, flags)
    }

    fn check_room(&self) -> Result<()> {
        self.handles.check_room()?;
        if self.inodes.has_room() {
            Ok(())
        } else {
            Err(Errno::ENFILE)
        }
    }

    fn reply_created(
        &self,
        call: &mut Call<'_>,
        parent: &Inode,
        file: OwnedFd,
        flags: i32,
    ) -> Result<()> {
        let path = sys::reopen(&call.worker.name(file.as_fd()), libc::O_PATH)?;
        let (entry, inode) = self.entry(parent, path)?;
        let opened = self.opened(inode, file, flags, true)?;
        reply(call, &entry);
        reply(call, &opened);
        Ok(())
    }

    /// Returns how many bytes the payload holds.
    pub(super) fn read(&self, body: &ReadIn, payload: &mut dyn Payload) -> Result<usize> {
        let handle = self.handles.get(body.fh)?;
        payload.read_from(handle.as_fd(), body.offset, body.size as usize)
    }

    pub(super) fn write(
        &self,
        call: &mut Call<'_>,
        body: &WriteIn,
        payload: &mut dyn Payload,
    ) -> Result<()> {
        let handle = self.handles.get(body.fh)?;
        handle.inode.seen.changed_by_guest();
        // The guest computed the offset from a size that may be old; only its cache's write-back knows better.
        let append = body.flags as i32 & libc::O_APPEND != 0 && body.fuse_flags & WRITE_CACHE == 0;
        let bits = SetId::of(body.fuse_flags & WRITE_KILL_SUIDGID != 0);
        let written = self.change_content(call, &handle.inode, bits, |_| {
            payload.write_to(handle.as_fd(), body.offset, body.size as usize, append)
        })?;
        reply(
            call,
            &WriteOut {
                size: written as u32,
                padding: 0,
            },
        );
        Ok(())
    }

    pub(super) fn flush(&self, handle: u64) -> Result<()> {
        sys::flush(self.handles.get(handle)?.as_fd())
    }

    pub(super) fn fallocate(&self, call: &mut Call<'_>, body: &FallocateIn) -> Result<()> {
        let handle = self.handles.get(body.fh)?;
        handle.inode.seen.changed_by_guest();
        // The guard has checked that both fit an i64.
        let (offset, length) = (body.offset as i64, body.length as i64);
        // A guest whose caller may not keep set-id bits has dropped them by a SETATTR before.
        self.change_content(call, &handle.inode, SetId::Stays, |_| {
            sys::allocate(handle.as_fd(), body.mode as i32, offset, length)
        })
    }

    pub(super) fn lseek(&self, call: &mut Call<'_>, body: &LseekIn) -> Result<()> {
        let handle = self.handles.get(body.fh)?;
        let offset = sys::seek(handle.as_fd(), body.offset as i64, body.whence as i32)?;
        reply(call, &LseekOut { offset });
        Ok(())
    }

    pub(super) fn copy_file_range(
        &self,
        call: &mut Call<'_>,
        body: &CopyFileRangeIn,
    ) -> Result<()> {
        let from = self.handles.get(body.fh_in)?;
        let to = self.handles.get(body.fh_out)?;
        to.inode.seen.changed_by_guest();
        // The answer has 32 bits; the caller asks again for the rest.
        let length = body.len.min(1 << 30) as usize;
        let (in_offset, out_offset) = (body.offset_in as i64, body.offset_out as i64);
        // As for fallocate.
        let copied = self.change_content(call, &to.inode, SetId::Stays, |_| {
            sys::copy_range(from.as_fd(), in_offset, to.as_fd(), out_offset, length)
        })?;
        reply(
            call,
            &WriteOut {
                size: copied as u32,
                padding: 0,
            },
        );
        Ok(())
    }
}
