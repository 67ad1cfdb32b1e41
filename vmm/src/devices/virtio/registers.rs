//! What a driver reads of a transport: a page of memory that the guest maps read-only, so that a read is no exit.
//!
//! Writes still are exits (or ioeventfds), and whoever changes what a driver may read stores it here: the transport after each
//! write, [`super::signal::Signal`] from any thread. An interrupt handler reads InterruptStatus each time, which would be the one
//! exit to user space that each of them costs.
//!
//! The configuration space is copied as a whole: a device whose configuration can change must only change one field at a time
//! that a driver reads with one access, as the generation counter cannot frame a copy.

use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;

/// Bits of the status register (VIRTIO 1.2 §2.1).
pub const ACKNOWLEDGE: u8 = 1;
/// The driver knows how to drive the device.
pub const DRIVER: u8 = 2;
/// The driver is ready: the device runs.
pub const DRIVER_OK: u8 = 4;
/// The driver has chosen its features.
pub const FEATURES_OK: u8 = 8;
/// The driver has given up on the device.
pub const FAILED: u8 = 0x80;

/// Bytes of the page, and of the window of guest physical addresses that shows it.
pub const PAGE: usize = 0x1000;
const WORDS: usize = PAGE / size_of::<u32>();

#[repr(align(4096))]
struct Page([AtomicU32; WORDS]);

/// The page; copies are the same one. It is never freed, as guest memory is not, so that KVM's mapping cannot dangle.
#[derive(Clone, Copy)]
pub struct Registers(&'static Page);

impl Registers {
    /// A page of zeros.
    pub fn zeroed() -> Registers {
        Registers(Box::leak(Box::new(Page(
            [const { AtomicU32::new(0) }; WORDS],
        ))))
    }

    /// Where the page is in this process, for KVM.
    pub fn host_address(self) -> u64 {
        std::ptr::from_ref(self.0) as u64
    }

    /// The register at `offset`, a multiple of 4 below [`PAGE`].
    pub fn load(self, offset: u32) -> u32 {
        u32::from_le(self.word(offset).load(Ordering::SeqCst))
    }

    /// Replaces a register.
    pub fn store(self, offset: u32, value: u32) {
        self.word(offset).store(value.to_le(), Ordering::SeqCst);
    }

    /// Replaces a field of two words.
    ///
    /// A driver reads the low word first, so the high one is stored first. While a value grows,
    /// what is read in between is never less than both. A value that shrinks past 4 GiB may be read
    /// as less than both; the interrupt that follows has it read again.
    pub fn store_long(self, offset: u32, value: u64) {
        self.store(offset + 4, (value >> 32) as u32);
        self.store(offset, value as u32);
    }

    /// Sets bits of a register; returns what it was.
    pub fn set(self, offset: u32, bits: u32) -> u32 {
        u32::from_le(self.word(offset).fetch_or(bits.to_le(), Ordering::SeqCst))
    }

    /// Clears bits of a register; returns what it was.
    pub fn clear(self, offset: u32, bits: u32) -> u32 {
        u32::from_le(self.word(offset).fetch_and(!bits.to_le(), Ordering::SeqCst))
    }

    /// Replaces the configuration space.
    ///
    /// # Panics
    /// It does not fit: the device is made wrong.
    pub fn store_config(self, bytes: &[u8]) {
        for (offset, chunk) in (VIRTIO_MMIO_CONFIG..).step_by(4).zip(bytes.chunks(4)) {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            self.store(offset, u32::from_le_bytes(word));
        }
    }

    /// What a read finds, of any width at any offset, for a host that cannot show the page to the guest. Past the page are zeros.
    pub fn read(self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            // Saturated it is past the page, too.
            let at = offset.saturating_add(index as u64);
            *byte = match u32::try_from(at) {
                Ok(at) if (at as usize) < PAGE => self.load(at & !3).to_le_bytes()[at as usize % 4],
                _ => 0,
            };
        }
    }

    fn word(self, offset: u32) -> &'static AtomicU32 {
        &self.0.0[offset as usize / 4]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_where_kvm_takes_it_and_reads_as_bytes() {
        let page = Registers::zeroed();
        assert_eq!(page.host_address() % PAGE as u64, 0);
        page.store(4, 0x0403_0201);
        page.store_config(&[9, 8, 7, 6, 5]);
        let mut data = [0xff; 8];
        page.read(2, &mut data);
        assert_eq!(data, [0, 0, 1, 2, 3, 4, 0, 0]);
        page.read(0x100, &mut data);
        assert_eq!(data, [9, 8, 7, 6, 5, 0, 0, 0]);
        for past in [PAGE as u64 - 1, PAGE as u64, u64::MAX - 8] {
            page.read(past, &mut data);
            assert_eq!(data, [0; 8], "{past:#x}");
        }
        assert_eq!(page.set(4, 0x10), 0x0403_0201);
        assert_eq!(page.clear(4, 1), 0x0403_0211);
        assert_eq!(page.load(4), 0x0403_0210);
    }
}
