//! Which interfaces the guest gets.

use std::time::{Duration, Instant};

use bulkhead_shim::{
    ledger::Ledger,
    netns,
    network::{Error, Network},
};

use super::world::{Guest, PATIENCE, World, frame, is, redirects, with_world};

fn names(world: &World) -> Vec<String> {
    let mut ledger = world.ledger("names");
    let mut network = world.attach("pod", &mut ledger).unwrap();
    let devices = network.devices();
    let names = devices.iter().map(|device| device.name.clone()).collect();
    drop(devices);
    assert!(ledger.teardown().is_empty());
    names
}

fn refusal(world: &World) -> String {
    let mut ledger = world.ledger("refused");
    let error = world.attach("pod", &mut ledger).unwrap_err();
    assert!(
        matches!(error, Error::Namespace(netns::Error::Refused { .. })),
        "{error}"
    );
    assert_eq!(ledger.held().count(), 0);
    assert!(ledger.teardown().is_empty());
    error.to_string()
}

#[test]
fn no_interface_is_a_network_too() {
    with_world(|world| assert!(names(world).is_empty()));
}

#[test]
fn an_interface_that_is_down_is_given() {
    with_world(|world| {
        world.join();
        world.veth("net1", 1);
        world.run("pod", "ip link set net1 down");
        assert_eq!(names(world), ["eth0", "net1"]);
    });
}

#[test]
fn a_macvlan_carries_groups_that_the_namespace_has_not_joined() {
    with_world(|world| {
        world.join();
        // The host's side of the pair is the parent, as the uplink is with CNI's macvlan plugin.
        world.setup(
            "peer ip link add link eth0 name mv0 address 02:00:00:00:00:09 type macvlan mode bridge
             peer ip link add link eth0 name mv1 type macvlan mode bridge",
        );
        world.add("vlan");
        let path = world.path("vlan").display().to_string();
        world.run("peer", &format!("ip link set mv0 netns {path}"));
        world.run("vlan", "ip link set mv0 up");
        let before = world.run("vlan", "ip link");
        let mut ledger = world.ledger("a");
        let mut other = world.ledger("b");
        let mut network = world.attach("vlan", &mut ledger).unwrap();
        let mut devices = network.devices();
        assert_eq!(devices[0].mac, [2, 0, 0, 0, 0, 9]);
        assert!(world.run("vlan", "ip link").contains("ALLMULTI"));
        let mut outside = world.attach("pod", &mut other).unwrap();
        let mut outside = Guest::of(&mut outside.devices()[0]);
        let mut guest = Guest::of(&mut devices[0]);
        let group = [0x01, 0x00, 0x5e, 0x12, 0x34, 0x56];
        outside.send(&frame(group, [2, 0, 0, 0, 0, 2], 0x88b5, b"to the group"));
        guest.receive(is(0x88b5));
        guest.send(&frame([2, 0, 0, 0, 0, 2], devices[0].mac, 0x88b5, b"back"));
        outside.receive(is(0x88b5));
        drop(guest);
        assert!(ledger.teardown().is_empty());
        let end = Instant::now() + PATIENCE;
        while world.run("vlan", "ip link") != before {
            assert!(Instant::now() < end, "{}", world.run("vlan", "ip link"));
        }
    });
}

#[test]
fn of_a_bridge_and_its_ports_the_guest_gets_the_side_with_addresses() {
    with_world(|world| {
        world.join();
        world.setup(
            "pod ip link add br0 type bridge
             pod ip link set eth0 master br0
             pod ip link set br0 up",
        );
        assert_eq!(names(world), ["eth0"]);
        world.run("pod", "ip addr add 10.9.0.2/24 dev br0");
        assert_eq!(names(world), ["br0"]);
        // And frames pass through it.
        let (mut one, mut two) = (world.ledger("a"), world.ledger("b"));
        let mut network = world.attach("pod", &mut one).unwrap();
        let mut devices = network.devices();
        let mac = devices[0].mac;
        let mut guest = Guest::of(&mut devices[0]);
        let mut peer = world.attach("peer", &mut two).unwrap();
        let mut peer = Guest::of(&mut peer.devices()[0]);
        guest.send(&frame([2, 0, 0, 0, 0, 1], mac, 0x88b5, b"out"));
        peer.receive(is(0x88b5));
        peer.send(&frame(mac, [2, 0, 0, 0, 0, 1], 0x88b5, b"in"));
        guest.receive(is(0x88b5));
        drop(guest);
        assert!(one.teardown().is_empty());
        world.run("pod", "ip addr add 10.9.1.2/24 dev eth0");
        assert!(refusal(world).contains("interface eth0 (veth)"));
    });
}

