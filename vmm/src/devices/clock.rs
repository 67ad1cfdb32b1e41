//! The port that tells the host's wall clock ([`CLOCK_PORT`]).
//!
//! It has no state and says nothing that a guest could not know: kvm-clock has the same time.

use std::time::SystemTime;

#[cfg(doc)]
use bulkhead_vmm_config::CLOCK_PORT;

use crate::bus::BusDevice;

/// Bytes that the port has.
pub const SIZE: u64 = 4;

/// The device: read-only, one port of four bytes.
pub struct ClockPort;

impl BusDevice for ClockPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // In one read or not at all: halves of two moments would be no time.
        if let (0, Ok(data)) = (offset, <&mut [u8; SIZE as usize]>::try_from(data)) {
            *data = low_micros(SystemTime::now()).to_le_bytes();
        }
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

fn low_micros(time: SystemTime) -> u32 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_micros() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_of_four_bytes_is_the_time_and_others_are_nothing() {
        let read = |offset, size: usize| {
            let mut data = vec![0; size];
            ClockPort.read(offset, &mut data);
            data
        };
        let before = low_micros(SystemTime::now());
        let told = u32::from_le_bytes(read(0, 4).try_into().unwrap());
        let after = low_micros(SystemTime::now());
        assert!(told.wrapping_sub(before) <= after.wrapping_sub(before));
        for (offset, size) in [(0, 1), (0, 2), (1, 2), (2, 2), (3, 1), (1, 4), (0, 0)] {
            assert_eq!(read(offset, size), vec![0; size]);
        }
    }
}
