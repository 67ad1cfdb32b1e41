use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::test_driver::{
    BUFFERS, Driver, HIGH_RAM, INDIRECT, Loop, NEXT, RAM_SIZE, WRITE, memory,
};
use super::{MAX_BYTES, Rng};

fn rng() -> (Driver, Loop) {
    let mut events = Loop::new();
    let rng = Rng::new(events.poller());
    events.attach(rng.handler());
    let mut driver = Driver::new(rng, memory());
    driver.start();
    (driver, events)
}

fn bytes(driver: &Driver, at: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    driver
        .memory
        .read_slice(&mut bytes, GuestAddress(at))
        .unwrap();
    bytes
}

#[test]
fn a_chain_is_filled_and_the_driver_interrupted() {
    let (mut driver, mut events) = rng();
    let head = driver.queues[0].add(&[(BUFFERS, 100, WRITE), (BUFFERS + 0x1000, 28, WRITE)]);
    driver.notify(0);
    events.settle();
    assert_eq!(driver.queues[0].take_used(), Some((head.into(), 128)));
    assert_eq!(driver.interrupts(), 1);
    assert!(bytes(&driver, BUFFERS, 100).iter().any(|&byte| byte != 0));
    assert_eq!(
        bytes(&driver, BUFFERS + 100, 28),
        [0; 28],
        "past the buffer"
    );
    assert!(
        bytes(&driver, BUFFERS + 0x1000, 28)
            .iter()
            .any(|&byte| byte != 0)
    );
}

#[test]
fn a_request_larger_than_the_cap_is_answered_in_part() {
    let (mut driver, mut events) = rng();
    driver.queues[0].add(&[(BUFFERS, 0x7_0000, WRITE)]);
    driver.notify(0);
    events.settle();
    assert_eq!(driver.queues[0].take_used(), Some((0, 64 * 1024)));
    assert_eq!(bytes(&driver, BUFFERS + 64 * 1024, 64), [0; 64]);
}

