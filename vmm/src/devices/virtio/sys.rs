//! System calls that move bytes straight between a descriptor and guest memory.
//!
//! Guest memory changes under our hands: no Rust reference to it may exist, so the kernel gets raw pointers. This module
//! holds all `unsafe` of the virtio devices but the ioctl(2)s of a tap.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// Most buffers of one transfer; below the kernel's 1,024 (UIO_MAXIOV).
pub(super) const MAX_BUFFERS: usize = 128;

/// A list of guest buffers for one system call.
pub(super) struct IoVecs<'m> {
    /// The first `count` are written: no 2 KiB to be zeroed for each frame. One more than guest buffers, for one of our own.
    vecs: [MaybeUninit<libc::iovec>; MAX_BUFFERS + 1],
    count: usize,
    memory: PhantomData<&'m ()>,
}

impl<'m> IoVecs<'m> {
    pub(super) fn new() -> IoVecs<'m> {
        IoVecs {
            vecs: [const { MaybeUninit::uninit() }; MAX_BUFFERS + 1],
            count: 0,
            memory: PhantomData,
        }
    }

    pub(super) fn free(&self) -> usize {
        MAX_BUFFERS.saturating_sub(self.count)
    }

    /// Appends a buffer; the caller has asked [`IoVecs::free`].
    pub(super) fn push(&mut self, slice: &VolatileSlice<'m>) {
        self.append(slice.ptr_guard_mut().as_ptr(), slice.len());
    }

    /// Appends memory of ours, for which there is room once in a full list; the kernel may write to it.
    pub(super) fn push_own(&mut self, bytes: &'m mut [u8]) {
        self.append(bytes.as_mut_ptr(), bytes.len());
    }

    fn append(&mut self, base: *mut u8, length: usize) {
        self.vecs[self.count].write(libc::iovec {
            iov_base: base.cast(),
            iov_len: length,
        });
        self.count += 1;
    }

    /// readv(2) into the buffers.
    pub(super) fn read(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        retry(|| {
            // SAFETY: as in `receive`; and memory of ours is borrowed exclusively for 'm.
            unsafe { libc::readv(fd.as_raw_fd(), self.list(), self.count as libc::c_int) }
        })
    }

    /// writev(2) of the buffers.
    pub(super) fn write(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        retry(|| {
            // SAFETY: as in `read`; the kernel only reads.
            unsafe { libc::writev(fd.as_raw_fd(), self.list(), self.count as libc::c_int) }
        })
    }

    /// recvmsg(2) from a socket into the buffers, without blocking. Descriptors sent beside the bytes are closed by the kernel.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut message = self.message();
        retry(|| {
            // SAFETY: each of the first `count` iovecs is a mapped guest buffer, as `push` took it from a VolatileSlice whose
            // mapping outlives 'm; no reference to those bytes exists in this process, so the kernel may write them at any time.
            unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) }
        })
    }

    /// sendmsg(2) of the buffers to a socket, without blocking and without SIGPIPE.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let message = self.message();
        retry(|| {
            // SAFETY: as in `receive`; the kernel only reads.
            unsafe {
                libc::sendmsg(
                    socket.as_raw_fd(),
                    &message,
                    libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                )
            }
        })
    }

    fn list(&self) -> *const libc::iovec {
        self.vecs.as_ptr().cast()
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: all-zero bytes are a msghdr without address, buffers and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.vecs.as_mut_ptr().cast();
        message.msg_iovlen = self.count;
        message
    }
}

/// Fills a guest buffer from getrandom(2).
pub(super) fn fill_random(slice: &VolatileSlice<'_>) -> io::Result<()> {
    let base = slice.ptr_guard_mut();
    let mut done = 0;
    while done < slice.len() {
        done += retry(|| {
            // SAFETY: `done < len`, so the range [base + done, base + len) is the rest of a mapped guest buffer to which no
            // reference exists.
            unsafe { libc::getrandom(base.as_ptr().add(done).cast(), slice.len() - done, 0) }
        })?;
    }
    Ok(())
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
