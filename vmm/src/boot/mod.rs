//! From a kernel image, an initrd and a machine's shape to guest memory that the first instruction can run in.
//!
//! The 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst, "64-bit boot protocol"): no real mode, no
//! decompression, no firmware. Processors and interrupt pins are told by an MP table, RAM by the E820 map in the zero page,
//! devices on the command line.
#![forbid(unsafe_code)]

use std::fs::File;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use crate::arch::x86_64::layout;
use crate::memory::{GuestMemory, Memory};

mod cmdline;
mod footprint;
mod kernel;
mod mp_table;
mod zero_page;

pub use cmdline::{Cmdline, CmdlineError};
pub use kernel::{Kernel, KernelError};

/// Why a guest cannot be prepared.
#[derive(Debug, Error)]
pub enum BootError {
    /// The kernel image.
    #[error("the kernel cannot be loaded")]
    Kernel(#[from] KernelError),
    /// The initrd cannot be read.
    #[error("reading the initrd failed")]
    Initrd(#[source] std::io::Error),
    /// The initrd does not fit.
    #[error(
        "an initrd of {initrd} bytes does not fit behind a kernel that ends at {kernel_end:#x} into {memory} bytes of memory; give the guest more memory"
    )]
    TooLittleMemory {
        /// Bytes of the initrd.
        initrd: u64,
        /// End of the kernel.
        kernel_end: u64,
        /// Bytes of low RAM.
        memory: u64,
    },
    /// The initrd is empty.
    #[error("the initrd is empty")]
    EmptyInitrd,
    /// A table does not fit where the layout wants it: a bug in the layout.
    #[error("writing the {what} to guest memory failed")]
    Write {
        /// Which table.
        what: &'static str,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// No random numbers.
    #[error("getrandom failed")]
    Random(#[source] std::io::Error),
}

/// What a guest is booted from.
pub struct Image<'a> {
    /// Uncompressed ELF kernel.
    pub kernel: &'a File,
    /// Initial RAM file system.
    pub initrd: &'a mut File,
    /// The whole command line.
    pub cmdline: &'a Cmdline,
    /// Number of vCPUs, whose APIC ids count from 0.
    pub vcpus: u8,
    /// Interrupt pins in use.
    pub pins: &'a [u32],
}

/// Puts everything into `memory`. Returns the address of the first instruction.
///
/// # Errors
/// The images are wrong or do not fit.
pub fn load(memory: &Memory, image: Image<'_>) -> Result<u64, BootError> {
    let kernel = Kernel::open(image.kernel)?;
    let initrd = place_initrd(memory.ram(), image.initrd, kernel.end())?;
    let occupied = kernel.occupied();
    let holds_kernel =
        |&(start, end): &(u64, u64)| occupied.iter().any(|part| part.0 < end && start < part.1);
    let (own, rest): (Vec<_>, Vec<_>) = footprint::ranges(memory.ram(), &occupied, initrd.1)
        .into_iter()
        .partition(holds_kernel);
    // Clearing what the guest will use takes as long as loading the kernel: a second processor, where there is one, does it.
    std::thread::scope(|scope| {
        scope.spawn(|| populate(memory, &rest));
        populate(memory, &own);
        kernel.load(memory.ram())
    })?;
    let memory = memory.ram();
    load_initrd(memory, image.initrd, initrd)?;
    write(
        memory,
        layout::CMDLINE,
        &image.cmdline.to_bytes(),
        "command line",
    )?;
    let table = mp_table::build(image.vcpus, image.pins);
    write(memory, layout::MP_TABLE, &table, "MP table")?;
    let seed = zero_page::rng_seed().map_err(BootError::Random)?;
    write(memory, layout::SETUP_DATA, &seed, "random seed")?;
    let page = zero_page::build(memory, initrd);
    memory
        .write_obj(page, GuestAddress(layout::ZERO_PAGE))
        .map_err(|source| BootError::Write {
            what: "zero page",
            source,
        })?;
    Ok(kernel.entry)
}

fn populate(memory: &Memory, ranges: &[(u64, u64)]) {
    for &(start, end) in ranges {
        memory.populate_huge(start, end);
    }
}

fn write(
    memory: &GuestMemory,
    address: u64,
    bytes: &[u8],
    what: &'static str,
) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|source| BootError::Write { what, source })
}

/// The initrd goes to the top of low RAM. Returns (address, length).
fn place_initrd(
    memory: &GuestMemory,
    file: &File,
    kernel_end: u64,
) -> Result<(u64, u64), BootError> {
    let size = file.metadata().map_err(BootError::Initrd)?.len();
    if size == 0 {
        return Err(BootError::EmptyInitrd);
    }
    let low = memory
        .iter()
        .next()
        .map_or(0, vm_memory::GuestMemoryRegion::len);
    let too_little = BootError::TooLittleMemory {
        initrd: size,
        kernel_end,
        memory: low,
    };
    let Some(start) = low
        .checked_sub(size)
        .map(|start| start & !(layout::PAGE - 1))
        .filter(|&start| start >= kernel_end)
    else {
        return Err(too_little);
    };
    Ok((start, size))
}

fn load_initrd(
    memory: &GuestMemory,
    file: &mut File,
    (start, size): (u64, u64),
) -> Result<(), BootError> {
    let length = usize::try_from(size).expect("it is below the size of RAM");
    memory
        .read_exact_volatile_from(GuestAddress(start), file, length)
        .map_err(|error| BootError::Initrd(std::io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};

    fn initrd_of(size: u64) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"first").unwrap();
        file.set_len(size).unwrap();
        file.rewind().unwrap();
        file
    }

    fn memory(size: u64) -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), size as usize)]).unwrap()
    }

    #[test]
    fn an_initrd_lies_at_the_top_on_a_page() {
        let memory = memory(64 << 20);
        let mut file = initrd_of(5000);
        let (start, size) = place_initrd(&memory, &file, 32 << 20).unwrap();
        load_initrd(&memory, &mut file, (start, size)).unwrap();
        assert_eq!((start, size), ((64 << 20) - 8192, 5000));
        let mut text = [0; 5];
        memory.read_slice(&mut text, GuestAddress(start)).unwrap();
        assert_eq!(&text, b"first");
    }

    #[test]
    fn an_initrd_that_reaches_into_the_kernel_is_refused() {
        let memory = memory(64 << 20);
        for size in [32 << 20, (64 << 20) + 1, 1 << 40] {
            let error = place_initrd(&memory, &initrd_of(size), (32 << 20) + 1).unwrap_err();
            assert!(
                matches!(error, BootError::TooLittleMemory { .. }),
                "{size}: {error}"
            );
        }
        let empty = place_initrd(&memory, &tempfile::tempfile().unwrap(), 0);
        assert!(matches!(empty, Err(BootError::EmptyInitrd)));
    }
}
