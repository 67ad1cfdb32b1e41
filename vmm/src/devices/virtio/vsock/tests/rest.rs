//! A guest whose device is taken away and replaced by another one, as a template's is.

use super::super::{ConnectionState, ResumeError};
use super::*;

/// A guest with the rings and connections of another one, and what was offered to it.
fn go_on(guest: Guest, ports: &[u32]) -> (Guest, Vec<UnixStream>) {
    let connections = guest.ports.at_rest().expect("it is at rest");
    let mut events = Loop::new();
    let vsock = Vsock::new(events.poller());
    let offers = vsock.ports();
    events.attach(vsock.handler());
    let driver = guest.driver.go_on(vsock).unwrap();
    let mut moved = Guest {
        driver,
        events,
        ports: offers,
        ..guest
    };
    let hosts = ports.iter().map(|&port| moved.offer(port)).collect();
    moved.ports.resume(&connections).unwrap();
    moved.events.settle();
    (moved, hosts)
}

#[test]
fn a_connection_goes_on_with_another_host() {
    let mut guest = Guest::new();
    let mut first = guest.connect();
    guest.send_bytes(b"before");
    assert_eq!(host_input(&mut first), (b"before".to_vec(), false));
    first.write_all(b"answer").unwrap();
    guest.events.settle();
    assert_eq!(guest.bytes(), b"answer");
    guest.send(op::CREDIT_UPDATE, 0);

    let (mut guest, mut hosts) = go_on(guest, &[PORT]);
    let mut second = hosts.remove(0);
    assert_eq!(*guest.driver.notices.connected.lock().unwrap(), [PORT]);
    guest.send_bytes(b"after");
    assert_eq!(host_input(&mut second), (b"after".to_vec(), false));
    second.write_all(b"also").unwrap();
    guest.events.settle();
    let (header, payload) = guest.receive().unwrap();
    assert_eq!((header.op, &payload[..]), (op::RW, &b"also"[..]));
    assert_eq!(header.fwd_cnt, 11, "it counts what the first has taken");
    assert_eq!(host_input(&mut first).0, b"", "not its host");
    assert_eq!(guest.faults("packet"), 0);
    // Ends go their way, and the port can be offered again.
    drop(second);
    guest.events.settle();
    assert_eq!(guest.ops(), [op::SHUTDOWN]);
    guest.send(op::SHUTDOWN, NO_RECEIVE | NO_SEND);
    assert_eq!(guest.ops(), [op::RST]);
    guest.offer(PORT);
}

#[test]
fn what_waits_for_the_guest_is_there_when_it_goes_on() {
    let mut guest = Guest::new();
    let _first = guest.connect();
    let connections = guest.ports.at_rest().unwrap();
    let mut events = Loop::new();
    let vsock = Vsock::new(events.poller());
    let ports = vsock.ports();
    events.attach(vsock.handler());
    let (mut host, theirs) = UnixStream::pair().unwrap();
    host.write_all(b"the first order").unwrap();
    ports.offer(PORT, theirs.into()).unwrap();
    let driver = guest.driver.go_on(vsock).unwrap();
    ports.resume(&connections).unwrap();
    guest = Guest {
        driver,
        events,
        ports,
        ..guest
    };
    guest.events.settle();
    assert_eq!(guest.bytes(), b"the first order");
}

/// Over many rounds, each with its own device: positions wrap.
#[test]
fn a_guest_goes_on_again_and_again() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    for round in 0..40_u8 {
        for nth in 0..13 {
            guest.send_bytes(&[round, nth]);
            assert_eq!(host_input(&mut host), (vec![round, nth], false));
            host.write_all(&[nth, round]).unwrap();
            guest.events.settle();
            assert_eq!(guest.bytes(), [nth, round]);
        }
        let (moved, mut hosts) = go_on(guest, &[PORT]);
        (guest, host) = (moved, hosts.remove(0));
    }
    assert_eq!(guest.driver.notices.faults.snapshot().len(), 0);
}

#[test]
fn a_device_that_has_something_to_do_is_not_at_rest() {
    // An answer for which there is no buffer.
    let mut guest = Guest::without_buffers();
    let _host = guest.offer(PORT);
    guest.send(op::REQUEST, 0);
    assert_eq!(guest.ports.at_rest(), None);
    // Bytes that the host does not take.
    let mut guest = Guest::new();
    let mut host = guest.connect();
    assert!(guest.ports.at_rest().is_some());
    while guest.ports.at_rest().is_some() {
        guest.send_bytes(&[7; 4096]);
    }
    host_input(&mut host);
    guest.events.settle();
    host_input(&mut host);
    guest.events.settle();
    guest.ops();
    assert!(guest.ports.at_rest().is_some(), "it has taken all");
    // One direction that has ended.
    guest.send(op::SHUTDOWN, NO_SEND);
    assert_eq!(guest.ports.at_rest(), None);
}

#[test]
fn a_connection_without_a_host_is_refused() {
    let mut guest = Guest::new();
    let _host = guest.connect();
    let connections: Vec<ConnectionState> = guest.ports.at_rest().unwrap();
    let other = Guest::new();
    let error = other.ports.resume(&connections).unwrap_err();
    assert!(matches!(error, ResumeError::NotOffered(PORT)), "{error}");
    // Nor can it go on where no driver runs.
    let idle = Vsock::new(Loop::new().poller());
    let (_ours, theirs) = UnixStream::pair().unwrap();
    idle.ports().offer(PORT, theirs.into()).unwrap();
    let error = idle.ports().resume(&connections).unwrap_err();
    assert!(matches!(error, ResumeError::Stopped), "{error}");
}
