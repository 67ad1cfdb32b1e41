//! System calls that neither std nor nix offers, each behind a safe function.
//!
//! This crate knows Linux and nothing of Bulkhead: it takes no decision, has no name or limit of
//! the product, and says what a call is in the words of its manual page. What the programs want of
//! Linux, and in which order, is theirs.
//!
//! A function here is safe to call: it passes the kernel only memory that it owns or borrows for
//! the length of the call, and returns a value or errno. Those that are `unsafe` say what the
//! caller must see to.

pub mod capability;
pub mod descriptor;
pub mod entropy;
pub mod landlock;
pub mod mount;
pub mod netlink;
pub mod packet;
pub mod path;
pub mod process;
pub mod schedule;
pub mod tap;
pub mod terminal;
pub mod thread;

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::Result;
use nix::errno::Errno;

/// Repeats a call for as long as a signal interrupts it (`EINTR`).
///
/// # Errors
/// Every other one of the call.
pub fn retry<T>(mut call: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Fills a buffer of at most 256 bytes with random ones: so few are never cut short (getrandom(2)).
///
/// # Errors
/// None once the host has booted.
pub fn random(buffer: &mut [u8]) -> Result<()> {
    if buffer.len() > 256 {
        return Err(Errno::EINVAL);
    }
    // SAFETY: the kernel writes at most the length given.
    done(unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) } as i64)
}

/// The result of a system call that answers nothing else.
fn done(result: impl Into<i64>) -> Result<()> {
    Errno::result(result.into()).map(drop)
}

/// The result of a system call that answers with a new descriptor.
fn new_descriptor(result: impl Into<i64>) -> Result<OwnedFd> {
    let number = Errno::result(result.into())?;
    // SAFETY: the system call that succeeded has made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(number as RawFd) })
}
