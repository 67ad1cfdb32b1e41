mod attacks;
mod control;
mod fuzz;
mod wire;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bulkhead_vmm_config::RateLimit;
use vm_memory::{Bytes, GuestAddress};

use self::wire::{BAD_HEADERS, Wire, frame};
use super::super::test_driver::{BUFFERS, Driver, Loop, WRITE, memory, reg};
use super::super::tests::{Direction, Subject};
use super::pair::Pair;
use super::*;

const HEADER: u64 = header::SIZE as u64;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

struct Guest {
    driver: Driver,
    events: Loop,
    wire: Wire,
    counters: Counters,
}

fn backend(taps: Vec<OwnedFd>) -> Backend {
    let taps = taps.into_iter().map(|fd| Tap::new(fd).unwrap());
    Backend {
        taps: taps.collect(),
        mac: MAC,
        mtu: 1500,
        receive_limit: RateLimit::default(),
        transmit_limit: RateLimit::default(),
    }
}

/// A device on the test's own event loop.
fn device(events: &mut Loop, backend: Backend) -> Net {
    let pairs = backend.taps.iter().map(|_| {
        let pair = Arc::new(Mutex::new(Pair::new(events.poller())));
        events.attach(pair.clone());
        pair
    });
    let pairs = pairs.collect();
    Net::new(backend, pairs)
}

impl Guest {
    fn new() -> Guest {
        Guest::with(1, 1500, |backend| backend)
    }

    fn with(queues: usize, mtu: i32, change: impl FnOnce(Backend) -> Backend) -> Guest {
        let mut guest = Guest::not_started(queues, mtu, change);
        guest.driver.start();
        guest
    }

    fn not_started(queues: usize, mtu: i32, change: impl FnOnce(Backend) -> Backend) -> Guest {
        let mut wire = Wire::new(queues, mtu);
        let mut events = Loop::new();
        let net = device(&mut events, change(backend(wire.take_taps())));
        let counters = net.counters();
        Guest {
            driver: Driver::new(net, memory()),
            events,
            wire,
            counters,
        }
    }

    /// Posts receive buffers of this size, one behind the other.
    fn post(&mut self, sizes: impl IntoIterator<Item = u32>) {
        let mut at = BUFFERS;
        for size in sizes {
            self.driver.queues[0].add(&[(at, size, WRITE)]);
            at += u64::from(size);
        }
        self.driver.notify(0);
    }

    /// Puts header and frame behind each other and sends them as one chain of two descriptors.
    fn send(&mut self, header: &[u8], frame: &[u8]) -> u16 {
        let memory = &self.driver.memory;
        memory.write_slice(header, GuestAddress(BUFFERS)).unwrap();
        let at = BUFFERS + 0x100;
        memory.write_slice(frame, GuestAddress(at)).unwrap();
        let head = self.driver.queues[1].add(&[
            (BUFFERS, header.len() as u32, 0),
            (at, frame.len() as u32, 0),
        ]);
        self.driver.notify(1);
        self.events.settle();
        head
    }

    fn bytes(&self, at: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let memory = &self.driver.memory;
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn num_buffers(&self, at: u64) -> u8 {
        self.bytes(at + header::NUM_BUFFERS as u64, 1)[0]
    }

    fn stats(&self) -> NetStats {
        self.counters.snapshot()
    }
}

impl Subject for Guest {
    fn driver(&mut self) -> &mut Driver {
        &mut self.driver
    }

    fn events(&mut self) -> &mut Loop {
        &mut self.events
    }

    fn queues(&self) -> &'static [Direction] {
        &[Direction::Writes, Direction::Reads, Direction::Both]
    }

    fn assert_works(&mut self) {
        let sent = self.stats().sent;
        self.send(&[0; header::SIZE], &frame(100, 3));
        assert_eq!(self.stats().sent, sent + 1);
    }

    fn disturb(&mut self) {
        self.wire.send(&frame(100, 1));
    }
}

