//! Real networks: each test has a network namespace of its own, in which pairs of veth devices stand for the machine's.

use super::*;
use world::{Message, World, in_namespace, nested};

mod hostile;
mod world;

const CREATE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;

/// Of linux/fib_rules.h and linux/rtnetlink.h.
const FRA_SRC: u16 = 2;
const FRA_PRIORITY: u16 = 6;
const RTNH_F_ONLINK: u32 = 4;

/// What agent.proto calls lo and the first two devices.
const LO: u32 = 1;
const FIRST: u32 = 2;
const SECOND: u32 = 3;

fn v4(text: &str) -> Vec<u8> {
    text.parse::<std::net::Ipv4Addr>()
        .unwrap()
        .octets()
        .to_vec()
}

fn v6(text: &str) -> Vec<u8> {
    text.parse::<std::net::Ipv6Addr>()
        .unwrap()
        .octets()
        .to_vec()
}

fn family(address: &[u8]) -> u8 {
    (if address.len() == 4 {
        libc::AF_INET
    } else {
        libc::AF_INET6
    }) as u8
}

fn link(index: u32, up: bool) -> Message {
    let up = u32::from(up) * libc::IFF_UP as u32;
    let mut body = vec![0; 4];
    for part in [index, up, up] {
        body.extend(part.to_ne_bytes());
    }
    Message::new(libc::RTM_NEWLINK, 0, &body)
}

fn rename(index: u32, name: &str) -> Message {
    link(index, false).with(libc::IFLA_IFNAME, format!("{name}\0").as_bytes())
}

fn address(index: u32, address: &[u8], prefix: u8) -> Message {
    let mut body = vec![family(address), prefix, libc::IFA_F_NODAD as u8, 0];
    body.extend(index.to_ne_bytes());
    Message::new(libc::RTM_NEWADDR, CREATE, &body)
        .with(libc::IFA_LOCAL, address)
        .with(libc::IFA_ADDRESS, address)
}

/// `flags` are RTNH_F_*.
fn route(family: u8, prefix: u8, scope: u8, flags: u32) -> Message {
    let mut body = vec![
        family,
        prefix,
        0,
        0,
        libc::RT_TABLE_MAIN,
        libc::RTPROT_STATIC,
        scope,
        libc::RTN_UNICAST,
    ];
    body.extend(flags.to_ne_bytes());
    Message::new(libc::RTM_NEWROUTE, CREATE, &body)
}

fn inet(prefix: u8, scope: u8, flags: u32) -> Message {
    route(libc::AF_INET as u8, prefix, scope, flags)
}

fn next_hop(index: u32, gateway: &str) -> Vec<u8> {
    let attribute = nested(&[(libc::RTA_GATEWAY, &v4(gateway))]);
    let mut hop = vec![(8 + attribute.len()) as u8, 0, 0, 0];
    hop.extend(index.to_ne_bytes());
    hop.extend(attribute);
    hop
}

fn neighbour(index: u32, address: &[u8], hardware: &[u8; 6]) -> Message {
    let mut body = vec![family(address), 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(libc::NUD_PERMANENT.to_ne_bytes());
    body.extend([0, 0]);
    Message::new(libc::RTM_NEWNEIGH, CREATE, &body)
        .with(libc::NDA_DST, address)
        .with(libc::NDA_LLADDR, hardware)
}

/// "from SOURCE lookup TABLE".
fn rule(priority: u32, source: &[u8], prefix: u8, table: u8) -> Message {
    const TO_TABLE: u8 = 1;
    let body = [
        family(source),
        0,
        prefix,
        0,
        table,
        0,
        0,
        TO_TABLE,
        0,
        0,
        0,
        0,
    ];
    Message::new(libc::RTM_NEWRULE, CREATE, &body)
        .with(FRA_SRC, source)
        .with(FRA_PRIORITY, &priority.to_ne_bytes())
}

fn network(requests: Vec<Message>, sysctls: &[(&str, &str)]) -> agent::Network {
    agent::Network {
        devices: 2,
        requests: requests.into_iter().map(Message::finish).collect(),
        sysctls: sysctls
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
        ..Default::default()
    }
}

/// The devices are called "a" and "c" before, "c" and "a" after.
fn up() -> Vec<Message> {
    vec![
        rename(FIRST, "tmp0"),
        rename(SECOND, "tmp1"),
        rename(FIRST, "c"),
        rename(SECOND, "a"),
        link(LO, true),
        link(FIRST, true)
            .with(libc::IFLA_MTU, &1400u32.to_ne_bytes())
            .with(libc::IFLA_ADDRESS, &[2, 0, 0, 0, 0, 7]),
        link(SECOND, true),
        address(FIRST, &v4("10.1.0.2"), 24),
        address(SECOND, &v4("10.2.0.2"), 24),
        address(FIRST, &v6("fd00::2"), 64),
    ]
}

#[test]
fn interfaces_get_their_names_addresses_and_sysctls() {
    in_namespace(|| {
        let world = World::new();
        let wanted = network(
            up(),
            &[
                ("net.ipv4.conf.c.rp_filter", "2"),
                ("net.ipv4.conf.a.forwarding", "0"),
                ("net.ipv4.ip_forward", "1"),
            ],
        );
        let [first, second] = [world.interfaces.0[0], world.interfaces.0[1]];
        assert!(first != FIRST && second != SECOND);
        for _ in 0..2 {
            apply(&wanted, &world.interfaces).unwrap();
        }
        let links = world::links();
        let (index, link) = &links["c"];
        assert_eq!(*index, first);
        assert_eq!(link.number(libc::IFLA_MTU), 1400);
        assert_eq!(link.attribute(libc::IFLA_ADDRESS), [2, 0, 0, 0, 0, 7]);
        assert_eq!(links["a"].0, second);
        let addresses = |family| {
            let all = world::dump(libc::RTM_GETADDR, family).into_iter();
            all.map(|found| (found.word(4), found.attribute(libc::IFA_ADDRESS)))
                .collect::<Vec<_>>()
        };
        let inet = addresses(libc::AF_INET);
        assert!(inet.contains(&(first, v4("10.1.0.2"))), "{inet:?}");
        assert!(inet.contains(&(second, v4("10.2.0.2"))), "{inet:?}");
        assert!(addresses(libc::AF_INET6).contains(&(first, v6("fd00::2"))));
        let read = |name: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}"));
        assert_eq!(read("conf/c/rp_filter").unwrap(), "2\n");
        // ip_forward would have set it to 1, had it come later.
        assert_eq!(read("conf/a/forwarding").unwrap(), "0\n");
        assert_eq!(read("conf/c/forwarding").unwrap(), "1\n");
    });
}

