//! The device against a driver without KVM and real socketpairs.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use vm_memory::{Bytes, GuestAddress};

use super::super::test_driver::{BUFFERS, Driver, HIGH_RAM, Loop, WRITE, memory};
use super::super::tests::{Direction, Subject};
use super::packet::{
    GUEST_CID, HEADER_LEN, HOST_CID, Header, NO_RECEIVE, NO_SEND, TYPE_STREAM, op,
};
use super::{BUF_ALLOC, OfferError, Ports, RX, TX, Vsock, Withdrawn};

mod attacks;
mod credit;
mod ends;
mod fuzz;
mod rest;
mod stream;

const RX_BUFFER: u64 = 4096;
const GUEST_PORT: u32 = 5000;
const PORT: u32 = 1024;

/// A guest: a driver that keeps the rx ring filled and speaks the packet protocol.
struct Guest {
    driver: Driver,
    events: Loop,
    ports: Ports,
    /// The host's end of the connection of a [`Subject`].
    host: Option<UnixStream>,
    /// Room for data that REQUEST and the later packets announce, and what was taken out of it.
    buf_alloc: u32,
    taken: u32,
}

impl Guest {
    fn new() -> Guest {
        let mut guest = Guest::without_buffers();
        guest.offer_buffers(128);
        guest
    }

    fn without_buffers() -> Guest {
        let mut events = Loop::new();
        let vsock = Vsock::new(events.poller());
        let ports = vsock.ports();
        events.attach(vsock.handler());
        let mut driver = Driver::new(vsock, memory());
        driver.start();
        Guest {
            driver,
            events,
            ports,
            host: None,
            buf_alloc: 256 * 1024,
            taken: 0,
        }
    }

    fn offer_buffers(&mut self, count: u64) {
        for nth in 0..count {
            self.driver.queues[0].add(&[(HIGH_RAM + nth * RX_BUFFER, RX_BUFFER as u32, WRITE)]);
        }
        self.driver.notify(RX.into());
        self.events.settle();
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: GUEST_PORT,
            dst_port: PORT,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.taken,
        }
    }

    /// Sends a packet whose header says what it says, with `payload` behind it.
    fn send_raw(&mut self, header: &Header, payload: &[u8]) {
        self.put(header, payload);
        let length = (HEADER_LEN + payload.len()) as u32;
        self.driver.queues[1].add(&[(BUFFERS, length, 0)]);
        self.kick_tx();
    }

    fn put(&mut self, header: &Header, payload: &[u8]) {
        let mut packet = header.bytes().to_vec();
        packet.extend_from_slice(payload);
        self.driver
            .memory
            .write_slice(&packet, GuestAddress(BUFFERS))
            .unwrap();
    }

    fn kick_tx(&mut self) {
        self.driver.notify(TX.into());
        self.events.settle();
        while self.driver.queues[1].take_used().is_some() {}
    }

    fn send(&mut self, op: u16, flags: u32) {
        let header = Header {
            flags,
            ..self.header(op)
        };
        self.send_raw(&header, &[]);
    }

    fn send_bytes(&mut self, bytes: &[u8]) {
        let header = Header {
            len: bytes.len() as u32,
            ..self.header(op::RW)
        };
        self.send_raw(&header, bytes);
    }

    /// Takes the next packet out of the rx ring and keeps its buffer.
    fn take(&mut self) -> Option<(u16, Header, Vec<u8>)> {
        let (head, length) = self.driver.queues[0].take_used()?;
        let at = HIGH_RAM + u64::from(head) * RX_BUFFER;
        let mut packet = vec![0; length as usize];
        self.driver
            .memory
            .read_slice(&mut packet, GuestAddress(at))
            .unwrap();
        let header = Header::parse(packet[..HEADER_LEN].try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
        assert_eq!(header.len as usize, packet.len() - HEADER_LEN);
        Some((head as u16, header, packet.split_off(HEADER_LEN)))
    }

    fn give_back(&mut self, head: u16) {
        self.driver.queues[0].publish(head);
    }

    /// The next packet; its buffer goes back to the ring.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, header, payload) = self.take()?;
        self.taken = self.taken.wrapping_add(header.len);
        self.give_back(head);
        self.driver.notify(RX.into());
        self.events.settle();
        Some((header, payload))
    }

    /// The operations of all packets that wait.
    fn ops(&mut self) -> Vec<u16> {
        std::iter::from_fn(|| self.receive())
            .map(|(header, _)| header.op)
            .collect()
    }

    /// All bytes that wait.
    fn bytes(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while let Some((header, payload)) = self.receive() {
            assert_eq!(header.op, op::RW);
            bytes.extend(payload);
        }
        bytes
    }

    fn offer(&self, port: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        self.ports.offer(port, theirs.into()).unwrap();
        ours
    }

    /// An established connection to [`PORT`].
    fn connect(&mut self) -> UnixStream {
        let host = self.offer(PORT);
        self.send(op::REQUEST, 0);
        assert_eq!(self.ops(), [op::RESPONSE]);
        host
    }

    fn faults(&self, name: &str) -> u64 {
        self.driver.notices.count(&format!("vsock.{name}"))
    }
}

