//! Guests that break the rules of every device, one attack after the other: each time the device
//! asks for a reset, counts, and works again, and the host's end of the wire has seen nothing of
//! it. The same rules, and more, are tested at the devices themselves;
//! here they go through KVM, the jail and the threads of the built program.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

use bulkhead_vmm::arch::x86_64::layout;
use bulkhead_vmm_config::{ANNOUNCE_PORT, GuestEnd, NetDevice, RateLimit};
use virtio_bindings::bindings::virtio_mmio::*;
use virtio_bindings::bindings::virtio_net::*;

use crate::support::driver::{BUFFERS, Driver, INDIRECT, NEXT, SIZE, WRITE};
use crate::support::{self, Setup};
use crate::wire::{BAD_HEADERS, Wire, frame};

/// A device: its name, its window, its queues and features, and whether it writes to a queue's
/// buffers.
#[derive(Clone, Copy)]
struct Device {
    name: &'static str,
    window: usize,
    features: u32,
    writes: &'static [bool],
}

const VSOCK: Device = Device {
    name: "vsock",
    window: 0,
    features: 0,
    writes: &[true, false, false],
};
const NET: Device = Device {
    name: "net",
    window: 1,
    features: 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_MRG_RXBUF
        | 1 << VIRTIO_NET_F_CTRL_VQ,
    writes: &[true, false, false],
};
const RNG: Device = Device {
    name: "rng",
    window: 2,
    features: 0,
    writes: &[true],
};

const BALLOON: Device = Device {
    name: "balloon",
    window: 3,
    // Statistics, DEFLATE_ON_OOM, reports.
    features: 1 << 1 | 1 << 2 | 1 << 5,
    writes: &[false, false, false, true],
};

const MEM: Device = Device {
    name: "mem",
    window: 4,
    // Nobody touches what is unplugged.
    features: 1 << 1,
    writes: &[false],
};

const INFLATE: u32 = 0;
const REPORTS: u32 = 3;
const RECEIVE: u32 = 0;
const SEND: u32 = 1;
const CONTROL: u32 = 2;
const HEADER: usize = 12;
const RAM_END: u64 = 128 << 20;
/// Where nothing is, between RAM and the devices.
const HOLE: u64 = 0xc800_0000;

/// Frames and packets of the good driver.
const GOOD: u64 = BUFFERS + 0x1_e000;
const DIAL: u64 = BUFFERS + 0x1_d000;
const ROOM: u64 = BUFFERS + 0x1_c000;
/// A request of [`MEM`]'s driver, to unplug all.
const UNPLUG_ALL: u64 = BUFFERS + 0x1_b000;

/// A kernel of attacks, and what the VMM has to count.
struct Attacks {
    driver: Driver,
    faults: BTreeMap<String, u64>,
    /// Frames that the good driver has sent.
    frames: u64,
}

impl Attacks {
    fn new() -> Attacks {
        let mut driver = Driver::new();
        driver.put(GOOD + HEADER as u64, &frame(100, 1));
        // A dial of a port that nobody offers, from the guest's address to the host's.
        let mut dial = [0; 44];
        (dial[0], dial[8], dial[16], dial[20]) = (3, 2, 77, 78);
        (dial[28], dial[30]) = (1, 1);
        driver.put(DIAL, &dial);
        driver.put(UNPLUG_ALL, &[2]);
        Attacks {
            driver,
            faults: BTreeMap::new(),
            frames: 0,
        }
    }

    fn start(&mut self, device: Device) {
        self.driver
            .select(device.window, device.writes.len() as u32);
        self.driver.start(device.features);
    }

    /// Does what a good driver does, from a reset on, and waits until it is done.
    fn use_it(&mut self, device: Device) {
        self.start(device);
        let driver = &mut self.driver;
        match device.name {
            "net" => {
                self.frames += 1;
                driver.chain(SEND, &[(GOOD, 112, 0)]);
                driver.kick(SEND);
                driver.wait_for_used(SEND, 1);
            }
            "vsock" => {
                driver.chain(RECEIVE, &[(ROOM, 0x1000, WRITE)]);
                driver.chain(SEND, &[(DIAL, 44, 0)]);
                driver.kick(SEND);
                // Its reset.
                driver.wait_for_used(RECEIVE, 1);
            }
            "balloon" => {
                driver.chain(REPORTS, &[(ROOM, 0x1000, WRITE)]);
                driver.kick(REPORTS);
                driver.wait_for_used(REPORTS, 1);
            }
            "mem" => {
                driver.chain(0, &[(UNPLUG_ALL, 24, 0), (ROOM, 10, WRITE)]);
                driver.kick(0);
                driver.wait_for_used(0, 1);
            }
            _ => {
                driver.chain(0, &[(ROOM, 64, WRITE)]);
                driver.kick(0);
                driver.wait_for_used(0, 1);
            }
        }
    }

