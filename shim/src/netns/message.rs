//! A message of rtnetlink(7): a header, a struct of fixed length and attributes.
//!
//! Attributes stay bytes. What the guest is told is what the namespace's kernel said, with a few numbers changed; attributes that
//! nobody here has heard of reach the guest unharmed.

use linux::netlink::{ATTRIBUTE, HEADER, read_u32};
pub(crate) use linux::netlink::{aligned, attributes, find, text_of};

/// Length of the struct that follows the header.
fn fixed_length(kind: u16) -> usize {
    match kind {
        libc::RTM_NEWLINK..=libc::RTM_GETLINK => 16,
        libc::RTM_NEWADDR..=libc::RTM_GETADDR => 8,
        libc::RTM_NEWQDISC..=libc::RTM_GETQDISC | libc::RTM_NEWTFILTER..=libc::RTM_GETTFILTER => 20,
        // struct rtmsg, ndmsg, fib_rule_hdr
        _ => 12,
    }
}

/// Where fields of those structs are (rtnetlink(7), linux/rtnetlink.h, neighbour.h, fib_rules.h).
pub(crate) mod field {
    /// Of addresses, routes, neighbours and rules: AF_*.
    pub(crate) const FAMILY: usize = 0;
    /// The interface; of all but routes and rules.
    pub(crate) const INDEX: usize = 4;

    /// struct ifinfomsg: ARPHRD_*, two bytes.
    pub(crate) const HARDWARE: usize = 2;
    /// IFF_*.
    pub(crate) const LINK_FLAGS: usize = 8;
    /// Which of the flags a request is about.
    pub(crate) const LINK_MASK: usize = 12;

    /// struct ifaddrmsg and rtmsg: length of the prefix, of a route's destination.
    pub(crate) const PREFIX: usize = 1;
    /// struct ifaddrmsg: IFA_F_*, the lower eight.
    pub(crate) const ADDRESS_FLAGS: usize = 2;
    /// RT_SCOPE_*.
    pub(crate) const SCOPE: usize = 3;

    /// struct rtmsg: RTPROT_*.
    pub(crate) const PROTOCOL: usize = 5;
    /// RTN_*.
    pub(crate) const ROUTE_TYPE: usize = 7;
    /// RTM_F_*, RTNH_F_*.
    pub(crate) const ROUTE_FLAGS: usize = 8;

    /// struct ndmsg: NUD_*, two bytes.
    pub(crate) const NEIGHBOUR_STATE: usize = 8;
    /// NTF_*.
    pub(crate) const NEIGHBOUR_FLAGS: usize = 10;

    /// struct fib_rule_hdr: RT_TABLE_*.
    pub(crate) const RULE_TABLE: usize = 4;
    /// FIB_RULE_*.
    pub(crate) const RULE_FLAGS: usize = 8;

    /// struct tcmsg: a qdisc's own number.
    pub(crate) const TC_HANDLE: usize = 8;
    /// What it is attached to.
    pub(crate) const TC_PARENT: usize = 12;
    /// Of a filter: preference and protocol.
    pub(crate) const TC_INFO: usize = 16;
}

/// One attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attribute {
    pub(crate) kind: u16,
    pub(crate) value: Vec<u8>,
}

fn push(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE + value.len()).expect("attributes of rtnetlink are short");
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(aligned(bytes.len()), 0);
}

/// A value that is attributes.
pub(crate) fn nested(attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, value) in attributes {
        push(&mut bytes, *kind, value);
    }
    bytes
}

/// The number that a value is.
pub(crate) fn u32_of(value: &[u8]) -> Option<u32> {
    read_u32(value, 0)
}

/// A message, sent or received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// RTM_*
    pub(crate) kind: u16,
    /// NLM_F_*
    pub(crate) flags: u16,
    /// The struct.
    fixed: Vec<u8>,
    pub(crate) attributes: Vec<Attribute>,
}

impl Message {
    /// A struct of zeros and no attributes.
    pub(crate) fn new(kind: u16, flags: i32) -> Message {
        Message {
            kind,
            flags: flags as u16, // NLM_F_* have 16 bits
            fixed: vec![0; fixed_length(kind)],
            attributes: Vec::new(),
        }
    }

