//! The MP table (MultiProcessor Specification 1.4): the processors, the IOAPIC and which of its pins have devices.
//!
//! Without ACPI it is what tells Linux of more than one processor and of an IOAPIC.

use crate::arch::x86_64::layout;

const FLOATING_POINTER_SIZE: u64 = 16;
/// MP 1.4 §4.1: the table proper follows the floating pointer.
const TABLE: u64 = layout::MP_TABLE + FLOATING_POINTER_SIZE;
/// Specification revision 1.4.
const REVISION: u8 = 4;
/// Version of integrated local APICs.
const LOCAL_APIC_VERSION: u8 = 0x14;
/// The bus that all interrupt entries name: ISA, so that "conforms" means edge-triggered, active high.
const ISA_BUS: u8 = 0;

/// Entry types of MP 1.4 §4.3.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const INTERRUPT: u8 = 3;

/// The bytes from [`layout::MP_TABLE`] on, for APIC ids `0..vcpus` and the IOAPIC with the id behind them.
pub fn build(vcpus: u8, pins: &[u32]) -> Vec<u8> {
    let entries = entries(vcpus, pins);
    let count = u16::from(vcpus) + 2 + pins.len() as u16;
    let mut table = header(entries.len() as u16, count);
    table.extend(entries);
    table[7] = checksum(&table);

    let mut bytes = b"_MP_".to_vec();
    bytes.extend((TABLE as u32).to_le_bytes());
    // Length in paragraphs, revision, checksum, and five feature bytes: the table is there, no PIC mode.
    bytes.extend([1, REVISION, 0, 0, 0, 0, 0, 0]);
    bytes[10] = checksum(&bytes);
    bytes.extend(table);
    debug_assert!(layout::MP_TABLE + bytes.len() as u64 <= layout::BASE_MEMORY_END);
    bytes
}

/// MP 1.4 §4.2.
fn header(entries_size: u16, count: u16) -> Vec<u8> {
    const SIZE: u16 = 44;
    let mut header = b"PCMP".to_vec();
    header.extend((SIZE + entries_size).to_le_bytes());
    header.extend([REVISION, 0]);
    header.extend(b"BULKHEADMICROVM     ");
    header.extend([0; 6]);
    header.extend(count.to_le_bytes());
    header.extend((layout::LOCAL_APIC as u32).to_le_bytes());
    header.extend([0; 4]);
    debug_assert_eq!(header.len(), usize::from(SIZE));
    header
}

fn entries(vcpus: u8, pins: &[u32]) -> Vec<u8> {
    let mut entries = Vec::new();
    for id in 0..vcpus {
        // §4.3.1: bit 0 usable, bit 1 the boot processor. CPUID is the source of the rest.
        let flags = if id == 0 { 3 } else { 1 };
        entries.extend([PROCESSOR, id, LOCAL_APIC_VERSION, flags]);
        entries.extend([0; 16]);
    }
    entries.extend([BUS, ISA_BUS]);
    entries.extend(b"ISA   ");
    let ioapic = vcpus;
    entries.extend([IOAPIC, ioapic, crate::devices::ioapic::VERSION, 1]);
    entries.extend((layout::IOAPIC as u32).to_le_bytes());
    for &pin in pins {
        // §4.3.4: vectored interrupt, polarity and trigger as the bus has them. Linux takes the pin as the IRQ number when
        // there is no PIC, so the bus's line has the same number.
        entries.extend([INTERRUPT, 0, 0, 0, ISA_BUS, pin as u8, ioapic, pin as u8]);
    }
    entries
}

/// The byte that makes the sum of all bytes zero, where it is still 0 in them.
fn checksum(bytes: &[u8]) -> u8 {
    0_u8.wrapping_sub(
        bytes
            .iter()
            .fold(0, |sum: u8, &byte| sum.wrapping_add(byte)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_table_fits_into_its_kibibyte() {
        let pins: Vec<u32> = (1..=layout::MAX_VIRTIO_DEVICES as u32 + 1).collect();
        let bytes = build(32, &pins);
        assert!(bytes.len() as u64 <= layout::BASE_MEMORY_END - layout::MP_TABLE);
    }

    #[test]
    fn checksums_and_counts_add_up() {
        for (vcpus, pins) in [(1, vec![]), (1, vec![1, 2, 3]), (32, vec![4])] {
            let bytes = build(vcpus, &pins);
            let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte));
            assert_eq!(sum(&bytes[..16]), 0);
            let table = &bytes[16..];
            assert_eq!(sum(table), 0);
            let length = usize::from(u16::from_le_bytes([table[4], table[5]]));
            assert_eq!(length, table.len());
            let mut rest = &table[44..];
            let mut count = 0;
            while let Some(&kind) = rest.first() {
                rest = &rest[if kind == PROCESSOR { 20 } else { 8 }..];
                count += 1;
            }
            assert_eq!(count, u16::from_le_bytes([table[34], table[35]]));
        }
    }
}
