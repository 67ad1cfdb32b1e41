//! Violations by the guest, each by its name.

use super::*;

#[test]
fn packets_of_another_type_or_to_another_address_are_reset() {
    let mut guest = Guest::new();
    let _host = guest.offer(PORT);
    for (dst_cid, kind) in [
        (2, 2),
        (2, 0),
        (2, 0xffff),
        (1, 1),
        (0, 1),
        (3, 1),
        (u64::MAX, 1),
    ] {
        let header = Header {
            dst_cid,
            kind,
            ..guest.header(op::REQUEST)
        };
        guest.send_raw(&header, &[]);
        let (head, length) = guest.driver.queues[0].take_used().unwrap();
        let at = GuestAddress(HIGH_RAM + u64::from(head) * RX_BUFFER);
        let mut reply = [0; HEADER_LEN];
        guest.driver.memory.read_slice(&mut reply, at).unwrap();
        let reply = Header::parse(&reply);
        assert_eq!((length as usize, reply.op), (HEADER_LEN, op::RST));
        // Linux looks for the type it asked with.
        assert_eq!((reply.src_cid, reply.kind), (dst_cid, kind));
    }
    assert_eq!(guest.ports.withdraw(PORT), Withdrawn::Offer);
}

#[test]
fn packets_from_another_address_are_dropped() {
    let mut guest = Guest::new();
    let _host = guest.offer(PORT);
    for src_cid in [0, 1, 2, 4, u64::from(u32::MAX) << 32 | 3] {
        let header = Header {
            src_cid,
            ..guest.header(op::REQUEST)
        };
        guest.send_raw(&header, &[]);
    }
    assert!(guest.ops().is_empty());
    assert_eq!(guest.faults("packet"), 5);
    assert_eq!(guest.ports.withdraw(PORT), Withdrawn::Offer);
}

#[test]
fn unknown_and_misplaced_operations_reset_the_connection() {
    for bad in [0, op::RESPONSE, op::REQUEST, 8, 0xffff] {
        let mut guest = Guest::new();
        let mut host = guest.connect();
        guest.send(bad, 0);
        assert_eq!(guest.ops(), [op::RST], "op {bad}");
        assert_eq!(host_input(&mut host), (Vec::new(), true));
        assert_eq!(guest.faults("packet"), 1);
    }
}

#[test]
fn packets_without_a_connection_are_reset_but_resets_are_not() {
    let mut guest = Guest::new();
    for unknown in [
        0,
        op::RESPONSE,
        op::SHUTDOWN,
        op::CREDIT_UPDATE,
        op::CREDIT_REQUEST,
        9,
    ] {
        guest.send(unknown, 0);
        assert_eq!(guest.ops(), [op::RST], "op {unknown}");
    }
    guest.send_bytes(b"x");
    assert_eq!(guest.ops(), [op::RST]);
    guest.send(op::RST, 0);
    assert!(guest.ops().is_empty());
}

#[test]
fn a_control_packet_with_a_payload_resets_the_connection() {
    for bad in [op::SHUTDOWN, op::CREDIT_UPDATE, op::CREDIT_REQUEST] {
        let mut guest = Guest::new();
        let _host = guest.connect();
        let header = Header {
            len: 4,
            ..guest.header(bad)
        };
        guest.send_raw(&header, b"junk");
        assert_eq!(guest.ops(), [op::RST]);
    }
    let mut guest = Guest::new();
    let _host = guest.offer(PORT);
    let header = Header {
        len: 4,
        ..guest.header(op::REQUEST)
    };
    guest.send_raw(&header, b"junk");
    assert_eq!(guest.ops(), [op::RST]);
}

/// CVE-2019-18960's class: a length that is checked against something other than the buffer.
#[test]
fn a_packet_longer_than_its_chain_stops_the_device() {
    for len in [6, 4096, BUF_ALLOC, u32::MAX, u32::MAX - 43] {
        let mut guest = Guest::new();
        let mut host = guest.connect();
        let header = Header {
            len,
            ..guest.header(op::RW)
        };
        guest.send_raw(&header, b"short");
        assert!(guest.driver.needs_reset());
        assert_eq!(guest.faults("packet_past_chain"), 1);
        assert_eq!(host_input(&mut host), (Vec::new(), true), "nothing leaks");
    }
}

