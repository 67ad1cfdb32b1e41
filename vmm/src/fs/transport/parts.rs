//! Pieces of guest memory, as the system calls want them.

use std::os::fd::BorrowedFd;

use vm_memory::{GuestAddress, GuestMemory as _, VolatileSlice};

use super::lent::GuestMemory;
use crate::fs::tree::Payload;
use crate::fs::tree::sys::{self, Result};

/// Pieces of guest memory, in order. No template lends them any more ([`super::lent`]): their addresses are safe to keep. The
/// guest may change them at any time; the host never holds a reference into them.
pub struct Parts<'m> {
    memory: &'m GuestMemory,
    list: Vec<libc::iovec>,
    total: usize,
}

/// A piece is not inside one region of the guest's RAM, or all are more than 4 GiB together.
#[derive(Debug, PartialEq, Eq)]
pub struct OutsideMemory;

impl<'m> Parts<'m> {
    /// No pieces yet.
    pub fn new(memory: &'m GuestMemory) -> Parts<'m> {
        Parts {
            memory,
            list: Vec::new(),
            total: 0,
        }
    }

    /// Lets go of all pieces, keeping the room for them.
    pub fn clear(&mut self) {
        self.list.clear();
        self.total = 0;
    }

    /// Bytes in all pieces.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Adds a piece, joined to the one before where the two touch.
    ///
    /// # Errors
    /// The piece is not all RAM.
    pub fn push(
        &mut self,
        address: GuestAddress,
        length: u32,
    ) -> std::result::Result<(), OutsideMemory> {
        let length = length as usize;
        if length == 0 {
            return Ok(());
        }
        let slice = self
            .memory
            .get_slice(address, length)
            .map_err(|_| OutsideMemory)?;
        let start = slice.ptr_guard_mut().as_ptr();
        self.total = self.total.checked_add(length).ok_or(OutsideMemory)?;
        if let Some(last) = self.list.last_mut()
            && last.iov_base.wrapping_byte_add(last.iov_len) == start.cast()
        {
            last.iov_len += length;
            return Ok(());
        }
        self.list.push(libc::iovec {
            iov_base: start.cast(),
            iov_len: length,
        });
        Ok(())
    }

    /// Copies the first bytes out; fewer if there are not as many.
    pub fn copy_out(&self, mut to: &mut [u8]) -> usize {
        let mut copied = 0;
        for slice in self.slices() {
            let count = slice.copy_to(to);
            copied += count;
            to = &mut to[count..];
        }
        copied
    }

    /// Copies bytes into the first ones; what does not fit is left out.
    pub fn copy_in(&self, mut from: &[u8]) {
        for slice in self.slices() {
            let count = slice.len().min(from.len());
            slice.copy_from(&from[..count]);
            from = &from[count..];
        }
    }

    fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.list.iter().map(|part| {
            // SAFETY: push made each part from a slice of `memory`, which stays mapped while it is borrowed.
            unsafe { VolatileSlice::new(part.iov_base.cast(), part.iov_len) }
        })
    }

    /// The `length` bytes after the first `skip`, into `window`.
    fn window(&self, mut skip: usize, mut length: usize, window: &mut Vec<libc::iovec>) {
        window.clear();
        for part in &self.list {
            if length == 0 {
                break;
            }
            if skip >= part.iov_len {
                skip -= part.iov_len;
                continue;
            }
            let count = length.min(part.iov_len - skip);
            let iov_base = part.iov_base.wrapping_byte_add(skip);
            window.push(libc::iovec {
                iov_base,
                iov_len: count,
            });
            skip = 0;
            length -= count;
        }
    }
}

/// A request's data: what follows the head of a WRITE, or the header of a reply.
pub struct Data<'a, 'm> {
    /// What the guest wrote.
    pub readable: &'a Parts<'m>,
    /// What the guest will read.
    pub writable: &'a Parts<'m>,
    /// Bytes of the WRITE's header and arguments.
    pub head: usize,
    /// Bytes of the reply's header.
    pub reply_head: usize,
    /// Kept between requests.
    pub window: &'a mut Vec<libc::iovec>,
}

