//! Pages of RAM that a template lends.
//!
//! ```text
//! what the guest sees     ▒▒▒▒████████▒▒▒▒▒▒▒▒    ▒ the pod's memfd, mapped shared
//! template's file             ████████            █ lent: mapped privately over it
//! shadow                  ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒        the memfd, mapped shared once more
//! ```
//!
//! A lent page costs a pod nothing until the guest writes to it; then the kernel gives this process
//! a copy. No other process can see such a page: where the fs process has to, or where the guest
//! has given the page back, the memfd takes its place, for good.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use vm_memory::{GuestMemoryRegion, GuestRegionMmap, VolatileSlice};

use super::{keep_out_of_dumps, map_shared};
use crate::arch::x86_64::layout::PAGE;

/// A region of guest memory that has lent pages.
struct Region {
    /// Guest physical addresses.
    range: Range<u64>,
    /// Where the guest's is mapped.
    host: *mut u8,
    /// Where the memfd is mapped once more.
    shadow: *mut u8,
}

// SAFETY: both mappings live as long as the process, and all access to them is volatile or by the
// kernel.
unsafe impl Send for Region {}

/// The pages that are lent now.
#[derive(Default)]
pub struct Lent {
    regions: Vec<Region>,
    /// Guest physical start and end of those that follow each other.
    runs: BTreeMap<u64, u64>,
}

impl Lent {
    /// Lends `length` bytes of `region` from guest physical `start`: they are those at `offset` of
    /// `file`, all whole pages.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn lend(
        &mut self,
        region: &GuestRegionMmap,
        (start, length): (u64, u64),
        file: &File,
        offset: u64,
    ) -> io::Result<()> {
        let host = self.region(region)?.at(start);
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let (size, fd) = (length as usize, file.as_raw_fd());
        // SAFETY: it replaces a part of the region's mapping, which stays memory of the same size
        // and protection.
        let address = unsafe { libc::mmap(host.cast(), size, protection, flags, fd, offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.runs.insert(start, start + length);
        keep_out_of_dumps(host, size)
    }

    /// Guest physical starts and lengths.
    pub fn runs(&self) -> Vec<(u64, u64)> {
        let length = |(&start, &end)| (start, end - start);
        self.runs.iter().map(length).collect()
    }

    /// Whether a byte of a range is lent.
    pub fn has(&self, range: &Range<u64>) -> bool {
        !self.within(range.clone()).is_empty()
    }

    /// Makes the pages that have bytes of `range` the pod's own, with what is in them. Nobody else
    /// writes to guest memory meanwhile.
    ///
    /// # Panics
    /// The kernel cannot map them: they may be mapped nowhere now.
    pub fn own(&mut self, range: Range<u64>) {
        self.replace(range, true);
    }

    /// Makes the pages that have bytes of `range` the pod's own, without what is in them: the guest has given them up.
    ///
    /// # Panics
    /// As [`Lent::own`].
    pub fn forget(&mut self, range: Range<u64>) {
        self.replace(range, false);
    }

    /// Makes the smallest pieces the pod's own until there are `most` at most.
    pub fn simplify(&mut self, most: usize) {
        let mut runs = self.runs();
        runs.sort_by_key(|&(_, length)| length);
        let many = runs.len().saturating_sub(most);
        for (start, length) in runs.into_iter().take(many) {
            self.own(start..start + length);
        }
    }

    fn replace(&mut self, range: Range<u64>, copy: bool) {
        let start = range.start & !(PAGE - 1);
        let end = range.end.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        for part in self.within(start..end) {
            let region = self.regions.iter().find(|region| region.has(&part));
            let region = region.expect("what is lent is in a region");
            region.replace(&part, copy);
            self.remove(&part);
        }
    }

    /// The lent parts of a range.
    fn within(&self, range: Range<u64>) -> Vec<Range<u64>> {
        if range.is_empty() {
            return Vec::new();
        }
        // Runs do not overlap, so that only the last one before it can reach into it.
        let before = self.runs.range(..range.start).next_back();
        let parts = before.into_iter().chain(self.runs.range(range.clone()));
        parts
            .map(|(&start, &end)| start.max(range.start)..end.min(range.end))
            .filter(|part| !part.is_empty())
            .collect()
    }

    /// Takes a part of one run away.
    fn remove(&mut self, part: &Range<u64>) {
        let run = self.runs.range(..=part.start).next_back();
        let (&start, &end) = run.expect("it is a part of a run");
        self.runs.remove(&start);
        for rest in [start..part.start, part.end..end] {
            if !rest.is_empty() {
                self.runs.insert(rest.start, rest.end);
            }
        }
    }

    fn region(&mut self, region: &GuestRegionMmap) -> io::Result<&Region> {
        let start = region.start_addr().0;
        let known = self.regions.iter().position(|one| one.range.start == start);
        let index = match known {
            Some(index) => index,
            None => {
                let backing = region.file_offset().expect("guest memory is a file");
                let range = (backing.start(), region.len());
                self.regions.push(Region {
                    range: start..start + region.len(),
                    host: region.as_ptr(),
                    shadow: map_shared(backing.file(), range)?,
                });
                self.regions.len() - 1
            }
        };
        Ok(&self.regions[index])
    }
}

impl Region {
    fn has(&self, part: &Range<u64>) -> bool {
        self.range.start <= part.start && part.end <= self.range.end
    }

    /// Where the guest's byte is mapped.
    fn at(&self, address: u64) -> *mut u8 {
        self.host
            .wrapping_add((address - self.range.start) as usize)
    }

    fn replace(&self, part: &Range<u64>, copy: bool) {
        let host = self.at(part.start);
        let shadow = self
            .shadow
            .wrapping_add((part.start - self.range.start) as usize);
        let length = (part.end - part.start) as usize;
        if copy {
            // SAFETY: both are mapped for good, readable and writable, and are only used by volatile
            // access.
            let [from, to] = [host, shadow].map(|at| unsafe { VolatileSlice::new(at, length) });
            from.copy_to_volatile_slice(to);
        }
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // An old size of 0 maps the pages of a shared mapping once more: mremap(2).
        // SAFETY: what is replaced is a part of guest memory's mapping, and stays one of the same
        // size and protection; there is no moment without.
        let mapped = unsafe { libc::mremap(shadow.cast(), 0, length, flags, host) };
        // The kernel unmaps first: whatever is mapped next could come to be where the guest has its memory.
        let error = io::Error::last_os_error();
        assert!(
            mapped != libc::MAP_FAILED,
            "guest memory is not mapped any more: {error}"
        );
    }
}

#[cfg(test)]
mod tests;
