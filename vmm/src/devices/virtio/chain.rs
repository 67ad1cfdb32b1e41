//! Descriptor chains: walked once, checked whole, then only plain numbers of ours.
//!
//! The walk copies each descriptor before it judges it, so that a driver that rewrites its table afterwards changes nothing.

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice,
};

use super::fault::Fault;
use super::sys::IoVecs;

const DESCRIPTOR_SIZE: u64 = 16;

/// A buffer that lies wholly in one region of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins.
    pub address: GuestAddress,
    /// Bytes.
    pub length: u32,
}

/// A checked chain: readable pieces, then writable ones. Reused from pop to pop to spare the allocator.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    pieces: Vec<Piece>,
    writable_from: usize,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    /// The index that goes into the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device reads.
    pub fn readable(&self) -> Buffers<'_> {
        Buffers {
            pieces: &self.pieces[..self.writable_from],
            length: self.readable_len,
        }
    }

    /// What the device writes.
    pub fn writable(&self) -> Buffers<'_> {
        Buffers {
            pieces: &self.pieces[self.writable_from..],
            length: self.writable_len,
        }
    }

    /// The readable part of a chain that must have no other.
    ///
    /// # Errors
    /// It has.
    pub fn only_readable(&self) -> Result<Buffers<'_>, Fault> {
        if self.writable_from < self.pieces.len() {
            return Err(Fault::UnexpectedWritable);
        }
        Ok(self.readable())
    }

    /// The writable part of a chain that must have no other.
    ///
    /// # Errors
    /// It has.
    pub fn only_writable(&self) -> Result<Buffers<'_>, Fault> {
        if self.writable_from > 0 {
            return Err(Fault::UnexpectedReadable);
        }
        Ok(self.writable())
    }

    /// Walks the chain at `head` of a table of `size` descriptors.
    pub(super) fn walk(
        &mut self,
        memory: &GuestMemoryMmap,
        table: GuestAddress,
        size: u16,
        head: u16,
    ) -> Result<(), Fault> {
        *self = Chain {
            head,
            pieces: std::mem::take(&mut self.pieces),
            ..Chain::default()
        };
        self.pieces.clear();
        if head >= size {
            return Err(Fault::HeadOutOfRange(head));
        }
        let mut index = head;
        for _ in 0..size {
            let at = table
                .checked_add(u64::from(index) * DESCRIPTOR_SIZE)
                .ok_or(Fault::Ring)?;
            let descriptor: Descriptor = memory.read_obj(at).map_err(|_| Fault::Ring)?;
            self.append(memory, &descriptor)?;
            if u32::from(descriptor.flags()) & VRING_DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next();
            if index >= size {
                return Err(Fault::NextOutOfRange(index));
            }
        }
        Err(Fault::ChainLoop)
    }

    fn append(&mut self, memory: &GuestMemoryMmap, descriptor: &Descriptor) -> Result<(), Fault> {
        let flags = u32::from(descriptor.flags());
        if flags & VRING_DESC_F_INDIRECT != 0 {
            return Err(Fault::Indirect);
        }
        let piece = Piece {
            address: descriptor.addr(),
            length: descriptor.len(),
        };
        let total = self.readable_len.checked_add(self.writable_len);
        total
            .and_then(|total| total.checked_add(piece.length))
            .ok_or(Fault::LengthOverflow)?;
        if flags & VRING_DESC_F_WRITE != 0 {
            self.writable_len += piece.length;
        } else if self.writable_from < self.pieces.len() {
            return Err(Fault::ReadableAfterWritable);
        } else {
            self.readable_len += piece.length;
            self.writable_from += 1;
        }
        if !in_one_region(memory, piece.address, u64::from(piece.length)) {
            return Err(Fault::OutsideMemory(piece.address, piece.length));
        }
        self.pieces.push(piece);
        Ok(())
    }
}

/// Whether `[address, address + length)` lies in one region of RAM. An empty range lies where its address does.
pub(super) fn in_one_region(memory: &GuestMemoryMmap, address: GuestAddress, length: u64) -> bool {
    let Some(region) = memory.find_region(address) else {
        return false;
    };
    let offset = address.raw_value() - region.start_addr().raw_value();
    offset
        .checked_add(length)
        .is_some_and(|end| end <= region.len())
}