#[test]
fn an_unwanted_interrupt_is_not_raised() {
    let (mut driver, mut events) = rng();
    driver.queues[0].set_used_event(5);
    for _ in 0..3 {
        driver.queues[0].add(&[(BUFFERS, 16, WRITE)]);
    }
    driver.notify(0);
    events.settle();
    assert_eq!(driver.interrupts(), 0);
    for _ in 0..3 {
        driver.queues[0].add(&[(BUFFERS, 16, WRITE)]);
    }
    driver.notify(0);
    events.settle();
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn a_driver_without_event_indices_is_served_and_may_decline_interrupts() {
    let mut events = Loop::new();
    let rng = Rng::new(events.poller());
    events.attach(rng.handler());
    let mut driver = Driver::new(rng, memory());
    driver.start_with(1 << 32);
    driver.queues[0].add(&[(BUFFERS, 16, WRITE)]);
    driver.notify(0);
    events.settle();
    assert_eq!(driver.interrupts(), 1);
    let flags = GuestAddress(driver.queues[0].available);
    driver.memory.write_obj(1u16, flags).unwrap();
    driver.queues[0].add(&[(BUFFERS, 16, WRITE)]);
    driver.notify(0);
    events.settle();
    assert_eq!(driver.interrupts(), 0);
    assert_eq!(driver.queues[0].take_used(), Some((0, 16)));
    assert_eq!(driver.queues[0].take_used(), Some((1, 16)));
}

/// Breaks one rule, and expects the device to stop, to say so, and to work again after a reset.
fn refused(fault: &str, attack: impl FnOnce(&mut Driver)) {
    let (mut driver, mut events) = rng();
    attack(&mut driver);
    driver.notify(0);
    events.settle();
    assert!(driver.needs_reset(), "{fault}");
    assert_eq!(
        driver.notices.count(&format!("rng.{fault}")),
        1,
        "{:?}",
        driver.notices.faults.snapshot()
    );
    assert_eq!(driver.read(0x60) & 2, 2, "configuration change interrupt");
    // Stopped: even a good chain is not looked at.
    driver.interrupts();
    driver.queues[0].set_available(0);
    driver.notify(0);
    assert!(events.is_quiet());
    assert_eq!(driver.interrupts(), 0);
    driver.start();
    driver.queues[0].add(&[(BUFFERS, 16, WRITE)]);
    driver.notify(0);
    events.settle();
    assert_eq!(driver.queues[0].take_used(), Some((0, 16)));
}

#[test]
fn a_head_past_the_table_is_refused() {
    refused("head_out_of_range", |driver| driver.queues[0].publish(64));
    refused("head_out_of_range", |driver| {
        driver.queues[0].publish(u16::MAX)
    });
}

#[test]
fn a_next_past_the_table_is_refused() {
    refused("next_out_of_range", |driver| {
        driver.queues[0].descriptor(0, BUFFERS, 4, WRITE | NEXT, 64);
        driver.queues[0].publish(0);
    });
}

#[test]
fn a_loop_of_descriptors_is_refused() {
    refused("chain_loop", |driver| {
        driver.queues[0].descriptor(0, BUFFERS, 4, WRITE | NEXT, 1);
        driver.queues[0].descriptor(1, BUFFERS, 4, WRITE | NEXT, 0);
        driver.queues[0].publish(0);
    });
}

#[test]
fn a_descriptor_outside_ram_is_refused() {
    for (address, len) in [
        (RAM_SIZE - 4, 8),
        (RAM_SIZE, 1),
        (HIGH_RAM - 1, 2),
        (HIGH_RAM + RAM_SIZE - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 7, 16),
        (0, u32::MAX),
        (RAM_SIZE, 0),
    ] {
        refused("outside_memory", |driver| {
            driver.queues[0].add(&[(address, len, WRITE)]);
        });
    }
}

#[test]
fn a_readable_descriptor_is_refused() {
    refused("unexpected_readable", |driver| {
        driver.queues[0].add(&[(BUFFERS, 4, 0)]);
    });
    refused("readable_after_writable", |driver| {
        driver.queues[0].add(&[(BUFFERS, 4, WRITE), (BUFFERS, 4, 0)]);
    });
}

#[test]
fn an_indirect_descriptor_is_refused() {
    refused("indirect", |driver| {
        driver.queues[0].add(&[(BUFFERS, 16, INDIRECT)]);
    });
}

#[test]
fn a_chain_of_four_gibibytes_is_refused() {
    refused("length_overflow", |driver| {
        let piece = (BUFFERS, 0x8_0000, WRITE);
        // 64 descriptors of 512 KiB are 32 MiB: only lengths that do not fit in RAM reach 4 GiB, so the sum is checked first.
        driver.queues[0].add(&[piece, (BUFFERS, u32::MAX, WRITE)]);
    });
}

#[test]
fn an_available_index_too_far_ahead_is_refused() {
    refused("available_index", |driver| {
        driver.queues[0].set_available(65)
    });
    refused("available_index", |driver| {
        driver.queues[0].set_available(u16::MAX)
    });
}

#[test]
fn empty_buffers_are_used_with_nothing_in_them() {
    let (mut driver, mut events) = rng();
    driver.queues[0].add(&[(BUFFERS, 0, WRITE)]);
    driver.notify(0);
    events.settle();
    assert_eq!(driver.queues[0].take_used(), Some((0, 0)));
    assert!(!driver.needs_reset());
}

#[test]
fn a_missing_queue_is_refused_at_driver_ok() {
    let mut events = Loop::new();
    let rng = Rng::new(events.poller());
    events.attach(rng.handler());
    let mut driver = Driver::new(rng, memory());
    driver.negotiate(1 << 32);
    driver.write(0x70, 0xf);
    assert!(driver.needs_reset());
    assert_eq!(driver.notices.count("rng.queue_missing"), 1);
}

#[test]
fn a_kick_storm_leaves_the_loop_quiet() {
    let (mut driver, mut events) = rng();
    for _ in 0..1000 {
        driver.notify(0);
    }
    events.settle();
    assert!(events.is_quiet());
    assert!(!driver.needs_reset());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any bytes as rings: the device serves, or asks for a reset; a chain is never longer than it may be.
    #[test]
    fn no_ring_bytes_panic(
        table in prop::collection::vec(any::<u8>(), 0..1024),
        available in prop::collection::vec(any::<u8>(), 0..140),
        index in any::<u16>(),
        near in any::<bool>(),
    ) {
        let (mut driver, mut events) = rng();
        let queue = &driver.queues[0];
        let (at_table, at_available) = (queue.table, queue.available);
        driver.memory.write_slice(&table, GuestAddress(at_table)).unwrap();
        driver.memory.write_slice(&available, GuestAddress(at_available)).unwrap();
        driver.queues[0].set_available(if near { index % 65 } else { index });
        driver.notify(0);
        events.settle();
        while let Some((_, written)) = driver.queues[0].take_used() {
            prop_assert!(written as usize <= MAX_BYTES);
        }
        driver.start();
        driver.queues[0].add(&[(BUFFERS, 16, WRITE)]);
        driver.notify(0);
        events.settle();
        prop_assert_eq!(driver.queues[0].take_used(), Some((0, 16)));
    }
}
