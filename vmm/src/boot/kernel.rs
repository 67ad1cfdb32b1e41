//! The kernel: an uncompressed x86-64 ELF executable, loaded where its program headers say.
//!
//! Only what its sections hold is copied. Between them lies padding, 3 MiB of the kernel's 12, that the kernel gives to its
//! page allocator: pages that need not exist before.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use crate::arch::x86_64::layout;
use crate::memory::GuestMemory;

/// Why a file is no kernel that can be booted.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The file cannot be read.
    #[error("reading the kernel file failed")]
    Read(#[source] io::Error),
    /// A compressed image.
    #[error("the kernel file is a bzImage; give the uncompressed vmlinux")]
    Compressed,
    /// Something else.
    #[error("the kernel file is no ELF executable for x86-64; give the uncompressed vmlinux")]
    NotAKernel,
    /// Headers that contradict themselves or the file's size.
    #[error("the kernel file is damaged: {0}")]
    Damaged(&'static str),
    /// The segments do not fit into guest memory.
    #[error("the kernel needs memory up to {end:#x}; give the guest more")]
    TooLarge {
        /// End of the kernel.
        end: u64,
    },
}

/// A kernel file, looked at but not loaded.
#[derive(Debug)]
pub struct Kernel<'a> {
    file: &'a File,
    pieces: Vec<Piece>,
    /// Address of its 64-bit entry point.
    pub entry: u64,
    segments: Vec<Segment>,
}

/// A part of the file and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    offset: u64,
    length: u64,
    address: u64,
}

/// A PT_LOAD program header.
#[derive(Clone, Copy, Debug)]
struct Segment {
    offset: u64,
    length: u64,
    address: u64,
    in_memory: u64,
}

impl Segment {
    fn end(&self) -> u64 {
        self.address + self.in_memory
    }

    /// Where `length` bytes of the file at `offset` go, when they are a part of this segment.
    fn place(&self, offset: u64, length: u64) -> Option<Piece> {
        let into = offset.checked_sub(self.offset)?;
        let inside = into.checked_add(length)? <= self.length;
        inside.then_some(Piece {
            offset,
            length,
            address: self.address + into,
        })
    }
}

