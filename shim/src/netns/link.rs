//! A link of the namespace: what it is, and whether a guest can have it.

use std::collections::HashSet;

use super::{
    Error,
    message::{self, Message, field},
};

/// Attributes of a link's AF_INET part (linux/if_link.h).
const IFLA_INET_CONF: u16 = 1;
/// And of its AF_INET6 part.
const IFLA_INET6_CONF: u16 = 2;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;

/// Names of our taps are this and six hexadecimal digits.
const TAP_PREFIX: &str = "bulkhead";
/// Devices that the kernel makes in every namespace when their module is loaded.
const FALLBACKS: [&str; 11] = [
    "tunl0",
    "sit0",
    "gre0",
    "gretap0",
    "erspan0",
    "ip_vti0",
    "ip6_vti0",
    "ip6tnl0",
    "ip6gre0",
    "ip6gretap0",
    "teql0",
];

/// What a link's kind means for a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// An Ethernet device whose frames can be redirected.
    Ethernet,
    /// The same, but it gets nothing from a link beneath it that is redirected too.
    Stacked,
    /// The same, and the links enslaved to it belong to it.
    Master,
    /// Refused, for this reason.
    Other(&'static str),
}

impl Kind {
    fn of(name: &str) -> Kind {
        match name {
            // No kind: a physical device, or a virtual function (host-device, SR-IOV). tun: a tap, by its Ethernet address.
            "" | "veth" | "dummy" | "tun" => Kind::Ethernet,
            "macvlan" | "ipvlan" | "vlan" => Kind::Stacked,
            "bridge" | "bond" | "team" => Kind::Master,
            "macvtap" | "ipvtap" => Kind::Other("what opens its character device gets its frames"),
            "vrf" => Kind::Other("routing domains are not repeated in the guest"),
            "netkit" => Kind::Other("its frames have no Ethernet addresses of their own; use veth"),
            "vxlan" | "geneve" | "gretap" | "ip6gretap" | "erspan" | "ip6erspan" | "bareudp" => {
                Kind::Other("the packets that it makes would bypass the guest")
            }
            _ => Kind::Other(
                "only veth, macvlan, ipvlan, vlan, bridge, bond, team, dummy, tap and physical Ethernet devices can be given to a guest",
            ),
        }
    }
}

/// A link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// IFLA_INFO_KIND; empty for a physical device.
    pub(crate) kind: String,
    /// IFF_*
    pub(crate) flags: u32,
    /// ARPHRD_*
    hardware: u16,
    pub(crate) address: Vec<u8>,
    pub(crate) mtu: u32,
    pub(crate) queue_length: u32,
    /// The link it is enslaved to.
    master: Option<u32>,
    /// The link it is made on, if that is in this namespace.
    beneath: Option<u32>,
    /// net.ipv4.conf.NAME.*, by IPV4_DEVCONF_* - 1
    pub(crate) ipv4: Vec<i32>,
    /// net.ipv6.conf.NAME.*, by DEVCONF_*; empty: it has no IPv6.
    pub(crate) ipv6: Vec<i32>,
    /// IN6_ADDR_GEN_MODE_*
    pub(crate) address_mode: Option<u8>,
}

impl Link {
    pub(crate) fn parse(message: &Message) -> Link {
        let info = message.get(libc::IFLA_LINKINFO).unwrap_or_default();
        let families = message.get(libc::IFLA_AF_SPEC).unwrap_or_default();
        let part = |family: libc::c_int, kind| {
            message::find(families, family as u16).and_then(|part| message::find(part, kind))
        };
        let numbers = |bytes: Option<&[u8]>| {
            let words = bytes.unwrap_or_default().chunks_exact(4);
            let number = |word| message::u32_of(word).expect("four bytes") as i32;
            words.map(number).collect()
        };
        let elsewhere = message.get(libc::IFLA_LINK_NETNSID).is_some();
        Link {
            index: message.number(field::INDEX),
            name: message.get_text(libc::IFLA_IFNAME).unwrap_or_default(),
            kind: message::find(info, libc::IFLA_INFO_KIND)
                .map(message::text_of)
                .unwrap_or_default(),
            flags: message.number(field::LINK_FLAGS),
            hardware: message.half(field::HARDWARE),
            address: message.get(libc::IFLA_ADDRESS).unwrap_or_default().to_vec(),
            mtu: message.get_number(libc::IFLA_MTU).unwrap_or_default(),
            queue_length: message.get_number(libc::IFLA_TXQLEN).unwrap_or_default(),
            master: message.get_number(libc::IFLA_MASTER),
            beneath: message
                .get_number(libc::IFLA_LINK)
                .filter(|index| *index != 0 && !elsewhere),
            ipv4: numbers(part(libc::AF_INET, IFLA_INET_CONF)),
            ipv6: numbers(part(libc::AF_INET6, IFLA_INET6_CONF)),
            address_mode: part(libc::AF_INET6, IFLA_INET6_ADDR_GEN_MODE)
                .and_then(|value| value.first().copied()),
        }
    }