#[test]
fn a_chain_shorter_than_a_header_stops_the_device() {
    let mut guest = Guest::new();
    guest.driver.queues[1].add(&[(BUFFERS, 43, 0)]);
    guest.kick_tx();
    assert!(guest.driver.needs_reset());
    let mut guest = Guest::without_buffers();
    guest.driver.queues[0].add(&[(BUFFERS, 44, WRITE)]);
    guest.send(op::REQUEST, 0);
    assert!(guest.driver.needs_reset());
    assert_eq!(guest.faults("chain_too_short"), 1);
}

#[test]
fn buffers_of_the_wrong_direction_stop_the_device() {
    let mut guest = Guest::new();
    guest.driver.queues[1].add(&[(BUFFERS, 44, 0), (BUFFERS, 44, WRITE)]);
    guest.kick_tx();
    assert_eq!(guest.faults("unexpected_writable"), 1);
    let mut guest = Guest::without_buffers();
    guest.driver.queues[0].add(&[(BUFFERS, 64, 0), (BUFFERS, 4096, WRITE)]);
    guest.send(op::REQUEST, 0);
    assert_eq!(guest.faults("unexpected_readable"), 1);
    assert!(guest.driver.needs_reset());
}

/// CVE-2026-45782's class: one buffer in two reads at once.
#[test]
fn an_rx_buffer_offered_twice_stops_the_device() {
    let mut guest = Guest::without_buffers();
    guest.offer_buffers(2);
    let mut host = guest.connect();
    host.write_all(&pattern(3 * 4096)).unwrap();
    let (head, _, _) = loop {
        guest.events.settle();
        match guest.take() {
            Some(packet) => break packet,
            None => guest.offer_buffers(1),
        }
    };
    guest.give_back(head);
    guest.give_back(head);
    guest.driver.notify(RX.into());
    guest.events.settle();
    assert_eq!(guest.faults("head_in_flight"), 1);
    assert!(guest.driver.needs_reset());
}

#[test]
fn a_header_split_over_descriptors_is_read_and_written_whole() {
    let mut guest = Guest::without_buffers();
    let mut host = guest.offer(PORT);
    let request = guest.header(op::REQUEST);
    guest.put(&request, &[]);
    guest.driver.queues[1].add(&[
        (BUFFERS, 1, 0),
        (BUFFERS + 1, 0, 0),
        (BUFFERS + 1, 42, 0),
        (BUFFERS + 43, 1, 0),
    ]);
    guest.kick_tx();
    let send = Header {
        len: 5,
        ..guest.header(op::RW)
    };
    guest.put(&send, b"split");
    guest.driver.queues[1].add(&[(BUFFERS, 46, 0), (BUFFERS + 46, 3, 0)]);
    guest.kick_tx();
    assert_eq!(host_input(&mut host), (b"split".to_vec(), false));

    host.write_all(b"abcdef").unwrap();
    let rx = [
        (HIGH_RAM, 43, WRITE),
        (HIGH_RAM + 43, 3, WRITE),
        (HIGH_RAM + 46, 100, WRITE),
    ];
    for base in [0, 0x1000] {
        guest.driver.queues[0].add(&rx.map(|(at, len, flags)| (at + base, len, flags)));
    }
    guest.driver.notify(RX.into());
    guest.events.settle();
    assert_eq!(guest.driver.queues[0].take_used().unwrap().1, 44);
    assert_eq!(guest.driver.queues[0].take_used().unwrap().1, 50);
    let mut packet = [0; 50];
    let at = GuestAddress(HIGH_RAM + 0x1000);
    guest.driver.memory.read_slice(&mut packet, at).unwrap();
    assert_eq!(&packet[44..], b"abcdef");
}

