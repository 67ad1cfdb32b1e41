//! The blocks of the region, and what a request may do to them.

use std::ops::Range;

use super::{BLOCK, Region};

/// What the blocks of a range are (VIRTIO 1.2 §5.15.6.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// All are plugged.
    Plugged,
    /// None is.
    Unplugged,
    /// Some are.
    Mixed,
}

/// Which blocks are plugged.
pub struct Blocks {
    region: Region,
    plugged: Vec<bool>,
    count: u64,
}

impl Blocks {
    /// A region with nothing plugged.
    pub fn new(region: Region) -> Blocks {
        Blocks {
            region,
            plugged: vec![false; (region.size / BLOCK) as usize],
            count: 0,
        }
    }

    /// Where they are.
    pub fn region(&self) -> Region {
        self.region
    }

    /// All of them.
    pub fn all(&self) -> Range<usize> {
        0..self.plugged.len()
    }

    /// Bytes that are plugged.
    pub fn plugged(&self) -> u64 {
        self.count * BLOCK
    }

    /// The `count` blocks from `address` on. `None` where those are no whole blocks, none at all,
    /// or some past the first `usable` bytes of the region.
    pub fn range(&self, address: u64, count: u16, usable: u64) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.region.start)?;
        let length = u64::from(count) * BLOCK;
        let end = offset.checked_add(length)?;
        let fits = offset.is_multiple_of(BLOCK) && count > 0 && end <= usable;
        fits.then_some((offset / BLOCK) as usize..(end / BLOCK) as usize)
    }

    /// What they are.
    pub fn state(&self, range: Range<usize>) -> State {
        let blocks = &self.plugged[range];
        match (blocks.contains(&true), blocks.contains(&false)) {
            (true, false) => State::Plugged,
            (true, true) => State::Mixed,
            (false, _) => State::Unplugged,
        }
    }

    /// Notes that they are plugged, or are not any more.
    pub fn set(&mut self, range: Range<usize>, plugged: bool) {
        for block in &mut self.plugged[range] {
            if std::mem::replace(block, plugged) != plugged {
                self.count = if plugged {
                    self.count + 1
                } else {
                    self.count - 1
                };
            }
        }
    }

    /// The first plugged blocks of the range that lie together.
    pub fn run(&self, range: Range<usize>) -> Option<Range<usize>> {
        if self.count == 0 {
            return None;
        }
        let blocks = &self.plugged[range.clone()];
        let first = blocks.iter().position(|&plugged| plugged)?;
        let more = blocks[first..].iter().take_while(|&&plugged| plugged);
        let start = range.start + first;
        Some(start..start + more.count())
    }

    /// Guest physical address of a block.
    pub fn address(&self, block: usize) -> u64 {
        self.region.start + block as u64 * BLOCK
    }
}
