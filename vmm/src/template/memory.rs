//! RAM of a machine that stands still, in a file: pages that are not all zero, at the places that
//! they have in the file of guest RAM. The rest of the file are holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{Bytes, GuestMemory as _, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use crate::arch::x86_64::layout::PAGE;
use crate::lending;
use crate::memory::{HUGE_PAGE, Memory, collapse, map_shared};

/// Memory cannot be saved, or lent.
#[derive(Debug, Error)]
pub enum RunError {
    /// A file.
    #[error("its memory cannot be moved")]
    Io(#[from] io::Error),
    /// A piece is not in RAM.
    #[error(
        "a piece of its memory at {0:#x} is not in the memory of this machine, or not in its file"
    )]
    Outside(u64),
    /// Each piece is a mapping.
    #[error("its memory is in {0} pieces, and {max} are the most", max = lending::MAX_RUNS)]
    Scattered(usize),
}

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Guest physical address of the first.
    address: u64,
    /// Its place in the file.
    offset: u64,
    /// Bytes, in whole pages.
    length: u64,
}

/// The file to which a machine's memory goes, mapped while this process may still map files.
pub struct Target {
    file: File,
    at: *mut u8,
    length: u64,
}

// SAFETY: the mapping lives as long as the process, and nobody reads or writes by it.
unsafe impl Send for Target {}

impl Target {
    /// Takes an empty file.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn new(file: File, memory: &Memory) -> io::Result<Target> {
        let length = memory.saved().map(GuestMemoryRegion::len).sum();
        let at = map_shared(&file, (0, length))?;
        Ok(Target { file, at, length })
    }

    /// Writes RAM and the ramoops region; returns where they are in the file.
    ///
    /// # Errors
    /// The files'.
    pub fn save(&self, memory: &Memory) -> Result<Vec<Run>, RunError> {
        let mut runs = Vec::new();
        let mut place = 0;
        for region in memory.saved() {
            save_region(region, &self.file, place, &mut runs)?;
            place += region.len();
        }
        if runs.len() > lending::MAX_RUNS {
            return Err(RunError::Scattered(runs.len()));
        }
        runs.iter().for_each(|run| self.make_huge(run));
        Ok(runs)
    }

    /// Has huge pages where a run fills them: those that go on from the template read them by a
    /// fault each, and not by 512. A hint.
    fn make_huge(&self, run: &Run) {
        let start = run.offset.next_multiple_of(HUGE_PAGE);
        let end = (run.offset + run.length).min(self.length);
        for offset in (start..end).step_by(HUGE_PAGE as usize) {
            if end - offset >= HUGE_PAGE {
                collapse(self.at.wrapping_add(offset as usize), HUGE_PAGE as usize);
            }
        }
    }
}

fn save_region(
    region: &GuestRegionMmap,
    file: &File,
    place: u64,
    runs: &mut Vec<Run>,
) -> Result<(), RunError> {
    let start = region.start_addr().0;
    let backing = region.file_offset().expect("guest memory is a file");
    let mut page = [0; PAGE as usize];
    let mut at = 0;
    // A read of a hole would make it a page.
    while let Some(data) = seek(backing.file(), backing.start() + at, Whence::SeekData)? {
        at = (data - backing.start()) & !(PAGE - 1);
        if at >= region.len() {
            break;
        }
        let hole = seek(backing.file(), data, Whence::SeekHole)?;
        let end = hole.map_or(region.len(), |hole| hole - backing.start());
        while at < end.min(region.len()) {
            backing
                .file()
                .read_exact_at(&mut page, backing.start() + at)?;
            if page.iter().any(|&byte| byte != 0) {
                file.write_all_at(&page, place + at)?;
                push(runs, start + at, place + at);
            }
            at += PAGE;
        }
    }
    Ok(())
}

/// Adds a page, to the last run if it follows it.
fn push(runs: &mut Vec<Run>, address: u64, offset: u64) {
    match runs.last_mut() {
        Some(run) if run.address + run.length == address && run.offset + run.length == offset => {
            run.length += PAGE;
        }
        _ => runs.push(Run {
            address,
            offset,
            length: PAGE,
        }),
    }
}

/// Where data or a hole begins from `offset` on; `None`: there is none.
fn seek(file: &File, offset: u64, whence: Whence) -> Result<Option<u64>, RunError> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    match lseek(file, offset, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(io::Error::from(error).into()),
    }
}

