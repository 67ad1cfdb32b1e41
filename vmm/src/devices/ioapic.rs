//! An IOAPIC with only the pins that have devices.
//!
//! It stores what the guest writes and turns each unmasked redirection entry into the interrupt message that KVM is to send
//! when the pin's irqfd fires; no interrupt ever passes through here (82093AA data sheet for the registers). Linux touches
//! every register of every pin during its boot, one exit each, hence the short list. Entries are edge-triggered: the MP table
//! says so, and a level-triggered one is delivered as edges, because nobody here hears the end-of-interrupt.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bus::BusDevice;

/// The version register's low byte: an 82093AA without the directed EOI register.
pub const VERSION: u8 = 0x11;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const REG_ID: u8 = 0;
const REG_VERSION: u8 = 1;
const REG_ARBITRATION: u8 = 2;
const REG_FIRST_ENTRY: u8 = 0x10;

const ID_BITS: u32 = 0x0f00_0000;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR are the chip's own.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;

/// An interrupt message (Intel SDM volume 3 §11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Low half of the address; the high half is 0 as APIC ids are below 256.
    pub address: u32,
    /// Data.
    pub data: u32,
}

/// Who delivers: pin `i` sends `messages[i]`, or nothing while that is `None`.
pub trait Router: Send {
    /// Replaces all routes. A failure is the host's, and the router's to report.
    fn set_routes(&mut self, messages: &[Option<Message>]);
}

/// What a guest has written into the chip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    id: u32,
    select: u8,
    entries: Vec<u64>,
}

/// The state is that of a chip with so many pins, and this one has others.
#[derive(Debug, Error)]
#[error("its interrupt controller has {0} pins and not {1}")]
pub struct OtherPins(usize, usize);

/// The chip.
pub struct Ioapic<R> {
    id: u32,
    select: u8,
    entries: Vec<u64>,
    routes: Vec<Option<Message>>,
    router: R,
}

impl<R: Router> Ioapic<R> {
    /// A chip with all `pins` masked.
    pub fn new(id: u8, pins: u8, router: R) -> Ioapic<R> {
        Ioapic {
            id: u32::from(id) << 24,
            select: 0,
            entries: vec![MASKED; usize::from(pins)],
            routes: vec![None; usize::from(pins)],
            router,
        }
    }

    /// What the guest has written.
    pub fn state(&self) -> IoapicState {
        IoapicState {
            id: self.id,
            select: self.select,
            entries: self.entries.clone(),
        }
    }

    /// Goes on as a chip that a guest has written so. All routes are set at once.
    ///
    /// # Errors
    /// It has other pins.
    pub fn resume(&mut self, state: &IoapicState) -> Result<(), OtherPins> {
        if state.entries.len() != self.entries.len() {
            return Err(OtherPins(state.entries.len(), self.entries.len()));
        }
        self.id = state.id & ID_BITS;
        self.select = state.select;
        self.entries.clone_from(&state.entries);
        self.routes = self.entries.iter().copied().map(message).collect();
        self.router.set_routes(&self.routes);
        Ok(())
    }

    fn register(&self) -> u32 {
        match self.select {
            REG_ID | REG_ARBITRATION => self.id,
            REG_VERSION => {
                let last = self.entries.len().saturating_sub(1) as u32;
                u32::from(VERSION) | last << 16
            }
            _ => match self.entry_index() {
                Some((pin, high)) => (self.entries[pin] >> if high { 32 } else { 0 }) as u32,
                None => 0,
            },
        }
    }

    fn set_register(&mut self, value: u32) {
        if self.select == REG_ID {
            self.id = value & ID_BITS;
            return;
        }
        let Some((pin, high)) = self.entry_index() else {
            return;
        };
        let value = u64::from(value);
        let entry = self.entries[pin];
        self.entries[pin] = if high {
            entry & 0xffff_ffff | value << 32
        } else {
            entry & !0xffff_ffff | value & !READ_ONLY
        };
        let route = message(self.entries[pin]);
        // Only a change costs: KVM waits for every vCPU to leave the old table.
        if route != self.routes[pin] {
            self.routes[pin] = route;
            self.router.set_routes(&self.routes);
        }
    }

    /// The pin and the half of its entry that the select register names.
    fn entry_index(&self) -> Option<(usize, bool)> {
        let index = self.select.checked_sub(REG_FIRST_ENTRY)?;
        let pin = usize::from(index / 2);
        (pin < self.entries.len()).then_some((pin, index % 2 == 1))
    }
}

impl<R: Router> BusDevice for Ioapic<R> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => u32::from(self.select),
            WINDOW => self.register(),
            _ => 0,
        };
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = value.to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(data);
        match offset {
            SELECT => self.select = value as u8,
            WINDOW => self.set_register(value),
            _ => {}
        }
    }
}

