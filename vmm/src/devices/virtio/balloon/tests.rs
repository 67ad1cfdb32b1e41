use std::os::unix::fs::MetadataExt;

use bulkhead_fuzz::Unstructured;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryRegion};

use super::super::fuzz::Hostile;
use super::super::test_driver::{
    BUFFERS, Driver, HIGH_RAM, Loop, RAM_SIZE, WRITE, memory as fresh_memory,
};
use super::super::tests::{Direction, Subject};
use super::*;

/// Indices of the queues where all features are accepted.
const INFLATEQ: usize = 0;
const DEFLATEQ: usize = 1;
const STATSQ: usize = 2;
const REPORTINGQ: usize = 3;

const PAGE: u64 = super::PAGE as u64;

struct Guest {
    driver: Driver,
    events: Loop,
    gauge: Gauge,
}

impl Subject for Guest {
    fn driver(&mut self) -> &mut Driver {
        &mut self.driver
    }

    fn events(&mut self) -> &mut Loop {
        &mut self.events
    }

    fn queues(&self) -> &'static [Direction] {
        use Direction::{Reads, Writes};
        &[Reads, Reads, Reads, Writes]
    }

    fn assert_works(&mut self) {
        while self.driver.queues[REPORTINGQ].take_used().is_some() {}
        let before = self.gauge.read();
        self.fill(BUFFERS, PAGE);
        let head = self.report(&[(BUFFERS, PAGE as u32)]);
        let used = self.driver.queues[REPORTINGQ].take_used();
        assert_eq!(used, Some((head.into(), 0)));
        assert!(self.is_hole(BUFFERS, PAGE));
        let after = self.gauge.read();
        assert_eq!(after.requests, before.requests + 1);
        assert_eq!(after.returned_bytes, before.returned_bytes + PAGE);
    }
}

pub(in super::super) fn subject() -> Box<dyn Subject> {
    Box::new(balloon())
}

fn device() -> (Driver, Loop, Gauge) {
    let mut events = Loop::new();
    let balloon = Balloon::new(events.poller(), Arc::new(|_| ()));
    events.attach(balloon.handler());
    let gauge = balloon.gauge();
    (Driver::new(balloon, fresh_memory()), events, gauge)
}

fn balloon() -> Guest {
    let (mut driver, events, gauge) = device();
    driver.start();
    Guest {
        driver,
        events,
        gauge,
    }
}

impl Guest {
    fn fill(&self, at: u64, length: u64) {
        let bytes = vec![0xc5; length as usize];
        let at = GuestAddress(at);
        self.driver.memory.write_slice(&bytes, at).unwrap();
    }

    /// Whether the host has the memory back: zeros are not enough.
    fn is_hole(&self, at: u64, length: u64) -> bool {
        let region = self.driver.memory.find_region(GuestAddress(at)).unwrap();
        let file = region.file_offset().unwrap();
        let start = file.start() + at - region.start_addr().0;
        let data = nix::unistd::lseek(file.file(), start as i64, nix::unistd::Whence::SeekData);
        data.is_err() || data.unwrap() as u64 >= start + length
    }

    fn is_whole(&self, at: u64, length: u64) -> bool {
        let mut bytes = vec![0; length as usize];
        let at = GuestAddress(at);
        self.driver.memory.read_slice(&mut bytes, at).unwrap();
        bytes.iter().all(|&byte| byte == 0xc5)
    }

    /// Pages of the file that are there.
    fn resident(&self) -> u64 {
        let region = self.driver.memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        file.metadata().unwrap().blocks() * 512
    }

    fn report(&mut self, blocks: &[(u64, u32)]) -> u16 {
        let blocks: Vec<_> = blocks
            .iter()
            .map(|&(at, length)| (at, length, WRITE))
            .collect();
        let head = self.driver.queues[REPORTINGQ].add(&blocks);
        self.driver.notify(REPORTINGQ as u32);
        self.events.settle();
        head
    }

