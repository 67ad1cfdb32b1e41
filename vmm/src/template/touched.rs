//! What machines that go on from a template touch of it first.
//!
//! A page that a guest touches costs an exit and a fault, one by one. Whoever makes a template has
//! one machine go on from it and *learns* what that touches, until its end; the next machines get
//! those pages at once, before they run. It is advice: without it, or with another one, a guest
//! sees the same.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemory as _};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::file::{self, FileError};
use crate::arch::x86_64::layout::PAGE;
use crate::build_id::build_id;
use crate::memory::Memory;

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

/// Missing from the C library: Linux 5.14.
const MADV_POPULATE_READ: libc::c_int = 22;
const MADV_POPULATE_WRITE: libc::c_int = 23;

/// How many pages are looked at at once.
const LOOK: usize = 512;

/// How a page was touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Touch {
    /// The fs process needed it.
    Owned,
    Written,
    Read,
}

/// Guest physical starts and lengths of the pages that were touched in the one way or the other.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    owned: Vec<(u64, u64)>,
    written: Vec<(u64, u64)>,
    read: Vec<(u64, u64)>,
}

impl Touched {
    /// Reads what a [`Learner`] has written.
    ///
    /// # Errors
    /// It is none of this build's, or damaged.
    pub fn read(file: &File) -> Result<Touched, FileError> {
        file::read(file, &build_id())
    }

    /// Gives a machine these pages before it runs. Where a host cannot, the guest's accesses do.
    pub fn prepare(&self, memory: &Memory, vcpu: &VcpuFd) {
        for &(start, length) in &self.owned {
            let end = start.saturating_add(length);
            memory.loan().lock().own(start..end);
        }
        for (runs, advice) in [
            (&self.owned, MADV_POPULATE_WRITE),
            (&self.written, MADV_POPULATE_WRITE),
            (&self.read, MADV_POPULATE_READ),
        ] {
            for &run in runs {
                populate(memory, run, advice);
                show(vcpu, run);
            }
        }
    }

    fn add(&mut self, touch: Touch, page: u64) {
        let runs = match touch {
            Touch::Owned => &mut self.owned,
            Touch::Written => &mut self.written,
            Touch::Read => &mut self.read,
        };
        match runs.last_mut() {
            Some((start, length)) if *start + *length == page => *length += PAGE,
            _ => runs.push((page, PAGE)),
        }
    }
}

/// Has this process's page tables point to pages.
fn populate(memory: &Memory, (start, length): (u64, u64), advice: libc::c_int) {
    let Ok(size) = usize::try_from(length) else {
        return;
    };
    // What is not in RAM is not touched.
    let Ok(slice) = memory.ram().get_slice(GuestAddress(start), size) else {
        return;
    };
    let place = slice.ptr_guard_mut();
    // SAFETY: the range is a part of guest memory's mapping; no contents change.
    unsafe { libc::madvise(place.as_ptr().cast(), size, advice) };
}

/// Has the guest's nested page tables point to pages: Linux 6.11.
fn show(vcpu: &VcpuFd, (gpa, size): (u64, u64)) {
    let mut range = kvm_pre_fault_memory {
        gpa,
        size,
        ..Default::default()
    };
    let mut left = u64::MAX;
    while range.size > 0 && range.size < left {
        left = range.size;
        // SAFETY: the kernel reads and writes this structure; what it maps is the guest's.
        let answer = unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut range) };
        if answer != 0 {
            return;
        }
    }
}

/// Finds out what a machine touches.
pub struct Learner {
    pagemap: File,
    to: File,
    /// Asked for while files may be opened.
    build: String,
    /// What was lent to it when it began.
    lent: Vec<(u64, u64)>,
}

impl Learner {
    /// Learns of a machine that has not run; `to` is an empty file.
    ///
    /// # Errors
    /// open(2)'s of what /proc tells of this process's page tables.
    pub fn new(to: File, memory: &Memory) -> io::Result<Learner> {
        Ok(Learner {
            pagemap: File::open("/proc/self/pagemap")?,
            to,
            build: build_id(),
            lent: memory.loan().lock().runs(),
        })
    }

    /// Writes it down, when the machine has ended.
    ///
    /// # Errors
    /// The files'.
    pub fn finish(&self, memory: &Memory) -> Result<(), FileError> {
        file::write(&self.to, &self.build, &self.touched(memory)?)
    }

    fn touched(&self, memory: &Memory) -> io::Result<Touched> {
        let lent = memory.loan().lock();
        let mut touched = Touched::default();
        for &(start, length) in &self.lent {
            let pages: Vec<u64> = (start..start + length).step_by(PAGE as usize).collect();
            for pages in pages.chunks(LOOK) {
                let mut entries = [[0; 8]; LOOK];
                let entries = &mut entries[..pages.len()];
                self.look(memory, pages[0], entries.as_flattened_mut())?;
                for (&page, entry) in pages.iter().zip(entries) {
                    let touch = match lent.has(&(page..page + PAGE)) {
                        true => touch(u64::from_le_bytes(*entry)),
                        false => Some(Touch::Owned),
                    };
                    if let Some(touch) = touch {
                        touched.add(touch, page);
                    }
                }
            }
        }
        Ok(touched)
    }