#[test]
fn routes_neighbours_and_rules_are_made_once() {
    in_namespace(|| {
        let world = World::new();
        let [first, second] = [world.interfaces.0[0], world.interfaces.0[1]];
        let mut requests = up();
        let hops = [next_hop(FIRST, "10.1.0.1"), next_hop(SECOND, "10.2.0.1")].concat();
        requests.extend([
            inet(0, 0, RTNH_F_ONLINK)
                .with(libc::RTA_GATEWAY, &v4("169.254.1.1"))
                .with(libc::RTA_OIF, &FIRST.to_ne_bytes()),
            inet(16, libc::RT_SCOPE_LINK, 0)
                .with(libc::RTA_DST, &v4("10.8.0.0"))
                .with(libc::RTA_OIF, &SECOND.to_ne_bytes())
                .with(libc::RTA_PREFSRC, &v4("10.1.0.2"))
                .with(libc::RTA_PRIORITY, &77u32.to_ne_bytes()),
            inet(16, 0, 0)
                .with(libc::RTA_DST, &v4("10.9.0.0"))
                .with(libc::RTA_MULTIPATH, &hops),
            route(libc::AF_INET6 as u8, 64, 0, 0)
                .with(libc::RTA_DST, &v6("fd01::"))
                .with(libc::RTA_GATEWAY, &v6("fd00::1"))
                .with(libc::RTA_OIF, &FIRST.to_ne_bytes()),
            neighbour(SECOND, &v4("10.2.0.9"), &[2, 0, 0, 0, 0, 9]),
            rule(1000, &v4("10.1.0.0"), 24, 100),
        ]);
        let wanted = network(requests, &[]);
        let counts = || {
            [libc::RTM_GETROUTE, libc::RTM_GETRULE]
                .map(|kind| world::dump(kind, libc::AF_INET).len())
        };
        apply(&wanted, &world.interfaces).unwrap();
        let before = counts();
        apply(&wanted, &world.interfaces).unwrap();
        assert_eq!(counts(), before, "what exists stays, and comes once");

        let routes = world::dump(libc::RTM_GETROUTE, libc::AF_INET);
        let find = |wanted: &str| {
            let found = |route: &&world::Found| route.attribute(libc::RTA_DST) == v4(wanted);
            routes.iter().find(found).unwrap()
        };
        let is_default = |route: &&world::Found| {
            route.body[1] == 0 && route.attribute(libc::RTA_GATEWAY) == v4("169.254.1.1")
        };
        let default = routes.iter().find(is_default).unwrap();
        assert_eq!(default.number(libc::RTA_OIF), first);
        let direct = find("10.8.0.0");
        assert_eq!(direct.number(libc::RTA_OIF), second);
        assert_eq!(direct.number(libc::RTA_PRIORITY), 77);
        assert_eq!(direct.attribute(libc::RTA_PREFSRC), v4("10.1.0.2"));
        assert_eq!(direct.body[6], libc::RT_SCOPE_LINK);
        let mut hops = find("10.9.0.0").attribute(libc::RTA_MULTIPATH);
        let hops: Vec<Option<u32>> = records::Records::new(&mut hops, 8)
            .map(|hop| linux::netlink::read_u32(hop.unwrap(), 4))
            .collect();
        assert_eq!(hops, [Some(first), Some(second)]);
        let inet6 = world::dump(libc::RTM_GETROUTE, libc::AF_INET6);
        assert!(inet6.iter().any(|route| {
            route.attribute(libc::RTA_DST) == v6("fd01::") && route.number(libc::RTA_OIF) == first
        }));
        let neighbours = world::dump(libc::RTM_GETNEIGH, libc::AF_INET);
        assert!(neighbours.iter().any(|found| {
            found.word(4) == second
                && found.attribute(libc::NDA_DST) == v4("10.2.0.9")
                && found.attribute(libc::NDA_LLADDR) == [2, 0, 0, 0, 0, 9]
        }));
        let rules = world::dump(libc::RTM_GETRULE, libc::AF_INET);
        assert!(rules.iter().any(|rule| {
            rule.number(FRA_PRIORITY) == 1000 && rule.attribute(FRA_SRC) == v4("10.1.0.0")
        }));
    });
}

