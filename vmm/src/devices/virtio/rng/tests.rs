use vm_memory::{Bytes, GuestAddress};

use super::super::test_driver::{BUFFERS, Driver, Loop, WRITE, memory};
use super::super::tests::{Direction, Subject};
use super::Rng;

impl Subject for (Driver, Loop) {
    fn driver(&mut self) -> &mut Driver {
        &mut self.0
    }

    fn events(&mut self) -> &mut Loop {
        &mut self.1
    }

    fn queues(&self) -> &'static [Direction] {
        &[Direction::Writes]
    }

    fn assert_works(&mut self) {
        let (driver, events) = self;
        while driver.queues[0].take_used().is_some() {}
        let head = driver.queues[0].add(&[(BUFFERS, 16, WRITE)]);
        driver.notify(0);
        events.settle();
        assert_eq!(driver.queues[0].take_used(), Some((head.into(), 16)));
    }
}

pub(in super::super) fn subject() -> Box<dyn Subject> {
    Box::new(rng())
}

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

/// The class of what Firecracker 1.16 mended: memory for as much as the guest asks for.
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