    /// Puts a list of page numbers at `at` into the queue.
    fn list(&mut self, queue: usize, at: u64, numbers: &[u32]) -> u16 {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.driver
            .memory
            .write_slice(&bytes, GuestAddress(at))
            .unwrap();
        let head = self.driver.queues[queue].add(&[(at, bytes.len() as u32, 0)]);
        self.driver.notify(queue as u32);
        self.events.settle();
        head
    }

    fn tell(&mut self, entries: &[(u16, u64)]) -> u16 {
        let mut bytes = Vec::new();
        for (tag, value) in entries {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        self.driver
            .memory
            .write_slice(&bytes, GuestAddress(BUFFERS))
            .unwrap();
        let head = self.driver.queues[STATSQ].add(&[(BUFFERS, bytes.len() as u32, 0)]);
        self.driver.notify(STATSQ as u32);
        self.events.settle();
        head
    }

    fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let queue = &mut self.driver.queues[queue];
        std::iter::from_fn(|| queue.take_used()).collect()
    }

    /// The device has stopped for this reason, and has taken nothing.
    fn assert_refused(&mut self, fault: &str, what: &str) {
        assert!(self.driver.needs_reset(), "{what}");
        let name = format!("balloon.{fault}");
        assert_eq!(self.driver.notices.count(&name), 1, "{what}");
        assert_eq!(self.gauge.read().returned_bytes, 0, "{what}");
        assert!(self.is_whole(BUFFERS + 0x8000, 0x8000), "{what}");
    }
}

/// A guest with memory at BUFFERS + 0x8000 that must not go.
fn guarded() -> Guest {
    let guest = balloon();
    guest.fill(BUFFERS + 0x8000, 0x8000);
    guest
}

#[test]
fn reported_blocks_are_the_hosts_again_and_nothing_beside_them() {
    let mut guest = balloon();
    let top = HIGH_RAM + RAM_SIZE - 2 * PAGE;
    guest.fill(BUFFERS, 8 * PAGE);
    guest.fill(top, 2 * PAGE);
    let resident = guest.resident();
    let head = guest.report(&[(BUFFERS + PAGE, 2 * PAGE as u32), (top, 2 * PAGE as u32)]);
    assert_eq!(guest.used(REPORTINGQ), [(head.into(), 0)]);
    assert_eq!(guest.driver.interrupts(), 1);
    assert!(guest.is_hole(BUFFERS + PAGE, 2 * PAGE));
    assert!(guest.is_hole(top, 2 * PAGE));
    assert!(guest.is_whole(BUFFERS, PAGE));
    assert!(guest.is_whole(BUFFERS + 3 * PAGE, 5 * PAGE));
    assert_eq!(guest.resident(), resident - 4 * PAGE);
    // Taken again without a word: zeros, then what the guest writes.
    assert!(!guest.is_whole(top, PAGE));
    guest.fill(top, PAGE);
    assert!(guest.is_whole(top, PAGE));
    let stats = guest.gauge.read();
    assert_eq!((stats.requests, stats.returned_bytes), (1, 4 * PAGE));
}

#[test]
fn as_many_blocks_as_a_queue_holds_are_one_request() {
    let mut guest = balloon();
    guest.fill(BUFFERS, 64 * PAGE);
    let blocks: Vec<_> = (0..64)
        .map(|nth| (BUFFERS + nth * PAGE, PAGE as u32))
        .collect();
    let head = guest.report(&blocks);
    assert_eq!(guest.used(REPORTINGQ), [(head.into(), 0)]);
    assert!(guest.is_hole(BUFFERS, 64 * PAGE));
}

#[test]
fn a_block_that_is_reported_again_or_overlaps_costs_nobody_anything() {
    let mut guest = balloon();
    guest.fill(BUFFERS, 4 * PAGE);
    let blocks = [
        (BUFFERS, 2 * PAGE as u32),
        (BUFFERS, 2 * PAGE as u32),
        (BUFFERS + PAGE, 2 * PAGE as u32),
    ];
    guest.report(&blocks);
    guest.report(&blocks);
    assert_eq!(guest.used(REPORTINGQ).len(), 2);
    assert!(guest.is_hole(BUFFERS, 3 * PAGE));
    assert!(guest.is_whole(BUFFERS + 3 * PAGE, PAGE));
}

