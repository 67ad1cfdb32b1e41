//! Guest RAM, and the only place that gives guest physical addresses to KVM.
//!
//! RAM is one memfd, sealed against changes of its size, mapped shared so that a vhost-user process can map the same pages.
//! Holes are punched by whoever gives memory back, so there is no write seal. The ramoops region is a memfd of its own: it
//! is no RAM to the guest, no device reads it, and no other process ever gets it.
//!
//! Behind RAM the same memfd has what may be plugged later. It is a hole until somebody writes
//! there, so devices and the fs process reach all of it from the start. KVM knows of it as much as
//! the shim has asked for ([`Spare`]).
//!
//! A machine that goes on from a template has the template's pages over its own ([`Lent`]).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemory as _, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::arch::x86_64::layout::{self, SpareRange};

mod lent;

pub use lent::Lent;

/// First of KVM's memory slots for [`Spare`]. RAM and devices' registers have those below.
pub const FIRST_SPARE_SLOT: u32 = 64;

/// What the processor maps by one entry of the second-lowest page table.
pub const HUGE_PAGE: u64 = 2 << 20;

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
        source: io::Error,
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

/// What a template lends a machine; copies are the same one.
#[derive(Clone, Default)]
pub struct Loan(Arc<Mutex<Lent>>);

impl Loan {
    /// Looks at it, or changes it.
    pub fn lock(&self) -> MutexGuard<'_, Lent> {
        self.0.lock().expect("nobody panics with it locked")
    }
}

/// All memory of a machine.
pub struct Memory {
    ram: GuestMemory,
    all: GuestMemory,
    spare: Option<SpareRange>,
    ramoops: GuestRegionMmap,
    loan: Loan,
}

impl Memory {
    /// Makes `size` bytes of RAM and the ramoops region. Nothing is resident until it is touched.
    ///
    /// # Errors
    /// The host has no memory, or limits it.
    pub fn new(size: u64) -> Result<Memory, MemoryError> {
        Memory::with_spare(size, 0)
    }

    /// The same, with room for `spare` bytes more.
    ///
    /// # Errors
    /// The host has no memory, or limits it.
    pub fn with_spare(size: u64, spare: u64) -> Result<Memory, MemoryError> {
        let spare = (spare > 0).then(|| layout::spare_range(size, spare));
        let (ranges, mut size) = (layout::ram_ranges(size), size);
        // A huge page of the guest's is one of the file's, too.
        let spare_offset = size.next_multiple_of(HUGE_PAGE);
        if let Some(range) = spare {
            size = spare_offset + range.size;
        }
        let file = sealed_memfd("RAM", size)?;
        let region = |offset, start, length| {
            let file = file.try_clone().map_err(|source| MemoryError::Memfd {
                what: "RAM",
                size,
                source,
            })?;
            map(FileOffset::new(file, offset), start, length)
        };
        let mut offset = 0;
        let mut regions = Vec::new();
        for (start, length) in ranges {
            regions.push(region(offset, start, length)?);
            offset += length;
        }
        let ram = GuestMemory::from_regions(regions)
            .map_err(|error| MemoryError::Ranges(error.to_string()))?;
        let all = match spare {
            Some(range) => {
                let region = region(spare_offset, range.start, range.size)?;
                ram.insert_region(Arc::new(region))
                    .map_err(|error| MemoryError::Ranges(error.to_string()))?
            }
            None => ram.clone(),
        };
        let file = sealed_memfd("ramoops", layout::RAMOOPS_SIZE)?;
        let ramoops = map(
            FileOffset::new(file, 0),
            layout::RAMOOPS,
            layout::RAMOOPS_SIZE,
        )?;
        Ok(Memory {
            ram,
            all,
            spare,
            ramoops,
            loan: Loan::default(),
        })
    }

    /// What a template lends it.
    pub fn loan(&self) -> &Loan {
        &self.loan
    }

    /// RAM, for loading.
    pub fn ram(&self) -> &GuestMemory {
        &self.ram
    }

