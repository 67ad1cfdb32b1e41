use super::*;

/// Runs a command; its answer.
fn command(guest: &mut Guest, queue: usize, words: &[u8]) -> u8 {
    let memory = &guest.driver.memory;
    memory.write_slice(words, GuestAddress(BUFFERS)).unwrap();
    let answer = BUFFERS + 0x1000;
    memory.write_obj(9_u8, GuestAddress(answer)).unwrap();
    guest.driver.queues[queue].add(&[(BUFFERS, words.len() as u32, 0), (answer, 1, WRITE)]);
    guest.driver.notify(queue as u32);
    guest.events.settle();
    assert!(guest.driver.queues[queue].take_used().is_some());
    guest.bytes(answer, 1)[0]
}

const OK: u8 = VIRTIO_NET_OK as u8;
const ERR: u8 = VIRTIO_NET_ERR as u8;

#[test]
fn receive_modes_are_what_the_device_does_anyway() {
    let mut guest = Guest::new();
    assert_eq!(command(&mut guest, 2, &[0, 0, 1]), OK);
    assert_eq!(command(&mut guest, 2, &[0, 1, 0]), OK);
    assert_eq!(command(&mut guest, 2, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), OK);
    for unknown in [
        [0, 2, 1],
        [0, 5, 1],
        [1, 1, 0],
        [2, 0, 0],
        [7, 0, 0],
        [255, 255, 255],
    ] {
        assert_eq!(command(&mut guest, 2, &unknown), ERR, "{unknown:?}");
    }
    assert_eq!(
        command(&mut guest, 2, &[4, 0, 1, 0]),
        ERR,
        "one pair: no MQ"
    );
}

#[test]
fn offloads_are_those_that_were_negotiated() {
    let mut guest = Guest::new();
    let offloads = |bits: u64| {
        let mut words = vec![5, 0];
        words.extend(bits.to_le_bytes());
        words
    };
    let tso = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    assert_eq!(command(&mut guest, 2, &offloads(tso)), OK);
    assert_eq!(command(&mut guest, 2, &offloads(0)), OK);
    assert_eq!(command(&mut guest, 2, &offloads(1 << 63)), ERR);
    assert_eq!(command(&mut guest, 2, &[5, 1, 0, 0, 0, 0, 0, 0, 0, 0]), ERR);
}

#[test]
fn pairs_join_and_leave_as_the_driver_says() {
    let mut guest = Guest::with(3, 1500, |backend| backend);
    assert_ne!(guest.driver.offered() & 1 << VIRTIO_NET_F_MQ, 0);
    for queue in [0, 2, 4] {
        for nth in 0..100 {
            let at = BUFFERS + 0x2000 + 0x10000 * queue + 512 * nth;
            guest.driver.queues[queue as usize].add(&[(at, 512, WRITE)]);
        }
        guest.driver.notify(queue as u32);
    }
    // The kernel spreads by flow: addresses of an IPv4 header.
    let send = |guest: &mut Guest| {
        for flow in 0..64 {
            let mut packet = frame(100, flow);
            packet[12..14].copy_from_slice(&0x0800_u16.to_be_bytes());
            packet[14..34].copy_from_slice(&[
                0x45, 0, 0, 86, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, flow, 10, 0, 0, 99,
            ]);
            guest.wire.send(&packet);
        }
        guest.events.settle();
        [0, 2, 4].map(|queue| {
            let used = std::iter::from_fn(|| guest.driver.queues[queue].take_used());
            used.count()
        })
    };
    assert_eq!(
        send(&mut guest),
        [64, 0, 0],
        "one pair, until the driver asks"
    );
    assert_eq!(command(&mut guest, 6, &[4, 0, 3, 0]), OK);
    for queue in [0, 2, 4] {
        for nth in 0..64 {
            let at = BUFFERS + 0x2000 + 0x10000 * queue + 512 * nth;
            guest.driver.queues[queue as usize].add(&[(at, 512, WRITE)]);
        }
        guest.driver.notify(queue as u32);
    }
    let spread = send(&mut guest);
    assert_eq!(spread.iter().sum::<usize>(), 64);
    assert!(spread.iter().all(|&count| count > 0), "{spread:?}");
    for bad in [0, 4, 0xff] {
        assert_eq!(command(&mut guest, 6, &[4, 0, bad, 0]), ERR, "{bad}");
    }
    assert_eq!(command(&mut guest, 6, &[4, 0, 1, 0]), OK);
    assert!(guest.events.is_quiet());
}

#[test]
fn a_malformed_command_is_a_fault() {
    for pieces in [
        &[(BUFFERS, 1, 0), (BUFFERS, 1, WRITE)][..],
        &[(BUFFERS, 2, 0)],
        &[(BUFFERS, 1, WRITE)],
        &[(BUFFERS, 0, 0), (BUFFERS, 0, WRITE)],
    ] {
        let mut guest = Guest::new();
        guest.driver.queues[2].add(pieces);
        guest.driver.notify(2);
        guest.events.settle();
        assert!(guest.driver.needs_reset(), "{pieces:?}");
        assert_eq!(guest.driver.notices.count("net.chain_too_short"), 1);
    }
}