    /// Breaks a rule from a reset on, is told so, and is good again.
    fn refused(
        &mut self,
        device: Device,
        queue: u32,
        fault: &str,
        attack: impl FnOnce(&mut Driver),
    ) {
        let nth = self.faults.values().sum::<u64>();
        println!("{nth:#04x}: {} {queue}: {fault}", device.name);
        // A guest that waits for ever has told on its console which one it was.
        self.driver.port(layout::SERIAL_PORT, nth as u8);
        self.start(device);
        if device.name == "vsock" && queue == RECEIVE {
            // A device that has nothing to say does not look for buffers.
            self.driver.chain(SEND, &[(DIAL, 44, 0)]);
            attack(&mut self.driver);
            self.driver.kick(SEND);
        } else {
            attack(&mut self.driver);
            self.driver.kick(queue);
        }
        self.driver.wait_for_refusal();
        let name = format!("{}.{fault}", device.name);
        *self.faults.entry(name).or_default() += 1;
        self.use_it(device);
    }

    /// Boots them.
    fn run(self) {
        let expected = self.faults.clone();
        assert_eq!(self.counted(), expected);
    }

    /// Boots them; what the VMM has counted.
    fn counted(self) -> BTreeMap<String, u64> {
        let Some(_) = support::kernel() else {
            return self.faults;
        };
        let mut kernel = tempfile::NamedTempFile::new().expect("a file");
        kernel
            .write_all(&self.driver.elf())
            .expect("it can be written");
        let mut wire = Wire::new(1, 1500);
        let mut setup = Setup::new(kernel.path(), b"unused").with_serial();
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
        setup.config.spare_memory_mib = 1;
        let mut machine = setup.start();
        let ended = machine.end();
        let whole = (GuestEnd::PowerOff, 0);
        assert_eq!((ended.end, ended.code), whole, "{}", machine.report());
        let told = machine.resets.iter();
        let told: BTreeSet<_> = told
            .map(|(name, reason)| format!("{name}.{reason}"))
            .collect();
        assert_eq!(told.len(), machine.resets.len(), "each once");
        assert!(
            self.faults.keys().all(|fault| told.contains(fault)),
            "{told:?}"
        );
        let stats = ended.stats.net[0];
        assert_eq!((stats.sent, stats.send_dropped), (self.frames, 0));
        for nth in 0..self.frames {
            assert_eq!(wire.receive(), Some(frame(100, 1)), "{nth}");
        }
        assert_eq!(wire.receive(), None);
        ended.stats.guest_faults
    }
}

fn flags(writes: bool) -> u16 {
    if writes { WRITE } else { 0 }
}

#[test]
fn network_headers_and_lengths() {
    let mut attacks = Attacks::new();
    // The last one's segments were not negotiated.
    for header in BAD_HEADERS
        .into_iter()
        .chain([[1, 4, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]])
    {
        let at = BUFFERS + 0x100 * attacks.faults.values().sum::<u64>();
        attacks.refused(NET, SEND, "net_header", |driver| {
            driver.put(at, &header);
            driver.put(at + HEADER as u64, &frame(100, 2));
            driver.chain(SEND, &[(at, 112, 0)]);
        });
    }
    attacks.refused(NET, SEND, "frame_too_long", |driver| {
        driver.chain(SEND, &[(BUFFERS, 0x1_0100, 0)]);
    });
    for length in [0, 11, 25] {
        attacks.refused(NET, SEND, "chain_too_short", |driver| {
            driver.chain(SEND, &[(BUFFERS, length, 0)]);
        });
    }
    attacks.refused(NET, RECEIVE, "chain_too_short", |driver| {
        driver.chain(RECEIVE, &[(BUFFERS, 11, WRITE)]);
    });
    attacks.refused(NET, RECEIVE, "head_in_flight", |driver| {
        driver.chain(RECEIVE, &[(BUFFERS, 64, WRITE)]);
        driver.publish(RECEIVE, 0);
    });
    attacks.run();
}