/// One direction of a chain, as a string of bytes.
#[derive(Clone, Copy)]
pub struct Buffers<'c> {
    pieces: &'c [Piece],
    length: u32,
}

impl Buffers<'_> {
    /// The buffers one by one, for a device that wants their places and not their bytes.
    pub fn pieces(&self) -> &[Piece] {
        self.pieces
    }

    /// Bytes in all pieces.
    pub fn length(&self) -> u32 {
        self.length
    }

    /// Copies `data.len()` bytes from the start.
    ///
    /// # Errors
    /// The chain is shorter.
    pub fn read(&self, memory: &GuestMemoryMmap, data: &mut [u8]) -> Result<(), Fault> {
        self.read_at(memory, 0, data)
    }

    /// Copies `data.len()` bytes from behind the first `skip` bytes.
    ///
    /// # Errors
    /// The chain is shorter.
    pub fn read_at(
        &self,
        memory: &GuestMemoryMmap,
        skip: usize,
        data: &mut [u8],
    ) -> Result<(), Fault> {
        let mut done = 0;
        self.each(memory, skip, data.len(), |slice| {
            done += slice.copy_to(&mut data[done..]);
        })
    }

    /// Copies `data` to the start.
    ///
    /// # Errors
    /// The chain is shorter.
    pub fn write(&self, memory: &GuestMemoryMmap, data: &[u8]) -> Result<(), Fault> {
        self.write_at(memory, 0, data)
    }

    /// Copies `data` behind the first `skip` bytes.
    ///
    /// # Errors
    /// The chain is shorter.
    pub fn write_at(
        &self,
        memory: &GuestMemoryMmap,
        skip: usize,
        data: &[u8],
    ) -> Result<(), Fault> {
        let mut done = 0;
        self.each(memory, skip, data.len(), |slice| {
            slice.copy_from(&data[done..]);
            done += slice.len();
        })
    }

    /// Appends the `count` bytes from `skip` on to `bytes`.
    ///
    /// # Errors
    /// The chain is shorter.
    pub fn append_to(
        &self,
        memory: &GuestMemoryMmap,
        skip: usize,
        count: usize,
        bytes: &mut std::collections::VecDeque<u8>,
    ) -> Result<(), Fault> {
        let mut block = [0; 4096];
        self.each(memory, skip, count, |slice| {
            let mut rest = slice;
            while !rest.is_empty() {
                let copied = rest.copy_to(&mut block[..]);
                bytes.extend(&block[..copied]);
                rest = rest.offset(copied).expect("copy_to stays in its slice");
            }
        })
    }

    /// Lists the `count` bytes from `skip` on for a system call. Returns false, with nothing listed, where the list is full.
    ///
    /// # Errors
    /// The chain is shorter.
    pub(super) fn list<'m>(
        &self,
        memory: &'m GuestMemoryMmap,
        skip: usize,
        count: usize,
        list: &mut IoVecs<'m>,
    ) -> Result<bool, Fault> {
        if self.pieces.len() > list.free() {
            return Ok(false);
        }
        self.each(memory, skip, count, |slice| list.push(&slice))?;
        Ok(true)
    }

    /// Calls `visit` with each slice of the `count` bytes from `skip` on.
    pub(super) fn each<'m>(
        &self,
        memory: &'m GuestMemoryMmap,
        mut skip: usize,
        mut count: usize,
        mut visit: impl FnMut(VolatileSlice<'m>),
    ) -> Result<(), Fault> {
        for piece in self.pieces {
            let length = piece.length as usize;
            if skip >= length {
                skip -= length;
                continue;
            }
            if count == 0 {
                break;
            }
            let take = (length - skip).min(count);
            let outside = Fault::OutsideMemory(piece.address, piece.length);
            let start = piece.address.checked_add(skip as u64).ok_or(outside)?;
            visit(memory.get_slice(start, take).map_err(|_| outside)?);
            skip = 0;
            count -= take;
        }
        if count > 0 {
            return Err(Fault::ChainTooShort);
        }
        Ok(())
    }
}
