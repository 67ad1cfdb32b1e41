//! Guest RAM, and the only place that gives guest physical addresses to KVM.
//!
//! RAM is one memfd, sealed against changes of its size, mapped shared so that a vhost-user process can map the same pages.
//! Holes are punched by whoever gives memory back, so there is no write seal. The ramoops region is a memfd of its own: it
//! is no RAM to the guest, no device reads it, and no other process ever gets it.

use std::fs::File;
use std::io;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use thiserror::Error;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemory as _, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::arch::x86_64::layout;

/// Guest RAM as devices see it; clones share the mapping.
pub type GuestMemory = vm_memory::GuestMemoryMmap;

/// Why guest memory cannot be made.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The memfd could not be made, sized or sealed.
    #[error("making a memfd of {size} bytes for {what} failed")]
    Memfd {
        /// RAM or ramoops.
        what: &'static str,
        /// Its size in bytes.
        size: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The mapping failed.
    #[error(
        "mapping {size} bytes of guest memory at {start:#x} failed; is the address space limited?"
    )]
    Map {
        /// Guest physical address.
        start: u64,
        /// Bytes.
        size: u64,
        /// Why.
        #[source]
        source: MmapRegionError,
    },
    /// The ranges overlap: the layout is wrong.
    #[error("guest memory ranges do not fit together: {0}")]
    Ranges(String),
    /// KVM refuses the memory.
    #[error("KVM refuses {size} bytes of guest memory at {start:#x}")]
    Slot {
        /// Guest physical address.
        start: u64,
        /// Bytes.
        size: u64,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// All memory of a machine.
pub struct Memory {
    ram: GuestMemory,
    ramoops: GuestRegionMmap,
}

impl Memory {
    /// Makes `size` bytes of RAM and the ramoops region. Nothing is resident until it is touched.
    ///
    /// # Errors
    /// The host has no memory, or limits it.
    pub fn new(size: u64) -> Result<Memory, MemoryError> {
        let file = sealed_memfd("RAM", size)?;
        let mut offset = 0;
        let mut regions = Vec::new();
        for (start, length) in layout::ram_ranges(size) {
            let file = file.try_clone().map_err(|source| MemoryError::Memfd {
                what: "RAM",
                size,
                source,
            })?;
            regions.push(map(FileOffset::new(file, offset), start, length)?);
            offset += length;
        }
        let ram = GuestMemory::from_regions(regions)
            .map_err(|error| MemoryError::Ranges(error.to_string()))?;
        let file = sealed_memfd("ramoops", layout::RAMOOPS_SIZE)?;
        let ramoops = map(
            FileOffset::new(file, 0),
            layout::RAMOOPS,
            layout::RAMOOPS_SIZE,
        )?;
        Ok(Memory { ram, ramoops })
    }

    /// RAM, for devices and for loading.
    pub fn ram(&self) -> &GuestMemory {
        &self.ram
    }

    /// First address behind RAM.
    pub fn end(&self) -> u64 {
        self.ram.last_addr().raw_value() + 1
    }

    /// Makes the memory visible to the guest.
    ///
    /// # Errors
    /// KVM refuses a slot.
    ///
    /// # Safety
    /// `self` outlives the last KVM_RUN of any vCPU of `vm`.
    pub unsafe fn register(&self, vm: &VmFd) -> Result<(), MemoryError> {
        for (slot, region) in (0..).zip(self.ram.iter().chain([&self.ramoops])) {
            let host = region.as_ptr() as u64;
            let entry = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: host,
            };
            // SAFETY: the range is a mapping of exactly this size that `self` owns, and the caller keeps `self` that long.
            unsafe { vm.set_user_memory_region(entry) }.map_err(|source| MemoryError::Slot {
                start: entry.guest_phys_addr,
                size: entry.memory_size,
                source,
            })?;
        }
        Ok(())
    }

    /// A copy of the ramoops region: bytes that the guest chose.
    pub fn ramoops(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.ramoops.size()];
        let slice = self
            .ramoops
            .get_slice(MemoryRegionAddress(0), bytes.len())
            .expect("the slice is the whole region");
        slice.copy_to(&mut bytes[..]);
        bytes
    }
}

fn sealed_memfd(what: &'static str, size: u64) -> Result<File, MemoryError> {
    let fail = |source: io::Error| MemoryError::Memfd { what, size, source };
    let fd = memfd_create(what, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
        .map_err(|error| fail(error.into()))?;
    let file = File::from(fd);
    file.set_len(size).map_err(fail)?;
    // A process that shares the memory must not be able to make our mapping fault (SIGBUS) by shrinking the file.
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(|error| fail(error.into()))?;
    Ok(file)
}

fn map(file: FileOffset, start: u64, size: u64) -> Result<GuestRegionMmap, MemoryError> {
    let length = usize::try_from(size).expect("x86-64 has 64-bit addresses");
    let mapping = MmapRegionBuilder::new(length)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        // NORESERVE: a pod's limit is its cgroup's, not the host's overcommit heuristic over the sum of all pods' sizes.
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(file)
        .build()
        .map_err(|source| MemoryError::Map {
            start,
            size,
            source,
        })?;
    GuestRegionMmap::new(mapping, GuestAddress(start))
        .ok_or_else(|| MemoryError::Ranges(format!("{start:#x}+{size:#x} wraps")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn ram_is_sealed_and_split_around_the_hole() {
        let size = layout::HOLE + (1 << 20);
        let memory = Memory::new(size).unwrap();
        let ram = memory.ram();
        assert_eq!(ram.num_regions(), 2);
        let high = ram
            .find_region(GuestAddress(layout::RAM_ABOVE_HOLE))
            .unwrap();
        assert_eq!(high.file_offset().unwrap().start(), layout::HOLE);
        let file = high.file_offset().unwrap().file();
        assert_eq!(file.metadata().unwrap().len(), size);
        assert!(file.set_len(size - 4096).is_err());
        assert!(file.set_len(size + 4096).is_err());
        assert!(fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err());
        assert!(ram.write_obj(1_u8, GuestAddress(layout::HOLE)).is_err());
        assert!(ram.write_obj(1_u8, GuestAddress(layout::RAMOOPS)).is_err());
        ram.write_obj(7_u8, GuestAddress(layout::RAM_ABOVE_HOLE))
            .unwrap();
    }

    #[test]
    fn memory_beyond_the_host_is_made_without_reserving_it() {
        let memory = Memory::new(layout::MAX_MEMORY).unwrap();
        let last = layout::RAM_ABOVE_HOLE + layout::MAX_MEMORY - layout::HOLE - 1;
        assert_eq!(memory.ram().last_addr(), GuestAddress(last));
    }

    #[test]
    fn ramoops_starts_zeroed() {
        let memory = Memory::new(layout::MIN_MEMORY).unwrap();
        let bytes = memory.ramoops();
        assert_eq!(bytes.len() as u64, layout::RAMOOPS_SIZE);
        assert!(bytes.iter().all(|&byte| byte == 0));
    }
}
