//! Set-id bits when the content of a file changes: they go, or stay where the guest's caller may
//! keep them.
//!
//! Only the guest's kernel knows whether its caller has CAP_FSETID, and says so with the request.
//! The host's kernel clears the bits for everybody who lacks that capability *in the first user
//! namespace* (`setattr_should_drop_suidgid`), so for the fs process, always. Where the bits must
//! stay, the engine puts them back. Where they must go, it takes them away before, as Linux does,
//! and depends on nobody's capabilities.
//!
//! While a file with such bits changes, no other request of this share changes bits: a write that
//! puts them back must not undo the removal by another one. Two pods that share a volume, and the
//! host itself, do not wait for each other; Linux has no call that writes and keeps the bits.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use super::inodes::Inode;
use super::sys::{self, Result};
use super::{Call, Engine};

/// What becomes of the bits of a file whose content changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SetId {
    /// The caller has no CAP_FSETID (`FUSE_WRITE_KILL_SUIDGID` and its kin).
    Goes,
    /// The caller has it, or the guest has taken the bits away before.
    Stays,
}

impl SetId {
    /// By the request's flag to clear them.
    pub(super) fn of(clear: bool) -> SetId {
        match clear {
            true => SetId::Goes,
            false => SetId::Stays,
        }
    }
}

/// Whose turn it is to change set-id bits.
pub(super) struct Turn {
    lock: Mutex<()>,
    since: Instant,
}

impl Default for Turn {
    fn default() -> Turn {
        Turn {
            lock: Mutex::default(),
            since: Instant::now(),
        }
    }
}

impl Turn {
    fn take(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(|error| error.into_inner())
    }

    /// Milliseconds of a clock of its own.
    fn now(&self) -> u64 {
        self.since.elapsed().as_millis() as u64
    }
}

/// `mode` after a change of the content by somebody without CAP_FSETID. Without the group's execute
/// bit the set-group-id bit gives no rights, and only the guest knows who may keep it.
fn without(mode: u32) -> u32 {
    let group = if mode & libc::S_IXGRP == 0 {
        0
    } else {
        libc::S_ISGID
    };
    mode & !(libc::S_ISUID | group)
}

fn mode(inode: &Inode) -> Result<u32> {
    Ok(u32::from(sys::status(inode.as_fd())?.raw.stx_mode) & 0o7777)
}

impl Engine {
    /// Changes the content of `inode` by `change`, and its set-id bits as `bits` says.
    pub(super) fn change_content<T>(
        &self,
        call: &mut Call<'_>,
        inode: &Inode,
        bits: SetId,
        change: impl FnOnce(&mut Call<'_>) -> Result<T>,
    ) -> Result<T> {
        let now = self.set_id.now();
        if inode.kind != libc::S_IFREG || inode.plain_until.load(Ordering::Relaxed) > now {
            return change(call);
        }
        let turn = self.set_id.take();
        let before = mode(inode)?;
        let has_bits = |mode| without(mode) != mode;
        if !has_bits(before) {
            // By another inode of the same file the guest may set bits at any moment.
            if !inode.is_aliased() {
                let until = now.saturating_add(self.cache.attr_ms);
                inode.plain_until.store(until, Ordering::Relaxed);
            }
            drop(turn);
            return change(call);
        }
        let name = call.worker.name(inode.as_fd());
        if bits == SetId::Goes {
            sys::change_mode(&name, without(before))?;
        }
        let changed = change(call);
        // After a failure, too: the kernel clears them first. Whoever has changed the mode
        // meanwhile is right.
        if bits == SetId::Stays && mode(inode)? == without(before) {
            sys::change_mode(&name, before)?;
        }
        changed
    }

    /// Changes the mode, for good.
    pub(super) fn set_mode(&self, call: &mut Call<'_>, inode: &Inode, mode: u32) -> Result<()> {
        let _turn = self.set_id.take();
        inode.plain_until.store(0, Ordering::Relaxed);
        sys::change_mode(&call.worker.name(inode.as_fd()), mode)
    }

    /// Takes away what a change of the content takes away.
    pub(super) fn drop_set_id(&self, call: &mut Call<'_>, inode: &Inode) -> Result<()> {
        if matches!(inode.kind, libc::S_IFDIR | libc::S_IFLNK) {
            return Ok(());
        }
        self.narrow(call, inode, without)
    }

    /// Takes away the set-group-id bit, of a directory, too.
    pub(super) fn drop_set_group_id(&self, call: &mut Call<'_>, inode: &Inode) -> Result<()> {
        self.narrow(call, inode, |mode| mode & !libc::S_ISGID)
    }

    fn narrow(
        &self,
        call: &mut Call<'_>,
        inode: &Inode,
        narrower: impl Fn(u32) -> u32,
    ) -> Result<()> {
        let _turn = self.set_id.take();
        let before = mode(inode)?;
        let after = narrower(before);
        if after == before {
            return Ok(());
        }
        sys::change_mode(&call.worker.name(inode.as_fd()), after)
    }
}
