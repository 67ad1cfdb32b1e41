//! The TCP ports that somebody listens on and that loopback reaches, as the kernel tells them (sock_diag(7)).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bulkhead_agent_protocol::agent;
use linux::netlink::{HEADER, Netlink, Refusal, attributes, read_u32};
use nix::sys::socket::SockProtocol;

/// Most ports of a family that the host is told.
const MAX_PORTS: usize = 1024;

/// SOCK_DIAG_BY_FAMILY, and the size of struct inet_diag_req_v2 and inet_diag_msg.
const BY_FAMILY: u16 = 20;
const REQUEST: usize = 56;
const ANSWER: usize = 72;
/// INET_DIAG_SKV6ONLY.
const ONLY_IPV6: u16 = 11;
/// TCP_LISTEN of include/net/tcp_states.h.
const LISTEN: u32 = 10;

/// What the kernel tells of a listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Listener {
    address: IpAddr,
    port: u16,
    /// Interface that it is bound to; 0: none.
    interface: u32,
    /// It takes no IPv4 connections at an IPv6 address.
    only_ipv6: bool,
    /// The kernel's name of the socket, never used again.
    cookie: u64,
}

impl Listener {
    /// Reads struct inet_diag_msg and the attributes after it.
    fn read(message: &[u8], family: libc::c_int) -> Option<Self> {
        let (message, rest) = message.split_at_checked(ANSWER)?;
        let source = &message[8..24];
        let address = match family {
            libc::AF_INET => IpAddr::from(*source.first_chunk::<4>()?),
            _ => IpAddr::from(*source.first_chunk::<16>()?),
        };
        let cookie = u64::from(read_u32(message, 44)?) | u64::from(read_u32(message, 48)?) << 32;
        let only_ipv6 = attributes(rest).any(|(kind, value)| kind == ONLY_IPV6 && *value != [0]);
        Some(Self {
            address,
            port: u16::from_be_bytes([message[4], message[5]]),
            interface: read_u32(message, 40)?,
            only_ipv6,
            cookie,
        })
    }

    fn reached_at_ipv4(&self) -> bool {
        match self.address {
            IpAddr::V4(address) => is_loopback(address),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => !self.only_ipv6,
            IpAddr::V6(address) => address.to_ipv4_mapped().is_some_and(is_loopback),
        }
    }

    fn reached_at_ipv6(&self) -> bool {
        [Ipv6Addr::UNSPECIFIED, Ipv6Addr::LOCALHOST]
            .map(IpAddr::V6)
            .contains(&self.address)
    }
}

fn is_loopback(address: Ipv4Addr) -> bool {
    [Ipv4Addr::UNSPECIFIED, Ipv4Addr::LOCALHOST].contains(&address)
}

/// What listens at one moment.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Snapshot {
    pub(super) ports: agent::Listeners,
    /// Ports that do not fit in.
    pub(super) left_out: usize,
    /// Those of the sockets asked about that listen.
    pub(super) listening: HashSet<u64>,
}

/// Asks the kernel what listens in the network namespace of the calling thread, and which of the sockets in `asked` do.
pub(super) fn read(asked: &HashMap<u64, bool>) -> Result<Snapshot, Refusal> {
    let mut kernel = Netlink::open(SockProtocol::NetlinkSockDiag)?;
    let (mut ipv4, mut ipv6) = (BTreeSet::new(), BTreeSet::new());
    let mut listening = HashSet::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut request = [0; HEADER + REQUEST];
        request[0..4].copy_from_slice(&((HEADER + REQUEST) as u32).to_ne_bytes());
        request[4..6].copy_from_slice(&BY_FAMILY.to_ne_bytes());
        request[HEADER] = family as u8;
        request[HEADER + 1] = libc::IPPROTO_TCP as u8;
        request[HEADER + 4..HEADER + 8].copy_from_slice(&(1u32 << LISTEN).to_ne_bytes());
        // What changes meanwhile rings again.
        kernel.dump(&mut request, |answer| {
            let Some(listener) = Listener::read(answer.body, family) else {
                return;
            };
            if asked.contains_key(&listener.cookie) {
                listening.insert(listener.cookie);
            }
            // Bound to another interface it does not hear loopback.
            if listener.interface > 1 {
                return;
            }
            if listener.reached_at_ipv4() {
                ipv4.insert(listener.port);
            }
            if listener.reached_at_ipv6() {
                ipv6.insert(listener.port);
            }
        })?;
    }
    let lowest =
        |ports: &BTreeSet<u16>| ports.iter().take(MAX_PORTS).map(|p| (*p).into()).collect();
    Ok(Snapshot {
        ports: agent::Listeners {
            ipv4: lowest(&ipv4),
            ipv6: lowest(&ipv6),
            ..Default::default()
        },
        left_out: [ipv4, ipv6]
            .iter()
            .map(|ports| ports.len().saturating_sub(MAX_PORTS))
            .sum(),
        listening,
    })
}
