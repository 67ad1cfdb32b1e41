//! Credit both ways (VIRTIO 1.2 §5.10.6.3), and rings that run dry.

use super::*;

#[test]
fn a_guest_that_fills_its_room_is_buffered_and_then_told_of_new_room() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    let data = pattern(1 << 20);
    // Until the socket and the promised room are full.
    let mut sent = 0;
    let mut told = 0u32;
    while sent + 4096 <= data.len() && (sent as u32 - told) + 4096 <= BUF_ALLOC {
        guest.send_bytes(&data[sent..sent + 4096]);
        sent += 4096;
        while let Some((header, _)) = guest.receive() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            told = header.fwd_cnt;
        }
    }
    assert!(sent as u32 >= BUF_ALLOC && sent < data.len(), "{sent}");
    assert!(
        guest.events.is_quiet(),
        "no busy loop while the host does not read"
    );
    let mut received = Vec::new();
    for _ in 0..20 {
        received.extend(host_input(&mut host).0);
        guest.events.settle();
    }
    assert_eq!(received, data[..sent]);
    let last = std::iter::from_fn(|| guest.receive()).last().unwrap().0;
    assert_eq!(last.op, op::CREDIT_UPDATE);
    assert!(sent as u32 - last.fwd_cnt < BUF_ALLOC / 4);
    assert!(guest.events.is_quiet());
}

#[test]
fn a_guest_that_sends_past_its_room_is_reset_and_the_rest_delivered() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    let block = pattern(64 * 1024 - 44);
    let mut sent = 0;
    while guest.faults("packet") == 0 {
        guest.send_bytes(&block);
        sent += block.len();
        assert!(sent < 4 << 20, "the backlog is not bounded");
    }
    assert_eq!(guest.ops().last(), Some(&op::RST));
    let mut received = Vec::new();
    loop {
        let (bytes, ended) = host_input(&mut host);
        received.extend(bytes);
        guest.events.settle();
        if ended {
            break;
        }
    }
    assert_eq!(received.len(), sent - block.len());
    assert!(guest.events.is_quiet());
}

#[test]
fn the_host_is_held_to_the_guest_s_room() {
    let mut guest = Guest::new();
    guest.buf_alloc = 10_000;
    let mut host = guest.connect();
    let data = pattern(25_000);
    host.write_all(&data).unwrap();
    guest.events.settle();
    let mut received = guest.bytes();
    assert_eq!(received.len(), 10_000);
    assert!(guest.events.is_quiet(), "no busy loop without credit");
    while received.len() < data.len() {
        let before = received.len();
        guest.send(op::CREDIT_UPDATE, 0);
        received.extend(guest.bytes());
        assert!(received.len() - before <= 10_000);
        assert!(received.len() > before);
    }
    assert_eq!(received, data);
}

/// CVE-2026-23069's class: arithmetic below zero when the peer takes room back.
#[test]
fn a_guest_that_shrinks_its_room_gets_nothing_until_it_has_some() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    host.write_all(&pattern(8000)).unwrap();
    guest.events.settle();
    let first = guest.bytes();
    assert_eq!(first.len(), 8000);
    guest.taken = 0;
    guest.buf_alloc = 100;
    guest.send(op::CREDIT_UPDATE, 0);
    host.write_all(b"more").unwrap();
    guest.events.settle();
    assert_eq!(guest.bytes(), b"");
    // A count ahead of what was sent is no credit either.
    guest.taken = 9000;
    guest.send(op::CREDIT_UPDATE, 0);
    assert_eq!(guest.bytes(), b"");
    assert!(guest.events.is_quiet());
    guest.taken = 8000;
    guest.send(op::CREDIT_UPDATE, 0);
    assert_eq!(guest.bytes(), b"more");
}

/// CVE-2026-23086's class: room that a guest claims must not become memory of the host.
#[test]
fn a_guest_that_claims_four_gibibytes_costs_nothing() {
    let mut guest = Guest::without_buffers();
    guest.buf_alloc = u32::MAX;
    let mut host = guest.offer(PORT);
    guest.send(op::REQUEST, 0);
    let mut accepted = 0;
    let block = pattern(65536);
    while let Ok(count) = host.write(&block) {
        accepted += count;
        guest.events.settle();
        assert!(accepted < 1 << 20, "somebody buffers without rx buffers");
    }
    assert!(guest.events.is_quiet());
    guest.offer_buffers(64);
    let (header, _) = guest.receive().unwrap();
    assert_eq!(header.op, op::RESPONSE);
    assert_eq!(guest.bytes().len(), accepted);
}

/// CVE-2020-16843's class: a full rx ring must not freeze the device.
#[test]
fn an_rx_ring_that_runs_dry_and_is_refilled_resumes() {
    let mut guest = Guest::without_buffers();
    guest.offer_buffers(4);
    let mut host = guest.connect();
    let data = pattern(100_000);
    host.write_all(&data).unwrap();
    guest.events.settle();
    let mut received = Vec::new();
    let mut heads = Vec::new();
    while received.len() < data.len() {
        while let Some((head, _, payload)) = guest.take() {
            received.extend(payload);
            heads.push(head);
        }
        assert!(guest.events.is_quiet(), "no busy loop without buffers");
        assert!(!heads.is_empty());
        for head in heads.drain(..) {
            guest.give_back(head);
        }
        guest.driver.notify(RX.into());
        guest.events.settle();
    }
    assert_eq!(received, data);
}

#[test]
fn busy_connections_share_the_rx_ring() {
    let mut guest = Guest::without_buffers();
    let mut hosts = Vec::new();
    for nth in 0..4 {
        hosts.push(guest.offer(PORT + nth));
        let dial = Header {
            dst_port: PORT + nth,
            ..guest.header(op::REQUEST)
        };
        guest.send_raw(&dial, &[]);
    }
    for host in &mut hosts {
        host.write_all(&pattern(150_000)).unwrap();
    }
    guest.offer_buffers(128);
    let mut bytes = [0; 4];
    while let Some((_, header, payload)) = guest.take() {
        bytes[(header.src_port - PORT) as usize] += payload.len();
    }
    assert!(bytes.iter().all(|&bytes| bytes > 60_000), "{bytes:?}");
}

#[test]
fn a_credit_request_is_answered() {
    let mut guest = Guest::new();
    let _host = guest.connect();
    guest.send(op::CREDIT_REQUEST, 0);
    let (header, _) = guest.receive().unwrap();
    assert_eq!(
        (header.op, header.buf_alloc),
        (op::CREDIT_UPDATE, BUF_ALLOC)
    );
    assert!(guest.ops().is_empty());
}
