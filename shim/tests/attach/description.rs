//! What the guest is told, read by somebody else's parser.

use std::{collections::HashMap, net::IpAddr};

use bulkhead_agent_protocol::agent;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage as Request,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteNextHopFlags, RouteType},
    rule::{RuleAttribute, RuleMessage},
};

use super::world::{World, with_world};

/// The value of a message's first attribute of a kind.
macro_rules! value_of {
    ($message:expr, $kind:path) => {
        $message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                $kind(value) => Some(value.clone()),
                _ => None,
            })
    };
}

#[derive(Default)]
struct Told {
    order: Vec<&'static str>,
    links: Vec<LinkMessage>,
    addresses: Vec<AddressMessage>,
    neighbours: Vec<NeighbourMessage>,
    routes: Vec<RouteMessage>,
    rules: Vec<RuleMessage>,
    sysctls: HashMap<String, String>,
    devices: u32,
}

fn read(network: &agent::Network) -> Told {
    let mut told = Told {
        devices: network.devices,
        sysctls: network.sysctls.clone(),
        ..Told::default()
    };
    for request in &network.requests {
        let length = u32::from_ne_bytes(request[..4].try_into().unwrap()) as usize;
        assert_eq!(length, request.len(), "one whole message");
        let message = NetlinkMessage::<Request>::deserialize(request).unwrap();
        let NetlinkPayload::InnerMessage(message) = message.payload else {
            panic!("{message:?}");
        };
        let (kind, ()) = match message {
            Request::NewLink(it) | Request::SetLink(it) => ("link", told.links.push(it)),
            Request::NewAddress(it) => ("address", told.addresses.push(it)),
            Request::NewNeighbour(it) => ("neighbour", told.neighbours.push(it)),
            Request::NewRoute(it) => ("route", told.routes.push(it)),
            Request::NewRule(it) => ("rule", told.rules.push(it)),
            other => panic!("{other:?}"),
        };
        if told.order.last() != Some(&kind) {
            told.order.push(kind);
        }
    }
    told
}

fn told_of(world: &World) -> Told {
    let mut ledger = world.ledger("told");
    let mut network = world.attach("pod", &mut ledger).unwrap();
    let told = read(&network.for_guest());
    drop(network.devices());
    assert!(ledger.teardown().is_empty());
    told
}

fn renames(told: &Told) -> Vec<(u32, String)> {
    let name =
        |link: &LinkMessage| Some((link.header.index, value_of!(link, LinkAttribute::IfName)?));
    told.links.iter().filter_map(name).collect()
}

fn address_of(message: &AddressMessage) -> (u32, IpAddr, u8) {
    let address = value_of!(message, AddressAttribute::Address);
    (
        message.header.index,
        address.unwrap(),
        message.header.prefix_len,
    )
}

fn flags_of(told: &Told, address: &str) -> AddressFlags {
    let address: IpAddr = address.parse().unwrap();
    let mut messages = told.addresses.iter();
    let message = messages.find(|message| address_of(message).1 == address);
    value_of!(message.unwrap(), AddressAttribute::Flags).unwrap()
}

/// The route to this network and prefix.
fn route<'a>(told: &'a Told, to: Option<&str>, prefix: u8, ipv6: bool) -> &'a RouteMessage {
    let to = to.map(|to| match to.parse().unwrap() {
        IpAddr::V4(to) => RouteAddress::Inet(to),
        IpAddr::V6(to) => RouteAddress::Inet6(to),
    });
    let found = told.routes.iter().find(|route| {
        let destination = value_of!(route, RouteAttribute::Destination);
        let family = u8::from(route.header.address_family) == libc::AF_INET6 as u8;
        destination == to && route.header.destination_prefix_length == prefix && family == ipv6
    });
    found.unwrap_or_else(|| panic!("no route to {to:?}/{prefix}: {:#?}", told.routes))
}

