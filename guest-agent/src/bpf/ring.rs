//! A ring of records that programs write and this process reads (BPF_MAP_TYPE_RINGBUF, Documentation/bpf/ringbuf.rst).
//!
//! ```text
//!  page 0            page 1             pages 2…                    the same pages again
//!  consumer's        producer's         data: records of 8 + n      so that a record that goes over the end
//!  position (ours)   position (theirs)  bytes at multiples of 8     is whole in memory
//! ```

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::{BPF_MAP_CREATE, bpf, take};

const BPF_MAP_TYPE_RINGBUF: u32 = 27;
const PAGE: usize = 4096;
/// Bits of a record's length: it is being written; it is to be passed over.
const BUSY: u32 = 1 << 31;
const DISCARD: u32 = 1 << 30;
const HEADER: u64 = 8;

/// The part of `union bpf_attr` for BPF_MAP_CREATE.
#[repr(C)]
struct MapAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// A ring whose records have `N` words of 8 bytes. Its descriptor is readable while there are records.
#[derive(Debug)]
pub(crate) struct Ring<const N: usize> {
    fd: OwnedFd,
    /// Bytes of data, a power of two.
    size: usize,
    /// Our position.
    consumer: NonNull<u8>,
    /// The producer's position, then the data twice.
    producer: NonNull<u8>,
}

// SAFETY: the mappings belong to this object alone and do not depend on the thread.
unsafe impl<const N: usize> Send for Ring<N> {}

impl<const N: usize> Ring<N> {
    /// Makes one of `size` bytes, a power of two of at least a page.
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        let attr = MapAttr {
            map_type: BPF_MAP_TYPE_RINGBUF,
            key_size: 0,
            value_size: 0,
            max_entries: u32::try_from(size).map_err(|_| Errno::E2BIG)?,
        };
        // SAFETY: `attr` has no pointers; the answer is a descriptor of ours alone.
        let fd = unsafe { take(bpf(BPF_MAP_CREATE, &attr)?) }?;
        let read_write = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let consumer = map(&fd, 0, PAGE, read_write)?;
        let producer = match map(&fd, PAGE, PAGE + 2 * size, ProtFlags::PROT_READ) {
            Ok(producer) => producer,
            Err(errno) => {
                // SAFETY: mapped above with this length, and nobody refers to it.
                let _ = unsafe { munmap(consumer.cast(), PAGE) };
                return Err(errno.into());
            }
        };
        Ok(Self {
            fd,
            size,
            consumer,
            producer,
        })
    }

    /// Takes all records that are whole. `false` with them: others may have found the ring full.
    pub(crate) fn take(&mut self) -> (Vec<[u64; N]>, bool) {
        // SAFETY: both pages begin with an aligned u64 that lives as long as the mapping, and that both sides access
        // atomically.
        let (consumer, producer) = unsafe {
            (
                &*self.consumer.as_ptr().cast::<AtomicU64>(),
                &*self.producer.as_ptr().cast::<AtomicU64>(),
            )
        };
        let mut position = consumer.load(Ordering::Relaxed);
        let end = producer.load(Ordering::Acquire);
        let has_room = end - position <= (self.size / 2) as u64;
        let mut records = Vec::new();
        while position < end {
            let at = PAGE + (position as usize & (self.size - 1));
            // SAFETY: `at` is a multiple of 8 below PAGE + size; every record begins with its length, which the kernel writes
            // atomically.
            let length = unsafe { &*self.producer.as_ptr().add(at).cast::<AtomicU32>() }
                .load(Ordering::Acquire);
            if length & BUSY != 0 {
                break;
            }
            if length & DISCARD == 0 && length as usize == N * 8 {
                // SAFETY: a whole record, which ends at most size bytes after the first copy's end; the kernel does not
                // write it again before our position has passed it.
                records.push(unsafe {
                    self.producer
                        .as_ptr()
                        .add(at + HEADER as usize)
                        .cast::<[u64; N]>()
                        .read()
                });
            }
            position += HEADER + u64::from(length & !DISCARD).next_multiple_of(8);
            consumer.store(position, Ordering::Release);
        }
        (records, has_room)
    }
}

impl<const N: usize> AsFd for Ring<N> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<const N: usize> Drop for Ring<N> {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with these lengths; nothing refers to them any more.
        unsafe {
            let _ = munmap(self.consumer.cast(), PAGE);
            let _ = munmap(self.producer.cast(), PAGE + 2 * self.size);
        }
    }
}

fn map(fd: &OwnedFd, offset: usize, length: usize, access: ProtFlags) -> nix::Result<NonNull<u8>> {
    let length = NonZeroUsize::new(length).ok_or(Errno::EINVAL)?;
    let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
    let memory = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, fd, offset)? };
    Ok(memory.cast())
}
