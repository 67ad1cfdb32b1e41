//! Which memory Linux touches while it boots, so that it can be made resident before: an access to a page that the host has
//! not mapped yet is an exit, and a boot on small pages takes more than 5,000 of them.
//!
//! Found by tracing page faults of our kernel with 64 MiB to 6 GiB (tests/bench has the boot's exits): nine pages of ten lie in the
//! ranges below, and are nearly all of what the ranges hold. A kernel that allocates elsewhere boots as well, with more exits.

use vm_memory::{Address, GuestMemory as _, GuestMemoryRegion};

use crate::arch::x86_64::layout;
use crate::memory::{GuestMemory, HUGE_PAGE};

const MIB: u64 = 1 << 20;

/// Boot tables, the real-mode trampoline and what is left of the first MiB for the page allocator.
const LOW: (u64, u64) = (0, 2 * MIB);
/// What the page allocator gives out first when all memory is below the hole.
const FIRST_PAGES: (u64, u64) = (8 * MIB, 14 * MIB);
/// The same when there is memory above: Linux prefers that.
const FIRST_PAGES_ABOVE: (u64, u64) = (layout::RAM_ABOVE_HOLE, layout::RAM_ABOVE_HOLE + 16 * MIB);
/// Bytes of memory for each byte of struct page.
const PAGE_ARRAY_SHARE: u64 = 64;
/// What else is allocated from the top: per-processor areas, hash tables, page tables.
const TOP: u64 = 5 * MIB / 2;
/// Page arrays are made resident up to this size; those of larger guests are filled when they are needed, partly in the
/// background.
const MAX_PAGE_ARRAY: u64 = 128 * MIB;

/// Whole huge pages as (start, end) pairs in order, for a guest whose kernel occupies `kernel` and whose initrd, at the top of
/// low RAM, has `initrd` bytes.
pub fn ranges(memory: &GuestMemory, kernel: &[(u64, u64)], initrd: u64) -> Vec<(u64, u64)> {
    let (Some(low), Some(top)) = (memory.iter().next(), memory.iter().last()) else {
        return Vec::new();
    };
    let end = top.start_addr().raw_value() + top.len();
    let end = end - end % HUGE_PAGE;
    let above = end > layout::RAM_ABOVE_HOLE;
    let page_array = (end / PAGE_ARRAY_SHARE).min(MAX_PAGE_ARRAY);
    let first = if above {
        FIRST_PAGES_ABOVE
    } else {
        FIRST_PAGES
    };
    // What Linux allocates first is below the initrd, if that is at the same end.
    let taken = if above { 0 } else { initrd };
    let top = end.saturating_sub(taken + page_array + TOP);
    let low_end = low.len() - low.len() % HUGE_PAGE;
    let mut ranges = vec![LOW, first, (top, end)];
    ranges.push((low_end.saturating_sub(initrd), low_end));
    ranges.extend(kernel);
    merge(ranges)
}

/// Rounds outwards to huge pages and joins what then touches.
fn merge(ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let mut whole: Vec<(u64, u64)> = ranges
        .into_iter()
        .filter(|(start, end)| start < end)
        .map(|(start, end)| (start - start % HUGE_PAGE, end.next_multiple_of(HUGE_PAGE)))
        .collect();
    whole.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (start, end) in whole {
        match merged.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    #[test]
    fn ranges_are_huge_pages_that_do_not_touch() {
        let ranges = merge(vec![
            (5 * MIB, 5 * MIB + 1),
            (0, 1),
            (5, 5),
            (3 * MIB, 4 * MIB),
            (9 * MIB, 10 * MIB),
        ]);
        assert_eq!(ranges, [(0, 6 * MIB), (8 * MIB, 10 * MIB)]);
    }

    #[test]
    fn a_guest_above_the_hole_begins_there() {
        let memory = Memory::new(4096 * MIB).unwrap();
        let ranges = ranges(memory.ram(), &[(16 * MIB, 30 * MIB)], 3 * MIB);
        let above = layout::RAM_ABOVE_HOLE;
        assert_eq!(
            ranges,
            [
                (0, 2 * MIB),
                (16 * MIB, 30 * MIB),
                (3068 * MIB, 3072 * MIB),
                (above, above + 16 * MIB),
                (above + 940 * MIB, above + 1024 * MIB)
            ]
        );
    }

    #[test]
    fn the_smallest_guest_has_room_for_them() {
        let memory = Memory::new(layout::MIN_MEMORY).unwrap();
        let ranges = ranges(memory.ram(), &[(16 * MIB, 31 * MIB)], 3 * MIB);
        let last = ranges.last().unwrap();
        assert_eq!(*last, (layout::MIN_MEMORY - 8 * MIB, layout::MIN_MEMORY));
    }
}