#[test]
fn a_namespace_as_it_is_told() {
    with_world(|world| {
        world.join();
        world.veth("net1", 1);
        world.setup(
            "pod ip link set lo up
             pod ip link set eth0 mtu 1400
             pod sysctl -qw net.ipv6.conf.eth0.accept_ra=0
             pod sysctl -qw net.ipv4.conf.net1.rp_filter=2
             pod sysctl -qw net.ipv4.conf.all.arp_ignore=1
             pod ip addr add 10.88.0.5/16 brd + dev eth0
             pod ip addr add 10.5.0.1/32 dev lo
             pod ip addr add 192.168.7.2/24 dev net1
             pod ip addr add 10.9.9.1 peer 10.9.9.2/32 dev net1
             pod ip addr add fd00::5/64 dev eth0 nodad
             pod ip addr add fd01::5/64 dev net1 nodad noprefixroute
             pod ip addr add fd02::5/64 dev net1 nodad valid_lft 7000 preferred_lft 6000
             pod ip route del 192.168.7.0/24 dev net1
             pod ip route add 169.254.1.1 dev eth0 scope link
             pod ip route add default via 169.254.1.1 dev eth0
             pod ip route add 10.96.0.0/12 via 192.0.2.1 dev net1 onlink mtu 1300 src 192.168.7.2
             pod ip route add 10.77.0.0/16 nexthop via 10.88.0.1 dev eth0 weight 2 nexthop via 192.0.2.7 dev net1 onlink
             pod ip route add unreachable 10.66.0.0/16
             pod ip route add 10.55.0.0/16 dev net1 table 100
             pod ip route add local 10.44.0.0/16 dev lo
             pod ip -6 route add default via fd00::1 dev eth0
             pod ip -6 route add fd77::/64 nexthop via fd00::1 dev eth0 nexthop via fd02::1 dev net1
             pod ip neigh add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent
             pod ip neigh add 10.88.0.9 lladdr ee:ee:ee:ee:ee:09 dev eth0 nud reachable
             pod ip neigh add proxy fd00::99 dev net1
             pod ip rule add from 192.168.7.2 lookup 100 priority 500
             pod ip -6 rule add iif net1 lookup 100 priority 501",
        );
        let told = told_of(world);
        assert_eq!(told.devices, 2);
        assert_eq!(
            told.order,
            ["link", "address", "link", "neighbour", "route", "rule"]
        );
        assert_eq!(
            renames(&told),
            [(3, "net1".to_string())],
            "eth0 has its name"
        );
        check_links(&told);
        check_addresses(&told);
        check_routes(&told);
        check_the_rest(&told);
    });
}

fn check_links(told: &Told) {
    let has = |index, attribute: LinkAttribute| {
        told.links
            .iter()
            .any(|link| link.header.index == index && link.attributes.contains(&attribute))
    };
    assert!(has(2, LinkAttribute::Mtu(1400)) && has(3, LinkAttribute::Mtu(1500)));
    assert!(has(2, LinkAttribute::Address(vec![2, 0, 0, 0, 0, 2])));
    assert!(has(3, LinkAttribute::Address(vec![2, 0, 0, 0, 1, 2])));
    for index in 1..=3 {
        let is_up = |link: &&LinkMessage| {
            link.header.index == index && link.header.flags.contains(LinkFlags::Up)
        };
        assert_eq!(told.links.iter().filter(is_up).count(), 1, "{index}");
    }
}

fn check_addresses(told: &Told) {
    let mut all: Vec<_> = told.addresses.iter().map(address_of).collect();
    all.retain(|(_, address, _)| match address {
        IpAddr::V6(address) => !address.is_unicast_link_local(),
        IpAddr::V4(_) => true,
    });
    all.sort();
    let parse =
        |(index, address, prefix): (u32, &str, u8)| (index, address.parse().unwrap(), prefix);
    let expected = [
        (1, "10.5.0.1", 32),
        (2, "10.88.0.5", 16),
        (2, "fd00::5", 64),
        (3, "10.9.9.2", 32), // the peer
        (3, "192.168.7.2", 24),
        (3, "fd01::5", 64),
        (3, "fd02::5", 64),
    ]
    .map(parse);
    assert_eq!(all, expected);
    let prefix = AddressFlags::Noprefixroute;
    for (address, without_route) in [
        ("10.88.0.5", false),
        ("192.168.7.2", true), // its route was removed
        ("10.9.9.2", false),
        ("fd00::5", false),
        ("fd01::5", true),
        ("fd02::5", false),
    ] {
        assert_eq!(
            flags_of(told, address).contains(prefix),
            without_route,
            "{address}"
        );
    }
    for address in &told.addresses {
        let (_, value, _) = address_of(address);
        let flags = flags_of(told, &value.to_string());
        assert_eq!(
            flags.contains(AddressFlags::Nodad),
            value.is_ipv6(),
            "{value}"
        );
        let lives = |attribute: &AddressAttribute| matches!(attribute, AddressAttribute::CacheInfo(info) if info.ifa_valid <= 7000 && info.ifa_valid > 6000);
        let mortal = address.attributes.iter().any(lives);
        assert_eq!(
            mortal,
            value == "fd02::5".parse::<IpAddr>().unwrap(),
            "{value}"
        );
    }
    let broadcast = AddressAttribute::Broadcast("10.88.255.255".parse().unwrap());
    assert!(
        told.addresses
            .iter()
            .any(|address| address.attributes.contains(&broadcast))
    );
    let link_local = |address: &&AddressMessage| match address_of(address) {
        (_, IpAddr::V6(address), _) => address.is_unicast_link_local(),
        _ => false,
    };
    assert_eq!(told.addresses.iter().filter(link_local).count(), 2);
}