    /// Reads the entries of a page and those behind it.
    fn look(&self, memory: &Memory, page: u64, entries: &mut [u8]) -> io::Result<()> {
        let slice = memory.ram().get_slice(GuestAddress(page), PAGE as usize);
        let slice = slice.map_err(io::Error::other)?;
        let at = slice.ptr_guard().as_ptr().addr() as u64 / PAGE;
        self.pagemap.read_exact_at(entries, at * 8)
    }
}

/// How a page that is lent still was touched (pagemap.rst: bit 63 is a page that is mapped, bit 62
/// one that is swapped, bit 61 says that it is a file's).
fn touch(entry: u64) -> Option<Touch> {
    match (entry >> 62, entry >> 61 & 1) {
        (0, _) => None,
        (_, 0) => Some(Touch::Written),
        _ => Some(Touch::Read),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use vm_memory::Bytes;

    const START: u64 = 0x10_0000;
    const PAGES: u64 = 64;

    fn machine(template: &File) -> Memory {
        let memory = Memory::new(64 << 20).unwrap();
        let region = memory.ram().iter().next().unwrap();
        let run = (START, PAGES * PAGE);
        let mut lent = memory.loan().lock();
        lent.lend(region, run, template, START).unwrap();
        drop(lent);
        memory
    }

    fn template() -> File {
        let file = tempfile::tempfile().unwrap();
        let bytes = [7; (PAGES * PAGE) as usize];
        file.write_all_at(&bytes, START).unwrap();
        file
    }

    fn page(number: u64) -> u64 {
        START + number * PAGE
    }

    #[test]
    fn what_one_machine_touches_the_next_one_has_at_once() {
        let template = template();
        let first = machine(&template);
        let mut to = tempfile::tempfile().unwrap();
        let learner = Learner::new(to.try_clone().unwrap(), &first).unwrap();
        assert_eq!(learner.touched(&first).unwrap(), Touched::default());
        let write = |memory: &Memory, at| memory.ram().write_obj(1_u8, GuestAddress(at)).unwrap();
        write(&first, page(2));
        write(&first, page(3) + 9);
        let _: u8 = first.ram().read_obj(GuestAddress(page(40))).unwrap();
        first.loan().lock().own(page(5)..page(7));
        learner.finish(&first).unwrap();
        to.rewind().unwrap();
        let touched = Touched::read(&to).unwrap();
        assert_eq!(touched.written, [(page(2), 2 * PAGE)]);
        assert_eq!(touched.owned, [(page(5), 2 * PAGE)]);
        // The kernel maps what is around a page that is read.
        let read = |(start, length): &(u64, u64)| (*start..start + length).contains(&page(40));
        assert!(touched.read.iter().any(read), "{touched:?}");

        let second = machine(&template);
        for (run, advice) in [
            (touched.written[0], MADV_POPULATE_WRITE),
            (touched.read[0], MADV_POPULATE_READ),
        ] {
            populate(&second, run, advice);
        }
        let learner = Learner::new(tempfile::tempfile().unwrap(), &second).unwrap();
        let again = learner.touched(&second).unwrap();
        assert_eq!(again.written, touched.written);
        assert!(!again.read.is_empty());
        let seen: u8 = second.ram().read_obj(GuestAddress(page(2))).unwrap();
        assert_eq!(seen, 7);
    }

    #[test]
    fn advice_that_is_wrong_changes_nothing() {
        let Some(kvm) = crate::test_kvm::open() else {
            return;
        };
        let vm = kvm.create_vm().unwrap();
        let memory = machine(&template());
        // SAFETY: no vCPU runs.
        unsafe { memory.register(&vm) }.unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let runs = vec![
            (0, u64::MAX),
            (u64::MAX, u64::MAX),
            (u64::MAX - 4095, 4096),
            (1 << 40, 1 << 40),
            (3, 5),
            (64 << 20, 4096),
            (0, 0),
            (page(1), PAGE),
        ];
        let touched = Touched {
            owned: vec![(u64::MAX, 9), (3, 5), (page(3) + 1, 1)],
            written: runs.clone(),
            read: runs,
        };
        touched.prepare(&memory, &vcpu);
        let all: Vec<(u64, u64)> = vec![(START, 3 * PAGE), (page(4), (PAGES - 4) * PAGE)];
        assert_eq!(memory.loan().lock().runs(), all);
        let seen: u8 = memory.ram().read_obj(GuestAddress(page(1))).unwrap();
        assert_eq!(seen, 7);
    }

    #[test]
    fn files_that_are_damaged_are_no_advice() {
        let to = tempfile::tempfile().unwrap();
        let memory = machine(&template());
        let learner = Learner::new(to.try_clone().unwrap(), &memory).unwrap();
        learner.finish(&memory).unwrap();
        let mut bytes = Vec::new();
        (&to).rewind().unwrap();
        (&to).read_to_end(&mut bytes).unwrap();
        for nth in 0..bytes.len() {
            let other = tempfile::tempfile().unwrap();
            let mut damaged = bytes.clone();
            damaged[nth] ^= 1;
            other.write_all_at(&damaged, 0).unwrap();
            assert!(Touched::read(&other).is_err(), "{nth}");
        }
    }
}
