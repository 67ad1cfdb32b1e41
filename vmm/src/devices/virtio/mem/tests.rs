use std::fs::File;
use std::os::unix::fs::MetadataExt;

use bulkhead_fuzz::Unstructured;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use super::super::fuzz::Hostile;
use super::super::test_driver::{BUFFERS, Driver, Loop, RAM_SIZE, WRITE, memory as ram, reg};
use super::super::tests::{Direction, Subject};
use super::request::{PLUG, REQUEST, RESPONSE, STATE, UNPLUG, UNPLUG_ALL};
use super::*;

const START: u64 = 1 << 30;
/// Few blocks, two of which are a unit; and as many as a request can name, and more.
const SMALL: Region = region(4);
const LARGE: Region = region(0x2_0000);

const fn region(blocks: u64) -> Region {
    Region {
        start: START,
        size: blocks * BLOCK,
        unit: 2 * BLOCK,
    }
}

/// Answers: their types and states.
const ACK: (u16, u16) = (0, 0);
const ACK_UNPLUGGED: (u16, u16) = (0, 1);
const ACK_MIXED: (u16, u16) = (0, 2);
const NACK: (u16, u16) = (1, 0);
const ERROR: (u16, u16) = (3, 0);

/// Where requests and their answers are.
const ASKED: u64 = BUFFERS + 0x1000;
const TOLD: u64 = BUFFERS + 0x2000;

struct Guest {
    driver: Driver,
    events: Loop,
    plug: Plug,
    /// What KVM would know of.
    shown: Arc<Mutex<Vec<u64>>>,
}

impl Subject for Guest {
    fn driver(&mut self) -> &mut Driver {
        &mut self.driver
    }

    fn events(&mut self) -> &mut Loop {
        &mut self.events
    }

    fn queues(&self) -> &'static [Direction] {
        &[Direction::Both]
    }

    fn assert_works(&mut self) {
        while self.driver.queues[0].take_used().is_some() {}
        assert_eq!(self.ask(UNPLUG_ALL, 0, 0), ACK);
        self.request(4);
        assert_eq!(self.ask(PLUG, START, 2), ACK);
        self.fill(0);
        assert_eq!(self.ask(STATE, START, 2), ACK);
        assert_eq!(self.ask(UNPLUG, START, 1), ACK);
        assert!(self.is_hole(0));
        assert_eq!(self.plugged(), BLOCK);
        assert_eq!(self.ask(UNPLUG_ALL, 0, 0), ACK);
        assert_eq!(self.plugged(), 0);
    }
}

pub(in super::super) fn subject() -> Box<dyn Subject> {
    Box::new(guest(SMALL))
}

