//! Ends: each direction for itself, no byte lost, no wait for ever.

use std::net::Shutdown;

use super::*;

#[test]
fn the_host_ends_first_and_still_receives() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    host.write_all(b"last").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    guest.events.settle();
    let (header, payload) = guest.receive().unwrap();
    assert_eq!((header.op, &payload[..]), (op::RW, &b"last"[..]));
    let (header, _) = guest.receive().unwrap();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, NO_SEND));
    assert!(guest.events.is_quiet());
    guest.send_bytes(b"reply");
    assert_eq!(host_input(&mut host), (b"reply".to_vec(), false));
    guest.send(op::SHUTDOWN, NO_SEND);
    assert_eq!(guest.ops(), [op::RST]);
    assert_eq!(host_input(&mut host), (Vec::new(), true));
    assert!(guest.events.is_quiet());
}

#[test]
fn the_guest_ends_first_and_still_receives() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    guest.send_bytes(b"last");
    guest.send(op::SHUTDOWN, NO_SEND);
    assert!(guest.ops().is_empty());
    assert_eq!(host_input(&mut host), (b"last".to_vec(), true));
    host.write_all(b"reply").unwrap();
    guest.events.settle();
    assert_eq!(guest.bytes(), b"reply");
    drop(host);
    guest.events.settle();
    assert_eq!(guest.ops(), [op::RST]);
    assert!(guest.events.is_quiet());
}

#[test]
fn a_guest_that_sends_after_its_end_is_reset() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    guest.send(op::SHUTDOWN, NO_SEND);
    guest.send_bytes(b"more");
    assert_eq!(guest.ops(), [op::RST]);
    assert_eq!(host_input(&mut host), (Vec::new(), true));
}

#[test]
fn a_guest_that_receives_no_more_breaks_the_host_s_pipe() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    guest.send(op::SHUTDOWN, NO_RECEIVE);
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send_bytes(b"still");
    assert_eq!(host_input(&mut host), (b"still".to_vec(), false));
    guest.send(op::SHUTDOWN, NO_SEND);
    assert_eq!(guest.ops(), [op::RST]);
    assert_eq!(host_input(&mut host), (Vec::new(), true));
}

#[test]
fn a_host_that_writes_and_closes_loses_no_byte() {
    let mut guest = Guest::without_buffers();
    guest.offer_buffers(3);
    let mut host = guest.connect();
    let data = pattern(120_000);
    host.write_all(&data).unwrap();
    drop(host);
    guest.events.settle();
    assert!(guest.events.is_quiet(), "a hang-up is level-triggered");
    let mut received = Vec::new();
    loop {
        let (header, payload) = guest.receive().unwrap();
        if header.op == op::SHUTDOWN {
            assert_eq!(header.flags, NO_SEND);
            break;
        }
        received.extend(payload);
    }
    assert_eq!(received, data);
    // Only bytes that nobody takes end it for good.
    assert!(guest.ops().is_empty());
    guest.send_bytes(b"x");
    assert_eq!(guest.ops(), [op::RST]);
    assert!(guest.events.is_quiet());
}

#[test]
fn a_host_end_that_is_closed_before_the_dial_still_connects() {
    let mut guest = Guest::new();
    let mut host = guest.offer(PORT);
    host.write_all(b"all there is").unwrap();
    drop(host);
    guest.send(op::REQUEST, 0);
    assert_eq!(guest.ops(), [op::RESPONSE, op::RW, op::SHUTDOWN]);
    guest.send(op::SHUTDOWN, NO_RECEIVE | NO_SEND);
    assert_eq!(guest.ops(), [op::RST]);
}

#[test]
fn a_host_that_closes_with_bytes_unread_still_delivers_its_own() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    guest.send_bytes(b"never read");
    host.write_all(b"goodbye").unwrap();
    drop(host);
    guest.events.settle();
    let (_, payload) = guest.receive().unwrap();
    assert_eq!(payload, b"goodbye");
    let (header, _) = guest.receive().unwrap();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, NO_SEND));
}

#[test]
fn a_guest_that_closes_gets_its_reset_while_the_host_still_reads() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    let data = pattern(380_000);
    for block in data.chunks(20_000) {
        guest.send_bytes(block);
    }
    while guest.receive().is_some() {}
    guest.send(op::SHUTDOWN, NO_RECEIVE | NO_SEND);
    assert_eq!(
        guest.ops(),
        [op::RST],
        "the guest does not wait for the host"
    );
    assert!(guest.events.is_quiet());
    // The same ports may be used again at once, while the old bytes drain.
    let mut second = guest.connect();
    guest.send_bytes(b"second");
    let mut received = Vec::new();
    loop {
        let (bytes, ended) = host_input(&mut host);
        received.extend(bytes);
        guest.events.settle();
        if ended {
            break;
        }
    }
    assert_eq!(received, data);
    assert_eq!(host_input(&mut second), (b"second".to_vec(), false));
    assert!(guest.events.is_quiet());
}

#[test]
fn a_guest_s_reset_delivers_what_came_before_it() {
    let mut guest = Guest::without_buffers();
    guest.offer_buffers(1);
    let mut host = guest.offer(PORT);
    guest.send(op::REQUEST, 0);
    // The one buffer holds the RESPONSE, so that this stays in the socket.
    host.write_all(b"unread input").unwrap();
    guest.send_bytes(b"before");
    guest.send(op::RST, 0);
    assert_eq!(
        host_input(&mut host),
        (b"before".to_vec(), true),
        "an end, not ECONNRESET"
    );
}

#[test]
fn a_host_that_only_stops_reading_is_reported_when_it_matters() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    host.shutdown(Shutdown::Read).unwrap();
    guest.events.settle();
    assert!(guest.ops().is_empty());
    guest.send_bytes(b"x");
    let (header, _) = guest.receive().unwrap();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, NO_RECEIVE));
    host.write_all(b"more").unwrap();
    guest.events.settle();
    assert_eq!(guest.bytes(), b"more");
    drop(host);
    guest.events.settle();
    assert_eq!(guest.ops(), [op::RST]);
}