pub(in super::super) fn subject() -> Box<dyn Subject> {
    Box::new(Guest::new())
}

#[test]
fn a_frame_goes_each_way_and_is_counted() {
    let mut guest = Guest::new();
    let out = frame(600, 1);
    let head = guest.send(&[0; header::SIZE], &out);
    assert_eq!(guest.wire.receive().as_ref(), Some(&out));
    assert_eq!(guest.driver.queues[1].take_used(), Some((head.into(), 0)));

    guest.post([2048, 2048]);
    let into = frame(700, 2);
    guest.wire.send(&into);
    guest.events.settle();
    assert_eq!(guest.driver.queues[0].take_used(), Some((0, 712)));
    assert_eq!(guest.bytes(BUFFERS + HEADER, 700), into);
    assert_eq!(guest.num_buffers(BUFFERS), 1);
    assert!(guest.driver.interrupts() > 0);
    let stats = NetStats {
        received: 1,
        received_bytes: 700,
        sent: 1,
        sent_bytes: 600,
        ..NetStats::default()
    };
    assert_eq!(guest.stats(), stats);
    assert!(guest.events.is_quiet());
}

#[test]
fn every_queue_asks_for_its_next_kick() {
    let mut guest = Guest::new();
    for round in 0..3 {
        guest.send(&[0; header::SIZE], &frame(60, round));
        let answer = BUFFERS + 0x8000;
        guest.driver.queues[2].add(&[(BUFFERS + 0x7000, 3, 0), (answer, 1, WRITE)]);
        guest.driver.notify(2);
        guest.post([256]);
        for seed in 0..2 {
            guest.wire.send(&frame(100, seed));
        }
        guest.events.settle();
        for queue in 0..3 {
            assert!(guest.driver.queues[queue].wants_kick(), "{queue}");
        }
        // The second frame waits for the next buffer.
        assert_eq!(guest.stats().received, u64::from(round) + 1);
    }
}

#[test]
fn the_configuration_says_what_the_device_is() {
    let mut guest = Guest::new();
    assert_eq!(guest.driver.read(8), VIRTIO_ID_NET);
    let mut config = [0; CONFIG];
    for (at, word) in (0x100..).step_by(4).zip(config.chunks_mut(4)) {
        word.copy_from_slice(&guest.driver.read(at).to_le_bytes());
    }
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 5]);
    let offered = guest.driver.offered();
    assert_eq!(offered & 1 << VIRTIO_NET_F_MQ, 0, "one pair");
    assert_ne!(offered & 1 << VIRTIO_NET_F_HOST_TSO6, 0);
}

#[test]
fn a_large_frame_fills_several_buffers_and_a_small_one_takes_the_next() {
    let mut guest = Guest::with(1, 9000, |backend| backend);
    guest.post([1536; 8]);
    let (large, small) = (frame(9000, 3), frame(60, 4));
    guest.wire.send(&large);
    guest.wire.send(&small);
    guest.events.settle();
    for head in 0..5 {
        assert_eq!(guest.driver.queues[0].take_used(), Some((head, 1536)));
    }
    let rest = 9012 - 5 * 1536;
    assert_eq!(guest.driver.queues[0].take_used(), Some((5, rest)));
    assert_eq!(guest.driver.queues[0].take_used(), Some((6, 72)));
    assert_eq!(guest.num_buffers(BUFFERS), 6);
    assert_eq!(guest.bytes(BUFFERS + HEADER, 9000), large);
    let next = BUFFERS + 6 * 1536;
    assert_eq!(guest.num_buffers(next), 1);
    assert_eq!(guest.bytes(next + HEADER, 60), small);
}