    pub(crate) fn is(&self, flag: libc::c_int) -> bool {
        self.flags & flag as u32 != 0
    }

    /// Whether frames for groups that nobody in the namespace has joined do not reach it: what the guest joins, the host cannot
    /// know. A veth passes everything on.
    pub(crate) fn filters_groups(&self) -> bool {
        self.kind != "veth" && !self.is(libc::IFF_ALLMULTI)
    }

    /// A tap of a pod.
    pub(crate) fn is_tap_of_a_pod(&self) -> bool {
        self.kind == "tun" && is_tap_name(&self.name)
    }

    /// Made by the kernel, and used by nobody.
    fn is_fallback(&self) -> bool {
        FALLBACKS.contains(&self.name.as_str()) && !self.is(libc::IFF_UP)
    }

    /// Its Ethernet address.
    pub(crate) fn mac(&self) -> Option<[u8; 6]> {
        let mac: [u8; 6] = self.address.as_slice().try_into().ok()?;
        // The lowest bit of the first byte marks a group's address (IEEE 802-2014 §8.2.2).
        (mac != [0; 6] && mac[0] & 1 == 0).then_some(mac)
    }

    fn refused(&self, reason: impl Into<String>) -> Error {
        Error::Refused {
            interface: self.name.clone(),
            kind: match self.kind.as_str() {
                "" => "physical".into(),
                kind => kind.into(),
            },
            reason: reason.into(),
        }
    }
}

/// A request to set a link's flags to those of `flags` that are in `mask`.
pub(crate) fn flags(index: u32, flags: u32, mask: u32) -> Message {
    Message::new(libc::RTM_NEWLINK, 0)
        .with_number(field::INDEX, index)
        .with_number(field::LINK_FLAGS, flags)
        .with_number(field::LINK_MASK, mask)
}

/// Whether it is a name that [`tap_name`] makes.
pub(crate) fn is_tap_name(name: &str) -> bool {
    name.strip_prefix(TAP_PREFIX).is_some_and(|digits| {
        digits.len() == 6 && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
    })
}

/// A tap's name: no two pods' are the same, so that nobody gives back another one's.
pub(crate) fn tap_name(number: u32) -> String {
    format!("{TAP_PREFIX}{:06x}", number & 0xff_ffff)
}

