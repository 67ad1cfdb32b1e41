//! The address map: what is at which guest physical address and at which port.
//!
//! ```text
//! 0x0000_0000  RAM            GDT, zero page, page tables, command line, MP table below 640 KiB
//! 0x0010_0000  RAM            kernel where its program headers say, initrd at the top of low RAM
//! 0xc000_0000  hole           RAM stops here at the latest
//! 0xcff0_0000  ramoops        console and panic records: memory, but not in the E820 map
//! 0xd000_0000  virtio-mmio    one page a device
//! 0xfec0_0000  IOAPIC
//! 0xfee0_0000  local APIC
//! 0xfffb_c000  KVM's own pages (Intel hosts: TSS and identity map)
//! 0x1_0000_0000 RAM           the rest
//! behind it    spare memory   what may be plugged: in no memory map
//!
//! port 0x03f8  serial console, when configured
//! port 0x8900  announcements of the agent (ANNOUNCE_PORT)
//! port 0x8904  the host's wall clock, for the agent (CLOCK_PORT)
//! ```

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A page, and the unit of everything that is mapped.
pub const PAGE: u64 = 4 * KIB;

/// Global descriptor table, for the first instructions only.
pub const GDT: u64 = 0x500;
/// The "zero page" (struct boot_params, Documentation/arch/x86/boot.rst).
pub const ZERO_PAGE: u64 = 0x7000;
/// Stack pointer at entry; the kernel sets its own at once.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Top-level page table; the two lower levels follow, a page each.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes of the command line with its final NUL (COMMAND_LINE_SIZE of Linux on x86).
pub const CMDLINE_SIZE: u64 = 2048;
/// List of struct setup_data.
pub const SETUP_DATA: u64 = 0x2_1000;
/// MP floating pointer and configuration table: the last KiB of base memory, where MP 1.4 §4 lets systems look.
pub const MP_TABLE: u64 = 0x9_fc00;
/// End of base memory.
pub const BASE_MEMORY_END: u64 = 0xa_0000;
/// RAM goes on here after the area that PCs give to video memory and ROMs.
pub const HIGH_MEMORY: u64 = MIB;

/// The hole below 4 GiB begins: low RAM ends here at the latest.
pub const HOLE: u64 = 3 * GIB;
/// RAM that did not fit below the hole begins.
pub const RAM_ABOVE_HOLE: u64 = 4 * GIB;

/// The ramoops region.
pub const RAMOOPS: u64 = 0xcff0_0000;
/// Its size. Whole pages; the split into records is in [`crate::ramoops`].
pub const RAMOOPS_SIZE: u64 = 128 * KIB;

/// First virtio-mmio window.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Size of one.
pub const VIRTIO_MMIO_SIZE: u64 = PAGE;
/// Most virtio devices in a machine.
pub const MAX_VIRTIO_DEVICES: usize = 17;
/// Interrupt pins that an IOAPIC may have (82093AA).
const MAX_PINS: usize = 24;

/// IOAPIC registers (the address that MP 1.4 §3.6.5 makes the default).
pub const IOAPIC: u64 = 0xfec0_0000;
/// Size of its window.
pub const IOAPIC_SIZE: u64 = PAGE;
/// Local APICs.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page that KVM needs on Intel hosts without unrestricted guests, and three for a TSS behind it.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`KVM_IDENTITY_MAP`].
pub const KVM_TSS: u64 = KVM_IDENTITY_MAP + PAGE;

/// First port of the serial console.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Number of its ports.
pub const SERIAL_PORTS: u64 = 8;
/// Its interrupt pin, the one that Linux's table of legacy ports has.
pub const SERIAL_PIN: u32 = 4;
/// Pin 0 would be Linux IRQ 0, which drivers take for "none".
pub const FIRST_PIN: u32 = 1;

/// Least guest memory, in bytes. In the lab a guest of one vCPU boots from 38 MiB on, where there
/// is room for the initrd behind the kernel, and has 7 MiB left; with this it has 16.
pub const MIN_MEMORY: u64 = 48 * MIB;
/// Most guest memory with what may be plugged, in bytes. Its end stays below the 2^39 that the
/// smallest KVM hosts address.
pub const MAX_MEMORY: u64 = 256 * GIB;

/// RAM as (start, length) pairs for a machine with `size` bytes of it.
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(HOLE);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((RAM_ABOVE_HOLE, size - low));
    }
    ranges
}

/// Where memory can be plugged into a running machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpareRange {
    /// Guest physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes by which the guest's kernel adds memory; start and size are multiples.
    pub unit: u64,
}

/// Where at least `spare` bytes can be plugged into a machine with `ram` bytes of RAM.
///
/// The unit is never less than what Linux 6.12 chooses (probe_memory_block_size() in
/// arch/x86/mm/init_64.c). That is 128 MiB as long as RAM ends below 64 GiB. From there on it is
/// the largest power of two up to 2 GiB that divides RAM's end.
pub fn spare_range(ram: u64, spare: u64) -> SpareRange {
    const SMALL: u64 = 128 * MIB;
    const LARGE: u64 = 2 * GIB;
    let end = ram_ranges(ram)
        .last()
        .map_or(0, |(start, length)| start + length);
    let unit = if end < 64 * GIB { SMALL } else { LARGE };
    SpareRange {
        start: end.max(RAM_ABOVE_HOLE).next_multiple_of(unit),
        size: spare.next_multiple_of(unit),
        unit,
    }
}

