//! Several vCPUs at once: registers, kicks and memory without any order, on the threads that a
//! machine has.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::super::activator::{Activator, Attended};
use super::super::mmio::MmioTransport;
use super::super::net::Slot;
use super::super::test_driver::{BUFFERS, memory};
use super::*;
use crate::bus::Bus;
use vmm_sys_util::eventfd::EventFd;

const WINDOW: u64 = 0xd000_0000;
const VCPUS: u64 = 4;
const LONG: Duration = Duration::from_millis(700);

/// xorshift, which is as random as this needs.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

struct Vcpu<'a> {
    bus: &'a Bus,
    kicks: &'a [EventFd],
    memory: &'a GuestMemoryMmap,
    dice: Dice,
}

impl Vcpu<'_> {
    fn store(&self, register: u64, value: u32) {
        self.bus.write(WINDOW + register, &value.to_le_bytes());
    }

    /// A handshake that others run into.
    fn start(&mut self) {
        for status in [0, 1, 3] {
            self.store(reg::STATUS, status);
        }
        for (half, bits) in [(0, 0), (1, 1)] {
            self.store(reg::DRIVER_FEATURES_SEL, half);
            self.store(reg::DRIVER_FEATURES, bits);
        }
        self.store(reg::STATUS, 0xb);
        for queue in 0..self.kicks.len() as u32 {
            self.store(reg::QUEUE_SEL, queue);
            self.store(reg::QUEUE_NUM, 8);
            let base = 0x1000 + 0x8000 * queue;
            for (register, offset) in [
                (reg::QUEUE_DESC, 0),
                (reg::QUEUE_AVAIL, 0x4000),
                (reg::QUEUE_USED, 0x5000),
            ] {
                self.store(register, base + offset);
            }
            self.store(reg::QUEUE_READY, 1);
        }
        self.store(reg::STATUS, 0xf);
    }

    /// A word of a ring, or of what a ring may name.
    fn scribble(&mut self) {
        let queue = self.dice.roll(self.kicks.len() as u64);
        let part = [0, 0, 0x4000, 0x4000, 0x5000][self.dice.roll(5) as usize];
        let at = 0x1000 + 0x8000 * queue + part + 2 * self.dice.roll(80);
        let word = match self.dice.roll(4) {
            0 => self.dice.roll(0x1_0000) as u16,
            1 => (BUFFERS >> 16) as u16,
            _ => self.dice.roll(16) as u16,
        };
        self.memory.write_obj(word, GuestAddress(at)).unwrap();
    }

    fn act(&mut self) {
        match self.dice.roll(100) {
            0..2 => self.start(),
            2 => self.store(reg::STATUS, 0),
            3 => self.store(reg::STATUS, self.dice.0 as u32),
            4..10 => {
                let register = 4 * self.dice.roll(0x40);
                let value = self.dice.roll(0x2_0000) as u32;
                self.store(register, value);
            }
            10..20 => {
                let mut data = [0; 8];
                let width = 1 + self.dice.roll(8) as usize;
                let at = WINDOW + self.dice.roll(0xff8);
                self.bus.read(at, &mut data[..width]);
            }
            20..50 => {
                let queue = self.dice.roll(self.kicks.len() as u64);
                // A full counter is nothing that a vCPU can reach.
                self.kicks[queue as usize].write(1).unwrap();
            }
            _ => self.scribble(),
        }
    }
}

fn raced(name: &str, new: New) {
    let mut subject = new();
    let driver = subject.driver();
    let memory = driver.memory.clone();
    let nobody = Driver::new(Slot::new(1), self::memory()).transport;
    let transport = std::mem::replace(&mut driver.transport, nobody);
    let kicks = transport.queue_events().unwrap();
    let transport: Arc<Mutex<MmioTransport>> = Arc::new(Mutex::new(transport));
    let activator = Activator::default();
    activator.start().unwrap();
    let attended = Attended::new(transport.clone(), activator);
    let mut bus = Bus::default();
    let device = Arc::new(Mutex::new(attended));
    bus.insert(WINDOW, 0x1000, device).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for nth in 1..=VCPUS {
            let mut vcpu = Vcpu {
                bus: &bus,
                kicks: &kicks,
                memory: &memory,
                dice: Dice(nth.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            };
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    vcpu.act();
                }
                vcpu.store(reg::STATUS, 0);
            });
        }
        let end = Instant::now() + LONG;
        while Instant::now() < end {
            subject.disturb();
            subject.events().settle();
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(bus);
    // The activator's thread lets go of a transport a moment after it has told so.
    let mut transport = Some(transport);
    let end = Instant::now() + LONG;
    let transport = loop {
        match Arc::try_unwrap(transport.take().unwrap()) {
            Ok(transport) => break transport,
            Err(shared) => transport = Some(shared),
        }
        assert!(Instant::now() < end, "{name}: somebody holds the transport");
        std::thread::yield_now();
    };
    subject.driver().transport = transport.into_inner().unwrap();
    assert_eq!(subject.driver().read(reg::STATUS), 0, "{name}");
    let failures = subject.driver().notices.failures.lock().unwrap().clone();
    assert!(failures.is_empty(), "{name}: {failures:?}");
    revived(&mut *subject);
}

#[test]
fn vcpus_that_race_in_every_register_ring_and_kick() {
    for (name, new) in DEVICES {
        in_time(move || raced(name, new));
    }
}
