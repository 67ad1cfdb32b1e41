//! What the namespace's kernel knows at one moment.

use std::{collections::HashSet, fs};

use crate::netns::{
    Error, Step,
    link::Link,
    message::{Message, field},
    redirect,
    socket::Socket,
};

/// RTEXT_FILTER_SKIP_STATS (linux/rtnetlink.h): links without their counters.
const WITHOUT_COUNTERS: u32 = 1 << 3;

/// Dumps, unparsed but for the links.
pub(super) struct Snapshot {
    pub(super) links: Vec<Link>,
    pub(super) addresses: Vec<Message>,
    pub(super) routes: Vec<Message>,
    /// Neighbours, and neighbours that the namespace answers for.
    pub(super) neighbours: Vec<Message>,
    pub(super) rules: Vec<Message>,
    /// Sysctls of all interfaces together.
    pub(super) all: Vec<(&'static str, i32)>,
    /// Links with an ingress or clsact qdisc.
    pub(super) ingress: Vec<u32>,
}

impl Snapshot {
    pub(super) fn take(socket: &mut Socket) -> Result<Snapshot, Error> {
        let mut dump = |message: Message, what| socket.dump(message).step("list", what);
        let internet = |mut messages: Vec<Message>| {
            // A dump of all families has those of multicast routing too.
            let families = [libc::AF_INET as u8, libc::AF_INET6 as u8];
            messages.retain(|message| families.contains(&message.byte(field::FAMILY)));
            messages
        };
        let links = Message::new(libc::RTM_GETLINK, 0)
            .with(libc::IFLA_EXT_MASK, &WITHOUT_COUNTERS.to_ne_bytes());
        let mut proxies = Message::new(libc::RTM_GETNEIGH, 0);
        proxies.set_byte(field::NEIGHBOUR_FLAGS, libc::NTF_PROXY);
        let mut neighbours = dump(Message::new(libc::RTM_GETNEIGH, 0), "neighbours")?;
        neighbours.extend(dump(proxies, "proxied neighbours")?);
        Ok(Snapshot {
            links: dump(links, "links")?.iter().map(Link::parse).collect(),
            addresses: internet(dump(Message::new(libc::RTM_GETADDR, 0), "addresses")?),
            routes: internet(dump(Message::new(libc::RTM_GETROUTE, 0), "routes")?),
            neighbours: internet(neighbours),
            rules: internet(dump(Message::new(libc::RTM_GETRULE, 0), "rules")?),
            all: of_all_interfaces(),
            ingress: redirect::with_ingress(socket).step("list", "qdiscs")?,
        })
    }

    pub(super) fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// Links with an address that somebody chose: of a wider scope than the link.
    pub(super) fn addressed(&self) -> HashSet<u32> {
        let chosen = |address: &&Message| address.byte(field::SCOPE) < libc::RT_SCOPE_LINK;
        let addresses = self.addresses.iter().filter(chosen);
        addresses
            .map(|address| address.number(field::INDEX))
            .collect()
    }
}

/// Sysctls that decide what an interface answers and whom it reaches: beneath net.ipv4.conf.NAME, number in IFLA_INET_CONF
/// (IPV4_DEVCONF_* - 1, linux/ip.h). All are 0 unless somebody sets them.
pub(super) const IPV4: [(&str, usize); 9] = [
    ("forwarding", 0),
    ("proxy_arp", 2),
    ("rp_filter", 7),
    ("arp_announce", 17),
    ("arp_ignore", 18),
    ("arp_accept", 20),
    ("arp_notify", 21),
    ("accept_local", 22),
    ("route_localnet", 25),
];
/// Beneath net.ipv6.conf.NAME, number in IFLA_INET6_CONF (DEVCONF_*, linux/ipv6.h), and what the kernel begins with.
pub(super) const IPV6: [(&str, usize, i32); 6] = [
    ("forwarding", 0, 0),
    ("accept_ra", 3, 1),
    ("autoconf", 5, 1),
    ("proxy_ndp", 22, 0),
    ("disable_ipv6", 26, 0),
    ("accept_dad", 27, 1),
];

/// Those of `all` that count beside an interface's own, where they are not 0, as the kernel begins.
fn of_all_interfaces() -> Vec<(&'static str, i32)> {
    const NAMES: [&str; 12] = [
        "net.ipv4.conf.all.forwarding",
        "net.ipv4.conf.all.proxy_arp",
        "net.ipv4.conf.all.rp_filter",
        "net.ipv4.conf.all.arp_announce",
        "net.ipv4.conf.all.arp_ignore",
        "net.ipv4.conf.all.arp_accept",
        "net.ipv4.conf.all.arp_notify",
        "net.ipv4.conf.all.accept_local",
        "net.ipv4.conf.all.route_localnet",
        "net.ipv6.conf.all.forwarding",
        "net.ipv6.conf.all.proxy_ndp",
        "net.ipv6.conf.all.disable_ipv6",
    ];
    let value = |name: &&'static str| {
        // /proc/sys/net is that of the reading thread's namespace. What is not there the kernel does not have.
        let text = fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/"))).ok()?;
        let value = text.trim().parse().ok()?;
        (value != 0).then_some((*name, value))
    };
    NAMES.iter().filter_map(value).collect()
}