/// As much of `spare` as a processor with so many address bits reaches behind `ram` bytes of RAM.
pub fn spare_within(ram: u64, spare: u64, bits: u32) -> u64 {
    let SpareRange { start, unit, .. } = spare_range(ram, spare);
    let end = 1_u64.checked_shl(bits).unwrap_or(u64::MAX);
    let room = end.saturating_sub(start);
    spare.min(room - room % unit)
}

/// Where the virtio-mmio window of the `index`th device is.
pub fn virtio_window(index: usize) -> u64 {
    VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_SIZE
}

/// Interrupt pins for `devices` virtio devices, leaving the serial console's free when there is one.
pub fn virtio_pins(devices: usize, serial: bool) -> Vec<u32> {
    (FIRST_PIN..)
        .filter(|&pin| !(serial && pin == SERIAL_PIN))
        .take(devices)
        .collect()
}

// The table above, checked when it is compiled.
const _: () = {
    assert!(GDT + 64 <= ZERO_PAGE && ZERO_PAGE + PAGE <= BOOT_STACK);
    assert!(BOOT_STACK <= PAGE_TABLES && PAGE_TABLES + 3 * PAGE <= CMDLINE);
    assert!(CMDLINE + CMDLINE_SIZE <= SETUP_DATA && SETUP_DATA + PAGE <= MP_TABLE);
    assert!(HOLE < RAMOOPS && RAMOOPS + RAMOOPS_SIZE <= VIRTIO_MMIO);
    assert!(VIRTIO_MMIO + MAX_VIRTIO_DEVICES as u64 * VIRTIO_MMIO_SIZE <= IOAPIC);
    assert!(IOAPIC + IOAPIC_SIZE <= LOCAL_APIC && LOCAL_APIC + PAGE <= KVM_IDENTITY_MAP);
    assert!(KVM_TSS + 3 * PAGE <= RAM_ABOVE_HOLE);
    assert!(RAM_ABOVE_HOLE + MAX_MEMORY + 2 * (2 * GIB) <= 1 << 39);
    assert!(FIRST_PIN as usize + MAX_VIRTIO_DEVICES < MAX_PINS);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram_ranges(64 * MIB), [(0, 64 * MIB)]);
        assert_eq!(ram_ranges(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(
            ram_ranges(6 * GIB),
            [(0, 3 * GIB), (RAM_ABOVE_HOLE, 3 * GIB)]
        );
        assert_eq!(
            ram_ranges(3 * GIB + PAGE),
            [(0, 3 * GIB), (RAM_ABOVE_HOLE, PAGE)]
        );
    }

    #[test]
    fn spare_memory_is_behind_ram_in_whole_units() {
        let at = |ram, spare| {
            let SpareRange { start, size, unit } = spare_range(ram, spare);
            assert!(start.is_multiple_of(unit) && size.is_multiple_of(unit));
            (start, size, unit)
        };
        let small = 128 * MIB;
        assert_eq!(at(64 * MIB, MIB), (4 * GIB, small, small));
        assert_eq!(at(3 * GIB, small), (4 * GIB, small, small));
        let above = 4 * GIB + small;
        assert_eq!(at(3 * GIB + MIB, small + 1), (above, 2 * small, small));
        // RAM ends at 64 GiB, less a page and exactly.
        assert_eq!(at(63 * GIB - PAGE, GIB), (64 * GIB, GIB, small));
        assert_eq!(at(63 * GIB, GIB), (64 * GIB, 2 * GIB, 2 * GIB));
        assert_eq!(at(63 * GIB + PAGE, GIB), (66 * GIB, 2 * GIB, 2 * GIB));
        let (start, size, _) = at(MAX_MEMORY - MIB, MIB);
        assert!(start + size <= 1 << 39);
    }

    #[test]
    fn spare_memory_ends_where_the_processor_does() {
        let within = |spare, bits| spare_within(512 * MIB, spare, bits);
        assert_eq!(within(64 * GIB, 39), 64 * GIB);
        assert_eq!(within(64 * GIB, 36), 60 * GIB);
        assert_eq!(within(GIB, 36), GIB);
        assert_eq!(within(GIB, 32), 0);
        assert_eq!(within(GIB, 64), GIB);
        assert_eq!(spare_within(80 * GIB, GIB, 36), 0);
    }

    #[test]
    fn no_virtio_device_takes_the_serial_pin() {
        assert_eq!(virtio_pins(3, true), [1, 2, 3]);
        assert_eq!(virtio_pins(5, true), [1, 2, 3, 5, 6]);
        assert_eq!(virtio_pins(5, false), [1, 2, 3, 4, 5]);
    }
}