#[test]
fn a_tap_of_somebody_else_is_an_interface() {
    with_world(|world| {
        world.setup(
            "pod ip tuntap add mode tap tap0
             pod ip link set tap0 up",
        );
        assert_eq!(names(world), ["tap0"]);
        world.run("pod", "ip tuntap add mode tun tun0");
        let error = refusal(world);
        assert!(
            error.contains("interface tun0 (tun)") && error.contains("Ethernet"),
            "{error}"
        );
    });
}

#[test]
fn kinds_that_a_guest_cannot_have_are_refused_by_name() {
    with_world(|world| {
        for (kind, more) in [("ifb", ""), ("vxlan", " id 7 dstport 4789")] {
            world.join();
            world.run("pod", &format!("ip link add odd0 type {kind}{more}"));
            let error = refusal(world);
            assert!(
                error.contains(&format!("interface odd0 ({kind})")),
                "{error}"
            );
            world.run("pod", "ip link del odd0");
            world.run("pod", "ip link del eth0");
        }
        world.join();
        world.run("pod", "ip link add link eth0 name mv0 type macvlan");
        let error = refusal(world);
        assert!(error.contains("interface mv0 (macvlan)"), "{error}");
        assert!(error.contains("made on eth0"), "{error}");
    });
}

#[test]
fn the_hosts_own_namespace_is_refused() {
    with_world(|world| {
        let mut ledger = world.ledger("a");
        let attach = |ledger: &mut Ledger, path: &str| {
            Network::attach(path.as_ref(), 1, usize::MAX, ledger).unwrap_err()
        };
        let error = attach(&mut ledger, "/proc/self/ns/net");
        assert!(
            matches!(error, Error::Namespace(netns::Error::Host { .. })),
            "{error}"
        );
        for none in ["/dev/null", "/nonexistent", "/proc/self/ns/mnt"] {
            let error = attach(&mut ledger, none);
            assert!(
                matches!(error, Error::Namespace(netns::Error::Namespace { .. })),
                "{error}"
            );
        }
        assert_eq!(ledger.held().count(), 0);
    });
}

#[test]
fn interfaces_that_come_later_are_found_by_another_look() {
    with_world(|world| {
        let mut ledger = world.ledger("a");
        let mut network = world.attach("pod", &mut ledger).unwrap();
        assert!(network.devices().is_empty());
        assert_eq!(network.for_guest().devices, 0);
        world.join();
        network.rescan(&mut ledger).unwrap();
        let first = network.devices();
        world.veth("eth1", 1);
        network.rescan(&mut ledger).unwrap();
        network.rescan(&mut ledger).unwrap();
        let second = network.devices();
        assert_eq!((first.len(), second.len()), (1, 1));
        assert_eq!(second[0].name, "eth1");
        assert_eq!(network.for_guest().devices, 2);
        assert_eq!(redirects(&ledger).len(), 2);
        drop((first, second));
        assert!(ledger.teardown().is_empty());
    });
}

#[test]
fn an_interface_that_comes_too_late_is_refused_by_name_and_changes_nothing() {
    with_world(|world| {
        world.join();
        let mut ledger = world.ledger("a");
        let mut network = world.attach("pod", &mut ledger).unwrap();
        network.settle(1);
        let mut devices = network.devices();
        network.for_guest();
        world.veth("eth1", 1);
        world.veth("eth2", 2);
        let before = world.state_of_pod();
        for _ in 0..2 {
            let error = network.rescan(&mut ledger).unwrap_err();
            let Error::Namespace(netns::Error::Late { interface, places }) = error else {
                panic!("{error}");
            };
            assert_eq!((interface.as_str(), places), ("eth2", 2));
        }
        assert_eq!(world.state_of_pod(), before);
        assert!(network.devices().is_empty() && redirects(&ledger).len() == 1);
        world.run("pod", "ip link del eth2");
        network.rescan(&mut ledger).unwrap();
        devices.extend(network.devices());
        assert_eq!(devices[1].name, "eth1");
        drop(devices);
        assert!(ledger.teardown().is_empty());
    });
}

#[test]
fn how_long_it_takes() {
    with_world(|world| {
        world.join();
        world.setup(
            "pod ip addr add 10.9.0.2/24 dev eth0
             pod ip route add default via 10.9.0.1",
        );
        let mut times: Vec<Duration> = (0..20)
            .map(|_| {
                let mut ledger = world.ledger("a");
                let begin = Instant::now();
                let mut network = world.attach("pod", &mut ledger).unwrap();
                let time = begin.elapsed();
                drop(network.devices());
                assert!(ledger.teardown().is_empty());
                time
            })
            .collect();
        times.sort();
        let (least, middle) = (times[0], times[times.len() / 2]);
        println!(
            "one veth: {} us at best, {} us in the middle",
            least.as_micros(),
            middle.as_micros()
        );
        let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
        assert_eq!(threads, 1, "no thread stays");
    });
}
