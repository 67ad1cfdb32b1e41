//! The few Linux calls that neither std nor nix offers, each behind a safe function.

pub mod daemon;
pub mod files;
pub mod mount;
pub mod process;
pub mod spawn;
pub mod stub;

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// For a process that lives long and does little: one heap for all threads, which [`trim_memory`] can give back.
pub fn keep_memory_small() {
    // SAFETY: mallopt takes no pointers. A failure leaves the default, which works too.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives free memory back to the kernel.
pub fn trim_memory() {
    // SAFETY: malloc_trim takes no pointers and touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets the runtime watch a descriptor.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor until it is dropped, which the AsyncFd does after deregistering.
    let watched = unsafe { AsyncFd::register_with_interest(fd, interest) };
    watched.map_err(Into::into)
}
