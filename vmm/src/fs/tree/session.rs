//! INIT: what is agreed with the guest's kernel; and the questions about a whole file system.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::sys::{self, Result};
use super::{Call, Engine, reply};
use crate::fs::wire::{
    InitIn, InitOut, KERNEL_VERSION, Kstatfs, MAX_DATA, MAX_DATA_PAGES, MINOR, OLDEST_MINOR,
    StatfsOut, init,
};

/// What is agreed to when the guest offers it.
///
/// Not among them: locks, which stay in the guest's kernel, where they exclude all containers of the pod and a killed waiter
/// dies at once (6.12's virtio-fs cannot interrupt a request that waits); they do not cross the VM's boundary. The write-back
/// cache, which would let the guest invent times and sizes of files that the host also writes.
const WANTED: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::POSIX_ACL
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::SUBMOUNTS
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT
    | init::ALLOW_IDMAP;

/// Requests in the background (read-ahead, write-back) that the guest may have under way at once.
const MAX_BACKGROUND: u16 = 64;

impl Engine {
    pub(super) fn init(&self, call: &mut Call<'_>, body: &InitIn, offered: u64) -> Result<()> {
        if body.major < KERNEL_VERSION
            || (body.major == KERNEL_VERSION && body.minor < OLDEST_MINOR)
        {
            return Err(Errno::EPROTO);
        }
        if body.major > KERNEL_VERSION {
            // The guest asks again with our version.
            reply(
                call,
                &InitOut {
                    major: KERNEL_VERSION,
                    minor: MINOR,
                    ..Default::default()
                },
            );
            return Ok(());
        }
        let agreed = offered & WANTED;
        self.forget_everything()?;
        self.agreed
            .store(agreed | init::BIG_WRITES, Ordering::Release);
        reply(
            call,
            &InitOut {
                major: KERNEL_VERSION,
                minor: MINOR,
                max_readahead: body.max_readahead,
                flags: agreed as u32,
                max_background: MAX_BACKGROUND,
                congestion_threshold: MAX_BACKGROUND / 4 * 3,
                max_write: MAX_DATA,
                time_gran: 1,
                max_pages: MAX_DATA_PAGES,
                flags2: (agreed >> 32) as u32,
                ..Default::default()
            },
        );
        Ok(())
    }

    pub(super) fn destroy(&self) -> Result<()> {
        self.agreed.store(0, Ordering::Release);
        self.forget_everything()
    }

    pub(super) fn agreed_to(&self, flag: u64) -> bool {
        self.agreed.load(Ordering::Relaxed) & flag != 0
    }

    pub(super) fn statfs(&self, call: &mut Call<'_>) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        let st = Kstatfs::from(sys::file_system(inode.as_fd())?);
        reply(call, &StatfsOut { st });
        Ok(())
    }

    /// Flushes the file system that a directory is on: sync(2) and syncfs(2) in the guest.
    pub(super) fn syncfs(&self, call: &mut Call<'_>) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        if inode.kind != libc::S_IFDIR {
            return Err(Errno::EINVAL);
        }
        let name = call.worker.name(inode.as_fd());
        let directory = sys::reopen(&name, libc::O_RDONLY | libc::O_DIRECTORY)?;
        sys::sync_file_system(directory.as_fd())
    }
}