/// Descriptors that are wrong on any queue.
fn broken_chains(attacks: &mut Attacks, device: Device) {
    for (queue, &writes) in (0..).zip(device.writes) {
        // The events' queue of vsock is never looked at.
        if device.name == "vsock" && queue == CONTROL {
            continue;
        }
        let piece = (BUFFERS, 64, flags(writes) | NEXT);
        for bad in [
            (RAM_END - 50, 100),
            (u64::MAX - 10, 100),
            (HOLE, 100),
            (layout::virtio_window(device.window), 64),
            (layout::RAMOOPS, 64),
        ] {
            attacks.refused(device, queue, "outside_memory", |driver| {
                driver.chain(queue, &[(bad.0, bad.1, flags(writes))]);
            });
        }
        attacks.refused(device, queue, "chain_loop", |driver| {
            driver.descriptor(queue, 0, piece, 0);
            driver.publish(queue, 0);
        });
        attacks.refused(device, queue, "next_out_of_range", |driver| {
            driver.descriptor(queue, 0, piece, SIZE);
            driver.publish(queue, 0);
        });
        attacks.refused(device, queue, "head_out_of_range", |driver| {
            driver.publish(queue, SIZE);
        });
        attacks.refused(device, queue, "available_index", |driver| {
            driver.set_available(queue, SIZE + 1);
        });
        attacks.refused(device, queue, "indirect", |driver| {
            driver.chain(queue, &[(BUFFERS, 16, flags(writes) | INDIRECT)]);
        });
        attacks.refused(device, queue, "length_overflow", |driver| {
            let flags = flags(writes);
            driver.chain(queue, &[(BUFFERS, 2, flags), (BUFFERS, u32::MAX, flags)]);
        });
    }
}