impl Subject for Guest {
    fn driver(&mut self) -> &mut Driver {
        &mut self.driver
    }

    fn events(&mut self) -> &mut Loop {
        &mut self.events
    }

    /// The events' queue is never looked at.
    fn queues(&self) -> &'static [Direction] {
        &[Direction::Writes, Direction::Reads]
    }

    /// With a dial, so that there is something to put into the guest's buffers.
    fn start(&mut self) {
        self.ports.withdraw(PORT);
        self.driver.start();
        self.host = Some(self.offer(PORT));
        self.send(op::REQUEST, 0);
    }

    /// A dial of a port that nobody offers is reset.
    fn assert_works(&mut self) {
        const NOWHERE: u32 = 77;
        while self.driver.queues[0].take_used().is_some() {}
        let at = |nth: u64| BUFFERS + 0x4000 + nth * RX_BUFFER;
        // What waits for a buffer comes before it.
        let heads: Vec<u16> = (0..8)
            .map(|nth| self.driver.queues[0].add(&[(at(nth), RX_BUFFER as u32, WRITE)]))
            .collect();
        self.driver.notify(RX.into());
        let dial = Header {
            dst_port: NOWHERE,
            ..self.header(op::REQUEST)
        };
        self.send_raw(&dial, &[]);
        let mut answered = false;
        while let Some((head, _)) = self.driver.queues[0].take_used() {
            let nth = heads.iter().position(|&known| u32::from(known) == head);
            let Some(nth) = nth else { continue };
            let mut bytes = [0; HEADER_LEN];
            let at = GuestAddress(at(nth as u64));
            self.driver.memory.read_slice(&mut bytes, at).unwrap();
            let header = Header::parse(&bytes);
            answered |= (header.op, header.src_port) == (op::RST, NOWHERE);
        }
        assert!(answered);
    }

    fn disturb(&mut self) {
        if let Some(host) = &mut self.host {
            let _ = host.write(b"something");
        }
    }
}

pub(in super::super) fn subject() -> Box<dyn Subject> {
    Box::new(Guest::without_buffers())
}