/// More than a turn gives back: others on the loop are served in between, and all of it goes.
#[test]
fn a_chain_of_gibibytes_is_worked_off_in_turns() {
    let mut guest = balloon();
    let blocks = [(HIGH_RAM, RAM_SIZE as u32); 64];
    let heads = [guest.driver.queues[REPORTINGQ].add(&blocks.map(|(a, l)| (a, l, WRITE)))];
    guest.driver.notify(REPORTINGQ as u32);
    let chain = 64 * RAM_SIZE;
    guest.events.settle();
    assert!(guest.events.is_quiet());
    assert_eq!(guest.used(REPORTINGQ), heads.map(|head| (head.into(), 0)));
    assert_eq!(guest.gauge.read().returned_bytes, chain);
    for _ in 0..8 {
        guest.driver.queues[REPORTINGQ].add(&blocks.map(|(a, l)| (a, l, WRITE)));
        guest.driver.notify(REPORTINGQ as u32);
        guest.events.settle();
        guest.events.settle();
    }
    assert!(guest.events.is_quiet());
    assert_eq!(guest.gauge.read().returned_bytes, 9 * chain);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn blocks_that_are_not_whole_pages_are_refused_before_any_is_taken() {
    let good = BUFFERS + 0x8000;
    for bad in [
        (BUFFERS, 1),
        (BUFFERS, 4095),
        (BUFFERS, 4097),
        (BUFFERS + 1, 4096),
        (BUFFERS + 512, 3584),
        (BUFFERS + 4095, 1),
        (BUFFERS + 8, 0),
    ] {
        let mut guest = guarded();
        guest.report(&[(good, PAGE as u32), bad]);
        guest.assert_refused("part_of_page", &format!("{bad:?}"));
        guest.driver.start();
        guest.assert_works();
    }
}

#[test]
fn blocks_outside_of_ram_are_refused_before_any_is_taken() {
    let good = BUFFERS + 0x8000;
    for bad in [
        (RAM_SIZE, PAGE as u32),
        (RAM_SIZE - PAGE, 2 * PAGE as u32),
        (
            RAM_SIZE - PAGE,
            (HIGH_RAM - RAM_SIZE) as u32 + 2 * PAGE as u32,
        ),
        (HIGH_RAM - PAGE, PAGE as u32),
        (HIGH_RAM + RAM_SIZE, PAGE as u32),
        (0, u32::MAX - 4095 - PAGE as u32),
        (0xcff0_0000, PAGE as u32),
        (0xd000_0000, PAGE as u32),
        (u64::MAX - 4095, PAGE as u32),
        (1 << 63, PAGE as u32),
    ] {
        let mut guest = guarded();
        guest.report(&[(good, PAGE as u32), bad]);
        guest.assert_refused("outside_memory", &format!("{bad:#x?}"));
        guest.driver.start();
        guest.assert_works();
    }
}

#[test]
fn pages_put_into_the_balloon_are_the_hosts_again() {
    let mut guest = balloon();
    guest.fill(BUFFERS, 16 * PAGE);
    let first = (BUFFERS / PAGE) as u32;
    // In order, backwards, and one twice.
    let numbers = [first + 1, first + 2, first + 6, first + 5, first + 6];
    let head = guest.list(INFLATEQ, 0x9_0000 + BUFFERS / 2, &numbers);
    assert_eq!(guest.used(INFLATEQ), [(head.into(), 0)]);
    assert!(guest.is_hole(BUFFERS + PAGE, 2 * PAGE));
    assert!(guest.is_hole(BUFFERS + 5 * PAGE, 2 * PAGE));
    for page in [0, 3, 4, 7] {
        assert!(guest.is_whole(BUFFERS + page * PAGE, PAGE), "{page}");
    }
    let head = guest.list(DEFLATEQ, 0x9_0000 + BUFFERS / 2, &numbers);
    assert_eq!(guest.used(DEFLATEQ), [(head.into(), 0)]);
    assert_eq!(guest.gauge.read().returned_bytes, 5 * PAGE);
}

#[test]
fn a_list_longer_than_a_block_is_taken_whole() {
    let mut guest = balloon();
    guest.fill(HIGH_RAM, RAM_SIZE);
    let high = (HIGH_RAM / PAGE) as u32;
    // Every second page, in an order that makes each a call of its own; 8 times over.
    let numbers: Vec<u32> = (0..128).rev().map(|nth| high + 2 * nth).collect();
    let numbers = numbers.repeat(8);
    let head = guest.list(INFLATEQ, BUFFERS, &numbers);
    guest.events.settle();
    assert_eq!(guest.used(INFLATEQ), [(head.into(), 0)]);
    assert!(guest.events.is_quiet());
    for page in 0..256 {
        let at = HIGH_RAM + page * PAGE;
        assert_eq!(guest.is_whole(at, PAGE), page % 2 == 1, "{page}");
    }
}

#[test]
fn page_numbers_outside_of_ram_are_refused_before_any_is_taken() {
    let good = (BUFFERS + 0x8000) as u32 / PAGE as u32;
    for bad in [
        (RAM_SIZE / PAGE) as u32,
        (HIGH_RAM / PAGE) as u32 - 1,
        ((HIGH_RAM + RAM_SIZE) / PAGE) as u32,
        0xcff00,
        0xd0000,
        0xf_ffff,
        0x10_0000,
        u32::MAX,
    ] {
        let mut guest = guarded();
        guest.list(INFLATEQ, BUFFERS, &[good, bad]);
        guest.assert_refused("outside_memory", &format!("{bad:#x}"));
        guest.driver.start();
        guest.assert_works();
    }
    // A run over the end of a region.
    let mut guest = guarded();
    let last = (RAM_SIZE / PAGE) as u32 - 1;
    guest.list(INFLATEQ, BUFFERS, &[good, last, last + 1]);
    guest.assert_refused("outside_memory", "over the end");
}

#[test]
fn a_list_that_ends_within_a_page_number_is_refused() {
    for length in [1, 2, 3, 5, 1023] {
        let mut guest = guarded();
        guest.driver.queues[INFLATEQ].add(&[(BUFFERS, length, 0)]);
        guest.driver.notify(INFLATEQ as u32);
        guest.events.settle();
        guest.assert_refused("chain_too_short", &length.to_string());
    }
}

#[test]
fn empty_requests_are_answered() {
    let mut guest = balloon();
    for queue in [INFLATEQ, DEFLATEQ] {
        guest.driver.queues[queue].add(&[(BUFFERS, 0, 0)]);
        guest.driver.notify(queue as u32);
    }
    guest.report(&[(BUFFERS, 0), (BUFFERS + PAGE, 0)]);
    for queue in [INFLATEQ, DEFLATEQ, REPORTINGQ] {
        assert_eq!(guest.used(queue).len(), 1, "{queue}");
    }
    assert_eq!(guest.gauge.read().returned_bytes, 0);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn statistics_are_asked_for_by_whoever_reads_them() {
    let mut guest = balloon();
    let head = guest.tell(&[(4, 1000), (7, 300), (0x7777, 5), (4, 2000)]);
    assert_eq!(guest.used(STATSQ), [], "nobody has asked");
    let told = guest.gauge.read().guest;
    assert_eq!(told["free"], 2000);
    assert_eq!(told["caches"], 300);
    assert_eq!(told.len(), 2);
    assert_eq!(guest.used(STATSQ), [(head.into(), 0)]);
    assert_eq!(guest.driver.interrupts(), 1);
    // Asked already.
    guest.gauge.read();
    assert_eq!(guest.used(STATSQ), []);
    assert_eq!(guest.driver.interrupts(), 0);
    guest.tell(&[(4, 3000)]);
    assert_eq!(guest.gauge.read().guest["free"], 3000);
    assert_eq!(guest.used(STATSQ).len(), 1);
}

#[test]
fn a_driver_with_several_buffers_of_statistics_gets_all_but_one_back() {
    let mut guest = balloon();
    for _ in 0..8 {
        guest.driver.queues[STATSQ].add(&[(BUFFERS, 100, 0)]);
    }
    guest.driver.notify(STATSQ as u32);
    guest.events.settle();
    assert_eq!(guest.used(STATSQ).len(), 7);
    assert!(guest.events.is_quiet());
}

#[test]
fn statistics_of_any_length_and_value_are_read_as_far_as_they_go() {
    let mut guest = balloon();
    let many: Vec<(u16, u64)> = (0..1000).map(|tag| (tag % 40, u64::MAX)).collect();
    guest.tell(&many);
    // Of the first 32 entries, 16 have names.
    assert_eq!(guest.gauge.read().guest.len(), 16);
    for length in [0, 1, 9] {
        let mut guest = balloon();
        guest.driver.queues[STATSQ].add(&[(BUFFERS, length, 0)]);
        guest.driver.notify(STATSQ as u32);
        guest.events.settle();
        assert!(guest.gauge.read().guest.is_empty());
        assert!(!guest.driver.needs_reset());
    }
}

#[test]
fn features_that_are_not_accepted_have_no_queues() {
    const PLAIN: u64 = 1 << 32;
    for (features, reporting) in [(PLAIN, None), (PLAIN | PAGE_REPORTING, Some(2))] {
        let (mut driver, events, gauge) = device();
        driver.start_with(features);
        let mut guest = Guest {
            driver,
            events,
            gauge,
        };
        guest.fill(BUFFERS, PAGE);
        for queue in 2..4 {
            guest.driver.queues[queue].add(&[(BUFFERS, PAGE as u32, WRITE)]);
            guest.driver.notify(queue as u32);
            guest.events.settle();
            let served = guest.used(queue).len();
            assert_eq!(
                served == 1,
                reporting == Some(queue),
                "{features:#x}, {queue}"
            );
        }
        assert_eq!(guest.is_hole(BUFFERS, PAGE), reporting.is_some());
        assert!(guest.gauge.read().guest.is_empty());
    }
}

#[test]
fn a_missing_queue_is_refused_at_driver_ok() {
    for missing in 0..4 {
        let (mut driver, mut events, gauge) = device();
        let features = driver.offered();
        driver.negotiate(features);
        for queue in (0..4).filter(|&queue| queue != missing) {
            driver.place(queue);
        }
        driver.write(0x70, 0xf);
        assert!(driver.needs_reset());
        assert_eq!(driver.notices.count("balloon.queue_missing"), 1);
        assert!(events.is_quiet());
        assert!(gauge.read().guest.is_empty());
    }
}

/// A turn that is over is no reason to go on after a reset.
#[test]
fn a_reset_ends_what_a_chain_has_begun() {
    let mut guest = balloon();
    guest.fill(HIGH_RAM, RAM_SIZE);
    let blocks: Vec<_> = (0..64)
        .map(|_| (HIGH_RAM, RAM_SIZE as u32, WRITE))
        .collect();
    guest.driver.queues[REPORTINGQ].add(&blocks);
    guest.tell(&[(4, 1)]);
    guest.driver.write(0x70, 0);
    guest.fill(HIGH_RAM, RAM_SIZE);
    guest.driver.notify(REPORTINGQ as u32);
    assert!(guest.events.is_quiet());
    assert!(guest.is_whole(HIGH_RAM, RAM_SIZE));
    // Asking pushes nothing into rings that are not there any more.
    assert_eq!(guest.gauge.read().guest["free"], 1);
    assert_eq!(guest.driver.interrupts(), 0);
    guest.driver.start();
    guest.assert_works();
}

/// Any rings of all queues: pages go whole or not at all, and the device works after a reset.
fn rings(data: &[u8]) {
    let mut guest = balloon();
    let mut input = Unstructured::new(data);
    let mut hostile = Hostile::new(&mut guest.driver, &mut input);
    while !hostile.input.is_empty() && hostile.step().is_ok() {
        guest.events.settle();
        guest.gauge.read();
    }
    hostile.finish_where_pages_go();
    // A long list takes many turns, which end with a reset.
    guest.driver.write(0x70, 0);
    assert!(guest.events.is_quiet());
    guest.driver.start();
    guest.assert_works();
}

#[test]
fn fuzz_balloon() {
    bulkhead_fuzz::run("balloon", rings);
}
