//! A netlink(7) socket that does not return before the kernel has answered, and the records that its messages are made of.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// Size of struct nlmsghdr: length u32, type u16, flags u16, sequence u32, port u32.
pub(super) const HEADER: usize = 16;

/// Above what the kernel puts into one part of an answer (NLMSG_GOODSIZE, or 32 KiB of a dump).
const RECEIVE: usize = 64 << 10;

/// Bit of nlmsg_flags in an error: attributes follow (NLM_F_ACK_TLVS); only the header of the request is in it (NLM_F_CAPPED).
const ACK_TLVS: u16 = 0x200;
const CAPPED: u16 = 0x100;
/// NLMSGERR_ATTR_MSG.
const ERROR_TEXT: u16 = 1;

/// The kernel did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[error("{errno}{}{text}", if text.is_empty() { "" } else { ": " })]
pub(super) struct Refusal {
    /// Why.
    pub(super) errno: Errno,
    /// Its own words, where it has some.
    pub(super) text: String,
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self {
            errno,
            text: String::new(),
        }
    }
}

/// A socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Netlink {
    fd: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens one.
    pub(super) fn open(protocol: SockProtocol) -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?;
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            let on: libc::c_int = 1;
            // SAFETY: the kernel reads one int, which outlives the call.
            let set = unsafe {
                libc::setsockopt(
                    fd.as_raw_fd(),
                    libc::SOL_NETLINK,
                    option,
                    (&raw const on).cast(),
                    size_of_val(&on) as libc::socklen_t,
                )
            };
            Errno::result(set)?;
        }
        Ok(Self { fd, sequence: 0 })
    }

    /// Has a request done. `message` begins with a struct nlmsghdr.
    pub(super) fn request(&mut self, message: &mut [u8]) -> Result<(), Refusal> {
        self.exchange(message, libc::NLM_F_ACK, |_| ())
    }

    /// Has everything told that the request asks for: the body of each message, and its end.
    pub(super) fn dump(
        &mut self,
        message: &mut [u8],
        each: impl FnMut(&mut [u8]),
    ) -> Result<(), Refusal> {
        self.exchange(message, libc::NLM_F_DUMP, each)
    }

    fn exchange(
        &mut self,
        message: &mut [u8],
        flags: libc::c_int,
        mut each: impl FnMut(&mut [u8]),
    ) -> Result<(), Refusal> {
        self.sequence += 1;
        let flags =
            read_u16(message, 6).ok_or(Errno::EINVAL)? | (libc::NLM_F_REQUEST | flags) as u16;
        message[6..8].copy_from_slice(&flags.to_ne_bytes());
        let sequence = message.get_mut(8..12).ok_or(Errno::EINVAL)?;
        sequence.copy_from_slice(&self.sequence.to_ne_bytes());
        retry(|| send(self.fd.as_raw_fd(), message, MsgFlags::empty()))?;
        let mut buffer = vec![0; RECEIVE];
        loop {
            let length = retry(|| recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC))?;
            let mut rest = buffer.get_mut(..length).ok_or(Errno::EMSGSIZE)?;
            while rest.len() >= HEADER {
                let length = read_u32(rest, 0).ok_or(Errno::EBADMSG)? as usize;
                if length < HEADER || length > rest.len() {
                    return Err(Errno::EBADMSG.into());
                }
                let end = length.next_multiple_of(4).min(rest.len());
                let (part, following) = rest.split_at_mut(end);
                rest = following;
                let ours = read_u32(part, 8) == Some(self.sequence);
                match i32::from(read_u16(part, 4).unwrap_or(0)) {
                    _ if !ours => {}
                    libc::NLMSG_ERROR | libc::NLMSG_DONE => return outcome(&mut part[..length]),
                    _ => each(&mut part[HEADER..length]),
                }
            }
        }
    }
}

fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// What the last message of an answer says: an errno, negative, and with it what was sent and the kernel's words.
fn outcome(message: &mut [u8]) -> Result<(), Refusal> {
    let errno = match read_u32(message, HEADER) {
        Some(number) => (number as i32).saturating_neg(),
        None => return Err(Errno::EBADMSG.into()),
    };
    if errno == 0 {
        return Ok(());
    }
    let flags = read_u16(message, 6).unwrap_or(0);
    let sent = match flags & CAPPED {
        0 => read_u32(message, HEADER + 4).unwrap_or(0) as usize,
        _ => HEADER,
    };
    let mut text = String::new();
    let told = (HEADER + 4).saturating_add(sent.next_multiple_of(4));
    if flags & ACK_TLVS != 0
        && let Some(told) = message.get_mut(told..)
    {
        for attribute in attributes(told).map_while(Result::ok) {
            if attribute.kind == ERROR_TEXT {
                let end = attribute.value.strip_suffix(&[0]);
                text = String::from_utf8_lossy(end.unwrap_or(attribute.value)).into_owned();
            }
        }
    }
    Err(Refusal {
        errno: Errno::from_raw(errno),
        text,
    })
}

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
    const HEADER: usize = 4;
    Records::new(bytes, HEADER).map(|record| {
        let (header, value) = record?.split_at_mut(HEADER);
        let kind = u16::from_ne_bytes([header[2], header[3]]) & libc::NLA_TYPE_MASK as u16;
        Ok(Attribute { kind, value })
    })
}

pub(super) fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_ne_bytes(*bytes))
}

pub(super) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}
