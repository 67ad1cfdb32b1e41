//! A guest whose network driver breaks the rules: the device asks for a reset, counts, and works again afterwards, and the host's
//! end of the wire has seen nothing of it. The same rules, and more, are tested at the device itself; here they go through KVM,
//! the jail and the threads of the built program.

use std::io::Write;

use bulkhead_vmm_config::{GuestEnd, NetDevice, RateLimit};
use virtio_bindings::bindings::virtio_net::*;

use crate::support::driver::{BUFFERS, Driver, INDIRECT, NEXT, SIZE, WRITE};
use crate::support::{self, Setup};
use crate::wire::{BAD_HEADERS, Wire, frame};

/// The only device before it is vsock.
const WINDOW: usize = 1;
const RECEIVE: u32 = 0;
const SEND: u32 = 1;
const CONTROL: u32 = 2;
const HEADER: usize = 12;
const FEATURES: u32 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CTRL_VQ;
const RAM_END: u64 = 128 << 20;

/// Frames of the good driver, before and after.
const GOOD: u64 = BUFFERS + 0x1_e000;

/// Boots a guest that is good, breaks a rule, and is good again.
fn refused(queue: u32, fault: &str, attack: impl FnOnce(&mut Driver)) {
    let Some(_) = support::kernel() else { return };
    println!("queue {queue}: {fault}");
    let mut driver = Driver::new(WINDOW, 3);
    driver.put(GOOD + HEADER as u64, &frame(100, 1));
    let send_a_good_one = |driver: &mut Driver| {
        driver.chain(SEND, &[(GOOD, 112, 0)]);
        driver.kick(SEND);
        driver.wait_for_used(SEND, 1);
    };
    driver.start(FEATURES);
    send_a_good_one(&mut driver);
    driver.start(FEATURES);
    attack(&mut driver);
    driver.kick(queue);
    driver.wait_for_refusal();
    driver.start(FEATURES);
    send_a_good_one(&mut driver);

    let mut kernel = tempfile::NamedTempFile::new().expect("a file");
    kernel.write_all(&driver.elf()).expect("it can be written");
    let mut wire = Wire::new(1, 1500);
    let mut setup = Setup::new(kernel.path(), b"unused");
    let [tap] = &wire.take_taps()[..] else {
        panic!("one queue")
    };
    // Ours keeps the interface, and what it has got, when the VMM has gone.
    let copy = tap.try_clone().expect("a free descriptor");
    let device = NetDevice {
        taps: vec![setup.add(copy)],
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        receive_limit: RateLimit::default(),
        transmit_limit: RateLimit::default(),
    };
    setup.config.net.push(device);
    let mut machine = setup.start();
    let ended = machine.end();
    assert_eq!(
        (ended.end, ended.code),
        (GuestEnd::PowerOff, 0),
        "{fault}: {}",
        machine.report()
    );
    let faults = ended.stats.guest_faults;
    assert_eq!(faults.len(), 1, "{fault}: {faults:?}");
    assert_eq!(faults.get(&format!("net.{fault}")), Some(&1), "{faults:?}");
    let stats = ended.stats.net[0];
    assert_eq!((stats.sent, stats.send_dropped), (2, 0), "{fault}");
    for _ in 0..2 {
        assert_eq!(wire.receive(), Some(frame(100, 1)), "{fault}");
    }
    assert_eq!(wire.receive(), None, "{fault}");
}

#[test]
fn bad_headers() {
    // The last one's segments were not negotiated.
    for header in BAD_HEADERS
        .into_iter()
        .chain([[1, 4, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]])
    {
        refused(SEND, "net_header", |driver| {
            driver.put(BUFFERS, &header);
            driver.put(BUFFERS + HEADER as u64, &frame(100, 2));
            driver.chain(SEND, &[(BUFFERS, 112, 0)]);
        });
    }
}

#[test]
fn oversized_chains() {
    refused(SEND, "frame_too_long", |driver| {
        driver.chain(SEND, &[(BUFFERS, 0x1_0100, 0)]);
    });
    refused(SEND, "length_overflow", |driver| {
        driver.chain(SEND, &[(BUFFERS, 2, 0), (BUFFERS, u32::MAX, 0)]);
    });
    refused(SEND, "indirect", |driver| {
        driver.chain(SEND, &[(BUFFERS, 16, INDIRECT)]);
    });
}

#[test]
fn wrong_lengths() {
    for length in [0, 11, 25] {
        refused(SEND, "chain_too_short", |driver| {
            driver.chain(SEND, &[(BUFFERS, length, 0)]);
        });
    }
    refused(RECEIVE, "chain_too_short", |driver| {
        driver.chain(RECEIVE, &[(BUFFERS, 11, WRITE)]);
    });
    for (address, length) in [
        (RAM_END - 50, 100),
        (u64::MAX - 10, 100),
        (0xd000_0000, 100),
    ] {
        for (queue, flags) in [(SEND, 0), (RECEIVE, WRITE)] {
            refused(queue, "outside_memory", |driver| {
                driver.chain(queue, &[(address, length, flags)]);
            });
        }
    }
}

#[test]
fn looped_and_lost_descriptors() {
    for (queue, flags) in [(RECEIVE, WRITE), (SEND, 0), (CONTROL, 0)] {
        let piece = (BUFFERS, 64, flags | NEXT);
        refused(queue, "chain_loop", |driver| {
            driver.descriptor(queue, 0, piece, 0);
            driver.publish(queue, 0);
        });
        refused(queue, "next_out_of_range", |driver| {
            driver.descriptor(queue, 0, piece, SIZE);
            driver.publish(queue, 0);
        });
        refused(queue, "head_out_of_range", |driver| {
            driver.publish(queue, SIZE);
        });
        refused(queue, "available_index", |driver| {
            driver.set_available(queue, SIZE + 1);
        });
    }
    refused(RECEIVE, "head_in_flight", |driver| {
        driver.chain(RECEIVE, &[(BUFFERS, 64, WRITE)]);
        driver.publish(RECEIVE, 0);
    });
}

#[test]
fn the_wrong_direction() {
    refused(SEND, "unexpected_writable", |driver| {
        driver.chain(SEND, &[(BUFFERS, 100, 0), (BUFFERS, 10, WRITE)]);
    });
    refused(RECEIVE, "unexpected_readable", |driver| {
        driver.chain(RECEIVE, &[(BUFFERS, 2048, 0)]);
    });
}
