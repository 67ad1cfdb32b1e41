//! Giving back, whoever dies first.

use std::{
    thread,
    time::{Duration, Instant},
};

use bulkhead_shim::{
    ledger::{Resource, collect},
    netns,
    network::Error,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{ForkResult, fork},
};

use super::world::{Guest, PATIENCE, World, is, reap, with_world};

const UDP_PORT: u16 = 9;

fn addressed(world: &World) {
    world.join();
    world.setup(
        "peer ip addr add 10.9.0.1/24 dev eth0
         pod ip addr add 10.9.0.2/24 dev eth0",
    );
}

/// The namespace's own kernel hears and answers.
fn namespace_speaks(world: &World) {
    let heard = world.inside("peer", || {
        std::net::UdpSocket::bind(("10.9.0.1", UDP_PORT)).unwrap()
    });
    heard.set_read_timeout(Some(PATIENCE)).unwrap();
    world.inside("pod", || {
        let socket = std::net::UdpSocket::bind("10.9.0.2:0").unwrap();
        socket.send_to(b"word", ("10.9.0.1", UDP_PORT)).unwrap();
    });
    let mut buffer = [0; 8];
    let (length, _) = heard.recv_from(&mut buffer).expect("the namespace is mute");
    assert_eq!(&buffer[..length], b"word");
}

#[test]
fn the_vmm_dies_first() {
    with_world(|world| {
        addressed(world);
        let before = world.state_of_pod();
        let mut ledger = world.ledger("a");
        let mut network = world.attach("pod", &mut ledger).unwrap();
        assert_ne!(world.state_of_pod(), before);
        drop(network.devices());
        assert!(ledger.teardown().is_empty());
        assert_eq!(world.state_of_pod(), before);
        namespace_speaks(world);
    });
}

#[test]
fn the_shim_dies_first_and_twice() {
    with_world(|world| {
        addressed(world);
        let before = world.state_of_pod();
        let mut ledger = world.ledger("a");
        let mut network = world.attach("pod", &mut ledger).unwrap();
        let devices = network.devices();
        let line: Vec<Resource> = ledger.held().cloned().collect();
        drop(ledger);
        // The VMM lives on: the tap is taken from it.
        let collected = collect(&world.state(), false).unwrap();
        assert_eq!(collected[0].held, line);
        assert!(collected[0].left.is_empty(), "{:?}", collected[0].left);
        assert_eq!(world.state_of_pod(), before);
        namespace_speaks(world);
        let mut again = world.ledger("a");
        again.take(line[0].clone()).unwrap();
        assert!(again.teardown().is_empty());
        assert_eq!(world.state_of_pod(), before);
        drop(devices);
    });
}

#[test]
fn the_namespace_or_its_interface_goes_first() {
    with_world(|world| {
        addressed(world);
        let mut ledger = world.ledger("a");
        let mut network = world.attach("pod", &mut ledger).unwrap();
        let devices = network.devices();
        world.run("pod", "ip link del eth0");
        assert!(ledger.teardown().is_empty());
        assert_eq!(world.run("pod", "ip -br link").lines().count(), 1);
        drop(devices);

        for (name, used_again) in [("net1", false), ("net2", true)] {
            // Another name each time: the kernel takes a while to end a namespace and the other ends of what is in it.
            world.veth(name, 1);
            let mut ledger = world.ledger("a");
            let mut network = world.attach("pod", &mut ledger).unwrap();
            let devices = network.devices();
            world.remove("pod");
            std::fs::remove_file(world.path("pod")).unwrap();
            if used_again {
                world.add("pod");
            }
            assert!(ledger.teardown().is_empty());
            drop(devices);
            if !used_again {
                world.add("pod");
            }
        }
    });
}

#[test]
fn what_others_put_on_the_interface_stays() {
    with_world(|world| {
        for kind in ["ingress", "clsact"] {
            addressed(world);
            world.setup(&format!(
                "pod tc qdisc add dev eth0 {kind}
                 pod tc filter add dev eth0 ingress pref 7 protocol ip u32 match ip dport 4242 0xffff"
            ));
            let filters = || world.run("pod", "tc filter show dev eth0 ingress");
            let (before, theirs) = (world.state_of_pod(), filters());
            let mut ledger = world.ledger("a");
            let mut network = world.attach("pod", &mut ledger).unwrap();
            let mut guest = Guest::of(&mut network.devices()[0]);
            assert!(filters().starts_with(&theirs), "{}", filters());
            world.inside("peer", || {
                let socket = std::net::UdpSocket::bind("10.9.0.1:0").unwrap();
                socket.send_to(b"who is it", "10.9.0.2:7").unwrap();
            });
            guest.receive(is(0x0806));
            drop(guest);
            assert!(ledger.teardown().is_empty());
            assert_eq!(world.state_of_pod(), before);
            assert_eq!(filters(), theirs);
            world.run("pod", "ip link del eth0");
        }
        // One that came into our qdisc keeps it.
        addressed(world);
        let mut ledger = world.ledger("a");
        let network = world.attach("pod", &mut ledger).unwrap();
        world.setup(
            "pod tc filter add dev eth0 ingress pref 7 protocol ip u32 match ip dport 4242 0xffff",
        );
        drop(network);
        assert!(ledger.teardown().is_empty());
        let left = world.run("pod", "tc filter show dev eth0 ingress");
        assert!(
            left.contains("pref 7") && !left.contains("mirred"),
            "{left}"
        );
    });
}

