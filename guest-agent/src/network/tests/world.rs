//! What the tests are made of: messages by hand, namespaces with veth devices, and what the kernel tells of them.

use std::collections::BTreeMap;

use super::super::{Interfaces, Netlink};
use super::CREATE;
use linux::netlink::{HEADER, attributes, read_u32};
use nix::sys::socket::SockProtocol;

/// A message of rtnetlink(7) in the making.
pub(super) struct Message(Vec<u8>);

impl Message {
    pub(super) fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend(body);
        Self(bytes)
    }

    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend(nested(&[(kind, value)]));
        self
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

/// Attributes in a row.
pub(super) fn nested(parts: &[(u16, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, value) in parts {
        bytes.extend((4 + value.len() as u16).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(*value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// Runs a test in a network namespace of its own.
pub(super) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .expect("these tests make network namespaces: run them as root");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn kernel() -> Netlink {
    Netlink::open(SockProtocol::NetlinkRoute).unwrap()
}

/// The devices "a" and "c", whose peers "b" and "d" are up.
pub(super) struct World {
    pub(super) interfaces: Interfaces,
}

impl World {
    pub(super) fn new() -> Self {
        for (name, peer) in [("a", "b"), ("c", "d")] {
            let [name, peer] = [name, peer].map(|name| format!("{name}\0").into_bytes());
            let mut described = vec![0; 16];
            described.extend(nested(&[(libc::IFLA_IFNAME, &peer)]));
            let data = nested(&[(1, &described)]); // VETH_INFO_PEER
            let info = nested(&[
                (libc::IFLA_INFO_KIND, b"veth"),
                (libc::IFLA_INFO_DATA, &data),
            ]);
            let mut message = Message::new(libc::RTM_NEWLINK, CREATE, &[0; 16])
                .with(libc::IFLA_IFNAME, &name)
                .with(libc::IFLA_LINKINFO, &info)
                .finish();
            kernel().request(&mut message, |_| {}).unwrap();
        }
        let links = links();
        for peer in ["b", "d"] {
            let mut up = super::link(links[peer].0, true).finish();
            kernel().request(&mut up, |_| {}).unwrap();
        }
        Self {
            interfaces: Interfaces(vec![links["a"].0, links["c"].0]),
        }
    }
}

/// A message that the kernel has answered with, without its header.
pub(super) struct Found {
    pub(super) body: Vec<u8>,
    attributes: BTreeMap<u16, Vec<u8>>,
}

impl Found {
    /// Empty when there is none.
    pub(super) fn attribute(&self, kind: u16) -> Vec<u8> {
        self.attributes.get(&kind).cloned().unwrap_or_default()
    }

    pub(super) fn number(&self, kind: u16) -> u32 {
        read_u32(&self.attribute(kind), 0).unwrap_or_default()
    }

    pub(super) fn word(&self, at: usize) -> u32 {
        read_u32(&self.body, at).unwrap()
    }
}

pub(super) fn dump(kind: u16, family: libc::c_int) -> Vec<Found> {
    let body = match kind {
        libc::RTM_GETLINK => 16,
        libc::RTM_GETADDR => 8,
        _ => 12,
    };
    let mut found = Vec::new();
    let mut request = Message::new(kind, 0, &vec![0; body]).finish();
    request[HEADER] = family as u8;
    kernel()
        .dump(&mut request, |answer| {
            let (body, rest) = answer.body.split_at(body);
            let attributes = attributes(rest)
                .map(|(kind, value)| (kind, value.to_owned()))
                .collect();
            found.push(Found {
                body: body.to_owned(),
                attributes,
            });
        })
        .unwrap();
    found
}

/// Links by name, with their indices.
pub(super) fn links() -> BTreeMap<String, (u32, Found)> {
    let name = |link: &Found| {
        let name = link.attribute(libc::IFLA_IFNAME);
        String::from_utf8(name.strip_suffix(&[0]).unwrap().to_owned()).unwrap()
    };
    dump(libc::RTM_GETLINK, libc::AF_UNSPEC)
        .into_iter()
        .map(|link| (name(&link), (link.word(4), link)))
        .collect()
}
