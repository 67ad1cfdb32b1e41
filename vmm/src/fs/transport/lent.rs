//! Guest memory of which a template may lend pages.
//!
//! The contents of a lent page are the template's, and only the VMM maps that. This process maps
//! the pod's memory file, which has a hole there: a read would yield zeros, and a write would be
//! lost to the guest. A page is lent until the VMM has copied it into the file; then it is the
//! pod's own for good.
//!
//! [`Region`] asks the VMM for lent pages before it hands out a slice of them, and a slice is the
//! only way to them: rings, tables of descriptors and data come the same way, and none can forget
//! to ask.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::guest_memory::Result;
use vm_memory::{
    GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestRegionMmap, MemoryRegionAddress, VolatileSlice,
};

use crate::arch::x86_64::layout::{MAX_MEMORY, PAGE};
use crate::lending::{self, ANSWER, BLOCK, MAX_LIST};

/// Guest memory as the fs process sees it.
pub type GuestMemory = GuestRegionCollection<Region>;

/// A region of guest memory. There is no host address of it, nor a slice of all of it: those would
/// be ways around the question.
#[derive(Debug)]
pub struct Region {
    mapped: GuestRegionMmap,
    lent: Option<Arc<Lent>>,
}

impl Region {
    /// A region of the pod's memory file; a template may lend pages of it.
    pub fn new(mapped: GuestRegionMmap, lent: Option<Arc<Lent>>) -> Region {
        Region { mapped, lent }
    }
}

/// Whether a page of this memory was not to be had. Then nothing that was read since is the
/// guest's fault, and nothing may be told to it as done.
pub fn failed(memory: &GuestMemory) -> bool {
    let has_failed = |region: &Region| {
        let lent = region.lent.as_ref();
        lent.is_some_and(|lent| lent.failed.load(Ordering::Acquire))
    };
    memory.iter().any(has_failed)
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> u64 {
        self.mapped.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapped.start_addr()
    }

    fn bitmap(&self) {}

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> Result<VolatileSlice<'_>> {
        // What is outside fails here: nobody is asked for it.
        let slice = self.mapped.get_slice(offset, count)?;
        if let Some(lent) = &self.lent
            && count > 0
        {
            // No region's end wraps.
            let start = self.start_addr().0 + offset.0;
            lent.make_own(start, start + count as u64)
                .map_err(GuestMemoryError::IOError)?;
        }
        Ok(slice)
    }

    fn as_volatile_slice(&self) -> Result<VolatileSlice<'_>> {
        Err(GuestMemoryError::HostAddressNotAvailable)
    }
}

impl GuestMemoryRegionBytes for Region {}

/// What the VMM has said about pages that a template lends. It outlives mappings: a driver that
/// resets the device has the VMM share memory again, and what was made the pod's own stays so.
pub struct Lending {
    /// Who has not said yet what is lent.
    unheard: Option<Lender>,
    lent: Option<Arc<Lent>>,
}

impl Lending {
    /// `lender` is this process's end of the socketpair, if the VMM may go on from a template.
    pub fn new(lender: Option<OwnedFd>) -> Lending {
        Lending {
            unheard: lender.map(|socket| Lender(socket.into())),
            lent: None,
        }
    }

    /// The lent pages, if there are any. The first call waits for the VMM to say which they are.
    ///
    /// # Errors
    /// The VMM has gone, or what it says is no list. The next call hears it again: without a list,
    /// no page may be taken for the pod's own.
    pub fn lent(&mut self) -> io::Result<Option<Arc<Lent>>> {
        if let Some(lender) = &self.unheard {
            let runs = lender.runs()?;
            let lender = self.unheard.take().filter(|_| !runs.is_empty());
            self.lent = lender.map(|lender| Arc::new(Lent::new(&runs, lender)));
        }
        Ok(self.lent.clone())
    }
}

/// This process's end of the socketpair; see [`lending`].
#[derive(Debug)]
struct Lender(File);

impl Lender {
    fn runs(&self) -> io::Result<Vec<(u64, u64)>> {
        // One byte more than the longest, so that a longer one is seen.
        let mut packet = vec![0; MAX_LIST + 1];
        let length = self.read(&mut packet)?;
        let runs = lending::decode_runs(&packet[..length]);
        // The runs are disjoint, so their sum does not wrap.
        runs.filter(|runs| runs.iter().map(|run| run.1).sum::<u64>() <= MAX_MEMORY)
            .ok_or_else(|| io::Error::other("the VMM gives no list of lent pages"))
    }

