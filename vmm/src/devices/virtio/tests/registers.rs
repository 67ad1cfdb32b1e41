//! Every register, real or not, at every width, in every state.

use super::super::net::Slot;
use super::super::test_driver::memory;
use super::*;
use crate::bus::BusDevice;

/// How far a driver is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Reset,
    Acknowledged,
    Driver,
    Features,
    Placed,
    Running,
    Failed,
}

const PHASES: [Phase; 7] = [
    Phase::Reset,
    Phase::Acknowledged,
    Phase::Driver,
    Phase::Features,
    Phase::Placed,
    Phase::Running,
    Phase::Failed,
];

/// Gets there from anywhere; the status that a driver reads there.
fn enter(driver: &mut Driver, phase: Phase) -> u32 {
    let features = driver.offered();
    match phase {
        Phase::Reset => driver.write(reg::STATUS, 0),
        Phase::Acknowledged | Phase::Driver => {
            driver.write(reg::STATUS, 0);
            driver.write(reg::STATUS, 1);
            if phase == Phase::Driver {
                driver.write(reg::STATUS, 3);
            }
        }
        Phase::Features => {
            driver.negotiate(features);
        }
        Phase::Placed => {
            driver.negotiate(features);
            driver.place(0);
        }
        Phase::Running => driver.start_with(features),
        Phase::Failed => {
            driver.start_with(features);
            driver.write(reg::STATUS, 0x8f);
        }
    }
    driver.read(reg::STATUS)
}

/// Writes each value at each offset and width; what changes the state is undone.
fn write_all(driver: &mut Driver, phase: Phase) {
    let status = enter(driver, phase);
    for offset in 0..0x1000 {
        for width in 1..=8 {
            for value in [0, 1, 0xf, u64::MAX, 0x0010_0000_0010_0000] {
                let bytes = &value.to_le_bytes()[..width];
                driver.transport.write(offset, bytes);
                let now = driver.read(reg::STATUS);
                if now == status {
                    continue;
                }
                let what = format!("{phase:?}, {bytes:?} at {offset:#x}");
                assert_eq!((offset, width), (reg::STATUS, 4), "{what}: status {now:#x}");
                assert!(value == 0 || now & status == status, "{what}: {now:#x}");
                enter(driver, phase);
            }
        }
    }
}

fn read_all(driver: &mut Driver) {
    let page: Vec<u8> = (0..0x1000)
        .map(|offset| {
            let mut byte = [0xee];
            driver.transport.read(offset, &mut byte);
            byte[0]
        })
        .collect();
    for offset in 0..0x1010 {
        for width in 0..=8 {
            let mut data = vec![0xee; width];
            driver.transport.read(offset, &mut data);
            let expected = (offset as usize..).take(width);
            let expected: Vec<u8> = expected
                .map(|at| page.get(at).copied().unwrap_or(0))
                .collect();
            assert_eq!(data, expected, "{width} bytes at {offset:#x}");
        }
    }
}

#[test]
fn every_offset_and_width_in_every_phase() {
    each(|name, subject| {
        for phase in PHASES {
            write_all(subject.driver(), phase);
            enter(subject.driver(), phase);
            read_all(subject.driver());
            assert!(subject.events().is_quiet(), "{name}: {phase:?}");
        }
        assert!(subject.driver().notices.failures.lock().unwrap().is_empty());
        revived(subject);
    });
}

/// A place without a device gets nobody past the features.
#[test]
fn every_offset_and_width_of_an_empty_place() {
    let mut driver = Driver::new(Slot::new(2), memory());
    for phase in [Phase::Reset, Phase::Acknowledged, Phase::Driver] {
        write_all(&mut driver, phase);
        read_all(&mut driver);
    }
    driver.negotiate(1 << 32);
    assert_eq!(driver.read(reg::STATUS), 3);
}

/// CVE-2026-5747's class: what a queue is must not change under a device that uses it.
#[test]
fn cve_2026_5747_a_running_queue_stays_where_it_is_whatever_is_written() {
    each(|name, subject| {
        for queue in 0..subject.driver().queues.len() as u32 + 2 {
            subject.driver().write(reg::QUEUE_SEL, queue);
            let size = subject.driver().read(reg::QUEUE_NUM_MAX);
            for register in (0x30..0x100).step_by(4).filter(|&at| at != reg::STATUS) {
                for value in [0, 1, 3, 0x10, 0xffff_fff0, u32::MAX] {
                    // A queue that is selected is attacked, not another one.
                    subject.driver().write(reg::QUEUE_SEL, queue);
                    subject.driver().write(register, value);
                }
            }
            subject.driver().write(reg::QUEUE_SEL, queue);
            assert_eq!(subject.driver().read(reg::QUEUE_NUM_MAX), size, "{name}");
        }
        assert!(!subject.driver().needs_reset(), "{name}");
        // On the rings of before.
        subject.assert_works();
    });
}