#[test]
fn a_frame_that_finds_too_few_buffers_waits_whole_for_more() {
    let mut guest = Guest::with(1, 9000, |backend| backend);
    guest.post([1000, 1000]);
    let large = frame(5000, 5);
    guest.wire.send(&large);
    guest.events.settle();
    assert_eq!(guest.driver.queues[0].take_used(), None);
    assert!(guest.events.is_quiet(), "it does not spin meanwhile");
    let mut at = BUFFERS + 2000;
    for size in [100, 1500, 1500] {
        guest.driver.queues[0].add(&[(at, size, WRITE)]);
        at += u64::from(size);
    }
    guest.driver.notify(0);
    guest.events.settle();
    for (head, written) in [(0, 1000), (1, 1000), (2, 100), (3, 1500), (4, 1412)] {
        assert_eq!(guest.driver.queues[0].take_used(), Some((head, written)));
    }
    assert_eq!(guest.num_buffers(BUFFERS), 5);
    assert_eq!(guest.bytes(BUFFERS + HEADER, 5000), large);
}

#[test]
fn buffers_in_more_pieces_than_one_call_takes_are_filled_in_order() {
    let mut guest = Guest::with(1, 9000, |backend| backend);
    for chain in 0..3 {
        let pieces: Vec<_> = (0..60)
            .map(|piece| (BUFFERS + 2400 * chain + 40 * piece, 40, WRITE))
            .collect();
        guest.driver.queues[0].add(&pieces);
    }
    guest.driver.notify(0);
    let large = frame(7000, 6);
    guest.wire.send(&large);
    guest.events.settle();
    assert_eq!(guest.bytes(BUFFERS + HEADER, 7000), large);
    assert_eq!(guest.num_buffers(BUFFERS), 3);
}

#[test]
fn a_frame_that_the_whole_ring_cannot_hold_is_dropped_and_the_next_one_comes() {
    let mut guest = Guest::with(1, 9000, |backend| backend);
    guest.post([header::SIZE as u32; RECEIVE_QUEUE as usize]);
    guest.wire.send(&frame(5000, 7));
    guest.wire.send(&frame(20, 8));
    guest.events.settle();
    assert_eq!(guest.stats().receive_dropped, 1);
    assert_eq!(guest.driver.queues[0].take_used(), Some((0, 12)));
    assert_eq!(guest.num_buffers(BUFFERS), 3);
    assert_eq!(guest.bytes(BUFFERS + HEADER, 20), frame(20, 8));
}

/// CVE-2020-16843's class.
#[test]
fn a_full_receive_queue_resumes_when_it_is_drained() {
    let mut guest = Guest::new();
    for seed in 0..200 {
        guest.wire.send(&frame(100, seed));
    }
    assert!(guest.events.is_quiet(), "without buffers nothing happens");
    let mut seen = 0_u8;
    while seen < 200 {
        guest.post([256; 16]);
        guest.events.settle();
        let mut at = BUFFERS;
        while let Some((_, written)) = guest.driver.queues[0].take_used() {
            assert_eq!(written, 112);
            if seen < 200 {
                assert_eq!(guest.bytes(at + HEADER, 100), frame(100, seen), "{seen}");
            }
            (seen, at) = (seen + 1, at + 256);
        }
    }
    assert_eq!(guest.stats().received, 200);
}

#[test]
fn without_merged_buffers_a_frame_has_one_and_does_not_spill() {
    let mut guest = Guest::not_started(1, 9000, |backend| backend);
    guest.driver.start_with(1 << 32 | 1 << VIRTIO_NET_F_MAC);
    for nth in 0..2 {
        guest.driver.queues[0].add(&[(BUFFERS + 2048 * nth, 1526, WRITE)]);
    }
    guest.driver.notify(0);
    guest.wire.send(&frame(4000, 9));
    guest.wire.send(&frame(1000, 10));
    guest.events.settle();
    assert_eq!(guest.driver.queues[0].take_used(), Some((0, 1012)));
    assert_eq!(guest.driver.queues[0].take_used(), None);
    let stats = guest.stats();
    assert_eq!((stats.received, stats.receive_dropped), (1, 1));
}

