//! struct boot_params and what it points to (Documentation/arch/x86/{boot,zero-page}.rst).

use std::io;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Address, GuestMemory as _, GuestMemoryRegion};

use crate::arch::x86_64::layout;
use crate::memory::GuestMemory;

/// "Undefined" boot loader.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Protocol 2.12, the first with 64-bit loading.
const PROTOCOL: u16 = 0x020c;
/// X86_SUBARCH_CE4100 of arch/x86/include/uapi/asm/bootparam.h, to Linux a PC without RTC, keyboard controller and BIOS:
/// what it does not look for costs no exits.
const SUBARCH_CE4100: u32 = 4;
const E820_RAM: u32 = 1;
/// SETUP_RNG_SEED of arch/x86/include/uapi/asm/setup_data.h.
const SETUP_RNG_SEED: u32 = 9;
const SEED_LENGTH: usize = 32;

/// The zero page for a guest whose initrd is at `initrd` (address, length).
pub fn build(memory: &GuestMemory, initrd: (u64, u64)) -> boot_params {
    let mut params = boot_params::default();
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.version = PROTOCOL;
    params.hdr.hardware_subarch = SUBARCH_CE4100;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = (layout::CMDLINE_SIZE - 1) as u32;
    params.hdr.setup_data = layout::SETUP_DATA;
    params.hdr.ramdisk_image = initrd.0 as u32;
    params.hdr.ramdisk_size = initrd.1 as u32;
    for (index, (start, size)) in e820(memory).into_iter().enumerate() {
        params.e820_table[index] = boot_e820_entry {
            addr: start,
            size,
            type_: E820_RAM,
        };
        params.e820_entries = index as u8 + 1;
    }
    params
}

/// RAM less the MP table and the old video and ROM area.
fn e820(memory: &GuestMemory) -> Vec<(u64, u64)> {
    let mut ranges = vec![(0, layout::MP_TABLE)];
    for region in memory.iter() {
        let start = region.start_addr().raw_value().max(layout::HIGH_MEMORY);
        let end = region.start_addr().raw_value() + region.len();
        ranges.push((start, end - start));
    }
    ranges
}

/// struct setup_data with a seed for the guest's random number generator, so that it need not wait for entropy.
///
/// # Errors
/// getrandom(2)'s.
pub fn rng_seed() -> io::Result<Vec<u8>> {
    let mut seed = [0_u8; SEED_LENGTH];
    linux::random(&mut seed)?;
    let mut data = 0_u64.to_le_bytes().to_vec();
    data.extend(SETUP_RNG_SEED.to_le_bytes());
    data.extend((SEED_LENGTH as u32).to_le_bytes());
    data.extend(seed);
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn e820_leaves_out_the_tables_and_the_hole() {
        let memory = crate::memory::Memory::new(layout::HOLE + (1 << 30)).unwrap();
        let params = build(memory.ram(), (0x1000_0000, 0x2000));
        let entries: Vec<(u64, u64, u32)> = params.e820_table[..3]
            .iter()
            .map(|entry| (entry.addr, entry.size, entry.type_))
            .collect();
        assert_eq!(params.e820_entries, 3);
        assert_eq!(
            entries,
            [
                (0, layout::MP_TABLE, 1),
                (layout::HIGH_MEMORY, layout::HOLE - layout::HIGH_MEMORY, 1),
                (layout::RAM_ABOVE_HOLE, 1 << 30, 1),
            ]
        );
        let (image, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((image, size), (0x1000_0000, 0x2000));
    }

    #[test]
    fn a_machine_of_one_region_has_two_entries() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        assert_eq!(build(&memory, (0, 0)).e820_entries, 2);
    }

    #[test]
    fn seeds_differ() {
        let (one, other) = (rng_seed().unwrap(), rng_seed().unwrap());
        assert_eq!(one.len(), 16 + SEED_LENGTH);
        assert_ne!(one, other);
    }
}