impl Payload for Data<'_, '_> {
    fn read_from(&mut self, file: BorrowedFd<'_>, offset: u64, length: usize) -> Result<usize> {
        self.writable.window(self.reply_head, length, self.window);
        transfer(self.window, |parts, done| {
            // SAFETY: the parts are guest memory, mapped and writable while `writable` borrows it, and we hold no
            // references into it.
            unsafe { sys::read_parts(file, offset + done as u64, parts) }
        })
    }

    fn write_to(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
        append: bool,
    ) -> Result<usize> {
        self.readable.window(self.head, length, self.window);
        transfer(self.window, |parts, done| {
            // SAFETY: the parts are guest memory, mapped and readable while `readable` borrows it.
            unsafe { sys::write_parts(file, offset + done as u64, parts, append) }
        })
    }
}

/// Moves all parts, in as many calls as their number needs: a READ that stops early would mean the end of the file.
fn transfer(
    parts: &[libc::iovec],
    mut call: impl FnMut(&[libc::iovec], usize) -> Result<usize>,
) -> Result<usize> {
    let mut done = 0;
    for some in parts.chunks(libc::UIO_MAXIOV as usize) {
        let wanted: usize = some.iter().map(|part| part.iov_len).sum();
        let count = match call(some, done) {
            Ok(count) => count,
            Err(error) if done == 0 => return Err(error),
            Err(_) => break,
        };
        done += count;
        if count < wanted {
            break;
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::super::lent::tests as lent;
    use super::*;
    use std::io::{Seek, Write};
    use std::os::fd::AsFd;
    use vm_memory::Bytes;

    fn memory() -> GuestMemory {
        lent::memory(&[(0x1000, 0x10000), (0x20000, 0x1000)])
    }

    #[test]
    fn pieces_outside_ram_are_refused() {
        let memory = memory();
        let mut parts = Parts::new(&memory);
        for (address, length) in [
            (0, 1),
            (0xfff, 2),
            (0x10fff, 2),
            (0x20fff, 2),
            (u64::MAX, 1),
            (u64::MAX, u32::MAX),
        ] {
            assert_eq!(
                parts.push(GuestAddress(address), length),
                Err(OutsideMemory)
            );
        }
        parts.push(GuestAddress(u64::MAX), 0).unwrap();
        assert_eq!(parts.total(), 0);
    }

    #[test]
    fn a_read_lands_behind_the_reply_header() {
        let memory = memory();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello, world").unwrap();
        file.rewind().unwrap();
        let readable = Parts::new(&memory);
        let mut writable = Parts::new(&memory);
        // Touching pieces become one.
        writable.push(GuestAddress(0x1000), 10).unwrap();
        writable.push(GuestAddress(0x100a), 10).unwrap();
        writable.push(GuestAddress(0x3000), 100).unwrap();
        assert_eq!(writable.list.len(), 2);
        let mut data = Data {
            readable: &readable,
            writable: &writable,
            head: 0,
            reply_head: 16,
            window: &mut Vec::new(),
        };
        assert_eq!(data.read_from(file.as_fd(), 0, 100).unwrap(), 12);
        let mut bytes = [0; 4];
        memory.read_slice(&mut bytes, GuestAddress(0x1010)).unwrap();
        assert_eq!(&bytes, b"hell");
        memory.read_slice(&mut bytes, GuestAddress(0x3000)).unwrap();
        assert_eq!(&bytes, b"o, w");
        writable.copy_in(b"0123456789abcdefghijklm");
        let mut back = [0; 30];
        assert_eq!(writable.copy_out(&mut back), 30);
        assert_eq!(&back, b"0123456789abcdefghijklmworld\0\0");
    }

    #[test]
    fn more_pieces_than_a_call_takes_move_all_the_same() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        let mut readable = Parts::new(&memory);
        for piece in 0..3000_u64 {
            memory
                .write_slice(&[piece as u8], GuestAddress(0x1000 + piece * 2))
                .unwrap();
            readable.push(GuestAddress(0x1000 + piece * 2), 1).unwrap();
        }
        let writable = Parts::new(&memory);
        let mut data = Data {
            readable: &readable,
            writable: &writable,
            head: 1,
            reply_head: 0,
            window: &mut Vec::new(),
        };
        assert_eq!(data.write_to(file.as_fd(), 0, 2999, false).unwrap(), 2999);
        assert_eq!(data.write_to(file.as_fd(), 0, 1, true).unwrap(), 1);
        assert_eq!(file.metadata().unwrap().len(), 3000);
    }
}