#[test]
fn a_second_pod_is_refused_and_a_dead_one_replaced() {
    with_world(|world| {
        addressed(world);
        let before = world.state_of_pod();
        let mut first = world.ledger("a");
        let mut network = world.attach("pod", &mut first).unwrap();
        let with_first = world.state_of_pod();
        let mut second = world.ledger("b");
        let error = world.attach("pod", &mut second).unwrap_err();
        assert!(
            matches!(error, Error::Namespace(netns::Error::Taken { .. })),
            "{error}"
        );
        assert_eq!(second.held().count(), 0);
        assert_eq!(world.state_of_pod(), with_first);
        // Its VMM dies; nobody has collected it when the next pod begins.
        drop(network.devices());
        let mut network = world.attach("pod", &mut second).unwrap();
        let mut guest = Guest::of(&mut network.devices()[0]);
        assert!(first.teardown().is_empty());
        world.inside("peer", || {
            let socket = std::net::UdpSocket::bind("10.9.0.1:0").unwrap();
            socket.send_to(b"who is it", "10.9.0.2:7").unwrap();
        });
        guest.receive(is(0x0806));
        assert!(second.teardown().is_empty());
        drop(guest);
        // The first pod's qdisc may stay, empty: the second found it there.
        world.run("pod", "tc filter show dev eth0 ingress");
        assert_eq!(
            before.lines().count(),
            world.run("pod", "ip link").lines().count()
                + before
                    .lines()
                    .filter(|line| line.starts_with("qdisc"))
                    .count()
        );
        namespace_speaks(world);
    });
}

#[test]
fn an_attach_that_fails_leaves_nothing() {
    with_world(|world| {
        addressed(world);
        world.veth("eth1", 1);
        world.setup(
            "pod tc qdisc add dev eth1 ingress
             pod tc filter add dev eth1 ingress pref 60000 protocol all u32 match u32 0 0",
        );
        let before = world.state_of_pod();
        let filters = world.run("pod", "tc filter show dev eth1 ingress");
        let mut ledger = world.ledger("a");
        let error = world.attach("pod", &mut ledger).unwrap_err();
        assert!(error.to_string().contains("interface eth1"), "{error}");
        assert!(
            matches!(error, Error::Namespace(netns::Error::Preference { .. })),
            "{error}"
        );
        assert_eq!(ledger.held().count(), 0);
        assert_eq!(world.state_of_pod(), before);
        assert_eq!(world.run("pod", "tc filter show dev eth1 ingress"), filters);
        namespace_speaks(world);
        assert!(ledger.teardown().is_empty());
    });
}

/// kill -9 at any moment of an attach: the replay leaves the namespace as it was.
#[test]
fn a_shim_killed_on_its_way_leaves_nothing() {
    with_world(|world| {
        addressed(world);
        world.veth("eth1", 1);
        let before = world.state_of_pod();
        let mut unfinished = 0;
        for round in 0..60 {
            // SAFETY: the child attaches and is killed; glibc keeps its allocator usable in a fork.
            match unsafe { fork() }.unwrap() {
                ForkResult::Child => {
                    let mut ledger = world.ledger("a");
                    let _network = world.attach("pod", &mut ledger).unwrap();
                    loop {
                        nix::unistd::pause();
                    }
                }
                ForkResult::Parent { child } => {
                    // Every second one after its first step, however late a busy machine lets it begin.
                    if round % 2 == 1 {
                        let ledger = world.state().join("default/a/ledger");
                        let end = Instant::now() + PATIENCE;
                        while !ledger.exists() {
                            assert!(Instant::now() < end, "it does not begin its ledger");
                        }
                    }
                    thread::sleep(Duration::from_micros(round * 40));
                    kill(child, Signal::SIGKILL).unwrap();
                    reap(child);
                }
            }
            for collected in collect(&world.state(), false).unwrap() {
                unfinished += u32::from(collected.held.len() < 2);
                assert!(collected.left.is_empty(), "{:?}", collected.left);
            }
            assert_eq!(world.state_of_pod(), before, "round {round}");
        }
        assert!(unfinished > 0, "none was killed on its way");
        namespace_speaks(world);
    });
}