#[test]
fn a_limit_holds_frames_back_in_both_directions() {
    let limit = RateLimit {
        packets: 100,
        burst_ms: 10,
        bytes: 0,
    };
    let mut guest = Guest::with(1, 1500, |backend| Backend {
        receive_limit: limit,
        transmit_limit: limit,
        ..backend
    });
    let start = Instant::now();
    guest.post([256; 30]);
    for seed in 0..20 {
        guest.wire.send(&frame(100, seed));
        guest.send(&[0; header::SIZE], &frame(100, seed));
    }
    let most = |start: Instant| 2 + start.elapsed().as_millis() as u64 / 10;
    let stats = guest.stats();
    assert!(
        stats.sent <= most(start) && stats.received <= most(start),
        "{stats:?}"
    );
    while guest.stats().sent < 20 || guest.stats().received < 20 {
        guest.events.settle();
        let stats = guest.stats();
        assert!(
            stats.sent <= most(start) && stats.received <= most(start),
            "{stats:?}"
        );
        assert!(start.elapsed() < Duration::from_secs(10), "{stats:?}");
    }
    assert!(guest.stats().throttled > 0);
}

#[test]
fn an_interface_that_goes_away_leaves_a_quiet_device() {
    let mut guest = Guest::new();
    guest.post([2048]);
    guest.events.settle();
    guest.wire.delete_interface();
    assert!(guest.events.is_quiet());
    guest.send(&[0; header::SIZE], &frame(100, 1));
    assert!(guest.driver.queues[1].take_used().is_some());
    assert_eq!(guest.stats().send_dropped, 1);
    assert!(!guest.driver.needs_reset());
    assert!(guest.events.is_quiet());
}

#[test]
fn a_change_of_the_link_interrupts_the_driver_once() {
    let mut guest = Guest::new();
    guest.driver.interrupts();
    let generation = guest.driver.read(0xfc);
    for _ in 0..2 {
        ports::set_link(&guest.driver.transport.signal(), false);
    }
    assert_eq!(guest.driver.read(0x104) >> 16 & 1, 0);
    assert_eq!(guest.driver.read(reg::INTERRUPT_STATUS) & 2, 2);
    assert_eq!(guest.driver.interrupts(), 1);
    assert_eq!(guest.driver.read(0xfc), generation + 1);
    guest.driver.write(reg::INTERRUPT_ACK, 2);
    ports::set_link(&guest.driver.transport.signal(), true);
    assert_eq!(guest.driver.read(0x104) >> 16 & 1, 1);
    assert_eq!(guest.driver.interrupts(), 1);
}

#[test]
fn an_empty_place_is_no_device_until_one_comes() {
    let mut wire = Wire::new(1, 1500);
    let mut driver = Driver::new(Slot::new(4), memory());
    assert_eq!(driver.read(8), 0, "§4.2.2: a placeholder");
    // A hostile driver does not ignore it.
    driver.write(reg::STATUS, 1);
    driver.write(reg::STATUS, 3);
    let mut events = Loop::new();
    let net = device(&mut events, backend(wire.take_taps()));
    driver.transport.replace_device(Box::new(net)).unwrap();
    assert_eq!(driver.read(8), VIRTIO_ID_NET);
    assert_eq!(driver.read(reg::STATUS), 0);
    driver.start();
    driver.queues[0].add(&[(BUFFERS, 2048, WRITE)]);
    driver.notify(0);
    wire.send(&frame(100, 1));
    events.settle();
    assert_eq!(driver.queues[0].take_used(), Some((0, 112)));
    let second = Slot::new(1);
    assert!(driver.transport.replace_device(Box::new(second)).is_err());
}

#[test]
fn a_descriptor_that_is_no_tap_with_the_header_is_refused() {
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(Tap::new(null.into()), Err(TapError::NotATap(_))));
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let plain = wire::open_tap(libc::IFF_TAP | libc::IFF_NO_PI);
    assert!(matches!(Tap::new(plain), Err(TapError::Flags(_))));
}
