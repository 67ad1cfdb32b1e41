//! What a hostile driver does to any device: its rings as the input says, and the walk of chains.

use std::sync::{Arc, Mutex};

use bulkhead_fuzz::{Unstructured, arbitrary};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Buffers, Chain};
use super::queue::{Layout, VirtQueue};
use super::rng::Rng;
use super::signal::Signal;
use super::test_driver::{
    BUFFERS, Driver, HIGH_RAM, INDIRECT, Loop, NEXT, Notices, RAM_SIZE, WRITE, memory,
};
use crate::bus::{Bus, BusDevice};
use crate::devices::announce::AnnouncePort;
use crate::devices::clock::{self, ClockPort};
use crate::devices::ioapic::Ioapic;
use crate::devices::serial::SerialConsole;
use crate::irq::IrqFd;

type Result<T> = arbitrary::Result<T>;

/// A page that no device may write, unless a descriptor names it.
const CANARY: u64 = RAM_SIZE - 0x2000;
const CANARY_SIZE: u64 = 0x1000;
const CANARY_BYTE: u8 = 0xc5;

/// One descriptor as a driver writes it.
struct Words {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// Mostly words that are nearly right: the rules lie at their edges.
fn words(input: &mut Unstructured<'_>) -> Result<Words> {
    let near = u64::from(input.arbitrary::<u16>()?);
    let address = match input.arbitrary::<u8>()? % 8 {
        0..=2 => BUFFERS + near,
        3 => HIGH_RAM + near,
        // The rings themselves.
        4 => 0x1000 + near,
        // The ends of RAM, and the hole.
        5 => RAM_SIZE - near % 0x40,
        6 => HIGH_RAM + RAM_SIZE - near % 0x40,
        _ => input.arbitrary()?,
    };
    let length = match input.arbitrary::<u8>()? % 4 {
        0 => input.arbitrary::<u8>()?.into(),
        1 | 2 => input.arbitrary::<u16>()?.into(),
        _ => input.arbitrary()?,
    };
    let flags = u16::from(input.arbitrary::<u8>()?);
    Ok(Words {
        address,
        length,
        flags: flags & (NEXT | WRITE | INDIRECT | 8),
        next: input.arbitrary::<u8>()?.into(),
    })
}

/// A driver that does what an input says.
pub(super) struct Hostile<'a, 'b> {
    pub(super) driver: &'a mut Driver,
    pub(super) input: &'a mut Unstructured<'b>,
    /// Some descriptor has named the canary.
    named: bool,
}

impl<'a, 'b> Hostile<'a, 'b> {
    pub(super) fn new(driver: &'a mut Driver, input: &'a mut Unstructured<'b>) -> Hostile<'a, 'b> {
        let canary = [CANARY_BYTE; CANARY_SIZE as usize];
        let at = GuestAddress(CANARY);
        driver.memory.write_slice(&canary, at).unwrap();
        Hostile {
            driver,
            input,
            named: false,
        }
    }

    /// Writes over a queue's rings and the buffers, then kicks it.
    pub(super) fn step(&mut self) -> Result<()> {
        let queue = usize::from(self.input.arbitrary::<u8>()?) % self.driver.queues.len();
        for _ in 0..self.input.arbitrary::<u8>()? % 8 {
            let index = u16::from(self.input.arbitrary::<u8>()?) % self.driver.queues[queue].size;
            let words = words(self.input)?;
            self.note(&words);
            self.driver.queues[queue].descriptor(
                index,
                words.address,
                words.length,
                words.flags,
                words.next,
            );
        }
        if self.input.arbitrary::<u8>()? % 4 == 0 {
            self.scribble()?;
        }
        for _ in 0..self.input.arbitrary::<u8>()? % 4 {
            let head = match self.input.arbitrary::<u8>()? {
                0xff => self.input.arbitrary()?,
                head => head.into(),
            };
            self.driver.queues[queue].publish(head);
        }
        match self.input.arbitrary::<u8>()? {
            0 => self.driver.queues[queue].set_available(self.input.arbitrary()?),
            1 => self.driver.queues[queue].set_used_event(self.input.arbitrary()?),
            2 => drop(self.driver.queues[queue].take_used()),
            _ => {}
        }
        self.driver.notify(queue as u32);
        Ok(())
    }

