//! Any rings and frames, against a real tap.

use std::cell::RefCell;

use bulkhead_fuzz::Unstructured;

use super::super::super::fuzz::Hostile;
use super::*;

thread_local! {
    /// A namespace and a tap take longer than a thousand inputs: one for all of them.
    static TAP: RefCell<Option<(Wire, OwnedFd)>> = const { RefCell::new(None) };
}

/// A device whose tap is a copy of the only one.
fn guest() -> (Driver, Loop, Counters) {
    let tap = TAP.with_borrow_mut(|place| {
        let (_, tap) = place.get_or_insert_with(|| {
            let mut wire = Wire::new(1, 1500);
            let tap = wire.take_taps().pop().unwrap();
            (wire, tap)
        });
        tap.try_clone().unwrap()
    });
    let mut events = Loop::new();
    let net = device(&mut events, backend(vec![tap]));
    let counters = net.counters();
    let mut driver = Driver::new(net, memory());
    driver.start();
    (driver, events, counters)
}

/// Any rings of all three queues; the device works after a reset.
fn rings(data: &[u8]) {
    let (mut driver, mut events, counters) = guest();
    let mut input = Unstructured::new(data);
    let mut hostile = Hostile::new(&mut driver, &mut input);
    while !hostile.input.is_empty() && hostile.step().is_ok() {
        if hostile.input.arbitrary::<u8>().is_ok_and(|byte| byte < 64) {
            TAP.with_borrow(|tap| tap.as_ref().unwrap().0.send(&frame(200, 1)));
        }
        events.settle();
    }
    hostile.finish();
    assert!(events.is_quiet());
    driver.start();
    let sent = counters.snapshot().sent;
    let memory = &driver.memory;
    memory
        .write_slice(&[0; header::SIZE], GuestAddress(BUFFERS))
        .unwrap();
    memory
        .write_slice(&frame(100, 3), GuestAddress(BUFFERS + HEADER))
        .unwrap();
    driver.queues[1].add(&[(BUFFERS, header::SIZE as u32 + 100, 0)]);
    driver.notify(1);
    events.settle();
    assert_eq!(counters.snapshot().sent, sent + 1);
    // What the wire has is not the next input's.
    driver.write(reg::STATUS, 0);
    TAP.with_borrow(|place| {
        let (_, tap) = place.as_ref().unwrap();
        let mut frame = [0; 4096];
        while nix::unistd::read(tap, &mut frame).is_ok() {}
    });
}

/// A header and a frame behind it, as one packet: header checks and what the kernel makes of them.
fn packet(data: &[u8]) {
    let (mut driver, mut events, counters) = guest();
    let cut = data.len().min(2000);
    let memory = &driver.memory;
    memory
        .write_slice(&data[..cut], GuestAddress(BUFFERS))
        .unwrap();
    driver.queues[1].add(&[(BUFFERS, cut as u32, 0)]);
    driver.notify(1);
    events.settle();
    let stats = counters.snapshot();
    if !driver.needs_reset() {
        assert_eq!(stats.sent + stats.send_dropped, 1);
        assert_eq!(driver.queues[1].take_used(), Some((0, 0)));
    }
    assert!(events.is_quiet());
}

#[test]
fn fuzz_net_rings() {
    bulkhead_fuzz::run("net_rings", rings);
}

#[test]
fn fuzz_net_packet() {
    bulkhead_fuzz::run("net_packet", packet);
}