fn check_routes(told: &Told) {
    let has = |route: &RouteMessage, attribute| {
        assert!(
            route.attributes.contains(&attribute),
            "{attribute:?} in {route:#?}"
        );
    };
    let inet = |address: &str| RouteAddress::Inet(address.parse().unwrap());
    let inet6 = |address: &str| RouteAddress::Inet6(address.parse().unwrap());
    let default = route(told, None, 0, false);
    has(default, RouteAttribute::Gateway(inet("169.254.1.1")));
    has(default, RouteAttribute::Oif(2));
    let service = route(told, Some("10.96.0.0"), 12, false);
    has(service, RouteAttribute::Oif(3));
    has(service, RouteAttribute::PrefSource(inet("192.168.7.2")));
    assert!(
        format!("{:?}", service.header.flags)
            .to_lowercase()
            .contains("onlink"),
        "{service:?}"
    );
    assert!(format!("{service:?}").contains("Mtu(1300)"), "{service:?}");
    let hops = route(told, Some("10.77.0.0"), 16, false);
    let hops = value_of!(hops, RouteAttribute::MultiPath).unwrap();
    let hops: Vec<_> = hops
        .iter()
        .map(|hop| (hop.interface_index, hop.hops, hop.flags))
        .collect();
    assert_eq!(
        hops,
        [
            (2, 1, RouteNextHopFlags::empty()),
            (3, 0, RouteNextHopFlags::Onlink)
        ]
    );
    assert_eq!(
        route(told, Some("10.66.0.0"), 16, false).header.kind,
        RouteType::Unreachable
    );
    has(
        route(told, Some("10.55.0.0"), 16, false),
        RouteAttribute::Table(100),
    );
    has(
        route(told, Some("10.44.0.0"), 16, false),
        RouteAttribute::Oif(1),
    );
    has(
        route(told, None, 0, true),
        RouteAttribute::Gateway(inet6("fd00::1")),
    );
    route(told, Some("fd77::"), 64, true);
    // Those of the kernel's own making it makes in the guest too.
    assert_eq!(told.routes.len(), 9, "{:#?}", told.routes);
    let gateway = |route: &RouteMessage| {
        value_of!(route, RouteAttribute::Gateway).is_some()
            || value_of!(route, RouteAttribute::MultiPath).is_some()
    };
    let first = told.routes.iter().position(gateway).unwrap();
    assert!(
        told.routes[first..].iter().all(gateway),
        "{:#?}",
        told.routes
    );
}

fn check_the_rest(told: &Told) {
    let neighbours: Vec<_> = told
        .neighbours
        .iter()
        .map(|neighbour| {
            let to = match value_of!(neighbour, NeighbourAttribute::Destination) {
                Some(NeighbourAddress::Inet(to)) => IpAddr::V4(to),
                Some(NeighbourAddress::Inet6(to)) => IpAddr::V6(to),
                other => panic!("{other:?}"),
            };
            (neighbour.header.ifindex, to.to_string())
        })
        .collect();
    assert_eq!(
        neighbours,
        [(2, "169.254.1.1".into()), (3, "fd00::99".into())]
    );
    let priority = |rule: &RuleMessage| value_of!(rule, RuleAttribute::Priority).unwrap();
    let mut rules: Vec<_> = told.rules.iter().map(priority).collect();
    rules.sort();
    assert_eq!(rules, [500, 501]);
    let sysctl = |name: &str| told.sysctls.get(name).map(String::as_str);
    assert_eq!(sysctl("net.ipv6.conf.eth0.accept_ra"), Some("0"));
    assert_eq!(
        sysctl("net.ipv6.conf.net1.accept_ra"),
        None,
        "as the kernel begins"
    );
    assert_eq!(sysctl("net.ipv4.conf.net1.rp_filter"), Some("2"));
    assert_eq!(sysctl("net.ipv4.conf.all.arp_ignore"), Some("1"));
}

#[test]
fn names_that_cross_are_given_one_after_the_other() {
    with_world(|world| {
        world.veth("first", 0);
        world.veth("eth0", 1);
        world.veth("eth1", 2);
        world.setup(
            "pod ip link set first down
             pod ip link set first name eth2",
        );
        let told = told_of(world);
        let steps = renames(&told);
        let mut names: HashMap<u32, String> =
            (0..3).map(|at| (at + 2, format!("eth{at}"))).collect();
        for (index, name) in steps {
            assert!(
                !names.values().any(|taken| *taken == name),
                "{name} is taken"
            );
            names.insert(index, name);
        }
        assert_eq!(names[&2], "eth2");
        assert_eq!(names[&3], "eth0");
        assert_eq!(names[&4], "eth1");
    });
}
