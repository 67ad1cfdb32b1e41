//! Violations by the guest, each by its name.

use proptest::prelude::*;

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

#[test]
fn a_next_beyond_the_table_stops_the_device_and_a_reset_revives_it() {
    let mut guest = Guest::new();
    let _host = guest.connect();
    guest.driver.queues[1].descriptor(0, BUFFERS, 44, NEXT, 128);
    guest.driver.queues[1].publish(0);
    guest.kick_tx();
    assert_eq!(guest.faults("next_out_of_range"), 1);
    guest.driver.start();
    guest.offer_buffers(16);
    let mut host = guest.connect();
    guest.send_bytes(b"alive");
    assert_eq!(host_input(&mut host), (b"alive".to_vec(), false));
}

fn header() -> impl Strategy<Value = Header> {
    let cid = prop_oneof![8 => Just(3u64), 1 => 0u64..5, 1 => any::<u64>()];
    let dst = prop_oneof![8 => Just(2u64), 1 => 0u64..5, 1 => any::<u64>()];
    let kind = prop_oneof![8 => Just(1u16), 1 => any::<u16>()];
    let len = prop_oneof![4 => 0u32..64, 1 => any::<u32>()];
    let counts = (
        prop_oneof![0u32..100_000, any::<u32>()],
        prop_oneof![0u32..100_000, any::<u32>()],
    );
    (
        cid,
        dst,
        (0u32..3, 0u32..4),
        len,
        kind,
        0u16..9,
        0u32..4,
        counts,
    )
        .prop_map(
            |(
                src_cid,
                dst_cid,
                (src_port, dst_port),
                len,
                kind,
                op,
                flags,
                (buf_alloc, fwd_cnt),
            )| Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len,
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            },
        )
}

#[derive(Clone, Debug)]
enum Move {
    Packet(Header, usize),
    Offer(u32),
    Withdraw(u32),
    Host(u32, usize),
    HostRead(u32),
    HostClose(u32),
    RxBuffers(u64),
    Take,
}

fn step() -> impl Strategy<Value = Move> {
    prop_oneof![
        6 => (header(), 0usize..128).prop_map(|(header, bytes)| Move::Packet(header, bytes)),
        3 => (0u32..4).prop_map(Move::Offer),
        1 => (0u32..4).prop_map(Move::Withdraw),
        2 => (0u32..4, 1usize..300_000).prop_map(|(port, bytes)| Move::Host(port, bytes)),
        1 => (0u32..4).prop_map(Move::HostRead),
        1 => (0u32..4).prop_map(Move::HostClose),
        2 => (1u64..8).prop_map(Move::RxBuffers),
        3 => Just(Move::Take),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a guest and a host do, the device does not panic, does not spin, and works after a reset.
    #[test]
    fn no_script_panics_or_spins(script in prop::collection::vec(step(), 0..60)) {
        let mut guest = Guest::without_buffers();
        let mut hosts = std::collections::HashMap::new();
        for step in script {
            match step {
                Move::Packet(header, bytes) => guest.send_raw(&header, &vec![7; bytes]),
                Move::Offer(port) => {
                    let (ours, theirs) = UnixStream::pair().unwrap();
                    ours.set_nonblocking(true).unwrap();
                    if guest.ports.offer(port, theirs.into()).is_ok() {
                        hosts.insert(port, ours);
                    }
                }
                Move::Withdraw(port) => drop(guest.ports.withdraw(port)),
                Move::Host(port, bytes) => {
                    if let Some(host) = hosts.get_mut(&port) {
                        let _ = host.write(&vec![9; bytes]);
                    }
                }
                Move::HostRead(port) => {
                    if let Some(host) = hosts.get_mut(&port) {
                        let _ = host.read(&mut [0; 4096]);
                    }
                }
                Move::HostClose(port) => drop(hosts.remove(&port)),
                Move::RxBuffers(count) => {
                    for nth in 0..count {
                        guest.driver.queues[0].add(&[(HIGH_RAM + nth * RX_BUFFER, RX_BUFFER as u32, WRITE)]);
                    }
                    guest.driver.notify(RX.into());
                }
                Move::Take => drop(guest.driver.queues[0].take_used()),
            }
            guest.events.settle();
        }
        prop_assert!(guest.events.is_quiet());
        drop(hosts);
        guest.driver.start();
        guest.offer_buffers(8);
        for port in 0..4 {
            guest.ports.withdraw(port);
        }
        let mut host = guest.connect();
        guest.send_bytes(b"alive");
        prop_assert_eq!(host_input(&mut host), (b"alive".to_vec(), false));
    }

    /// Any bytes as rings and packets.
    #[test]
    fn no_ring_bytes_panic(
        table in prop::collection::vec(any::<u8>(), 0..2048),
        available in prop::collection::vec(any::<u8>(), 0..262),
        packets in prop::collection::vec(any::<u8>(), 0..4096),
        index in 0u16..130,
        queue in 0usize..2,
    ) {
        let mut guest = Guest::without_buffers();
        let mut host = guest.offer(0);
        host.write_all(b"input").unwrap();
        let (at_table, at_available) = (guest.driver.queues[queue].table, guest.driver.queues[queue].available);
        let memory = guest.driver.memory.clone();
        memory.write_slice(&packets, GuestAddress(0)).unwrap();
        memory.write_slice(&table, GuestAddress(at_table)).unwrap();
        memory.write_slice(&available, GuestAddress(at_available)).unwrap();
        guest.driver.queues[queue].set_available(index);
        guest.driver.notify(0);
        guest.driver.notify(1);
        prop_assert!(guest.events.is_quiet());
    }
}