    /// RAM and what may be plugged, for devices.
    pub fn all(&self) -> &GuestMemory {
        &self.all
    }

    /// All that a guest has written to: RAM without what may be plugged, and the ramoops region.
    pub fn saved(&self) -> impl Iterator<Item = &GuestRegionMmap> {
        self.ram.iter().chain([&self.ramoops])
    }

    /// Takes the contents away: all is zero, nothing is resident, and nothing is lent.
    ///
    /// # Errors
    /// fallocate(2)'s.
    pub fn clear(&self) -> io::Result<()> {
        self.loan.lock().forget(0..u64::MAX);
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for region in self.saved() {
            let backing = region.file_offset().expect("guest memory is a file");
            let (start, length) = (backing.start() as i64, region.len() as i64);
            fallocate(backing.file(), flags, start, length)?;
        }
        Ok(())
    }

    /// First address behind both.
    pub fn end(&self) -> u64 {
        self.all.last_addr().raw_value() + 1
    }

    /// What may be plugged, where anything may.
    pub fn spare(&self) -> Option<Spare> {
        let range = self.spare?;
        let region = self.all.find_region(GuestAddress(range.start))?;
        Some(Spare {
            range,
            host: region.as_ptr() as u64,
            shown: 0,
            slot: FIRST_SPARE_SLOT,
        })
    }

