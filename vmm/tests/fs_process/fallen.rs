//! A VMM that has fallen to its guest: what it says and gives keeps neither the process nor the
//! shim waiting.

use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::Result;

use super::*;
use vmm_sys_util::eventfd::EventFd;

/// Any descriptor where the protocol has an eventfd.
fn as_event(fd: impl Into<OwnedFd>) -> EventFd {
    // SAFETY: the descriptor is nobody else's.
    unsafe { EventFd::from_raw_fd(fd.into().into_raw_fd()) }
}

fn full(flags: i32) -> EventFd {
    let event = EventFd::new(flags).unwrap();
    event.write(u64::MAX - 1).unwrap();
    event
}

/// Stops the queue, has `change` made, and starts it again.
fn again(driver: &mut Driver, change: impl FnOnce(&mut Driver)) {
    driver.frontend.get_vring_base(1).unwrap();
    change(driver);
    driver.start();
}

/// Gives a descriptor that is refused; the shim is answered, and the log says why.
fn refused(says: &str, give: impl FnOnce(&mut Driver) -> Result<()>) {
    let share = Share::new();
    let (mut process, mut driver) = started(&share);
    driver.frontend.get_vring_base(1).unwrap();
    give(&mut driver).expect_err(says);
    assert!(matches!(
        process.ask(&FsRequest::Stats),
        FsEvent::Stats { .. }
    ));
    let mut log = Vec::new();
    while !String::from_utf8_lossy(&log).contains(says) {
        comes(says, process.log.as_fd());
        let mut line = [0; 4096];
        let count = process.log.read(&mut line).unwrap();
        assert_ne!(count, 0, "{}", String::from_utf8_lossy(&log));
        log.extend(&line[..count]);
    }
    assert_eq!(process.end(), 0);
}

#[test]
fn a_kick_that_cannot_be_watched_is_refused_and_told() {
    refused(
        "queue 1: the kick cannot be watched: Operation not permitted",
        |driver| {
            driver.kick = as_event(memfd_create(c"kick", MFdFlags::empty()).unwrap());
            driver.try_start()
        },
    );
}

#[test]
fn an_interrupt_whose_writes_wait_is_refused_and_told() {
    refused("queue 1: writes to the interrupt would wait", |driver| {
        driver.call = full(0);
        driver.try_start()
    });
}

#[test]
fn a_full_interrupt_does_not_hold_up_the_queue() {
    let share = Share::new();
    fs::write(share.at("f"), "x").unwrap();
    let (mut process, mut driver) = started(&share);
    again(&mut driver, |driver| driver.call = full(libc::EFD_NONBLOCK));
    for _ in 0..3 {
        driver.request_unheard(Opcode::Lookup, ROOT_ID, &[b"f\0"]);
    }
    again(&mut driver, |driver| {
        driver.call = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    });
    assert_eq!(driver.lookup(ROOT_ID, "f").unwrap().attr.size, 1);
    assert_eq!(process.end(), 0);
}

/// An interrupt that ends in a pipe without a reader is no signal that kills.
#[test]
fn an_interrupt_that_nobody_can_hear_is_lost() {
    let share = Share::new();
    fs::write(share.at("f"), "x").unwrap();
    let (mut process, mut driver) = started(&share);
    again(&mut driver, |driver| {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
        drop(reader);
        driver.call = as_event(writer);
    });
    driver.request_unheard(Opcode::Lookup, ROOT_ID, &[b"f\0"]);
    driver.frontend.get_vring_base(1).unwrap();
    assert_eq!(process.end(), 0);
}

/// A queue is stopped whatever its kick is: full, so that writes to it wait, or nothing that a
/// write would wake.
#[test]
fn a_queue_stops_whatever_its_kick_is() {
    let (done, waited) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        stop_queues_of_every_kick();
        done.send(()).unwrap();
    });
    let stopped = waited.recv_timeout(PATIENCE);
    stopped.expect("the process waits for ever, or the thread has failed");
}

fn stop_queues_of_every_kick() {
    let share = Share::new();
    fs::write(share.at("f"), "x").unwrap();
    let (mut process, mut driver) = started(&share);
    again(&mut driver, |driver| driver.kick = full(0));
    let (reader, _writer) = nix::unistd::pipe().unwrap();
    again(&mut driver, |driver| driver.kick = as_event(reader));
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.shutdown(std::net::Shutdown::Both).unwrap();
    again(&mut driver, |driver| driver.kick = as_event(theirs));
    again(&mut driver, |driver| {
        driver.kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    });
    assert_eq!(driver.lookup(ROOT_ID, "f").unwrap().attr.size, 1);
    assert_eq!(process.end(), 0);
}
