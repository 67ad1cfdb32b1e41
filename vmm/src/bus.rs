//! Address decoding: which device answers an access to a port or to a guest physical address.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use thiserror::Error;

/// A range of addresses that a device would answer overlaps another device's, or is empty or past the end.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("bus range {base:#x}+{len:#x} is empty, wraps or overlaps another device")]
pub struct BadRange {
    base: u64,
    len: u64,
}

/// Something that answers reads and writes at addresses. Offsets count from the device's base.
///
/// Accesses come from the guest: any offset inside the range, any width from 1 to 8 bytes. A device answers what it does not
/// know with zeros and ignores such writes.
pub trait BusDevice: Send {
    /// Fills `data` from `offset`. `data` is zeroed when it arrives.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

struct Entry {
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// A map from addresses to devices, fixed before the first vCPU runs.
#[derive(Default)]
pub struct Bus {
    ranges: BTreeMap<u64, Entry>,
}

impl Bus {
    /// Lets `device` answer `base..base + len`.
    ///
    /// # Errors
    /// The range is empty, wraps or overlaps one already on the bus.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BadRange> {
        let bad = BadRange { base, len };
        let end = base
            .checked_add(len)
            .filter(|_| len > 0)
            .ok_or(BadRange { base, len })?;
        if self
            .ranges
            .range(..end)
            .next_back()
            .is_some_and(|(start, entry)| start + entry.len > base)
        {
            return Err(bad);
        }
        self.ranges.insert(base, Entry { len, device });
        Ok(())
    }

    /// Reads for the guest; zeros where nothing answers. Returns whether a device did.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0);
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device
                    .lock()
                    .expect("a device does not panic")
                    .read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Writes for the guest. Returns whether a device took it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device
                    .lock()
                    .expect("a device does not panic")
                    .write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, width: usize) -> Option<(&Mutex<dyn BusDevice>, u64)> {
        let (base, entry) = self.ranges.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(width as u64)?;
        (end <= entry.len).then_some((&*entry.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u64);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&mut self, offset: u64, _data: &[u8]) {
            self.0 = offset;
        }
    }

    #[test]
    fn overlapping_empty_and_wrapping_ranges_are_refused() {
        let mut bus = Bus::default();
        let echo = || Arc::new(Mutex::new(Echo(0)));
        bus.insert(0x1000, 0x100, echo()).unwrap();
        assert!(bus.insert(0x10ff, 1, echo()).is_err());
        assert!(bus.insert(0xfff, 2, echo()).is_err());
        assert!(bus.insert(0x0, 0x10000, echo()).is_err());
        assert!(bus.insert(0x2000, 0, echo()).is_err());
        assert!(bus.insert(u64::MAX, 2, echo()).is_err());
        bus.insert(0x1100, 1, echo()).unwrap();
        bus.insert(0xfff, 1, echo()).unwrap();
    }

    #[test]
    fn an_access_past_the_end_of_a_device_reaches_nobody() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 4, Arc::new(Mutex::new(Echo(0))))
            .unwrap();
        let mut data = [0xff; 4];
        assert!(bus.read(0x1000, &mut data));
        assert!(!bus.read(0x1001, &mut data));
        assert_eq!(data, [0; 4]);
        assert!(!bus.write(u64::MAX, &[0; 8]));
        assert!(!bus.write(0xfff, &[0]));
    }
}
