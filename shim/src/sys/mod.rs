//! What the shim wants of Linux: mounts, processes, identities, and the few calls that std, nix and
//! `linux` do not offer.

pub mod daemon;
pub mod device_filter;
pub mod files;
pub mod identity;
pub mod keeper;
pub mod mount;
pub mod own;
pub mod process;
pub mod spawn;
pub mod stub;
pub mod view;

#[cfg(test)]
pub(crate) mod memory_tests;

use std::{io, os::fd::OwnedFd};

use nix::sys::inotify::{InitFlags, Inotify};
use tokio::io::{Interest, unix::AsyncFd};

/// For a process that lives long and does little: one heap for all threads, which [`trim_memory`] can give back.
pub fn keep_memory_small() {
    // SAFETY: mallopt takes no pointers. A failure leaves the default, which works too.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// As many open files as the process may have: a guest's listeners are descriptors of ours.
pub fn allow_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // A failure leaves the limit, which is no trouble to most pods.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, soft.max(hard.min(1 << 16)), hard);
    }
}

/// Gives free memory back to the kernel.
pub fn trim_memory() {
    // SAFETY: malloc_trim takes no pointers and touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// An instance of inotify that counts for `uid` and not for root, who may have only fs.inotify.max_user_instances (128) on the
/// whole host, fewer than a node has pods.
pub fn inotify_of(uid: u32) -> io::Result<Inotify> {
    let make = move || {
        // Of this thread alone, which ends right after. Real and saved uid stay root's: nobody who
        // has `uid` may signal or trace the thread.
        linux::thread::set_uids(None, Some(uid), None)?;
        Ok(Inotify::init(
            InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC,
        )?)
    };
    let thread = std::thread::Builder::new().spawn(make)?;
    thread.join().expect("nothing in it panics")
}

/// Lets the runtime watch a descriptor.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor until it is dropped, which the AsyncFd does after deregistering.
    let watched = unsafe { AsyncFd::register_with_interest(fd, interest) };
    watched.map_err(Into::into)
}
