//! Resets at every moment.

use super::super::test_driver::{BUFFERS, WRITE};
use super::*;

/// The nth thing that a busy driver does, good or bad.
fn act(subject: &mut dyn Subject, nth: usize) {
    let queues = subject.queues();
    if !queues.is_empty() {
        let index = nth % queues.len();
        let flags = match queues[index] {
            Direction::Writes => WRITE,
            _ => 0,
        };
        let at = BUFFERS + 0x1000 * (nth as u64 % 64);
        subject.driver().queues[index].add(&[(at, 0x1000, flags)]);
    }
    subject.driver().notify((nth % 3) as u32);
    subject.disturb();
}

/// After a reset a device touches neither memory nor the interrupt.
fn silent(subject: &mut dyn Subject, what: &str) {
    let memory = subject.driver().memory.clone();
    subject.driver().interrupts();
    let before = contents(&memory);
    subject.disturb();
    for queue in 0..4 {
        subject.driver().notify(queue);
    }
    assert!(subject.events().is_quiet(), "{what}");
    assert_eq!(subject.driver().interrupts(), 0, "{what}");
    assert!(contents(&memory) == before, "{what}: it wrote to memory");
}

#[test]
fn a_reset_after_any_number_of_steps_ends_all_that_was_going_on() {
    each(|name, subject| {
        for steps in 0..24 {
            for settled in [false, true] {
                subject.driver().start();
                for nth in 0..steps {
                    act(subject, nth);
                    if settled {
                        subject.events().settle();
                    }
                }
                subject.driver().write(reg::STATUS, 0);
                let what = format!("{name}: {steps} steps, settled {settled}");
                assert_eq!(subject.driver().read(reg::STATUS), 0, "{what}");
                assert_eq!(subject.driver().read(reg::INTERRUPT_STATUS), 0, "{what}");
                silent(subject, &what);
                revived(subject);
            }
        }
    });
}

#[test]
fn a_reset_in_the_middle_of_a_handshake_leaves_nothing_of_it() {
    each(|name, subject| {
        let steps: [&dyn Fn(&mut Driver); 6] = [
            &|driver| driver.write(reg::STATUS, 1),
            &|driver| driver.write(reg::STATUS, 3),
            &|driver| {
                let features = driver.offered();
                driver.negotiate(features);
            },
            &|driver| {
                driver.place(0);
            },
            // Without most of its queues.
            &|driver| driver.write(reg::STATUS, 0xf),
            &|driver| driver.write(reg::STATUS, 0x8f),
        ];
        for count in 0..=steps.len() {
            subject.driver().write(reg::STATUS, 0);
            for step in &steps[..count] {
                step(subject.driver());
            }
            subject.driver().write(reg::STATUS, 0);
            silent(subject, &format!("{name}: after {count} steps"));
            subject.driver().write(reg::QUEUE_SEL, 0);
            assert_eq!(subject.driver().read(reg::QUEUE_READY), 0, "{name}");
            revived(subject);
        }
    });
}
