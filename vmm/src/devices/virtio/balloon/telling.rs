//! What the guest tells of its memory (VIRTIO 1.2 §5.5.6.3): numbers with tags, which nobody here
//! acts on.

use std::collections::BTreeMap;

use vm_memory::GuestMemoryMmap;

use super::super::chain::Buffers;
use super::super::fault::Fault;

/// A tag of two bytes, a value of eight, both little-endian and packed.
const ENTRY: usize = 10;
/// Linux 6.12 has 16 tags. What lies behind so many entries is not looked at.
const MAX_ENTRIES: usize = 32;

/// §5.5.6.4, and what Linux has added since (include/uapi/linux/virtio_balloon.h); by tag.
const NAMES: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free",
    "total",
    "available",
    "caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kills",
    "allocation_stalls",
    "async_scans",
    "direct_scans",
    "async_reclaims",
    "direct_reclaims",
];

/// Reads a buffer of statistics. Unknown tags are nothing to us, and of a tag that comes twice the
/// last one counts.
///
/// # Errors
/// The chain is not what it says.
pub fn read(
    memory: &GuestMemoryMmap,
    buffers: Buffers<'_>,
) -> Result<BTreeMap<String, u64>, Fault> {
    let mut bytes = [0; ENTRY * MAX_ENTRIES];
    let count = bytes.len().min(buffers.length() as usize);
    buffers.read(memory, &mut bytes[..count])?;
    let entry = |entry: &[u8]| {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let value = entry[2..].try_into().expect("eight bytes");
        let name = NAMES.get(usize::from(tag))?;
        Some(((*name).to_owned(), u64::from_le_bytes(value)))
    };
    Ok(bytes[..count]
        .chunks_exact(ENTRY)
        .filter_map(entry)
        .collect())
}
