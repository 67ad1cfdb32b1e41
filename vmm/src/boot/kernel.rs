//! The kernel: an uncompressed x86-64 ELF executable, loaded where its program headers say.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_loader::loader::{Elf, KernelLoader};
use thiserror::Error;
use vm_memory::{Address, GuestAddress};

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
    /// The segments do not fit into guest memory, or the file is cut short.
    #[error("the kernel's segments do not load; give the guest more memory or check the file")]
    Segments(#[source] linux_loader::loader::Error),
    /// The entry point lies outside of what was loaded.
    #[error("the kernel's entry point {0:#x} lies outside of its segments")]
    Entry(u64),
}

/// A kernel in guest memory.
#[derive(Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Address of its 64-bit entry point.
    pub entry: u64,
    /// First address behind it, its zeroed data included.
    pub end: u64,
}

/// Copies the kernel's segments to `memory`.
///
/// # Errors
/// The file is not what it should be or does not fit.
pub fn load(memory: &GuestMemory, file: &mut File) -> Result<Loaded, KernelError> {
    check_header(file)?;
    let above = Some(GuestAddress(layout::HIGH_MEMORY));
    let result = Elf::load(memory, None, file, above).map_err(KernelError::Segments)?;
    // linux-loader names the ELF entry point `kernel_load`; for vmlinux it is the physical address of startup_64.
    let entry = result.kernel_load.raw_value();
    let end = result.kernel_end;
    if entry < layout::HIGH_MEMORY || entry >= end {
        return Err(KernelError::Entry(entry));
    }
    Ok(Loaded { entry, end })
}

fn check_header(file: &File) -> Result<(), KernelError> {
    // ELF-64 object file format §3: class 64, little-endian, ET_EXEC, EM_X86_64.
    const EXECUTABLE: [u8; 4] = [2, 0, 62, 0];
    let mut header = [0; 0x210];
    let length = file.read_at(&mut header, 0).map_err(KernelError::Read)?;
    let header = &header[..length];
    // boot.rst: the setup header of a bzImage has this magic at 0x202.
    if header.get(0x202..0x206) == Some(b"HdrS") {
        return Err(KernelError::Compressed);
    }
    let is_kernel =
        header.starts_with(b"\x7fELF\x02\x01") && header.get(16..20) == Some(&EXECUTABLE);
    is_kernel.then_some(()).ok_or(KernelError::NotAKernel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

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

    fn load_bytes(bytes: &[u8], memory: u64) -> Result<Loaded, KernelError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), memory as usize)]).unwrap();
        let loaded = load(&memory, &mut file)?;
        let mut first = [0; 1];
        memory
            .read_slice(&mut first, GuestAddress(loaded.entry))
            .unwrap();
        assert_eq!(first, [0xf4]);
        Ok(loaded)
    }

    #[test]
    fn a_kernel_is_loaded_where_it_says() {
        let loaded = load_bytes(&elf(0x100_0000, &[0xf4; 100], 8192), 64 << 20).unwrap();
        assert_eq!(loaded.entry, 0x100_0000);
        assert_eq!(loaded.end, 0x100_2000);
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
        assert!(matches!(
            refused(&low),
            KernelError::Segments(_) | KernelError::Entry(_)
        ));
        let high = elf(65 << 20, &[0xf4; 10], 10);
        assert!(matches!(refused(&high), KernelError::Segments(_)));
        let whole = elf(0x100_0000, &[0xf4; 100], 100);
        for length in [20, 64, 119, whole.len() - 1] {
            assert!(matches!(
                refused(&whole[..length]),
                KernelError::Segments(_) | KernelError::NotAKernel
            ));
        }
        let mut astray = whole.clone();
        astray[24..32].copy_from_slice(&0x300_0000_u64.to_le_bytes());
        assert!(matches!(
            refused(&astray),
            KernelError::Entry(_) | KernelError::Segments(_)
        ));
    }
}
