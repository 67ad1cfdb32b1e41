//! Descriptors and rings that break a rule: the device stops, counts it, asks for a reset, and
//! works afterwards.

use super::super::test_driver::{BUFFERS, DriverQueue, INDIRECT, NEXT, WRITE};
use super::Direction::*;
use super::*;

/// Has `attack` made on each queue of each device.
fn refused(faults: &[&str], attack: impl Fn(&mut DriverQueue, u16)) {
    for (name, new) in DEVICES {
        let mut subject = new();
        for (index, &direction) in subject.queues().iter().enumerate() {
            let flags = if direction == Writes { WRITE } else { 0 };
            subject.start();
            attack(&mut subject.driver().queues[index], flags);
            subject.driver().notify(index as u32);
            subject.events().settle();
            let what = format!("{name}, queue {index}: {faults:?}");
            assert!(subject.driver().needs_reset(), "{what}");
            let notices = subject.driver().notices.clone();
            let counted = faults.iter().map(|fault| {
                let fault = format!("{name}.{fault}");
                notices.count(&fault)
            });
            let counted: u64 = counted.sum();
            let all: u64 = notices.faults.snapshot().values().sum();
            assert_eq!(
                (counted, all),
                (index as u64 + 1, index as u64 + 1),
                "{what}"
            );
            // It has stopped: nothing that is good is looked at, and nothing spins.
            let memory = subject.driver().memory.clone();
            subject.driver().interrupts();
            let before = contents(&memory);
            for queue in 0..subject.queues().len() {
                subject.driver().notify(queue as u32);
            }
            subject.disturb();
            assert!(subject.events().is_quiet(), "{what}");
            assert_eq!(subject.driver().interrupts(), 0, "{what}");
            assert!(contents(&memory) == before, "{what}: it wrote to memory");
            revived(&mut *subject);
        }
    }
}

/// Two good ones before a bad one: all of the chain is checked before any of it is used.
fn pieces(bad: (u64, u32), flags: u16) -> [(u64, u32, u16); 3] {
    let good = |nth: u64| (BUFFERS + nth * 0x1000, 64, flags);
    [good(0), good(1), (bad.0, bad.1, flags)]
}

/// The class of Dragonball's a957054dd3: the start of a buffer was checked, its end was not.
#[test]
fn dragonball_a957054dd3_buffers_that_are_not_wholly_in_one_region() {
    let hole = HIGH_RAM - RAM_SIZE;
    for bad in [
        (RAM_SIZE - 4, 8),
        (RAM_SIZE - 8, hole as u32 + 16),
        (0, u32::MAX - 0x1000),
        (RAM_SIZE, 0),
        (RAM_SIZE, 1),
        (RAM_SIZE + hole / 2, 16),
        (HIGH_RAM - 1, 2),
        (HIGH_RAM + RAM_SIZE - 1, 2),
        (HIGH_RAM + RAM_SIZE, 64),
        (0xd000_0000, 64),
        (u64::MAX, 1),
        (u64::MAX - 7, 16),
        (1 << 63, 64),
    ] {
        refused(&["outside_memory"], |queue, flags| {
            queue.add(&[(bad.0, bad.1, flags)]);
        });
        refused(&["outside_memory"], |queue, flags| {
            queue.add(&pieces(bad, flags));
        });
    }
}

#[test]
fn chains_that_loop_or_leave_the_table() {
    refused(&["chain_loop"], |queue, flags| {
        queue.descriptor(0, BUFFERS, 4, flags | NEXT, 0);
        queue.publish(0);
    });
    refused(&["chain_loop"], |queue, flags| {
        for index in 0..queue.size {
            let next = (index + 1) % queue.size;
            queue.descriptor(index, BUFFERS, 4, flags | NEXT, next);
        }
        queue.publish(0);
    });
    for past in [0, 1, 0x7fff] {
        refused(&["next_out_of_range"], |queue, flags| {
            queue.descriptor(0, BUFFERS, 4, flags | NEXT, queue.size + past);
            queue.publish(0);
        });
        refused(&["head_out_of_range"], |queue, _| {
            queue.publish(queue.size + past);
        });
    }
}