/// The links that the guest gets, in the order in which the namespace has them. `addressed` are those that have an address which
/// somebody chose.
///
/// Of a bridge and its ports (a bond and its links, a team and its) the guest gets one side: the bridge when it has such an
/// address, and the ports carry on beneath it; else the ports, and the bridge is not the pod's way to anywhere.
///
/// # Errors
/// [`Error::Refused`] for a link that the guest cannot have, and that the pod would miss.
pub(crate) fn for_the_guest<'a>(
    links: &'a [Link],
    addressed: &HashSet<u32>,
) -> Result<Vec<&'a Link>, Error> {
    let find = |index| links.iter().find(|link| link.index == index);
    let is_used_master =
        |link: &Link| Kind::of(&link.kind) == Kind::Master && addressed.contains(&link.index);
    let has_ports = |link: &Link| links.iter().any(|port| port.master == Some(link.index));
    let mut chosen = Vec::new();
    for link in links {
        if link.is(libc::IFF_LOOPBACK) || link.is_tap_of_a_pod() || link.is_fallback() {
            continue;
        }
        if link.hardware != libc::ARPHRD_ETHER {
            return Err(link.refused("it is no Ethernet device"));
        }
        let master = link.master.and_then(find);
        if let Some(master) = master
            && is_used_master(master)
        {
            if addressed.contains(&link.index) {
                let name = &master.name;
                return Err(link.refused(format!(
                    "it is part of {name}, and both have addresses; the guest gets one of them: leave the addresses on {name}"
                )));
            }
            continue;
        }
        match Kind::of(&link.kind) {
            Kind::Other(reason) => return Err(link.refused(reason)),
            Kind::Master if !addressed.contains(&link.index) && has_ports(link) => continue,
            Kind::Stacked => {
                if let Some(beneath) = link.beneath.and_then(find) {
                    return Err(link.refused(format!(
                        "it is made on {}, which the guest gets too and which leaves it no frames; make it on an interface outside the namespace",
                        beneath.name
                    )));
                }
            }
            Kind::Ethernet | Kind::Master => {}
        }
        if link.mac().is_none() {
            return Err(link.refused("it has no Ethernet address of its own"));
        }
        chosen.push(link);
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: u32 = (libc::IFF_UP | libc::IFF_BROADCAST) as u32;

    fn link(index: u32, name: &str, kind: &str) -> Link {
        Link {
            index,
            name: name.into(),
            kind: kind.into(),
            flags: UP,
            hardware: libc::ARPHRD_ETHER,
            address: vec![2, 0, 0, 0, 0, index as u8],
            mtu: 1500,
            queue_length: 1000,
            master: None,
            beneath: None,
            ipv4: Vec::new(),
            ipv6: Vec::new(),
            address_mode: None,
        }
    }

    fn lo() -> Link {
        Link {
            flags: libc::IFF_LOOPBACK as u32,
            hardware: libc::ARPHRD_LOOPBACK,
            ..link(1, "lo", "")
        }
    }

    fn chosen(links: &[Link], addressed: &[u32]) -> Result<Vec<String>, String> {
        let links = [&[lo()], links].concat();
        for_the_guest(&links, &addressed.iter().copied().collect())
            .map(|links| links.iter().map(|link| link.name.clone()).collect())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn what_users_of_runc_have_is_given() {
        for kind in [
            "", "veth", "macvlan", "ipvlan", "vlan", "dummy", "tun", "bridge", "bond",
        ] {
            assert_eq!(
                chosen(&[link(2, "net1", kind)], &[]).unwrap(),
                ["net1"],
                "{kind}"
            );
        }
    }

    #[test]
    fn the_others_are_refused_by_kind_and_name() {
        for kind in [
            "macvtap", "ipvtap", "vrf", "netkit", "vxlan", "geneve", "gretap", "ifb", "odd",
        ] {
            let error = chosen(&[link(2, "net1", kind)], &[2]).unwrap_err();
            assert!(
                error.contains(&format!("interface net1 ({kind})")),
                "{error}"
            );
        }
        let wireguard = Link {
            hardware: libc::ARPHRD_NONE,
            address: Vec::new(),
            ..link(2, "wg0", "wireguard")
        };
        let error = chosen(&[wireguard], &[2]).unwrap_err();
        assert!(
            error.contains("wg0 (wireguard)") && error.contains("Ethernet"),
            "{error}"
        );
        for address in [vec![0; 6], vec![1, 0, 0, 0, 0, 0], vec![2; 20]] {
            let odd = Link {
                address,
                ..link(2, "eth0", "")
            };
            assert!(
                chosen(&[odd], &[2])
                    .unwrap_err()
                    .contains("eth0 (physical)")
            );
        }
    }

    #[test]
    fn what_the_kernel_puts_into_every_namespace_is_no_interface_until_it_is_used() {
        let sit = Link {
            hardware: libc::ARPHRD_SIT,
            flags: 0,
            ..link(2, "sit0", "sit")
        };
        assert!(chosen(std::slice::from_ref(&sit), &[]).unwrap().is_empty());
        assert!(chosen(&[Link { flags: UP, ..sit }], &[]).is_err());
    }

    #[test]
    fn a_master_and_its_links_are_not_taken_twice() {
        let port = |index, name| Link {
            master: Some(9),
            ..link(index, name, "veth")
        };
        let all = [port(2, "eth0"), port(3, "eth1"), link(9, "br0", "bridge")];
        assert_eq!(chosen(&all, &[]).unwrap(), ["eth0", "eth1"]);
        assert_eq!(chosen(&all, &[2]).unwrap(), ["eth0", "eth1"]);
        assert_eq!(chosen(&all, &[9]).unwrap(), ["br0"]);
        assert!(
            chosen(&all, &[2, 9])
                .unwrap_err()
                .contains("interface eth0")
        );
    }

    #[test]
    fn what_is_made_on_another_interface_of_the_guest_is_refused() {
        let stacked = Link {
            beneath: Some(2),
            ..link(3, "eth0.7", "vlan")
        };
        let error = chosen(&[link(2, "eth0", "veth"), stacked.clone()], &[2, 3]).unwrap_err();
        assert!(
            error.contains("eth0.7 (vlan)") && error.contains("made on eth0"),
            "{error}"
        );
        // A veth's other end may be in the same namespace: both ends work.
        let ends = [2, 3].map(|index| Link {
            beneath: Some(5 - index),
            ..link(index, &format!("v{index}"), "veth")
        });
        assert_eq!(chosen(&ends, &[]).unwrap(), ["v2", "v3"]);
    }

    #[test]
    fn the_taps_of_pods_have_names_of_their_own() {
        assert!(is_tap_name(&tap_name(u32::MAX)));
        assert!(tap_name(u32::MAX).len() < libc::IFNAMSIZ);
        for name in [
            "bulkhead",
            "bulkhead12345",
            "bulkhead1234567",
            "bulkheadxyzxyz",
            "eth0",
        ] {
            assert!(!is_tap_name(name), "{name}");
        }
    }
}