#[test]
fn a_flood_of_dials_without_rx_buffers_is_bounded_and_then_answered() {
    let mut guest = Guest::without_buffers();
    let mut sent = 0;
    let dial = guest.header(op::REQUEST);
    guest.put(&dial, &[]);
    // As many as the device takes, a ring full at a time.
    for _ in 0..100 {
        for _ in 0..64 {
            guest.driver.queues[1].add(&[(BUFFERS, 44, 0)]);
        }
        guest.driver.notify(TX.into());
        guest.events.settle();
        let used = std::iter::from_fn(|| guest.driver.queues[1].take_used()).count();
        sent += used;
        if used < 64 {
            break;
        }
    }
    assert_eq!(sent, 256, "the replies that the device keeps");
    assert!(guest.events.is_quiet(), "no busy loop while it waits");
    guest.offer_buffers(64);
    let mut resets = 0;
    while let Some((header, _)) = guest.receive() {
        assert_eq!(header.op, op::RST);
        resets += 1;
    }
    let rest = std::iter::from_fn(|| guest.driver.queues[1].take_used()).count();
    assert_eq!(resets, sent + rest);
    assert_eq!(rest, 64, "the tx queue goes on");
}

/// What a connection is at when a packet comes that is none of it.
#[derive(Clone, Copy, Debug)]
enum Before {
    Nothing,
    Offer,
    Connection,
    GuestEnded,
    HostEnded,
}

/// Packets with every operation, type and address, right and wrong, in every state of a connection:
/// each is answered by one packet at most, and a connection beside it goes on.
#[test]
fn packets_of_every_wrong_kind() {
    const OTHER: u32 = 99;
    let mut guest = Guest::new();
    let mut bystander = guest.offer(OTHER);
    let beside = Header {
        src_port: OTHER,
        dst_port: OTHER,
        ..guest.header(op::REQUEST)
    };
    guest.send_raw(&beside, &[]);
    assert_eq!(guest.ops(), [op::RESPONSE]);
    for before in [
        Before::Nothing,
        Before::Offer,
        Before::Connection,
        Before::GuestEnded,
        Before::HostEnded,
    ] {
        for op in (0..10).chain([0x100, 0x7fff, 0xffff]) {
            for kind in [0, 1, 2, 0x101, 0xffff] {
                for src_cid in [3, 2, 0, 1 << 32 | 3, u64::MAX] {
                    for dst_cid in [2, 3, 0, 1 << 32 | 2, u64::MAX] {
                        guest.reach(before);
                        let header = Header {
                            src_cid,
                            dst_cid,
                            kind,
                            flags: u32::MAX,
                            buf_alloc: u32::MAX,
                            fwd_cnt: u32::MAX,
                            len: if op == op::RW { 4 } else { 0 },
                            ..guest.header(op)
                        };
                        let what = format!("{before:?}: {header:?}");
                        guest.send_raw(&header, b"junk");
                        let answers = guest.answers();
                        assert!(answers <= 1, "{what}: {answers} answers");
                        if src_cid != GUEST_CID {
                            assert_eq!(answers, 0, "{what}");
                        }
                        assert!(!guest.driver.needs_reset(), "{what}");
                        let more = Header {
                            len: 1,
                            op: op::RW,
                            ..beside
                        };
                        guest.send_raw(&more, b"!");
                        assert_eq!(host_input(&mut bystander), (b"!".to_vec(), false), "{what}");
                    }
                }
            }
        }
    }
    assert!(guest.events.is_quiet());
}

impl Guest {
    /// Brings the connection of [`PORT`] to a state, from any.
    fn reach(&mut self, before: Before) {
        self.send(op::RST, 0);
        self.ports.withdraw(PORT);
        self.host = None;
        self.answers();
        match before {
            Before::Nothing => {}
            Before::Offer => self.host = Some(self.offer(PORT)),
            _ => {
                let host = self.connect();
                match before {
                    Before::GuestEnded => self.send(op::SHUTDOWN, NO_SEND),
                    Before::HostEnded => host.shutdown(std::net::Shutdown::Write).unwrap(),
                    _ => {}
                }
                self.events.settle();
                self.answers();
                self.host = Some(host);
            }
        }
    }

    /// How many packets came; their buffers go back.
    fn answers(&mut self) -> usize {
        let mut count = 0;
        while let Some((head, _)) = self.driver.queues[0].take_used() {
            self.give_back(head as u16);
            self.driver.notify(RX.into());
            self.events.settle();
            count += 1;
        }
        count
    }
}