    /// Any bytes among the buffers, where packets and indirect tables are.
    fn scribble(&mut self) -> Result<()> {
        let at = BUFFERS + u64::from(self.input.arbitrary::<u16>()?);
        let count = usize::from(self.input.arbitrary::<u8>()?).min(self.input.len());
        let bytes = self.input.bytes(count)?;
        self.driver
            .memory
            .write_slice(bytes, GuestAddress(at))
            .unwrap();
        Ok(())
    }

    fn note(&mut self, words: &Words) {
        let end = words.address.saturating_add(words.length.into());
        // What an indirect table or a self-written ring names is not known here.
        self.named |= words.flags & INDIRECT != 0 || words.address < BUFFERS;
        self.named |= words.address < CANARY + CANARY_SIZE && end > CANARY;
    }

    /// A device writes into buffers that it was given, and nowhere else.
    pub(super) fn finish(self) {
        let canary = self.canary();
        if !self.named {
            assert!(canary.iter().all(|&byte| byte == CANARY_BYTE));
        }
    }

    /// The same where a device takes pages, whose numbers may be anywhere: the page is as it was,
    /// or gone.
    pub(super) fn finish_where_pages_go(self) {
        let canary = self.canary();
        if !self.named {
            assert!([0, CANARY_BYTE].contains(&canary[0]));
            assert!(canary.iter().all(|&byte| byte == canary[0]));
        }
    }