    /// Returns when these pages are the pod's own.
    fn ask(&self, start: u64, end: u64) -> io::Result<()> {
        let question = lending::encode_question(start, end - start);
        uninterrupted(|| (&self.0).write(&question))?;
        // One byte more than an answer has.
        let mut answer = [0; 2];
        match self.read(&mut answer)? {
            1 if answer[0] == ANSWER => Ok(()),
            _ => Err(io::Error::other("the VMM does not give a lent page")),
        }
    }

    fn read(&self, packet: &mut [u8]) -> io::Result<usize> {
        uninterrupted(|| (&self.0).read(packet))
    }
}

/// A question that is given up would leave its answer to the next one.
fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The lent pages: a bit for each page of the VMM's list, set until the page is the pod's own.
#[derive(Debug)]
pub struct Lent {
    /// Sorted and disjoint.
    runs: Vec<Run>,
    bits: Vec<AtomicU64>,
    /// One question at a time.
    lender: Mutex<Lender>,
    /// A question had no answer.
    failed: AtomicBool,
}

#[derive(Debug)]
struct Run {
    start: u64,
    end: u64,
    /// The bit of its first page.
    bit: usize,
}

/// One page of a run.
struct Page {
    start: u64,
    bit: usize,
}

impl Lent {
    fn new(runs: &[(u64, u64)], lender: Lender) -> Lent {
        let mut bit = 0;
        let runs = runs.iter().map(|&(start, length)| {
            let first = bit;
            bit += (length / PAGE) as usize;
            Run {
                start,
                end: start + length,
                bit: first,
            }
        });
        let runs = runs.collect();
        let bits = (0..bit.div_ceil(64)).map(|_| AtomicU64::new(u64::MAX));
        Lent {
            runs,
            bits: bits.collect(),
            lender: Mutex::new(lender),
            failed: AtomicBool::new(false),
        }
    }

    /// Returns when no page with a byte from `start` to `end` is lent; `start` is below `end`.
    fn make_own(&self, start: u64, end: u64) -> io::Result<()> {
        while self.still_lent(start, end).is_some() {
            let lender = self.lender.lock().expect("no code panics with it locked");
            // Another thread may have asked meanwhile.
            let Some((first, _)) = self.still_lent(start, end) else {
                return Ok(());
            };
            let block = first & !(BLOCK - 1)..(first | (BLOCK - 1)).saturating_add(1);
            let lent = self.still_lent(block.start, block.end);
            let (first, last) = lent.unwrap_or((first, first));
            let end = last + PAGE;
            let asked = lender.ask(first, end);
            asked.inspect_err(|_| self.failed.store(true, Ordering::Release))?;
            for page in self.pages(first, end) {
                // Who finds the bit clear finds the page's contents too.
                self.bits[page.bit / 64].fetch_and(!(1 << (page.bit % 64)), Ordering::Release);
            }
        }
        Ok(())
    }

    /// The first and the last of the pages that are lent yet.
    fn still_lent(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let is_lent = |page: &Page| {
            self.bits[page.bit / 64].load(Ordering::Acquire) & 1 << (page.bit % 64) != 0
        };
        let first = self.pages(start, end).find(is_lent)?;
        // There is one unless another thread has made them own meanwhile.
        let last = self.pages(start, end).rfind(is_lent)?;
        Some((first.start, last.start))
    }

    fn pages(&self, start: u64, end: u64) -> impl DoubleEndedIterator<Item = Page> {
        let from = self.runs.partition_point(|run| run.end <= start);
        let to = self.runs.partition_point(|run| run.start < end);
        self.runs[from..to].iter().flat_map(move |run| {
            let first = (start.max(run.start) - run.start) / PAGE;
            let behind = (end.min(run.end) - run.start).div_ceil(PAGE);
            (first..behind).map(|page| Page {
                start: run.start + page * PAGE,
                bit: run.bit + page as usize,
            })
        })
    }
}

#[cfg(test)]
pub mod tests;