    /// Makes RAM visible to the guest.
    ///
    /// # Errors
    /// KVM refuses a slot.
    ///
    /// # Safety
    /// `self` outlives the last KVM_RUN of any vCPU of `vm`.
    pub unsafe fn register(&self, vm: &VmFd) -> Result<(), MemoryError> {
        for (slot, region) in (0..).zip(self.saved()) {
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

    /// Makes RAM at `start..end`, multiples of [`HUGE_PAGE`], resident as huge pages, so that the guest's first accesses are no
    /// exits. A hint: a host that cannot gives small pages at the first access.
    pub fn populate_huge(&self, start: u64, end: u64) {
        for address in (start..end).step_by(HUGE_PAGE as usize) {
            // Nothing is collapsed where nothing is: make one page.
            if self.ram.write_obj(0_u8, GuestAddress(address)).is_err() {
                return;
            }
        }
        let length = end.saturating_sub(start) as usize;
        let Ok(slice) = self.ram.get_slice(GuestAddress(start), length) else {
            return;
        };
        collapse(slice.ptr_guard_mut().as_ptr(), length);
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

/// The part of guest memory that a device plugs.
pub struct Spare {
    range: SpareRange,
    /// Where its mapping begins.
    host: u64,
    /// Bytes that KVM knows of.
    shown: u64,
    /// The next free one of KVM's slots. Each shows a unit of the region at least, and a region has
    /// 2048 of them at most.
    slot: u32,
}

impl Spare {
    /// Where it is.
    pub fn range(&self) -> SpareRange {
        self.range
    }

    /// Makes the first `size` bytes, whole units, visible to the guest. They stay so. KVM drops all
    /// that it has mapped when a slot goes, and a guest that does not let go of memory would keep
    /// the slot anyway.
    ///
    /// # Errors
    /// KVM refuses a slot.
    pub fn show(&mut self, vm: &VmFd, size: u64) -> Result<(), MemoryError> {
        let size = size.min(self.range.size);
        if size <= self.shown {
            return Ok(());
        }
        let entry = kvm_userspace_memory_region {
            slot: self.slot,
            flags: 0,
            guest_phys_addr: self.range.start + self.shown,
            memory_size: size - self.shown,
            userspace_addr: self.host + self.shown,
        };
        // SAFETY: the range is a part of a mapping that `map` has made, which is never undone.
        unsafe { vm.set_user_memory_region(entry) }.map_err(|source| MemoryError::Slot {
            start: entry.guest_phys_addr,
            size: entry.memory_size,
            source,
        })?;
        self.shown = size;
        self.slot += 1;
        Ok(())
    }
}

fn sealed_memfd(what: &'static str, size: u64) -> Result<File, MemoryError> {
    let fail = |source: io::Error| MemoryError::Memfd { what, size, source };
    /// Linux 6.3: nobody can execute it, by whatever descriptor, and nobody can change that.
    const MFD_NOEXEC_SEAL: MFdFlags = MFdFlags::from_bits_retain(8);
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let made = match memfd_create(what, flags | MFD_NOEXEC_SEAL) {
        // An older kernel.
        Err(Errno::EINVAL) => memfd_create(what, flags),
        made => made,
    };
    let fd = made.map_err(|error| fail(error.into()))?;
    let file = File::from(fd);
    file.set_len(size).map_err(fail)?;
    // A process that shares the memory must not be able to make our mapping fault (SIGBUS) by shrinking the file.
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(|error| fail(error.into()))?;
    Ok(file)
}

/// Maps `file` for good: guest memory lives as long as the process, so that no pointer to it can ever dangle.
fn map(file: FileOffset, start: u64, size: u64) -> Result<GuestRegionMmap, MemoryError> {
    let length = usize::try_from(size).expect("x86-64 has 64-bit addresses");
    // NORESERVE: a pod's limit is its cgroup's, not the host's overcommit heuristic over the sum of all pods' sizes.
    let address = map_shared(file.file(), (file.start(), size));
    let address = address.map_err(|source| MemoryError::Map {
        start,
        size,
        source,
    })?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let builder = MmapRegionBuilder::new(length)
        .with_mmap_prot(protection)
        .with_mmap_flags(flags)
        .with_file_offset(file);
    // SAFETY: the mapping has this length and is never undone.
    let builder = unsafe { builder.with_raw_mmap_pointer(address) };
    let mapping = builder
        .build()
        .map_err(|error| MemoryError::Ranges(error.to_string()))?;
    GuestRegionMmap::new(mapping, GuestAddress(start))
        .ok_or_else(|| MemoryError::Ranges(format!("{start:#x}+{size:#x} wraps")))
}

/// Backs a mapping of shared memory by huge pages, as far as it has pages there. A hint.
pub fn collapse(start: *mut u8, length: usize) {
    /// Linux 6.1; missing from the C library. Unlike MADV_HUGEPAGE it does not ask the host's settings for shared memory.
    const MADV_COLLAPSE: libc::c_int = 25;
    // SAFETY: the call changes how memory is backed, not what it holds; where nothing is mapped it fails.
    unsafe { libc::madvise(start.cast(), length, MADV_COLLAPSE) };
}

/// Maps `length` bytes from `offset` of a file, shared, at a multiple of [`HUGE_PAGE`] and for good.
///
/// # Errors
/// mmap(2)'s.
pub fn map_shared(file: &File, (offset, length): (u64, u64)) -> io::Result<*mut u8> {
    let size = usize::try_from(length).map_err(io::Error::other)?;
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let place = reserve_aligned(size)?;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: it replaces a part of the reservation that was just made and that nobody else knows.
    let address = unsafe { libc::mmap(place, size, protection, flags, file.as_raw_fd(), offset) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    keep_out_of_dumps(address.cast(), size)?;
    Ok(address.cast())
}

/// Keeps a mapping of guest memory out of core dumps: what a pod has in memory is not for the
/// host's disk.
///
/// # Errors
/// madvise(2)'s: the range is no mapping.
pub fn keep_out_of_dumps(start: *mut u8, length: usize) -> io::Result<()> {
    // SAFETY: the advice changes no memory and no mapping, it marks what a core dump leaves out.
    match unsafe { libc::madvise(start.cast(), length, libc::MADV_DONTDUMP) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Address space for `length` bytes at a multiple of [`HUGE_PAGE`], as guest memory begins at one, too.
fn reserve_aligned(length: usize) -> io::Result<*mut libc::c_void> {
    let huge = HUGE_PAGE as usize;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at a place of the kernel's choice.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length + huge,
            libc::PROT_NONE,
            flags,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // What lies before and behind stays reserved and costs nothing.
    Ok(base.map_addr(|address| address.next_multiple_of(huge)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_in_no_core_dump() {
        let memory = Memory::new(8 << 20).unwrap();
        let regions = memory.ram().iter().chain([&memory.ramoops]);
        for region in regions {
            let start = region.as_ptr() as usize;
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let mut lines = maps.lines();
            let found = lines.any(|line| line.starts_with(&format!("{start:x}-")));
            assert!(found, "{start:x} is not mapped");
            let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
            // proc_pid_smaps(5): "dd", do not include area into core dump.
            assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
        }
    }

    #[test]
    fn memory_cannot_be_made_a_program() {
        use std::os::unix::fs::PermissionsExt;
        let file = sealed_memfd("test", 4096).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let started = std::process::Command::new(path).spawn().unwrap_err();
        assert_eq!(started.kind(), io::ErrorKind::PermissionDenied);
        let executable = file.set_permissions(std::fs::Permissions::from_mode(0o700));
        let release = nix::sys::utsname::uname().unwrap();
        let release = release.release().to_string_lossy().into_owned();
        let mut numbers = release.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
        // MFD_NOEXEC_SEAL came with 6.3.
        if (numbers.next(), numbers.next()) >= (Some(6), Some(3)) {
            assert_eq!(
                executable.unwrap_err().kind(),
                io::ErrorKind::PermissionDenied
            );
        }
    }

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
    fn spare_memory_is_a_hole_of_the_same_file_and_no_ram() {
        use std::os::unix::fs::MetadataExt;
        let memory = Memory::with_spare(63 << 20, 100 << 20).unwrap();
        let start = GuestAddress(layout::RAM_ABOVE_HOLE);
        assert_eq!(memory.ram().num_regions(), 1);
        assert!(memory.ram().find_region(start).is_none());
        let region = memory.all().find_region(start).unwrap();
        assert_eq!(region.len(), 128 << 20);
        assert_eq!(memory.end(), layout::RAM_ABOVE_HOLE + (128 << 20));
        let file = region.file_offset().unwrap();
        assert_eq!(file.start(), 64 << 20);
        assert_eq!(file.file().metadata().unwrap().len(), 192 << 20);
        assert_eq!(file.file().metadata().unwrap().blocks(), 0);
        memory.all().write_obj(7_u8, start).unwrap();
        assert_eq!(file.file().metadata().unwrap().blocks(), 8);
    }

    #[test]
    fn a_machine_without_spare_memory_has_none() {
        let memory = Memory::new(layout::MIN_MEMORY).unwrap();
        assert!(memory.spare().is_none());
        assert_eq!(memory.all().num_regions(), 1);
        assert_eq!(memory.end(), layout::MIN_MEMORY);
    }

    #[test]
    fn what_was_asked_for_is_shown_to_kvm_once() {
        let Some(kvm) = crate::test_kvm::open() else {
            return;
        };
        let vm = kvm.create_vm().unwrap();
        let memory = Memory::with_spare(64 << 20, 1 << 30).unwrap();
        let mut spare = memory.spare().unwrap();
        const UNIT: u64 = 128 << 20;
        for size in [UNIT, UNIT, 0, 3 * UNIT, 2 * UNIT, 1 << 30, u64::MAX] {
            spare.show(&vm, size).unwrap();
        }
        assert_eq!((spare.shown, spare.slot), (1 << 30, FIRST_SPARE_SLOT + 3));
    }

    #[test]
    fn ramoops_starts_zeroed() {
        let memory = Memory::new(layout::MIN_MEMORY).unwrap();
        let bytes = memory.ramoops();
        assert_eq!(bytes.len() as u64, layout::RAMOOPS_SIZE);
        assert!(bytes.iter().all(|&byte| byte == 0));
    }
}