/// What an entry sends; nothing while it is masked.
fn message(entry: u64) -> Option<Message> {
    if entry & MASKED != 0 {
        return None;
    }
    let entry_low = entry as u32;
    let destination = (entry >> 56) as u32;
    let logical = entry_low >> 11 & 1;
    let vector_and_mode = entry_low & 0x7ff;
    Some(Message {
        address: 0xfee0_0000 | destination << 12 | logical << 2,
        // Bits 15:14 stay 0: edge.
        data: vector_and_mode,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    type Log = Arc<Mutex<Vec<Vec<Option<Message>>>>>;

    struct Recorder(Log);

    impl Router for Recorder {
        fn set_routes(&mut self, messages: &[Option<Message>]) {
            self.0.lock().unwrap().push(messages.to_vec());
        }
    }

    fn chip(pins: u8) -> (Ioapic<Recorder>, Log) {
        let log = Log::default();
        (Ioapic::new(1, pins, Recorder(log.clone())), log)
    }

    fn set(chip: &mut Ioapic<Recorder>, register: u32, value: u32) {
        chip.write(SELECT, &register.to_le_bytes());
        chip.write(WINDOW, &value.to_le_bytes());
    }

    fn get(chip: &mut Ioapic<Recorder>, register: u32) -> u32 {
        chip.write(SELECT, &register.to_le_bytes());
        let mut data = [0; 4];
        chip.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn it_lists_only_its_pins() {
        let (mut chip, _) = chip(4);
        assert_eq!(get(&mut chip, 0), 1 << 24);
        assert_eq!(get(&mut chip, 1), 0x0003_0011);
        assert_eq!(get(&mut chip, 0x10 + 6), 1 << 16);
        set(&mut chip, 0x10 + 8, 0x31);
        assert_eq!(get(&mut chip, 0x10 + 8), 0);
    }

    #[test]
    fn only_changes_of_unmasked_entries_reach_kvm() {
        let (mut chip, log) = chip(3);
        set(&mut chip, 0x13, 5 << 24);
        set(&mut chip, 0x12, 0x1_0031);
        assert!(log.lock().unwrap().is_empty());
        set(&mut chip, 0x12, 0x0_0031);
        let expected = Message {
            address: 0xfee0_5000,
            data: 0x31,
        };
        assert_eq!(*log.lock().unwrap(), [vec![None, Some(expected), None]]);
        set(&mut chip, 0x12, 0x0_0031);
        set(&mut chip, 0x12, 0x0_5031);
        assert_eq!(log.lock().unwrap().len(), 1, "status bits change nothing");
        set(&mut chip, 0x12, 0x1_0031);
        assert_eq!(log.lock().unwrap()[1], [None; 3]);
    }

    #[test]
    fn logical_destinations_and_modes_are_passed_on_as_edges() {
        let (mut chip, log) = chip(1);
        set(&mut chip, 0x11, 3 << 24);
        set(&mut chip, 0x10, 0x8900 | 0x41);
        let expected = Message {
            address: 0xfee0_3004,
            data: 0x141,
        };
        assert_eq!(log.lock().unwrap().last().unwrap(), &[Some(expected)]);
    }

    #[test]
    fn a_chip_goes_on_as_another_one_was_written() {
        let (mut first, _) = chip(3);
        set(&mut first, 0x13, 5 << 24);
        set(&mut first, 0x12, 0x0_0031);
        let (mut second, log) = chip(3);
        second.resume(&first.state()).unwrap();
        let expected = Message {
            address: 0xfee0_5000,
            data: 0x31,
        };
        assert_eq!(*log.lock().unwrap(), [vec![None, Some(expected), None]]);
        assert_eq!(second.state(), first.state());
        set(&mut second, 0x12, 0x0_0031);
        assert_eq!(log.lock().unwrap().len(), 1, "it knows its routes");
        let (mut other, log) = chip(4);
        other.resume(&first.state()).unwrap_err();
        assert!(log.lock().unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn no_register_script_makes_it_panic(
            script in proptest::collection::vec((0_u64..0x1000, any::<u64>(), 0_usize..=8, any::<bool>()), 0..200),
        ) {
            let (mut chip, _) = chip(5);
            for (offset, value, width, select) in script {
                let offset = if select { SELECT } else { offset };
                chip.write(offset, &value.to_le_bytes()[..width]);
                chip.write(WINDOW, &value.to_le_bytes()[..width]);
                let mut data = [0; 8];
                chip.read(offset, &mut data[..width]);
                chip.read(WINDOW, &mut data[..width]);
            }
        }
    }
}
