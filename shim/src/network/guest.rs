//! What the guest is told, so that its network is that of the namespace: messages of the namespace's kernel, turned into requests
//! to the guest's.

use std::collections::HashMap;

use bulkhead_agent_protocol::agent;

use super::{
    routes,
    snapshot::{IPV4, IPV6, Snapshot},
};
use crate::netns::{
    link::Link,
    message::{self, Attribute, Message, field},
};

/// Attributes of addresses (linux/if_addr.h) that libc does not have.
const IFA_FLAGS: u16 = 8;
const IFA_F_MANAGETEMPADDR: u32 = 0x100;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
const IFA_F_MCAUTOJOIN: u32 = 0x400;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_EUI64: u8 = 0;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const IN6_ADDR_GEN_MODE_RANDOM: u8 = 3;
/// Attributes of rules (linux/fib_rules.h).
const FRA_PRIORITY: u16 = 6;
const FIB_RULE_INVERT: u32 = 2;
/// `lo` has this index in every namespace.
const LO: u32 = 1;

/// A device of the guest.
#[derive(Clone, Debug)]
pub(super) struct Given {
    /// Index of the interface in the namespace.
    pub(super) index: u32,
    /// Its name.
    pub(super) name: String,
    /// The tap.
    pub(super) tap: String,
    /// We have opened the interface for all groups, which is not the guest's matter.
    pub(super) groups: bool,
}

/// The number by which a request names the guest's Nth device.
fn number(position: usize) -> u32 {
    position as u32 + 2 // a pod has few devices
}

/// All requests and sysctls. The first `known` devices have their names already.
pub(super) fn describe(snapshot: &Snapshot, devices: &[Given], known: usize) -> agent::Network {
    let numbers: HashMap<u32, u32> = devices
        .iter()
        .enumerate()
        .map(|(position, device)| (device.index, number(position)))
        .chain([(LO, LO)])
        .collect();
    let mut requests = renames(devices, known);
    let mut sysctls: Vec<(String, i32)> = snapshot
        .all
        .iter()
        .map(|(name, value)| ((*name).into(), *value))
        .collect();
    let mut after = Vec::new();
    for link in &snapshot.links {
        let Some(number) = numbers.get(&link.index) else {
            continue;
        };
        let device = devices.iter().find(|device| device.index == link.index);
        requests.extend(links(link, *number, device));
        after.extend(address_mode(link, *number));
        sysctls.extend(sysctls_of(link));
    }
    requests.extend(
        in_order_of_making(&snapshot.addresses)
            .filter_map(|message| address(message, snapshot, &numbers)),
    );
    requests.extend(after);
    requests.extend(
        snapshot
            .neighbours
            .iter()
            .filter_map(|message| neighbour(message, &numbers)),
    );
    requests.extend(routes::translate(&snapshot.routes, &numbers));
    requests.extend(snapshot.rules.iter().filter_map(rule));
    agent::Network {
        devices: devices.len() as u32,
        requests: (1..)
            .zip(&requests)
            .map(|(sequence, request)| request.bytes(sequence))
            .collect(),
        sysctls: sysctls
            .into_iter()
            .map(|(name, value)| (name, value.to_string()))
            .collect(),
        ..Default::default()
    }
}

fn request(kind: u16, flags: libc::c_int) -> Message {
    Message::new(kind, libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags)
}

/// A guest names its devices eth0, eth1, ... Those whose name another one is to have step aside first.
fn renames(devices: &[Given], known: usize) -> Vec<Message> {
    let has = |position: usize| match position < known {
        true => devices[position].name.clone(),
        false => format!("eth{position}"),
    };
    let rename = |position: usize, name: &str| {
        request(libc::RTM_NEWLINK, 0)
            .with_number(field::INDEX, number(position))
            .with_name(libc::IFLA_IFNAME, name)
    };
    let to_rename =
        || (0..devices.len()).filter(|position| devices[*position].name != has(*position));
    let is_in_the_way =
        |position: &usize| to_rename().any(|other| devices[other].name == has(*position));
    let aside = to_rename()
        .filter(is_in_the_way)
        .map(|position| rename(position, &format!("bulkhead{position}")));
    let named = to_rename().map(|position| rename(position, &devices[position].name));
    aside.chain(named).collect()
}