/// Guest memory with the region, a file of its own.
fn memory(region: Region) -> GuestMemoryMmap {
    let file = File::from(memfd_create("spare", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(region.size).unwrap();
    let file = FileOffset::new(file, 0);
    let mapping = MmapRegion::from_file(file, region.size as usize).unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(region.start)).unwrap();
    ram().insert_region(Arc::new(region)).unwrap()
}

fn device(region: Region) -> Guest {
    let mut events = Loop::new();
    let mem = Mem::new(region, events.poller());
    events.attach(mem.handler());
    let unwired = mem.unwired();
    let driver = Driver::new(mem, memory(region));
    let shown = Arc::<Mutex<Vec<u64>>>::default();
    let known = shown.clone();
    let show = Box::new(move |size| {
        known.lock().unwrap().push(size);
        Ok(())
    });
    Guest {
        plug: unwired.wire(driver.transport.signal(), show),
        driver,
        events,
        shown,
    }
}

fn guest(region: Region) -> Guest {
    let mut guest = device(region);
    guest.driver.start();
    guest
}

fn bytes(kind: u16, address: u64, count: u16) -> [u8; REQUEST] {
    let mut bytes = [0; REQUEST];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

impl Guest {
    fn request(&mut self, mib: u64) {
        self.plug.request(mib).unwrap();
    }

    fn send(&mut self, kind: u16, address: u64, count: u16) {
        let asked = bytes(kind, address, count);
        let memory = &self.driver.memory;
        memory.write_slice(&asked, GuestAddress(ASKED)).unwrap();
        let told = [0xee; RESPONSE];
        memory.write_slice(&told, GuestAddress(TOLD)).unwrap();
        self.driver.queues[0].add(&[(ASKED, REQUEST as u32, 0), (TOLD, RESPONSE as u32, WRITE)]);
        self.driver.notify(0);
    }

    /// The answer's type and state.
    fn told(&mut self) -> (u16, u16) {
        let used = self.driver.queues[0].take_used();
        assert_eq!(used.map(|(_, written)| written), Some(RESPONSE as u32));
        let mut told = [0; RESPONSE];
        let at = GuestAddress(TOLD);
        self.driver.memory.read_slice(&mut told, at).unwrap();
        assert_eq!(told[2..8], [0; 6]);
        (
            u16::from_le_bytes([told[0], told[1]]),
            u16::from_le_bytes([told[8], told[9]]),
        )
    }

    fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        self.send(kind, address, count);
        self.events.settle();
        let told = self.told();
        assert_eq!(self.long(PLUGGED_SIZE), self.plugged());
        told
    }

    /// A field of the configuration space.
    fn long(&mut self, field: u32) -> u64 {
        let at = u64::from(VIRTIO_MMIO_CONFIG + field);
        u64::from(self.driver.read(at)) | u64::from(self.driver.read(at + 4)) << 32
    }

    fn plugged(&self) -> u64 {
        self.plug.stats().plugged_bytes
    }

    fn refused(&self) -> u64 {
        self.plug.stats().refused
    }

    /// Touches a page of a block.
    fn fill(&self, block: u64) {
        let at = GuestAddress(START + block * BLOCK);
        self.driver.memory.write_slice(&[0xc5; 4096], at).unwrap();
    }

    fn file(&self) -> &File {
        let region = self.driver.memory.find_region(GuestAddress(START)).unwrap();
        region.file_offset().unwrap().file()
    }

    /// Whether the host has the block back: zeros are not enough.
    fn is_hole(&self, block: u64) -> bool {
        let start = (block * BLOCK) as i64;
        let data = nix::unistd::lseek(self.file(), start, nix::unistd::Whence::SeekData);
        data.is_err() || data.unwrap() >= start + BLOCK as i64
    }

    fn resident(&self) -> u64 {
        self.file().metadata().unwrap().blocks() * 512
    }
}

#[test]
fn a_driver_finds_the_region_and_hears_of_another_size() {
    let mut guest = device(SMALL);
    assert_eq!(guest.driver.read(reg::STATUS), 0);
    assert_eq!((guest.long(0), guest.long(8)), (BLOCK, 0));
    assert_eq!((guest.long(16), guest.long(24)), (START, SMALL.size));
    // Nobody to tell yet.
    guest.request(1);
    assert_eq!(guest.driver.interrupts(), 0);
    guest.driver.start();
    assert_eq!(guest.long(REQUESTED_SIZE), BLOCK);
    assert_eq!(guest.long(USABLE_REGION_SIZE), SMALL.unit);
    let generation = guest.driver.read(0xfc);
    guest.request(6);
    assert_eq!(guest.driver.interrupts(), 1);
    assert_eq!(guest.driver.read(reg::INTERRUPT_STATUS) & 2, 2);
    assert_eq!(guest.driver.read(0xfc), generation + 1);
    assert_eq!(guest.long(REQUESTED_SIZE), 3 * BLOCK);
    assert_eq!(guest.long(USABLE_REGION_SIZE), SMALL.size);
    // The same again, and less: the usable region never shrinks, and KVM is asked once.
    guest.request(5);
    assert_eq!(guest.driver.interrupts(), 0);
    guest.request(0);
    assert_eq!(guest.driver.interrupts(), 1);
    assert_eq!(guest.long(REQUESTED_SIZE), 0);
    assert_eq!(guest.long(USABLE_REGION_SIZE), SMALL.size);
    assert_eq!(*guest.shown.lock().unwrap(), [SMALL.unit, SMALL.size]);
}

#[test]
fn a_size_past_the_region_is_refused_and_changes_nothing() {
    let mut guest = guest(SMALL);
    guest.request(2);
    guest.driver.interrupts();
    for mib in [9, 10, u64::MAX >> 20, u64::MAX >> 20 | 1, u64::MAX] {
        let refused = guest.plug.request(mib).unwrap_err().to_string();
        assert!(refused.contains("up to 8 MiB can"), "{refused}");
    }
    assert_eq!(guest.long(REQUESTED_SIZE), BLOCK);
    assert_eq!(guest.driver.interrupts(), 0);
    guest.plug.show = Box::new(|_| Err("no more".into()));
    guest.plug.request(8).unwrap_err();
    assert_eq!(guest.long(REQUESTED_SIZE), BLOCK);
    assert_eq!(guest.long(USABLE_REGION_SIZE), SMALL.unit);
}

/// A field of more than 32 bits is never read as less while it grows.
#[test]
fn sizes_past_four_gibibytes_are_whole() {
    let mut guest = guest(LARGE);
    for gib in [3, 5, 200, 4, 0] {
        guest.request(gib << 10);
        assert_eq!(guest.long(REQUESTED_SIZE), gib << 30);
    }
    assert_eq!(guest.long(USABLE_REGION_SIZE), 200 << 30);
}

#[test]
fn what_is_unplugged_is_the_hosts_again_and_nothing_beside_it() {
    let mut guest = guest(SMALL);
    guest.request(8);
    assert_eq!(guest.ask(STATE, START, 4), ACK_UNPLUGGED);
    assert_eq!(guest.ask(PLUG, START, 3), ACK);
    assert_eq!(guest.ask(STATE, START, 3), ACK);
    assert_eq!(guest.ask(STATE, START, 4), ACK_MIXED);
    assert_eq!(guest.resident(), 0);
    for block in 0..3 {
        guest.fill(block);
    }
    assert_eq!(guest.ask(UNPLUG, START + BLOCK, 1), ACK);
    assert_eq!(
        (0..4).map(|nth| guest.is_hole(nth)).collect::<Vec<_>>(),
        [false, true, false, true]
    );
    assert_eq!(guest.resident(), 2 * 4096);
    assert_eq!(guest.plugged(), 2 * BLOCK);
    assert_eq!(guest.ask(STATE, START, 3), ACK_MIXED);
    assert_eq!(guest.ask(STATE, START + BLOCK, 1), ACK_UNPLUGGED);
    // Others at its place again.
    assert_eq!(guest.ask(PLUG, START + BLOCK, 1), ACK);
    assert_eq!(guest.ask(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!((guest.resident(), guest.plugged()), (0, 0));
    assert_eq!(guest.refused(), 0);
}

#[test]
fn more_than_was_asked_for_is_not_plugged() {
    let mut guest = guest(SMALL);
    assert_eq!(guest.ask(PLUG, START, 1), ERROR, "nothing is usable");
    guest.request(2);
    assert_eq!(guest.ask(PLUG, START, 2), NACK);
    assert_eq!(guest.ask(PLUG, START, 1), ACK);
    assert_eq!(guest.ask(PLUG, START + BLOCK, 1), NACK);
    assert_eq!(guest.plugged(), BLOCK);
    // Less is asked for: what is plugged stays, no more comes.
    guest.request(6);
    assert_eq!(guest.ask(PLUG, START + BLOCK, 2), ACK);
    guest.request(2);
    assert_eq!(guest.plugged(), 3 * BLOCK);
    assert_eq!(guest.ask(PLUG, START + 3 * BLOCK, 1), NACK);
    assert_eq!(guest.ask(UNPLUG, START, 1), ACK);
    assert_eq!(guest.ask(PLUG, START, 1), NACK);
    assert_eq!(guest.refused(), 5);
}

#[test]
fn blocks_that_are_plugged_twice_or_not_at_all() {
    let mut guest = guest(SMALL);
    guest.request(8);
    assert_eq!(guest.ask(UNPLUG, START, 1), ERROR);
    assert_eq!(guest.ask(PLUG, START + BLOCK, 2), ACK);
    for (first, count) in [(0, 2), (1, 1), (1, 2), (2, 2), (0, 4)] {
        assert_eq!(guest.ask(PLUG, START + first * BLOCK, count), ERROR);
    }
    for (first, count) in [(0, 2), (0, 1), (2, 2), (0, 4), (3, 1)] {
        assert_eq!(guest.ask(UNPLUG, START + first * BLOCK, count), ERROR);
    }
    assert_eq!(guest.plugged(), 2 * BLOCK);
    assert_eq!(guest.ask(UNPLUG, START + BLOCK, 2), ACK);
    assert_eq!(guest.ask(UNPLUG, START + BLOCK, 2), ERROR);
    assert_eq!(guest.refused(), 12);
}

#[test]
fn ranges_that_are_no_blocks_of_the_usable_region() {
    let mut guest = guest(SMALL);
    guest.request(4);
    assert_eq!(guest.ask(PLUG, START, 1), ACK);
    guest.fill(0);
    let bad = [
        (START, 0),
        (START, 3),
        (START, u16::MAX),
        (START + 1, 1),
        (START + BLOCK - 1, 1),
        (START + BLOCK / 2, 1),
        (START + 4096, 1),
        (START - BLOCK, 1),
        (START - BLOCK, 2),
        (START - 1, 1),
        (START + 2 * BLOCK, 1),
        (START + 3 * BLOCK, 1),
        (START + SMALL.size, 1),
        (0, 1),
        (0, u16::MAX),
        (RAM_SIZE, 1),
        (u64::MAX, 1),
        (u64::MAX - BLOCK + 1, 1),
        (u64::MAX - BLOCK + 1, 2),
        (u64::MAX - u64::from(u16::MAX) * BLOCK + 1, u16::MAX),
        (1 << 63, 1),
    ];
    for (address, count) in bad {
        for kind in [PLUG, UNPLUG, STATE] {
            let what = format!("{kind}: {address:#x}, {count}");
            assert_eq!(guest.ask(kind, address, count), ERROR, "{what}");
        }
    }
    assert_eq!(guest.refused(), 3 * bad.len() as u64);
    assert_eq!(guest.plugged(), BLOCK);
    assert!(!guest.is_hole(0));
    assert!(!guest.driver.needs_reset());
}

#[test]
fn requests_that_do_not_exist() {
    let mut guest = guest(SMALL);
    guest.request(8);
    for kind in [4, 0x100, 0x102, u16::MAX] {
        assert_eq!(guest.ask(kind, START, 1), ERROR, "{kind:#x}");
    }
    assert_eq!((guest.refused(), guest.plugged()), (4, 0));
}

#[test]
fn requests_and_answers_of_other_lengths() {
    let (asked, told) = (REQUEST as u32, RESPONSE as u32);
    for (request, response) in [
        (0, told),
        (1, told),
        (8, told),
        (asked - 1, told),
        (asked, 0),
        (asked, 8),
        (asked, told - 1),
    ] {
        let mut guest = guest(SMALL);
        guest.request(8);
        let memory = &guest.driver.memory;
        let plug = bytes(PLUG, START, 1);
        memory.write_slice(&plug, GuestAddress(ASKED)).unwrap();
        guest.driver.queues[0].add(&[(ASKED, request, 0), (TOLD, response, WRITE)]);
        guest.driver.notify(0);
        guest.events.settle();
        assert!(guest.driver.needs_reset(), "{request}, {response}");
        assert_eq!(guest.driver.notices.count("mem.chain_too_short"), 1);
        assert_eq!(guest.plugged(), 0, "{request}, {response}");
        guest.driver.start();
        guest.assert_works();
    }
    // Longer ones, and in pieces.
    let mut guest = guest(SMALL);
    guest.request(8);
    let plug = bytes(PLUG, START, 1);
    let memory = &guest.driver.memory;
    memory.write_slice(&plug, GuestAddress(ASKED)).unwrap();
    guest.driver.queues[0].add(&[
        (ASKED, 3, 0),
        (ASKED + 3, 100, 0),
        (TOLD, 1, WRITE),
        (TOLD + 1, 100, WRITE),
    ]);
    guest.driver.notify(0);
    guest.events.settle();
    assert_eq!(guest.told(), ACK);
    assert_eq!(guest.plugged(), BLOCK);
}

/// More than a turn gives back, and the request is written over meanwhile: others on the loop are
/// served in between, and what was checked is what happens.
#[test]
fn a_long_request_is_worked_off_in_turns_as_it_was_first_read() {
    const COUNT: u16 = 20_000;
    let mut guest = guest(LARGE);
    guest.request(LARGE.size >> 20);
    assert_eq!(guest.ask(PLUG, START, COUNT), ACK);
    assert_eq!(guest.ask(PLUG, START + LARGE.size - BLOCK, 1), ACK);
    guest.fill(0);
    guest.fill(u64::from(COUNT) - 1);
    guest.send(UNPLUG, START, COUNT);
    guest.events.settle();
    let midway = guest.plugged();
    assert!(
        (BLOCK..u64::from(COUNT) * BLOCK).contains(&midway),
        "{midway:#x}"
    );
    let other = bytes(PLUG, u64::MAX, u16::MAX);
    let memory = &guest.driver.memory;
    memory.write_slice(&other, GuestAddress(ASKED)).unwrap();
    while !guest.events.is_quiet() {}
    assert_eq!(guest.told(), ACK);
    assert_eq!(guest.plugged(), BLOCK);
    assert_eq!(guest.resident(), 0);
    guest.send(UNPLUG_ALL, 0, 0);
    while !guest.events.is_quiet() {}
    assert_eq!(guest.told(), ACK);
    assert_eq!(guest.plugged(), 0);
}

/// A driver that asks without end has others wait for a turn at most.
#[test]
fn requests_without_end_are_served_in_turns() {
    let mut guest = guest(LARGE);
    guest.request(LARGE.size >> 20);
    assert_eq!(guest.ask(PLUG, START + 65_533 * BLOCK, 1), ACK);
    // Each looks at 65,534 blocks; as many as the queue has room for.
    for _ in 0..100 {
        for _ in 0..4 {
            guest.send(STATE, START, 65_534);
        }
        guest.events.settle();
        assert!(guest.events.is_quiet());
        for _ in 0..4 {
            assert_eq!(guest.told(), ACK_MIXED);
        }
    }
    assert!(!guest.driver.needs_reset());
}

#[test]
fn a_reset_keeps_what_is_plugged() {
    let mut guest = guest(SMALL);
    guest.request(8);
    assert_eq!(guest.ask(PLUG, START + BLOCK, 2), ACK);
    guest.fill(1);
    guest.driver.write(reg::STATUS, 0);
    guest.driver.interrupts();
    assert_eq!(guest.plugged(), 2 * BLOCK);
    assert!(!guest.is_hole(1));
    // Nobody hears of it, and the next driver finds it.
    guest.request(2);
    assert_eq!(guest.driver.interrupts(), 0);
    guest.driver.start();
    assert_eq!(guest.long(PLUGGED_SIZE), 2 * BLOCK);
    assert_eq!(guest.long(REQUESTED_SIZE), BLOCK);
    assert_eq!(guest.ask(STATE, START + BLOCK, 2), ACK);
    assert_eq!(guest.ask(UNPLUG_ALL, u64::MAX, u16::MAX), ACK);
    assert!(guest.is_hole(1));
    guest.assert_works();
}

/// A turn that is over is no reason to go on after a reset; blocks are whole and counted.
#[test]
fn a_reset_ends_what_a_request_has_begun() {
    let mut guest = guest(LARGE);
    guest.request(LARGE.size >> 20);
    assert_eq!(guest.ask(PLUG, START, u16::MAX), ACK);
    guest.send(UNPLUG_ALL, 0, 0);
    guest.events.settle();
    guest.driver.write(reg::STATUS, 0);
    let left = guest.plugged();
    assert!(left > 0 && left < u64::from(u16::MAX) * BLOCK);
    assert!(guest.events.is_quiet());
    assert_eq!(guest.plugged(), left);
    guest.driver.start();
    let first = u64::from(u16::MAX) - left / BLOCK;
    assert_eq!(guest.ask(STATE, START, first as u16), ACK_UNPLUGGED);
    let count = (left / BLOCK) as u16;
    assert_eq!(guest.ask(STATE, START + first * BLOCK, count), ACK);
}

#[test]
fn a_missing_queue_is_refused_at_driver_ok() {
    let mut guest = device(SMALL);
    let features = guest.driver.offered();
    guest.driver.negotiate(features);
    guest.driver.write(reg::STATUS, 0xf);
    assert!(guest.driver.needs_reset());
    assert_eq!(guest.driver.notices.count("mem.queue_missing"), 1);
    assert!(guest.events.is_quiet());
    guest.driver.start();
    guest.assert_works();
}

/// Any requests and rings: never more is plugged than was asked for at some time, what is counted
/// is what the blocks say, and the device works after a reset.
fn requests(data: &[u8]) {
    let mut guest = guest(SMALL);
    let mut input = Unstructured::new(data);
    let mut most = 0;
    while !input.is_empty() {
        match input.arbitrary::<u8>().unwrap_or(0) % 8 {
            0 => {
                let mib = u64::from(input.arbitrary::<u8>().unwrap_or(0)) % 10;
                if guest.plug.request(mib).is_ok() {
                    most = most.max(mib.next_multiple_of(2) << 20);
                }
            }
            1 => {
                let mut hostile = Hostile::new(&mut guest.driver, &mut input);
                let _ = hostile.step();
                hostile.finish();
            }
            kind => {
                let near = u64::from(input.arbitrary::<u8>().unwrap_or(0));
                let address = match near {
                    0..0xf0 => START + (near % 8) * BLOCK + (near >> 6),
                    _ => input.arbitrary().unwrap_or(u64::MAX),
                };
                let count = input.arbitrary::<u8>().unwrap_or(0).into();
                let asked = bytes(u16::from(kind) - 2, address, count);
                let at = GuestAddress(ASKED);
                guest.driver.memory.write_slice(&asked, at).unwrap();
                let pieces = [(ASKED, REQUEST as u32, 0), (TOLD, RESPONSE as u32, WRITE)];
                guest.driver.queues[0].add(&pieces);
                guest.driver.notify(0);
            }
        }
        guest.events.settle();
        assert!(guest.plugged() <= most);
        assert_eq!(guest.long(PLUGGED_SIZE), guest.plugged());
        if guest.driver.needs_reset() {
            guest.driver.start();
        }
    }
    guest.driver.start();
    assert!(guest.events.is_quiet());
    guest.assert_works();
}

#[test]
fn fuzz_mem() {
    bulkhead_fuzz::run("mem", requests);
}