impl<'a> Kernel<'a> {
    /// Reads and checks the headers of `file`.
    ///
    /// # Errors
    /// The file is not what it should be.
    pub fn open(file: &'a File) -> Result<Kernel<'a>, KernelError> {
        // ELF-64 object file format §3.
        let header = check_header(file)?;
        let size = file.metadata().map_err(KernelError::Read)?.len();
        let segments = segments(file, &header, size)?;
        let pieces = pieces(file, &header, &segments)?;
        let entry = u64_at(&header, 24);
        if !segments
            .iter()
            .any(|segment| (segment.address..segment.end()).contains(&entry))
        {
            return Err(KernelError::Damaged("its entry point is in no segment"));
        }
        Ok(Kernel {
            file,
            pieces,
            entry,
            segments,
        })
    }

    /// First address behind the kernel.
    pub fn end(&self) -> u64 {
        self.segments.iter().map(Segment::end).max().unwrap_or(0)
    }

    /// (start, end) of everything that it reads or writes: the pieces that are copied, and the zeroed ends of segments.
    pub fn occupied(&self) -> Vec<(u64, u64)> {
        let copied = |piece: &Piece| (piece.address, piece.address + piece.length);
        let zeroed = |segment: &Segment| (segment.address + segment.length, segment.end());
        let pieces = self.pieces.iter().map(copied);
        pieces.chain(self.segments.iter().map(zeroed)).collect()
    }

    /// Copies the kernel to `memory`, which is zero where it was never written.
    ///
    /// # Errors
    /// It does not fit, or the file cannot be read.
    pub fn load(&self, memory: &GuestMemory) -> Result<(), KernelError> {
        use vm_memory::{GuestMemory as _, GuestMemoryRegion};
        let low = memory.iter().next().map_or(0, GuestMemoryRegion::len);
        let end = self.end();
        if end > low {
            return Err(KernelError::TooLarge { end });
        }
        for piece in &self.pieces {
            let mut file = self.file;
            io::Seek::seek(&mut file, io::SeekFrom::Start(piece.offset))
                .map_err(KernelError::Read)?;
            let length = piece.length as usize;
            memory
                .read_exact_volatile_from(GuestAddress(piece.address), &mut file, length)
                .map_err(|error| KernelError::Read(io::Error::other(error)))?;
        }
        Ok(())
    }
}

type Header = [u8; 64];

fn check_header(file: &File) -> Result<Header, KernelError> {
    // Class 64, little-endian; ET_EXEC, EM_X86_64.
    const EXECUTABLE: [u8; 4] = [2, 0, 62, 0];
    let mut start = [0; 0x210];
    let length = file.read_at(&mut start, 0).map_err(KernelError::Read)?;
    let start = &start[..length];
    // boot.rst: the setup header of a bzImage has this magic at 0x202.
    if start.get(0x202..0x206) == Some(b"HdrS") {
        return Err(KernelError::Compressed);
    }
    let header: &Header = start.first_chunk().ok_or(KernelError::NotAKernel)?;
    if !header.starts_with(b"\x7fELF\x02\x01") || header[16..20] != EXECUTABLE {
        return Err(KernelError::NotAKernel);
    }
    Ok(*header)
}

fn segments(file: &File, header: &Header, file_size: u64) -> Result<Vec<Segment>, KernelError> {
    const PT_LOAD: u32 = 1;
    let mut segments = Vec::new();
    for entry in table(
        file,
        u64_at(header, 32),
        u16_at(header, 56),
        56,
        u16_at(header, 54),
    )? {
        let segment = Segment {
            offset: u64_at(&entry, 8),
            address: u64_at(&entry, 24),
            length: u64_at(&entry, 32),
            in_memory: u64_at(&entry, 40),
        };
        if u32_at(&entry, 0) != PT_LOAD || segment.in_memory == 0 {
            continue;
        }
        let in_file = segment.offset.checked_add(segment.length);
        if in_file.is_none_or(|end| end > file_size) {
            return Err(KernelError::Damaged("a segment is longer than the file"));
        }
        if segment.length > segment.in_memory
            || segment.address < layout::HIGH_MEMORY
            || segment.address.checked_add(segment.in_memory).is_none()
        {
            return Err(KernelError::Damaged("a segment has an impossible place"));
        }
        segments.push(segment);
    }
    Ok(segments)
}

/// The sections that have content, or whole segments where the file was stripped of its section headers.
fn pieces(file: &File, header: &Header, segments: &[Segment]) -> Result<Vec<Piece>, KernelError> {
    const SHT_NOBITS: u32 = 8;
    const SHF_ALLOC: u64 = 2;
    let sections = table(
        file,
        u64_at(header, 40),
        u16_at(header, 60),
        64,
        u16_at(header, 58),
    )?;
    if sections.is_empty() {
        let whole = |segment: &Segment| segment.place(segment.offset, segment.length);
        return Ok(segments.iter().filter_map(whole).collect());
    }
    let mut pieces = Vec::new();
    for section in sections {
        let (kind, flags) = (u32_at(&section, 4), u64_at(&section, 8));
        let (offset, length) = (u64_at(&section, 24), u64_at(&section, 32));
        if kind == SHT_NOBITS || flags & SHF_ALLOC == 0 || length == 0 {
            continue;
        }
        let piece = segments
            .iter()
            .find_map(|segment| segment.place(offset, length))
            .ok_or(KernelError::Damaged("a section is in no segment"))?;
        pieces.push(piece);
    }
    Ok(pieces)
}

/// `count` entries of a table in the file.
fn table(
    file: &File,
    offset: u64,
    count: u16,
    expected: usize,
    entry_size: u16,
) -> Result<Vec<Vec<u8>>, KernelError> {
    if count == 0 {
        return Ok(Vec::new());
    }
    if usize::from(entry_size) != expected {
        return Err(KernelError::Damaged("its headers have an unknown size"));
    }
    let mut bytes = vec![0; usize::from(count) * expected];
    file.read_exact_at(&mut bytes, offset)
        .map_err(|_| KernelError::Damaged("its headers are cut off"))?;
    Ok(bytes.chunks(expected).map(<[u8]>::to_vec).collect())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// An ELF file with one segment of `content` at `address`, `in_memory` bytes long, entered at its first byte.
    pub fn elf(address: u64, content: &[u8], in_memory: u64) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        for half in [2_u16, 62] {
            file.extend(half.to_le_bytes());
        }
        file.extend(1_u32.to_le_bytes());
        for word in [address, 64, 0] {
            file.extend(word.to_le_bytes());
        }
        file.extend(0_u32.to_le_bytes());
        for half in [64_u16, 56, 1, 64, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        file.extend(1_u32.to_le_bytes());
        file.extend(5_u32.to_le_bytes());
        for word in [120, address, address, content.len() as u64, in_memory, 4096] {
            file.extend(word.to_le_bytes());
        }
        file.extend(content);
        file
    }

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn load_bytes(bytes: &[u8], memory: u64) -> Result<(u64, u64), KernelError> {
        let file = file_of(bytes);
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), memory as usize)]).unwrap();
        let kernel = Kernel::open(&file)?;
        kernel.load(&memory)?;
        let first: u8 = memory.read_obj(GuestAddress(kernel.entry)).unwrap();
        assert_eq!(first, 0xf4);
        Ok((kernel.entry, kernel.end()))
    }

    #[test]
    fn a_kernel_is_loaded_where_it_says() {
        let loaded = load_bytes(&elf(0x100_0000, &[0xf4; 100], 8192), 64 << 20).unwrap();
        assert_eq!(loaded, (0x100_0000, 0x100_2000));
    }

    #[test]
    fn only_sections_with_content_are_copied() {
        let mut bytes = elf(0x100_0000, &[0xf4; 100], 8192);
        let table = bytes.len() as u64;
        bytes[40..48].copy_from_slice(&table.to_le_bytes());
        bytes[60..62].copy_from_slice(&2_u16.to_le_bytes());
        // The first ten bytes, and one section without content.
        for (kind, length) in [(1_u32, 10_u64), (8, 4096)] {
            let mut section = [0; 64];
            section[4..8].copy_from_slice(&kind.to_le_bytes());
            section[8..16].copy_from_slice(&2_u64.to_le_bytes());
            section[24..32].copy_from_slice(&120_u64.to_le_bytes());
            section[32..40].copy_from_slice(&length.to_le_bytes());
            bytes.extend(section);
        }
        let file = file_of(&bytes);
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        Kernel::open(&file).unwrap().load(&memory).unwrap();
        let mut loaded = [0; 11];
        memory
            .read_slice(&mut loaded, GuestAddress(0x100_0000))
            .unwrap();
        assert_eq!(
            loaded,
            [
                0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0
            ]
        );
        bytes[table as usize + 24..][..8].copy_from_slice(&50_u64.to_le_bytes());
        let file = file_of(&bytes);
        assert!(matches!(Kernel::open(&file), Err(KernelError::Damaged(_))));
    }

    #[test]
    fn other_files_are_refused_with_a_reason() {
        let refused = |bytes: &[u8]| load_bytes(bytes, 64 << 20).unwrap_err();
        assert!(matches!(refused(b""), KernelError::NotAKernel));
        assert!(matches!(refused(b"#!/bin/sh\n"), KernelError::NotAKernel));
        let mut bzimage = vec![0; 0x1000];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(matches!(refused(&bzimage), KernelError::Compressed));
        let mut arm = elf(0x100_0000, &[0xf4], 1);
        arm[18] = 183;
        assert!(matches!(refused(&arm), KernelError::NotAKernel));
        let mut small = elf(0x100_0000, &[0xf4], 1);
        small[4] = 1;
        assert!(matches!(refused(&small), KernelError::NotAKernel));
    }

    #[test]
    fn a_kernel_outside_of_memory_or_cut_short_is_refused() {
        let refused = |bytes: &[u8]| load_bytes(bytes, 64 << 20).unwrap_err();
        let low = elf(0x1000, &[0xf4; 10], 10);
        assert!(matches!(refused(&low), KernelError::Damaged(_)));
        for address in [64 << 20, u64::MAX - 20] {
            let high = elf(address, &[0xf4; 10], 10);
            assert!(matches!(refused(&high), KernelError::TooLarge { .. }));
        }
        let wraps = elf(u64::MAX - 5, &[0xf4; 10], 10);
        assert!(matches!(refused(&wraps), KernelError::Damaged(_)));
        let whole = elf(0x100_0000, &[0xf4; 100], 100);
        for length in [64, 119, whole.len() - 1] {
            assert!(matches!(refused(&whole[..length]), KernelError::Damaged(_)));
        }
        assert!(matches!(refused(&whole[..63]), KernelError::NotAKernel));
        let mut astray = whole.clone();
        astray[24..32].copy_from_slice(&0x300_0000_u64.to_le_bytes());
        assert!(matches!(refused(&astray), KernelError::Damaged(_)));
    }

    proptest::proptest! {
        #[test]
        fn no_header_makes_it_panic(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400),
            at in 0_usize..200,
        ) {
            let mut file = elf(0x100_0000, &[0xf4; 100], 8192);
            for (to, from) in file[at.max(20)..].iter_mut().zip(&bytes) {
                *to = *from;
            }
            let file = file_of(&file);
            if let Ok(kernel) = Kernel::open(&file) {
                let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 17 << 20)]).unwrap();
                let _ = kernel.load(&memory);
            }
        }
    }
}
