//! The records that netlink's messages are made of, each checked to be whole and changed in place.

use linux::netlink::{ATTRIBUTE, read_u16};

/// A message ends before what it announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is cut off")]
pub(super) struct Cut;

/// Records that begin with their length as u16 and end at multiples of four.
pub(super) struct Records<'a> {
    rest: &'a mut [u8],
    /// Smallest length.
    header: usize,
}

impl<'a> Records<'a> {
    pub(super) fn new(bytes: &'a mut [u8], header: usize) -> Self {
        Self {
            rest: bytes,
            header,
        }
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<&'a mut [u8], Cut>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = std::mem::take(&mut self.rest);
        if rest.is_empty() {
            return None;
        }
        let length = read_u16(rest, 0).map_or(0, usize::from);
        if length < self.header || length > rest.len() {
            return Some(Err(Cut));
        }
        let end = length.next_multiple_of(4).min(rest.len());
        let (record, rest) = rest.split_at_mut(end);
        self.rest = rest;
        Some(Ok(&mut record[..length]))
    }
}

/// An attribute (struct nlattr) whose value can be changed in place.
pub(super) struct Attribute<'a> {
    pub(super) kind: u16,
    pub(super) value: &'a mut [u8],
}

/// The attributes that fill `bytes`.
pub(super) fn attributes(bytes: &mut [u8]) -> impl Iterator<Item = Result<Attribute<'_>, Cut>> {
    Records::new(bytes, ATTRIBUTE).map(|record| {
        let (header, value) = record?.split_at_mut(ATTRIBUTE);
        let kind = u16::from_ne_bytes([header[2], header[3]]) & libc::NLA_TYPE_MASK as u16;
        Ok(Attribute { kind, value })
    })
}
