//! Frames, through the redirect.

use std::{
    net::UdpSocket,
    time::{Duration, Instant},
};

use bulkhead_shim::{netns::counters, network::Network};

use super::world::{Guest, PATIENCE, frame, is, redirects, with_world};

const POD: [u8; 6] = [2, 0, 0, 0, 0, 2];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ALL: [u8; 6] = [0xff; 6];
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
/// Local Experimental EtherType 1 (IEEE 802): no kernel says anything about it.
const OURS: u16 = 0x88b5;

/// Who has 10.9.0.1? Tell 10.9.0.2.
fn arp_request() -> Vec<u8> {
    let mut payload = vec![0, 1, 8, 0, 6, 4, 0, 1];
    payload.extend(POD);
    payload.extend([10, 9, 0, 2]);
    payload.extend([0; 6]);
    payload.extend([10, 9, 0, 1]);
    frame(ALL, POD, ARP, &payload)
}

#[test]
fn a_guest_asks_and_its_peer_answers() {
    with_world(|world| {
        world.join();
        world.setup(
            "peer ip addr add 10.9.0.1/24 dev eth0
             peer ip neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev eth0 nud permanent
             pod ip addr add 10.9.0.2/24 dev eth0",
        );
        let mut ledger = world.ledger("a");
        let mut network = world.attach("pod", &mut ledger).unwrap();
        let mut devices = network.devices();
        assert_eq!(devices.len(), 1);
        assert_eq!((devices[0].name.as_str(), devices[0].mac), ("eth0", POD));
        assert_eq!(devices[0].mtu, 1500);
        let mut guest = Guest::of(&mut devices[0]);
        guest.send(&arp_request());
        let answer = guest.receive(is(ARP));
        assert_eq!(answer[..12], [POD, PEER].concat());
        assert_eq!(answer[20..22], [0, 2], "a reply");
        assert_eq!(answer[22..32], [&PEER[..], &[10, 9, 0, 1]].concat());

        world.inside("peer", || {
            let socket = UdpSocket::bind("10.9.0.1:9").unwrap();
            socket.send_to(b"for the guest", "10.9.0.2:7").unwrap();
        });
        let datagram = guest.receive(is(IPV4));
        assert!(datagram.ends_with(b"for the guest"), "{datagram:02x?}");

        let held: Vec<_> = redirects(&ledger);
        let counted = counters(&held).unwrap();
        assert_eq!(counted.len(), 1);
        let (outside, inside) = (counted[0].outside.unwrap(), counted[0].inside.unwrap());
        assert!(
            outside.rx_packets >= 2 && outside.tx_packets >= 1,
            "{outside:?}"
        );
        assert!(
            inside.tx_packets >= 2 && inside.rx_packets >= 1,
            "{inside:?}"
        );
        assert!(
            inside.rx_bytes >= 42 && inside.tx_dropped == 0,
            "{inside:?}"
        );
    });
}

#[test]
fn two_guests_talk_with_vlan_tags_and_groups() {
    with_world(|world| {
        world.join();
        let (mut one, mut two) = (world.ledger("a"), world.ledger("b"));
        let mut networks = [
            world.attach("pod", &mut one).unwrap(),
            world.attach("peer", &mut two).unwrap(),
        ];
        let [mut pod, mut peer] = networks
            .each_mut()
            .map(|network| Guest::of(&mut network.devices()[0]));
        // The longest frame, ones shorter than any word, a tag, two tags, a group that nobody has joined.
        let tagged = [&[0x81, 0x00, 0x00, 0x64, 0x88, 0xb5][..], b"tagged"].concat();
        let twice = [
            &[0x88, 0xa8, 0x00, 0x07, 0x81, 0x00, 0x00, 0x64, 0x88, 0xb5][..],
            b"twice",
        ];
        let addressed = [&PEER[..], &POD].concat();
        for sent in [
            frame(PEER, POD, OURS, b""),
            frame(PEER, POD, OURS, b"shr"),
            frame(PEER, POD, OURS, &[7; 1500]),
            [&addressed[..], &tagged].concat(),
            [&addressed[..], &twice.concat()].concat(),
            frame([0x33, 0x33, 0, 0, 0x12, 0x34], POD, OURS, b"group"),
        ] {
            pod.send(&sent);
            let got = peer.receive(|frame| frame[6..12] == POD && is_ours(frame));
            assert_eq!(got, sent);
            let mut back = sent.clone();
            back[..12].copy_from_slice(&[POD, PEER].concat());
            peer.send(&back);
            assert_eq!(
                pod.receive(|frame| frame[6..12] == PEER && is_ours(frame)),
                back
            );
        }
    });
}

fn is_ours(frame: &[u8]) -> bool {
    frame
        .windows(2)
        .skip(12)
        .step_by(2)
        .take(6)
        .any(|two| two == OURS.to_be_bytes())
}

#[test]
fn the_tap_itself_says_nothing() {
    with_world(|world| {
        world.join();
        let mut ledger = world.ledger("a");
        let mut network = world.attach("pod", &mut ledger).unwrap();
        let mut devices = network.devices();
        let mut guest = Guest::of(&mut devices[0]);
        let tap = redirects(&ledger)[0].tap.clone();
        let link = world.run("pod", &format!("ip -d link show {tap}"));
        for word in [
            "UP,LOWER_UP",
            "mtu 1500",
            "qlen 1000",
            "noqueue",
            "vnet_hdr on",
            "persist off",
        ] {
            assert!(link.contains(word), "{word}: {link}");
        }
        let tap_mac = link.split("link/ether ").nth(1).unwrap()[..17].to_string();
        let mac: Vec<u8> = tap_mac
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect();
        guest.hears_nothing(|frame| frame[6..12] == mac);
        let address = world.run("pod", &format!("ip addr show {tap}"));
        assert!(!address.contains("inet"), "{address}");
    });
}

#[test]
fn a_guest_that_does_not_read_costs_a_bounded_queue() {
    with_world(|world| {
        world.join();
        let (mut one, mut two) = (world.ledger("a"), world.ledger("b"));
        let mut silent = world.attach("pod", &mut one).unwrap();
        let mut loud = world.attach("peer", &mut two).unwrap();
        let mut silent = Guest::of(&mut silent.devices()[0]);
        let mut loud = Guest::of(&mut loud.devices()[0]);
        let held: Vec<_> = redirects(&one);
        let dropped = || counters(&held).unwrap()[0].inside.unwrap().tx_dropped;
        for sent in 0..3000 {
            loud.send(&frame(POD, PEER, OURS, b"much"));
            // On a busy machine the kernel may put packets off; then its own queue, of 1000, is not to be the one that is full.
            if sent % 200 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let end = Instant::now() + PATIENCE;
        while dropped() < 1900 {
            assert!(Instant::now() < end, "only {} are dropped", dropped());
        }
        // What comes after the last one is not in the range then.
        std::thread::sleep(Duration::from_millis(100));
        assert!((1900..=2100).contains(&dropped()), "{}", dropped());
        silent.receive(is(OURS));
    });
}

#[test]
fn a_queue_for_each_pair() {
    with_world(|world| {
        world.join();
        let mut ledger = world.ledger("a");
        let mut network = Network::attach(&world.path("pod"), 4, usize::MAX, &mut ledger).unwrap();
        assert_eq!(network.devices()[0].taps.len(), 4);
    });
}