    fn canary(&self) -> [u8; CANARY_SIZE as usize] {
        let mut canary = [0; CANARY_SIZE as usize];
        let at = GuestAddress(CANARY);
        self.driver.memory.read_slice(&mut canary, at).unwrap();
        canary
    }
}

/// Any rings: the device serves, or asks for a reset, after which it serves again.
fn rng(data: &[u8]) {
    let mut events = Loop::new();
    let device = Rng::new(events.poller());
    events.attach(device.handler());
    let mut driver = Driver::new(device, memory());
    driver.start();
    let mut input = Unstructured::new(data);
    let mut hostile = Hostile::new(&mut driver, &mut input);
    while !hostile.input.is_empty() && hostile.step().is_ok() {
        events.settle();
    }
    hostile.finish();
    assert!(events.is_quiet());
    driver.start();
    driver.queues[0].add(&[(BUFFERS, 16, WRITE)]);
    driver.notify(0);
    events.settle();
    assert_eq!(driver.queues[0].take_used(), Some((0, 16)));
}

/// The walk itself: whatever it lets through lies in RAM, ends, and is no longer than a chain may
/// be.
fn chain(data: &[u8]) {
    let memory = memory();
    let mut input = Unstructured::new(data);
    let size = 1 << (input.arbitrary::<u8>().unwrap_or(3) % 11);
    let (table, available, used) = (0x1000, 0x6000, 0x8000);
    for index in 0..size {
        let Ok(words) = words(&mut input) else { break };
        let at = GuestAddress(table + 16 * u64::from(index));
        let descriptor = virtio_queue::desc::split::Descriptor::new(
            words.address,
            words.length,
            words.flags,
            words.next,
        );
        memory.write_obj(descriptor, at).unwrap();
    }
    let layout = Layout {
        size,
        table,
        available,
        used,
    };
    assert!(layout.is_valid(&memory, size));
    let irq = IrqFd::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let signal = Signal::new("fuzz", irq, Notices::default().observer());
    let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let event_idx = data.len().is_multiple_of(2);
    let mut queue = VirtQueue::new(layout, event_idx, memory.clone(), kick, signal).unwrap();
    let mut popped = Chain::default();
    let mut held = Vec::new();
    for index in 1..=size.min(64) {
        let head: u16 = index - 1;
        let slot = GuestAddress(available + 4 + 2 * u64::from(head % size));
        memory.write_obj(head, slot).unwrap();
        memory
            .write_obj(index, GuestAddress(available + 2))
            .unwrap();
        match queue.pop(&mut popped) {
            Ok(true) => {}
            Ok(false) => panic!("a chain was made available"),
            // A device stops here.
            Err(_) => break,
        }
        assert_eq!(popped.head(), head);
        assert!(!held.contains(&head), "a head is given out once");
        for part in [popped.readable(), popped.writable()] {
            inside(part, &memory);
        }
        if head.is_multiple_of(2) {
            held.push(head);
        } else if head.is_multiple_of(3) {
            queue.unpop(&popped);
            assert_eq!(queue.pop(&mut popped), Ok(true));
        } else {
            queue.push(&popped, popped.writable().length()).unwrap();
            queue.signal_used().unwrap();
        }
    }
}

fn inside(part: Buffers<'_>, memory: &vm_memory::GuestMemoryMmap) {
    let mut bytes = 0;
    let count = part.length() as usize;
    part.each(memory, 0, count, |slice| bytes += slice.len())
        .expect("the walk has checked it");
    assert_eq!(bytes, count);
    let past = part.each(memory, 0, count + 1, |_| {});
    assert!(past.is_err(), "nothing lies behind a chain");
}

/// The devices that are no virtio ones, at any offset and width, on a bus as the machine has it.
fn legacy(data: &[u8]) {
    struct Nowhere;
    impl crate::devices::ioapic::Router for Nowhere {
        fn set_routes(&mut self, messages: &[Option<crate::devices::ioapic::Message>]) {
            assert_eq!(messages.len(), 5);
        }
    }
    let line = IrqFd::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let output = std::fs::File::options()
        .write(true)
        .open("/dev/null")
        .unwrap();
    let mut bus = Bus::default();
    let devices: [(u64, Arc<Mutex<dyn BusDevice>>); 4] = [
        (8, Arc::new(Mutex::new(SerialConsole::new(output, line)))),
        (clock::SIZE, Arc::new(Mutex::new(ClockPort))),
        (1, Arc::new(Mutex::new(AnnouncePort::new(Arc::new(|_| {}))))),
        (0x1000, Arc::new(Mutex::new(Ioapic::new(1, 5, Nowhere)))),
    ];
    for ((length, device), base) in devices.into_iter().zip((0..).step_by(0x1_0000)) {
        bus.insert(base, length, device).unwrap();
    }
    let mut input = Unstructured::new(data);
    let mut script = || -> Result<()> {
        let which = u64::from(input.arbitrary::<u8>()? % 4) << 16;
        let offset = match input.arbitrary::<u8>()? {
            0xff => input.arbitrary::<u16>()?.into(),
            // The selector and the window of the IOAPIC.
            0xfe => 0,
            0xfd => 0x10,
            near => u64::from(near),
        };
        let width = 1 + usize::from(input.arbitrary::<u8>()? % 8);
        let mut bytes = [0; 8];
        input.fill_buffer(&mut bytes[..width])?;
        if input.arbitrary()? {
            bus.write(which + offset, &bytes[..width]);
        } else {
            bus.read(which + offset, &mut bytes[..width]);
        }
        if input.is_empty() {
            return Err(arbitrary::Error::NotEnoughData);
        }
        Ok(())
    };
    while script().is_ok() {}
}

#[test]
fn fuzz_chain() {
    bulkhead_fuzz::run("chain", chain);
}

#[test]
fn fuzz_rng() {
    bulkhead_fuzz::run("rng", rng);
}

#[test]
fn fuzz_legacy() {
    bulkhead_fuzz::run("legacy", legacy);
}
