//! A hostile driver against every device. What one device alone can be told wrong is in its own
//! tests.

use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::test_driver::{Driver, HIGH_RAM, Loop, RAM_SIZE, reg};
use super::{balloon, fs, net, rng, vsock};

mod moments;
mod queues;
mod race;
mod registers;

/// A device with its driver, and the world at its other end.
pub(super) trait Subject: Send {
    fn driver(&mut self) -> &mut Driver;
    fn events(&mut self) -> &mut Loop;
    /// Queues that this process serves, each with what the device does to their buffers.
    fn queues(&self) -> &'static [Direction];
    /// The handshake of a good driver.
    fn start(&mut self) {
        self.driver().start();
    }
    /// Does what a good driver does, on the rings as they are, and finds it done.
    fn assert_works(&mut self);
    /// The other end sends something.
    fn disturb(&mut self) {}
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Reads,
    Writes,
    /// A request and room for its answer.
    Both,
}

type New = fn() -> Box<dyn Subject>;

const DEVICES: [(&str, New); 5] = [
    ("balloon", balloon::tests::subject),
    ("rng", rng::tests::subject),
    ("vsock", vsock::tests::subject),
    ("net", net::tests::subject),
    ("fs", fs::tests::subject),
];

/// Each device, started.
fn each(attack: impl Fn(&str, &mut dyn Subject)) {
    for (name, new) in DEVICES {
        let mut subject = new();
        subject.start();
        attack(name, &mut *subject);
    }
}

/// The device is what it was before anybody attacked it.
fn revived(subject: &mut dyn Subject) {
    subject.driver().start();
    subject.assert_works();
    assert!(!subject.driver().needs_reset());
    assert!(subject.events().is_quiet());
}

/// All of guest memory.
fn contents(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut bytes = vec![0; 2 * RAM_SIZE as usize];
    let (low, high) = bytes.split_at_mut(RAM_SIZE as usize);
    memory.read_slice(low, GuestAddress(0)).unwrap();
    memory.read_slice(high, GuestAddress(HIGH_RAM)).unwrap();
    assert_eq!(memory.num_regions(), 2);
    bytes
}

/// Runs an attack, and fails if it hangs.
fn in_time(attack: impl FnOnce() + Send + 'static) {
    const LIMIT: Duration = Duration::from_secs(120);
    let (done, waited) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        attack();
        done.send(()).unwrap();
    });
    let ended = waited.recv_timeout(LIMIT);
    ended.expect("a device hangs, or the attack has failed");
}