/// What it is, then its flags, up among them.
fn links(link: &Link, number: u32, device: Option<&Given>) -> Vec<Message> {
    let mut set = request(libc::RTM_NEWLINK, 0).with_number(field::INDEX, number);
    let mut mask = (libc::IFF_UP | libc::IFF_NOARP | libc::IFF_PROMISC | libc::IFF_ALLMULTI) as u32;
    let mut all = Vec::new();
    match device {
        // Nothing but up.
        None => mask = libc::IFF_UP as u32,
        Some(device) => {
            if device.groups {
                mask &= !libc::IFF_ALLMULTI as u32;
            }
            set = set
                .with(libc::IFLA_ADDRESS, &link.address)
                .with(libc::IFLA_MTU, &link.mtu.to_ne_bytes())
                .with(libc::IFLA_TXQLEN, &link.queue_length.to_ne_bytes());
            // No address of the guest kernel's own making until it has those of the namespace: it would probe the one that
            // the namespace has for a second, and nothing could use it meanwhile.
            if link.address_mode.is_some() {
                set = set.with(libc::IFLA_AF_SPEC, &address_mode_of(IN6_ADDR_GEN_MODE_NONE));
            }
            all.push(set.clone());
        }
    }
    let flags = request(libc::RTM_NEWLINK, 0)
        .with_number(field::INDEX, number)
        .with_number(field::LINK_FLAGS, link.flags & mask)
        .with_number(field::LINK_MASK, mask);
    // lo that is down is nobody's wish: a namespace begins so.
    if device.is_some() || link.is(libc::IFF_UP) {
        all.push(flags);
    }
    all
}

fn address_mode_of(mode: u8) -> Vec<u8> {
    let mode = message::nested(&[(IFLA_INET6_ADDR_GEN_MODE, &[mode])]);
    message::nested(&[(libc::AF_INET6 as u16, &mode)])
}

/// How the kernel makes addresses from now on. The mode with a stable secret stays off: the secret is the namespace's.
fn address_mode(link: &Link, number: u32) -> Option<Message> {
    let mode = link
        .address_mode
        .filter(|mode| [IN6_ADDR_GEN_MODE_EUI64, IN6_ADDR_GEN_MODE_RANDOM].contains(mode))?;
    (number != LO).then(|| {
        request(libc::RTM_NEWLINK, 0)
            .with_number(field::INDEX, number)
            .with(libc::IFLA_AF_SPEC, &address_mode_of(mode))
    })
}

fn sysctls_of(link: &Link) -> Vec<(String, i32)> {
    // As sysctl(8) writes a dot of a name.
    let name = link.name.replace('.', "/");
    let ipv4 = IPV4.iter().map(|(key, at)| {
        let value = link.ipv4.get(*at).copied().filter(|value| *value != 0);
        value.map(|value| (format!("net.ipv4.conf.{name}.{key}"), value))
    });
    let ipv6 = IPV6.iter().map(|(key, at, begins)| {
        let value = link.ipv6.get(*at).copied();
        // lo neither probes nor listens to routers.
        let counts = !link.is(libc::IFF_LOOPBACK) || ["forwarding", "disable_ipv6"].contains(key);
        let value = value.filter(|value| value != begins && counts);
        value.map(|value| (format!("net.ipv6.conf.{name}.{key}"), value))
    });
    ipv4.chain(ipv6).flatten().collect()
}

/// A kernel lists IPv4's addresses in this order and IPv6's of one scope the other way round.
fn in_order_of_making(addresses: &[Message]) -> impl Iterator<Item = &Message> {
    let of = move |family: libc::c_int| {
        addresses
            .iter()
            .filter(move |message| message.byte(field::FAMILY) == family as u8)
    };
    of(libc::AF_INET).chain(of(libc::AF_INET6).rev())
}