/// The classes of Dragonball's a957054dd3 (a buffer's end) and of looped and lost descriptors, for
/// each queue of each device.
#[test]
fn descriptors_that_break_a_rule() {
    let mut attacks = Attacks::new();
    for device in [NET, VSOCK, RNG] {
        broken_chains(&mut attacks, device);
        attacks.refused(device, RECEIVE, "unexpected_readable", |driver| {
            driver.chain(RECEIVE, &[(BUFFERS, 2048, 0)]);
        });
    }
    for device in [NET, VSOCK] {
        attacks.refused(device, SEND, "unexpected_writable", |driver| {
            driver.chain(SEND, &[(BUFFERS, 100, 0), (BUFFERS, 10, WRITE)]);
        });
    }
    // CVE-2019-18960's class.
    attacks.refused(VSOCK, SEND, "packet_past_chain", |driver| {
        let mut packet = [0; 44];
        (packet[0], packet[8], packet[28], packet[30]) = (3, 2, 1, 5);
        packet[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        driver.put(BUFFERS, &packet);
        driver.chain(SEND, &[(BUFFERS, 44, 0)]);
    });
    attacks.run();
}

/// The balloon's guest names memory, and what is not its own is not taken.
#[test]
fn memory_given_back_that_is_not_the_guests() {
    let mut attacks = Attacks::new();
    broken_chains(&mut attacks, BALLOON);
    for queue in INFLATE..REPORTS {
        attacks.refused(BALLOON, queue, "unexpected_writable", |driver| {
            driver.chain(queue, &[(BUFFERS, 64, WRITE)]);
        });
    }
    attacks.refused(BALLOON, REPORTS, "unexpected_readable", |driver| {
        driver.chain(REPORTS, &[(BUFFERS, 0x1000, 0)]);
    });
    for (at, length) in [(ROOM + 1, 0x1000), (ROOM, 0xfff), (ROOM + 0x800, 0x800)] {
        attacks.refused(BALLOON, REPORTS, "part_of_page", |driver| {
            driver.chain(REPORTS, &[(ROOM, 0x1000, WRITE), (at, length, WRITE)]);
        });
    }
    let window = layout::virtio_window(BALLOON.window);
    for at in [RAM_END, HOLE, layout::RAMOOPS, window, 0xffff_ffff << 12] {
        let list = BUFFERS + 0x100 * attacks.faults.values().sum::<u64>();
        attacks.refused(BALLOON, INFLATE, "outside_memory", |driver| {
            let numbers = [ROOM, at].map(|at| ((at >> 12) as u32).to_le_bytes());
            driver.put(list, numbers.as_flattened());
            driver.chain(INFLATE, &[(list, 8, 0)]);
        });
    }
    attacks.refused(BALLOON, INFLATE, "chain_too_short", |driver| {
        driver.chain(INFLATE, &[(BUFFERS, 6, 0)]);
    });
    attacks.run();
}

/// Requests for memory that have no beginning, no end, or no room for an answer.
#[test]
fn memory_asked_for_in_bad_words() {
    let mut attacks = Attacks::new();
    broken_chains(&mut attacks, MEM);
    for (request, response) in [(0, 10), (23, 10), (24, 0), (24, 9)] {
        attacks.refused(MEM, 0, "chain_too_short", |driver| {
            driver.chain(0, &[(UNPLUG_ALL, request, 0), (ROOM, response, WRITE)]);
        });
    }
    attacks.refused(MEM, 0, "readable_after_writable", |driver| {
        driver.chain(0, &[(ROOM, 10, WRITE), (UNPLUG_ALL, 24, 0)]);
    });
    attacks.run();
}

/// Every width at every offset of a running device's window and of the interrupt controller, and
/// ports: nobody minds, and the devices run on where they were put (CVE-2026-5747's class).
#[test]
fn accesses_of_every_width_to_devices_that_run() {
    let mut attacks = Attacks::new();
    for device in [VSOCK, NET, RNG, BALLOON, MEM] {
        attacks.start(device);
        let driver = &mut attacks.driver;
        for queue in 0..device.writes.len() as u32 + 1 {
            for register in [
                VIRTIO_MMIO_QUEUE_NUM,
                VIRTIO_MMIO_QUEUE_READY,
                VIRTIO_MMIO_QUEUE_DESC_LOW,
                VIRTIO_MMIO_QUEUE_DESC_HIGH,
                VIRTIO_MMIO_QUEUE_AVAIL_LOW,
                VIRTIO_MMIO_QUEUE_USED_LOW,
                VIRTIO_MMIO_DRIVER_FEATURES,
            ] {
                driver.store(VIRTIO_MMIO_QUEUE_SEL, queue);
                driver.store(register, 0);
            }
        }
        for offset in 0..0x110 {
            for width in [1, 2, 8] {
                let address = driver.register(offset);
                driver.touch(address, width, 0);
            }
        }
        for _ in 0..200 {
            for queue in 0..device.writes.len() as u32 + 1 {
                driver.kick(queue);
            }
        }
        // On the rings of before.
        match device.name {
            "rng" => {
                driver.chain(0, &[(ROOM, 64, WRITE)]);
                driver.kick(0);
                driver.wait_for_used(0, 1);
            }
            "net" => {
                attacks.frames += 1;
                driver.chain(SEND, &[(GOOD, 112, 0)]);
                driver.kick(SEND);
                driver.wait_for_used(SEND, 1);
            }
            "balloon" => {
                driver.chain(REPORTS, &[(ROOM, 0x1000, WRITE)]);
                driver.kick(REPORTS);
                driver.wait_for_used(REPORTS, 1);
            }
            "mem" => {
                driver.chain(0, &[(UNPLUG_ALL, 24, 0), (ROOM, 10, WRITE)]);
                driver.kick(0);
                driver.wait_for_used(0, 1);
            }
            _ => {
                driver.chain(SEND, &[(DIAL, 44, 0)]);
                driver.kick(SEND);
                driver.wait_for_used(SEND, 1);
            }
        }
    }
    let driver = &mut attacks.driver;
    for offset in (0..0x20).step_by(4) {
        for width in [1, 2, 8] {
            driver.touch(layout::IOAPIC + offset, width, 0);
        }
    }
    for width in [1, 2, 8] {
        driver.touch(HOLE, width, 0);
        driver.touch(layout::virtio_window(15) + 0xff8, width, 0);
    }
    let first = layout::SERIAL_PORT - 8;
    // In the loop mode the console feeds itself (CVE-2020-27174's class); it is left for the end.
    driver.port(layout::SERIAL_PORT + 4, 0x10);
    for nth in 0..200 {
        driver.port(layout::SERIAL_PORT, nth as u8);
    }
    for port in (0..0x20).chain(first..first + 24).chain(0xcf8..0xd00) {
        driver.port(port, 0xee);
    }
    for port in ANNOUNCE_PORT..ANNOUNCE_PORT + 8 {
        driver.port(port, 0xee);
    }
    for device in [VSOCK, NET, RNG, BALLOON, MEM] {
        attacks.use_it(device);
    }
    let counted = attacks.counted();
    if support::kernel().is_some() {
        for device in [VSOCK, NET, RNG, BALLOON, MEM] {
            for fault in ["frozen", "register"] {
                let name = format!("{}.{fault}", device.name);
                assert!(counted.get(&name) > Some(&0), "{name}: {counted:?}");
            }
        }
    }
}