/// Has `file`, which [`Target::save`] has written, lend its pages of RAM to memory that is all zero; those of the ramoops region,
/// whose end this process reads, are copied.
///
/// # Errors
/// The file is that of a machine with other memory, or shorter than it was.
pub fn lend(memory: &Memory, file: &File, runs: &[Run]) -> Result<(), RunError> {
    if runs.len() > lending::MAX_RUNS {
        return Err(RunError::Scattered(runs.len()));
    }
    let size = file.metadata()?.len();
    let mut lent = memory.loan().lock();
    let mut end = 0;
    for run in runs {
        let outside = || RunError::Outside(run.address);
        let whole = [run.address, run.offset, run.length];
        // Each page once, whatever the file says; a page behind the end of a file kills who touches it.
        let fits =
            run.offset >= end && run.length > 0 && whole.iter().all(|n| n.is_multiple_of(PAGE));
        end = run.offset.saturating_add(run.length);
        if !fits || end > size {
            return Err(outside());
        }
        let region = memory.saved().find(|region| {
            let offset = run.address.checked_sub(region.start_addr().0);
            offset
                .is_some_and(|offset| offset < region.len() && run.length <= region.len() - offset)
        });
        let region = region.ok_or_else(outside)?;
        if lent.has(&(run.address..run.address + run.length)) {
            return Err(outside());
        }
        if memory.ram().find_region(region.start_addr()).is_some() {
            lent.lend(region, (run.address, run.length), file, run.offset)?;
        } else {
            let length = usize::try_from(run.length).map_err(|_| outside())?;
            let mut from = file;
            io::Seek::seek(&mut from, io::SeekFrom::Start(run.offset))?;
            let place = MemoryRegionAddress(run.address - region.start_addr().0);
            region
                .read_exact_volatile_from(place, &mut from, length)
                .map_err(io::Error::other)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::layout;
    use vm_memory::GuestAddress;

    fn memory() -> Memory {
        Memory::with_spare(64 << 20, 128 << 20).unwrap()
    }

    #[test]
    fn pages_with_content_are_saved_and_the_rest_are_holes() {
        use std::os::unix::fs::MetadataExt;
        let first = memory();
        let write = |address: u64, byte: u8| {
            first.ram().write_obj(byte, GuestAddress(address)).unwrap();
        };
        // The first is written but zero; two pages follow each other.
        for (address, byte) in [(0, 0), (0x5000, 1), (0x6fff, 2), ((64 << 20) - 1, 3)] {
            write(address, byte);
        }
        let file = tempfile::tempfile().unwrap();
        let target = Target::new(file.try_clone().unwrap(), &first).unwrap();
        let runs = target.save(&first).unwrap();
        let places: Vec<_> = runs.iter().map(|run| (run.address, run.length)).collect();
        assert_eq!(places, [(0x5000, 0x2000), ((64 << 20) - 0x1000, 0x1000)]);
        assert_eq!(file.metadata().unwrap().blocks(), 3 * 8);

        let second = memory();
        lend(&second, &file, &runs).unwrap();
        let mut bytes = [vec![0; 64 << 20], vec![0; 64 << 20]];
        for (memory, bytes) in [&first, &second].into_iter().zip(&mut bytes) {
            memory.ram().read_slice(bytes, GuestAddress(0)).unwrap();
        }
        assert!(bytes[0] == bytes[1]);
    }

    #[test]
    fn the_kernels_last_words_are_saved_as_well() {
        let first = memory();
        let ramoops = first.saved().last().unwrap();
        assert_eq!(ramoops.start_addr().0, layout::RAMOOPS);
        ramoops.write_obj(7_u8, MemoryRegionAddress(9)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let target = Target::new(file.try_clone().unwrap(), &first).unwrap();
        let runs = target.save(&first).unwrap();
        let second = memory();
        lend(&second, &file, &runs).unwrap();
        assert_eq!(second.ramoops()[9], 7);
    }

    #[test]
    fn a_run_outside_of_memory_is_refused() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 30).unwrap();
        for (address, length) in [
            (64 << 20, PAGE),
            ((64 << 20) - PAGE, 2 * PAGE),
            (0, u64::MAX),
            (u64::MAX, PAGE),
            (u64::MAX, u64::MAX),
            (layout::RAM_ABOVE_HOLE, PAGE),
        ] {
            let run = Run {
                address,
                offset: 0,
                length,
            };
            let error = lend(&memory, &file, &[run]).unwrap_err();
            assert!(
                matches!(error, RunError::Outside(_)),
                "{address:#x}: {error}"
            );
        }
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        for offset in [0, u64::MAX, 1 << 40] {
            let run = Run {
                address: 0,
                offset,
                length: PAGE,
            };
            let error = lend(&memory, &file, &[run]).unwrap_err();
            assert!(matches!(error, RunError::Outside(0)), "{error}");
        }
    }

    #[test]
    fn parts_of_pages_and_more_pieces_than_can_be_told_are_refused() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 30).unwrap();
        let run = |address, offset, length| Run {
            address,
            offset,
            length,
        };
        for part in [(1, 0, PAGE), (0, 1, PAGE), (0, 0, 1), (0, 0, 0)] {
            let (address, offset, length) = part;
            let error = lend(&memory, &file, &[run(address, offset, length)]).unwrap_err();
            assert!(matches!(error, RunError::Outside(_)), "{part:?}: {error}");
        }
        let many: Vec<_> = (0..5000_u64)
            .map(|nth| run(nth * 2 * PAGE, nth * 2 * PAGE, PAGE))
            .collect();
        let error = lend(&memory, &file, &many).unwrap_err();
        assert!(matches!(error, RunError::Scattered(5000)), "{error}");
    }
}