fn address(message: &Message, snapshot: &Snapshot, numbers: &HashMap<u32, u32>) -> Option<Message> {
    let index = message.number(field::INDEX);
    let number = *numbers.get(&index)?;
    let (family, prefix) = (message.byte(field::FAMILY), message.byte(field::PREFIX));
    let value = message
        .get(libc::IFA_ADDRESS)
        .or_else(|| message.get(libc::IFA_LOCAL))?;
    let of_loopback = match family == libc::AF_INET as u8 {
        true => (value, prefix) == (&[127, 0, 0, 1][..], 8),
        false => value == std::net::Ipv6Addr::LOCALHOST.octets(),
    };
    if number == LO && of_loopback {
        return None;
    }
    let mut flags = message
        .get_number(IFA_FLAGS)
        .unwrap_or_else(|| message.byte(field::ADDRESS_FLAGS).into());
    if !has_prefix_route(message, value, snapshot) {
        flags |= IFA_F_NOPREFIXROUTE;
    }
    flags &=
        IFA_F_NOPREFIXROUTE | IFA_F_MANAGETEMPADDR | IFA_F_MCAUTOJOIN | libc::IFA_F_HOMEADDRESS;
    if family == libc::AF_INET6 as u8 {
        // The namespace has probed it, or was told not to.
        flags |= libc::IFA_F_NODAD;
    }
    let mut request = request(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
    request.set_byte(field::FAMILY, family);
    request.set_byte(field::PREFIX, prefix);
    request.set_byte(field::SCOPE, message.byte(field::SCOPE));
    request.set_number(field::INDEX, number);
    let forever = |value: &[u8]| value.len() < 8 || value[..8] == [0xff; 8];
    request.attributes = message
        .attributes
        .iter()
        .filter(|attribute| match attribute.kind {
            IFA_FLAGS => false,
            // Preferred and valid lifetime first.
            libc::IFA_CACHEINFO => !forever(&attribute.value),
            _ => true,
        })
        .cloned()
        .collect();
    Some(request.with(IFA_FLAGS, &flags.to_ne_bytes()))
}

/// Whether the namespace's kernel has the route to the network that an address is in, or would have it. CNI's ptp plugin removes
/// it, so that even neighbours in the network are reached by way of the gateway: then the guest's kernel must not make it either.
fn has_prefix_route(address: &Message, value: &[u8], snapshot: &Snapshot) -> bool {
    let index = address.number(field::INDEX);
    let prefix = address.byte(field::PREFIX);
    let running = snapshot.link(index).is_some_and(|link| {
        link.is(libc::IFF_UP) && link.is(libc::IFF_RUNNING) && !link.is(libc::IFF_LOOPBACK)
    });
    let host = usize::from(prefix) >= value.len() * 8;
    if !running || host {
        return true;
    }
    let network = masked(value, prefix);
    snapshot.routes.iter().any(|route| {
        routes::is_of_the_kernel(route)
            && route.byte(field::PREFIX) == prefix
            && route.get_number(libc::RTA_OIF) == Some(index)
            && route.get(libc::RTA_DST) == Some(&network)
    })
}

fn masked(value: &[u8], prefix: u8) -> Vec<u8> {
    let mask = |(at, byte): (usize, &u8)| {
        let bits = usize::from(prefix).saturating_sub(at * 8).min(8);
        byte & !(0xff_u16 >> bits) as u8
    };
    value.iter().enumerate().map(mask).collect()
}

/// Neighbours that somebody has written down; the others the guest finds itself.
fn neighbour(message: &Message, numbers: &HashMap<u32, u32>) -> Option<Message> {
    let number = numbers.get(&message.number(field::INDEX))?;
    let state = message.half(field::NEIGHBOUR_STATE);
    let flags = message.byte(field::NEIGHBOUR_FLAGS);
    let proxied = flags & libc::NTF_PROXY != 0;
    if !proxied && state & libc::NUD_PERMANENT == 0 {
        return None;
    }
    let mut request = request(libc::RTM_NEWNEIGH, libc::NLM_F_CREATE | libc::NLM_F_REPLACE);
    request.set_byte(field::FAMILY, message.byte(field::FAMILY));
    request.set_number(field::INDEX, *number);
    for at in [field::NEIGHBOUR_STATE, field::NEIGHBOUR_STATE + 1] {
        request.set_byte(at, message.byte(at));
    }
    let flags = flags & (libc::NTF_PROXY | libc::NTF_ROUTER);
    request.set_byte(field::NEIGHBOUR_FLAGS, flags);
    let kept = [libc::NDA_DST, libc::NDA_LLADDR];
    let keep = |attribute: &&Attribute| kept.contains(&attribute.kind);
    request.attributes = message.attributes.iter().filter(keep).cloned().collect();
    Some(request)
}

/// Rules but those that every kernel begins with. Interfaces are in them by name, and have the same names in the guest.
fn rule(message: &Message) -> Option<Message> {
    let priority = message.get_number(FRA_PRIORITY).unwrap_or_default();
    let table = libc::c_int::from(message.byte(field::RULE_TABLE));
    let begins = [
        (0, libc::RT_TABLE_LOCAL),
        (32766, libc::RT_TABLE_MAIN),
        (32767, libc::RT_TABLE_DEFAULT),
    ];
    if begins
        .iter()
        .any(|(at, of)| *at == priority && table == libc::c_int::from(*of))
    {
        return None;
    }
    let mut request = message.clone();
    request.kind = libc::RTM_NEWRULE;
    request.flags = self::request(0, libc::NLM_F_CREATE | libc::NLM_F_EXCL).flags;
    // Not whether it is detached, which is the kernel's to say.
    let flags = message.number(field::RULE_FLAGS);
    request.set_number(field::RULE_FLAGS, flags & FIB_RULE_INVERT);
    Some(request)
}
