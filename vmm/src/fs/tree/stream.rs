//! The position of an open directory, and the entries that the host has told ahead.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use super::sys::{self, Result};

/// `struct linux_dirent64`: inode, offset, record length, type; then the name.
const ENTRY_HEAD: usize = 19;

/// The position of an open directory, with entries that the host has told and the guest not yet asked for.
#[derive(Default)]
pub struct Stream {
    buffer: Vec<u8>,
    at: usize,
    end: usize,
    /// The cookie with which the guest goes on.
    position: u64,
}

/// One entry, as the host tells it.
pub struct Entry<'a> {
    /// Its inode.
    pub inode: u64,
    /// The cookie of the one after it.
    pub next: u64,
    /// Of the record in the buffer, in bytes.
    pub length: usize,
    /// `DT_*`.
    pub kind: u8,
    /// Its name.
    pub name: &'a CStr,
}

impl Stream {
    /// Goes to a cookie, which is the host's own 64 bits.
    pub fn go_to(&mut self, directory: BorrowedFd<'_>, cookie: u64) -> Result<()> {
        if cookie != self.position {
            let offset = i64::try_from(cookie).map_err(|_| Errno::EINVAL)?;
            sys::seek(directory, offset, libc::SEEK_SET)?;
            (self.at, self.end) = (0, 0);
            self.position = cookie;
        }
        Ok(())
    }

    /// Makes sure that there is an entry; false at the end of the directory.
    pub fn fill(&mut self, directory: BorrowedFd<'_>, size: usize) -> Result<bool> {
        if self.at < self.end {
            return Ok(true);
        }
        self.buffer.resize(size, 0);
        self.at = 0;
        self.end = 0;
        self.end = sys::directory_entries(directory, &mut self.buffer)?;
        if self.end == 0 {
            self.buffer = Vec::new();
        }
        Ok(self.end > 0)
    }

    /// The next entry, which stays until [`Stream::advance`].
    pub fn entry(&self) -> Option<Entry<'_>> {
        let bytes = self.buffer.get(self.at..self.end)?;
        let head = bytes.get(..ENTRY_HEAD)?;
        let word = |at: usize| u64::from_ne_bytes(head[at..at + 8].try_into().expect("8 bytes"));
        let length = usize::from(u16::from_ne_bytes([head[16], head[17]]));
        Some(Entry {
            inode: word(0),
            next: word(8),
            length,
            kind: head[18],
            name: CStr::from_bytes_until_nul(bytes.get(ENTRY_HEAD..length)?).ok()?,
        })
    }

    /// Goes past the entry that [`Stream::entry`] gave.
    pub fn advance(&mut self, length: usize, next: u64) {
        self.at += length;
        self.position = next;
    }
}