#[test]
fn available_indices_that_no_driver_writes() {
    for past in [1, 2, 0x7fff] {
        refused(&["available_index"], |queue, _| queue.overrun(past));
    }
}

/// Not offered, so that a table in a table cannot be either.
#[test]
fn indirect_descriptors_and_those_in_them() {
    for inner in [0, NEXT, INDIRECT, INDIRECT | NEXT] {
        for outer in [INDIRECT, INDIRECT | NEXT] {
            refused(&["indirect"], |queue, flags| {
                let table = queue.with_table(BUFFERS);
                table.descriptor(0, BUFFERS, 16, flags | inner, 0);
                queue.descriptor(0, BUFFERS, 16, flags | outer, 0);
                queue.publish(0);
            });
        }
    }
}

#[test]
fn chains_of_four_gibibytes() {
    refused(&["length_overflow"], |queue, flags| {
        queue.add(&[(BUFFERS, 0x1000, flags), (BUFFERS, u32::MAX, flags)]);
    });
}

#[test]
fn buffers_of_the_wrong_direction() {
    for (name, new) in DEVICES {
        let mut subject = new();
        for (index, &direction) in subject.queues().iter().enumerate() {
            let (flags, fault) = match direction {
                Reads => (WRITE, "unexpected_writable"),
                Writes => (0, "unexpected_readable"),
                // A request where there is none to read.
                Both => (WRITE, "chain_too_short"),
            };
            subject.start();
            let fault = format!("{name}.{fault}");
            let before = subject.driver().notices.count(&fault);
            subject.driver().queues[index].add(&[(BUFFERS, 2048, flags)]);
            subject.driver().notify(index as u32);
            subject.events().settle();
            assert!(subject.driver().needs_reset(), "{name}, queue {index}");
            let count = subject.driver().notices.count(&fault);
            assert_eq!(count, before + 1, "{name}, queue {index}");
            revived(&mut *subject);
        }
    }
    refused(&["readable_after_writable"], |queue, _| {
        queue.add(&[(BUFFERS, 64, WRITE), (BUFFERS + 64, 64, 0)]);
    });
}

/// CVE-2026-45782's class: two requests at once on one chain. A device that holds a chain refuses
/// it, one that does not has given it back before it looks at the next.
#[test]
fn cve_2026_45782_a_head_that_is_available_twice() {
    each(|name, subject| {
        for (index, &direction) in subject.queues().iter().enumerate() {
            subject.start();
            let fault = format!("{name}.head_in_flight");
            let before = subject.driver().notices.count(&fault);
            let flags = if direction == Writes { WRITE } else { 0 };
            let queue = &mut subject.driver().queues[index];
            let head = queue.add(&[(BUFFERS, 0x1000, flags)]);
            queue.publish(head);
            subject.driver().notify(index as u32);
            for _ in 0..4 {
                subject.disturb();
                subject.events().settle();
            }
            let held = subject.driver().notices.count(&fault) - before;
            let queue = &mut subject.driver().queues[index];
            let used = std::iter::from_fn(|| queue.take_used()).count();
            // A request without room for its answer is another fault.
            if direction != Both {
                assert_eq!(
                    used as u64,
                    if held == 1 { 0 } else { 2 },
                    "{name}, queue {index}"
                );
            }
            assert_eq!(
                subject.driver().needs_reset(),
                held == 1 || direction == Both
            );
            revived(subject);
        }
    });
}

#[test]
fn kick_storms() {
    each(|name, subject| {
        let queues = subject.driver().queues.len() as u32;
        let storm = |subject: &mut dyn Subject| {
            let events = subject.driver().transport.queue_events().unwrap();
            for nth in 0..20_000 {
                // As KVM's ioeventfd, and as a value that it does not match.
                events[nth % events.len()].write(1).unwrap();
                subject.driver().notify(nth as u32 % (queues + 2));
            }
            assert!(subject.events().is_quiet(), "{name}");
        };
        storm(subject);
        assert!(!subject.driver().needs_reset(), "{name}");
        subject.assert_works();
        subject.driver().write(reg::STATUS, 0);
        storm(subject);
        // What was kicked before is not heard by the next driver.
        subject.start();
        assert!(subject.events().is_quiet(), "{name}");
        subject.assert_works();
    });
}
