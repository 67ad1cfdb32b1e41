//! A hostile driver against every device. What one device alone can be told wrong is in its own
//! tests.

use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::test_driver::{Driver, HIGH_RAM, Loop, RAM_SIZE, reg};
use super::{balloon, fs, mem, net, rng, vsock};

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

const DEVICES: [(&str, New); 6] = [
    ("balloon", balloon::tests::subject),
    ("mem", mem::tests::subject),
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
    let mut bytes = Vec::new();
    for region in memory.iter() {
        let first = bytes.len();
        bytes.resize(first + region.len() as usize, 0);
        let start = region.start_addr();
        memory.read_slice(&mut bytes[first..], start).unwrap();
    }
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