    /// What follows a header; `None` when it is shorter than its struct.
    pub(crate) fn parse(kind: u16, flags: u16, body: &[u8]) -> Option<Message> {
        let length = fixed_length(kind);
        let attributes = attributes(body.get(aligned(length)..)?);
        Some(Message {
            kind,
            flags,
            fixed: body[..length].to_vec(),
            attributes: attributes
                .map(|(kind, value)| Attribute {
                    kind,
                    value: value.to_vec(),
                })
                .collect(),
        })
    }

    /// A field of one byte of the struct.
    pub(crate) fn byte(&self, offset: usize) -> u8 {
        self.fixed[offset]
    }

    /// A field of two bytes of the struct.
    pub(crate) fn half(&self, offset: usize) -> u16 {
        u16::from_ne_bytes([self.fixed[offset], self.fixed[offset + 1]])
    }

    /// A field of four bytes of the struct.
    pub(crate) fn number(&self, offset: usize) -> u32 {
        u32_of(&self.fixed[offset..]).expect("a field of the struct")
    }

    /// Sets a field of one byte.
    pub(crate) fn set_byte(&mut self, offset: usize, value: u8) {
        self.fixed[offset] = value;
    }

    /// Sets a field of four bytes.
    pub(crate) fn set_number(&mut self, offset: usize, value: u32) {
        self.fixed[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
    }

    /// The same with a field set.
    pub(crate) fn with_number(mut self, offset: usize, value: u32) -> Message {
        self.set_number(offset, value);
        self
    }

    /// The same with an attribute more.
    pub(crate) fn with(mut self, kind: u16, value: &[u8]) -> Message {
        self.attributes.push(Attribute {
            kind,
            value: value.to_vec(),
        });
        self
    }

    /// The same with an attribute more, a name.
    pub(crate) fn with_name(self, kind: u16, name: &str) -> Message {
        self.with(kind, &[name.as_bytes(), &[0]].concat())
    }

    /// The value of an attribute.
    pub(crate) fn get(&self, kind: u16) -> Option<&[u8]> {
        let found = self
            .attributes
            .iter()
            .find(|attribute| attribute.kind == kind);
        found.map(|attribute| attribute.value.as_slice())
    }

    /// The number that an attribute holds.
    pub(crate) fn get_number(&self, kind: u16) -> Option<u32> {
        self.get(kind).and_then(u32_of)
    }

    /// The text that an attribute holds.
    pub(crate) fn get_text(&self, kind: u16) -> Option<String> {
        self.get(kind).map(text_of)
    }

    /// Header and all.
    pub(crate) fn bytes(&self, sequence: u32) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes.extend(&self.fixed);
        bytes.resize(aligned(bytes.len()), 0);
        for attribute in &self.attributes {
            push(&mut bytes, attribute.kind, &attribute.value);
        }
        let length = bytes.len() as u32; // attributes are short
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_reads_back_as_it_was_written() {
        let message = Message::new(libc::RTM_NEWADDR, libc::NLM_F_REQUEST)
            .with_number(4, 7)
            .with_name(3, "eth0:1")
            .with(26, &nested(&[(1, b"a"), (2, b"")]));
        let bytes = message.bytes(9);
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(u32_of(&bytes), Some(bytes.len() as u32));
        let read = Message::parse(message.kind, message.flags, &bytes[HEADER..]).unwrap();
        assert_eq!(read, message);
        assert_eq!(read.get_text(3).unwrap(), "eth0:1");
        let inner = read.get(26).unwrap();
        assert_eq!(find(inner, 1), Some(&b"a"[..]));
        assert_eq!(find(inner, 2), Some(&b""[..]));
    }

    proptest! {
        #[test]
        fn whatever_arrives_is_read_without_a_panic(
            kind in 16u16..60, body in prop::collection::vec(any::<u8>(), 0..200)
        ) {
            if let Some(message) = Message::parse(kind, 0, &body) {
                prop_assert!(message.bytes(0).len() <= HEADER + aligned(body.len()) + 4);
            }
        }
    }
}
