//! RAM of a machine that stands still, in a file: pages that are not all zero, at the places that
//! they have in the file of guest RAM. The rest of the file are holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{Bytes, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use crate::arch::x86_64::layout::PAGE;
use crate::memory::Memory;

/// Memory cannot be saved, or filled.
#[derive(Debug, Error)]
pub enum RunError {
    /// A file.
    #[error("its memory cannot be moved")]
    Io(#[from] io::Error),
    /// A piece is not in RAM.
    #[error("a piece of its memory at {0:#x} is not in the memory of this machine")]
    Outside(u64),
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

/// Writes RAM and the ramoops region to `file`; returns where they are in it.
///
/// # Errors
/// The files'.
pub fn save(memory: &Memory, file: &File) -> Result<Vec<Run>, RunError> {
    let mut runs = Vec::new();
    let mut place = 0;
    for region in memory.saved() {
        save_region(region, file, place, &mut runs)?;
        place += region.len();
    }
    Ok(runs)
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

/// Copies what [`save`] has written into memory that is all zero.
///
/// # Errors
/// A file is shorter than it was, or is that of a machine with other memory.
pub fn fill(memory: &Memory, file: &File, runs: &[Run]) -> Result<(), RunError> {
    let mut end = 0;
    for run in runs {
        // Each byte once, whatever the file says.
        if run.offset < end {
            return Err(RunError::Outside(run.address));
        }
        end = run.offset.saturating_add(run.length);
        let outside = || RunError::Outside(run.address);
        let length = usize::try_from(run.length).map_err(|_| outside())?;
        let region = memory.saved().find(|region| {
            let offset = run.address.checked_sub(region.start_addr().0);
            offset
                .is_some_and(|offset| offset < region.len() && run.length <= region.len() - offset)
        });
        let region = region.ok_or_else(outside)?;
        let offset = run.address - region.start_addr().0;
        let mut from = file;
        io::Seek::seek(&mut from, io::SeekFrom::Start(run.offset))?;
        region
            .read_exact_volatile_from(MemoryRegionAddress(offset), &mut from, length)
            .map_err(io::Error::other)?;
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
        let runs = save(&first, &file).unwrap();
        let places: Vec<_> = runs.iter().map(|run| (run.address, run.length)).collect();
        assert_eq!(places, [(0x5000, 0x2000), ((64 << 20) - 0x1000, 0x1000)]);
        assert_eq!(file.metadata().unwrap().blocks(), 3 * 8);

        let second = memory();
        fill(&second, &file, &runs).unwrap();
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
        let runs = save(&first, &file).unwrap();
        let second = memory();
        fill(&second, &file, &runs).unwrap();
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
            let error = fill(&memory, &file, &[run]).unwrap_err();
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
            let error = fill(&memory, &file, &[run]).unwrap_err();
            assert!(matches!(error, RunError::Io(_)), "{error}");
        }
    }
}