#[test]
fn what_the_kernel_refuses_is_told_with_its_words() {
    in_namespace(|| {
        let world = World::new();
        let mut requests = up();
        requests.push(
            inet(8, 0, 0)
                .with(libc::RTA_DST, &v4("11.0.0.0"))
                .with(libc::RTA_GATEWAY, &v4("192.0.2.1")),
        );
        let error = apply(&network(requests, &[]), &world.interfaces).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel refuses request 11 of the pod's network (RTM_NEWROUTE 11.0.0.0/8): \
             ENETUNREACH: Network is unreachable: Nexthop has invalid gateway"
        );
    });
}

#[test]
fn a_sysctl_of_something_else_is_refused_before_anything_is_made() {
    in_namespace(|| {
        let world = World::new();
        let wanted = network(
            up(),
            &[("kernel.hostname", "x"), ("net.ipv4.ip_forward", "1")],
        );
        let error = apply(&wanted, &world.interfaces).unwrap_err();
        assert!(error.to_string().contains("\"kernel.hostname\""), "{error}");
        assert!(world::links().contains_key("a"));
        assert_eq!(world::links()["a"].0, world.interfaces.0[0]);
    });
}

#[test]
fn sysctls_of_all_come_before_those_of_one() {
    let wanted = network(
        Vec::new(),
        &[
            ("net.ipv4.conf.eth0.forwarding", "0"),
            ("net/ipv4/conf/eth0.1/forwarding", "0"),
            ("net.ipv4.neigh.default.gc_stale_time", "9"),
            ("net.ipv6.conf.all.disable_ipv6", "0"),
            ("net.ipv4.ip_forward", "1"),
            ("net.core.somaxconn", "1"),
        ],
    );
    let order: Vec<&str> = ordered(&wanted)
        .unwrap()
        .iter()
        .map(|(_, name, _)| *name)
        .collect();
    assert_eq!(
        order,
        [
            "net.core.somaxconn",
            "net.ipv4.ip_forward",
            "net.ipv4.neigh.default.gc_stale_time",
            "net.ipv6.conf.all.disable_ipv6",
            "net.ipv4.conf.eth0.forwarding",
            "net/ipv4/conf/eth0.1/forwarding",
        ]
    );
}

/// A tree like sysfs, with lo, a bridge, two devices and three slots, of which one has a driver.
fn sysfs() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let make = |path: &str| std::fs::create_dir_all(root.path().join(path)).unwrap();
    for (name, index, device) in [
        ("lo", 1, false),
        ("eth0", 12, true),
        ("a", 5, true),
        ("br0", 4, false),
    ] {
        make(&format!("class/net/{name}"));
        if device {
            make(&format!("class/net/{name}/device"));
        }
        let path = root.path().join(format!("class/net/{name}/ifindex"));
        std::fs::write(path, format!("{index}\n")).unwrap();
    }
    make("bus/platform/drivers/virtio-mmio");
    make("bus/platform/devices/virtio-mmio.0/driver");
    make("bus/platform/devices/virtio-mmio.7");
    make("bus/platform/devices/serial8250");
    root
}

#[test]
fn devices_are_found_in_their_order_and_slots_without_a_driver_are_looked_at_again() {
    let root = sysfs();
    assert_eq!(devices::present(root.path()).unwrap(), [5, 12]);
    devices::look_again(root.path()).unwrap();
    let bind = root.path().join("bus/platform/drivers/virtio-mmio/bind");
    assert_eq!(std::fs::read_to_string(bind).unwrap(), "virtio-mmio.7");
}