fn pattern(count: usize) -> Vec<u8> {
    (0..count as u32)
        .map(|nth| (nth.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

/// What the host can read now, and whether the end follows.
fn host_input(host: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let mut block = [0; 65536];
    loop {
        match host.read(&mut block) {
            Ok(0) => return (bytes, true),
            Ok(count) => bytes.extend_from_slice(&block[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return (bytes, false),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_dial_of_an_offered_port_connects_once() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    assert_eq!(*guest.driver.notices.connected.lock().unwrap(), [PORT]);
    guest.send_bytes(b"hello");
    assert_eq!(host_input(&mut host), (b"hello".to_vec(), false));
    host.write_all(b"world").unwrap();
    guest.events.settle();
    let (header, payload) = guest.receive().unwrap();
    assert_eq!((header.op, &payload[..]), (op::RW, &b"world"[..]));
    assert_eq!((header.fwd_cnt, header.buf_alloc), (5, BUF_ALLOC));
    // The second dial, from another port, finds no offer.
    let again = Header {
        src_port: GUEST_PORT + 1,
        ..guest.header(op::REQUEST)
    };
    guest.send_raw(&again, &[]);
    let (header, _) = guest.receive().unwrap();
    assert_eq!((header.op, header.dst_port), (op::RST, GUEST_PORT + 1));
    guest.send_bytes(b"!");
    assert_eq!(host_input(&mut host), (b"!".to_vec(), false));
}

#[test]
fn a_dial_of_a_port_that_is_not_offered_is_reset_at_once() {
    let mut guest = Guest::new();
    guest.send(op::REQUEST, 0);
    let (header, _) = guest.receive().unwrap();
    assert_eq!(
        (header.op, header.src_port, header.dst_port),
        (op::RST, PORT, GUEST_PORT)
    );
    assert!(guest.driver.notices.connected.lock().unwrap().is_empty());
}

#[test]
fn offers_made_before_the_driver_starts_are_kept_and_outlive_a_reset() {
    let mut events = Loop::new();
    let vsock = Vsock::new(events.poller());
    let ports = vsock.ports();
    let (_host, theirs) = UnixStream::pair().unwrap();
    ports.offer(PORT, theirs.into()).unwrap();
    events.attach(vsock.handler());
    let mut driver = Driver::new(vsock, memory());
    driver.start();
    driver.write(0x70, 0);
    driver.start();
    let mut guest = Guest {
        driver,
        events,
        ports,
        host: None,
        buf_alloc: 4096,
        taken: 0,
    };
    guest.offer_buffers(8);
    guest.send(op::REQUEST, 0);
    assert_eq!(guest.ops(), [op::RESPONSE]);
}

#[test]
fn a_reset_of_the_device_ends_its_connections() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    guest.driver.start();
    assert_eq!(host_input(&mut host), (Vec::new(), true));
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.offer_buffers(128);
    let mut host = guest.connect();
    guest.send_bytes(b"again");
    assert_eq!(host_input(&mut host), (b"again".to_vec(), false));
}

#[test]
fn a_withdrawn_port_is_no_longer_offered_or_connected() {
    let mut guest = Guest::new();
    let mut host = guest.offer(PORT);
    assert_eq!(
        guest.ports.offer(PORT, host.try_clone().unwrap().into()),
        Err(OfferError::Offered(PORT))
    );
    assert_eq!(guest.ports.withdraw(PORT), Withdrawn::Offer);
    assert_eq!(guest.ports.withdraw(PORT), Withdrawn::Nothing);
    assert_eq!(host_input(&mut host), (Vec::new(), true));
    guest.send(op::REQUEST, 0);
    assert_eq!(guest.ops(), [op::RST]);

    let mut host = guest.connect();
    assert_eq!(guest.ports.withdraw(PORT), Withdrawn::Connection);
    assert_eq!(guest.ops(), [op::RST]);
    assert_eq!(host_input(&mut host), (Vec::new(), true));
    guest.send_bytes(b"x");
    assert_eq!(guest.ops(), [op::RST], "the connection is unknown now");
}

#[test]
fn the_1025th_socket_is_refused() {
    let guest = Guest::new();
    let mut held = Vec::new();
    for port in 0..1024 {
        held.push(guest.offer(port));
    }
    let (_ours, theirs) = UnixStream::pair().unwrap();
    assert_eq!(
        guest.ports.offer(5000, theirs.into()),
        Err(OfferError::Full)
    );
}

/// CVE-2026-46214's class: connections that nobody has any more and that count all the same.
#[test]
fn a_thousand_connections_come_and_go_and_leave_nothing() {
    let mut guest = Guest::new();
    for nth in 0..1000 {
        let mut host = guest.offer(PORT);
        let mut header = Header {
            src_port: nth,
            ..guest.header(op::REQUEST)
        };
        guest.send_raw(&header, &[]);
        assert_eq!(guest.ops(), [op::RESPONSE]);
        header.op = op::SHUTDOWN;
        header.flags = NO_RECEIVE | NO_SEND;
        guest.send_raw(&header, &[]);
        assert_eq!(guest.ops(), [op::RST]);
        assert_eq!(host_input(&mut host), (Vec::new(), true));
    }
    assert!(guest.events.is_quiet());
    let held: Vec<_> = (0..1024).map(|port| guest.offer(port)).collect();
    assert_eq!(held.len(), 1024, "no socket is left behind");
}
