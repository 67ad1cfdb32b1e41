//! A netlink(7) socket that does not return before the kernel has answered, and the attributes that
//! its messages are made of.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::Result;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use crate::{done, retry};

/// Size of `struct nlmsghdr`: length u32, kind u16, flags u16, sequence number u32, port u32.
pub const HEADER: usize = 16;
/// Size of `struct nlattr` and `struct rtattr`: length u16, kind u16.
pub const ATTRIBUTE: usize = 4;

/// Above what the kernel puts into one part of an answer (NLMSG_GOODSIZE, or 32 KiB of a dump).
const BUFFER: usize = 64 << 10;
/// Attribute of an error: the kernel's words.
const ERROR_TEXT: u16 = 1;

/// The kernel did not do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{errno}{}{text}", if text.is_empty() { "" } else { ": " })]
pub struct Refusal {
    /// Why. `EBADMSG`: its answer is malformed.
    pub errno: Errno,
    /// Its own words, where it has some.
    pub text: String,
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Refusal {
        Refusal {
            errno,
            text: String::new(),
        }
    }
}

/// A message of an answer.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// Of the protocol, `RTM_*` for instance.
    pub kind: u16,
    /// `NLM_F_*`.
    pub flags: u16,
    /// What follows the header.
    pub body: &'a [u8],
}

/// A blocking socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Netlink {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens one.
    ///
    /// # Errors
    /// `EPROTONOSUPPORT`: the kernel has no such protocol.
    pub fn open(protocol: SockProtocol) -> Result<Netlink> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?;
        // Errors come with words, and without a copy of the request. A kernel that cannot do either
        // says less.
        for option in [libc::NETLINK_CAP_ACK, libc::NETLINK_EXT_ACK] {
            let on: libc::c_int = 1;
            // SAFETY: the kernel reads one int, which outlives the call.
            unsafe {
                libc::setsockopt(
                    fd.as_raw_fd(),
                    libc::SOL_NETLINK,
                    option,
                    (&raw const on).cast(),
                    size_of_val(&on) as libc::socklen_t,
                );
            }
        }
        Ok(Netlink {
            fd,
            sequence: 0,
            buffer: vec![0; BUFFER],
        })
    }

    /// Has a request done, and hands over what the kernel answers beside its success. `message`
    /// begins with a `struct nlmsghdr`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn request(
        &mut self,
        message: &mut [u8],
        each: impl FnMut(Answer<'_>),
    ) -> std::result::Result<(), Refusal> {
        self.exchange(message, libc::NLM_F_ACK, each).map(drop)
    }

    /// Has everything told that the request asks for. `false`: what was told of changed meanwhile
    /// (NLM_F_DUMP_INTR).
    ///
    /// # Errors
    /// The kernel's.
    pub fn dump(
        &mut self,
        message: &mut [u8],
        each: impl FnMut(Answer<'_>),
    ) -> std::result::Result<bool, Refusal> {
        self.exchange(message, libc::NLM_F_DUMP, each)
    }

    fn exchange(
        &mut self,
        message: &mut [u8],
        flags: libc::c_int,
        mut each: impl FnMut(Answer<'_>),
    ) -> std::result::Result<bool, Refusal> {
        self.sequence += 1;
        let header = message.first_chunk_mut::<HEADER>().ok_or(Errno::EINVAL)?;
        let flags =
            u16::from_ne_bytes([header[6], header[7]]) | (libc::NLM_F_REQUEST | flags) as u16;
        header[6..8].copy_from_slice(&flags.to_ne_bytes());
        header[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        // An unconnected netlink socket sends to the kernel.
        retry(|| send(self.fd.as_raw_fd(), message, MsgFlags::empty()))?;
        let mut whole = true;
        loop {
            // MSG_TRUNC: the length of what there was, not of what there was room for.
            let fd = self.fd.as_raw_fd();
            let length = retry(|| recv(fd, &mut self.buffer, MsgFlags::MSG_TRUNC))?;
            let mut rest = self.buffer.get(..length).ok_or(Errno::EMSGSIZE)?;
            while rest.len() >= HEADER {
                let size = read_u32(rest, 0).ok_or(Errno::EBADMSG)? as usize;
                let body = rest.get(HEADER..size).ok_or(Errno::EBADMSG)?;
                let half = |at: usize| u16::from_ne_bytes([rest[at], rest[at + 1]]);
                let (kind, flags) = (half(4), half(6));
                let ours = read_u32(rest, 8) == Some(self.sequence);
                rest = rest.get(aligned(size)..).unwrap_or_default();
                if !ours {
                    continue;
                }
                whole &= i32::from(flags) & libc::NLM_F_DUMP_INTR == 0;
                match i32::from(kind) {
                    // A dump that failed on its way says so at its end.
                    kind @ (libc::NLMSG_DONE | libc::NLMSG_ERROR) => {
                        return outcome(kind, flags.into(), body).map(|()| whole);
                    }
                    libc::NLMSG_NOOP => {}
                    _ => each(Answer { kind, flags, body }),
                }
            }
        }
    }
}

/// Brings an interface of the thread's network namespace up; 1 is lo in every one.
///
/// # Errors
/// `ENODEV`, `EPERM`.
pub fn bring_up(index: u32) -> std::result::Result<(), Refusal> {
    // A header and a struct ifinfomsg: flags, and which of them are meant.
    let mut message = [0; HEADER + 16];
    let up = (libc::IFF_UP as u32).to_ne_bytes();
    message[..4].copy_from_slice(&((HEADER + 16) as u32).to_ne_bytes());
    message[4..6].copy_from_slice(&libc::RTM_NEWLINK.to_ne_bytes());
    message[HEADER + 4..HEADER + 8].copy_from_slice(&index.to_ne_bytes());
    message[HEADER + 8..HEADER + 12].copy_from_slice(&up);
    message[HEADER + 12..].copy_from_slice(&up);
    Netlink::open(SockProtocol::NetlinkRoute)?.request(&mut message, |_| {})
}

/// The kernel's name of the thread's network namespace, never used again (SO_NETNS_COOKIE).
///
/// # Errors
/// `ENOPROTOOPT` before Linux 5.14.
pub fn namespace_cookie() -> Result<u64> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let mut cookie = 0u64;
    let mut length = size_of_val(&cookie) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into a number that outlives the call.
    done(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    })?;
    Ok(cookie)
}

/// What NLMSG_ERROR and the NLMSG_DONE of a dump say: 0, or an errno and perhaps words.
fn outcome(kind: i32, flags: i32, body: &[u8]) -> std::result::Result<(), Refusal> {
    let error = read_u32(body, 0).ok_or(Errno::EBADMSG)? as i32;
    if error == 0 {
        return Ok(());
    }
    // Only an error has the request, or its header, before its words.
    let request = match flags & libc::NLM_F_CAPPED {
        _ if kind == libc::NLMSG_DONE => 0,
        0 => read_u32(body, 4).unwrap_or_default() as usize,
        _ => HEADER,
    };
    let words = (flags & libc::NLM_F_ACK_TLVS != 0)
        .then(|| body.get(aligned(4 + request)..))
        .flatten()
        .and_then(|rest| find(rest, ERROR_TEXT));
    Err(Refusal {
        errno: Errno::from_raw(error.saturating_neg()),
        text: words.map(text_of).unwrap_or_default(),
    })
}

/// Where the next message, attribute or record begins.
pub const fn aligned(length: usize) -> usize {
    length.saturating_add(3) & !3
}

/// The attributes in `bytes`, kind and value; what is cut off at the end is left out.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(read_u16(bytes, 0)?);
        let kind = read_u16(bytes, 2)? & libc::NLA_TYPE_MASK as u16;
        let value = bytes.get(ATTRIBUTE..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The first attribute of the kind.
pub fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(other, value)| (other == kind).then_some(value))
}

/// The text that a value is, up to its NUL.
pub fn text_of(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&value[..end.unwrap_or(value.len())]).into_owned()
}

/// The number at an offset; `None` where there are fewer bytes.
pub fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_ne_bytes(*bytes))
}

/// The number at an offset; `None` where there are fewer bytes.
pub fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_kernels_words_are_found_behind_the_request() {
        let words = b"\x12\0\x01\0no such thing\0\0\0";
        let number = (-libc::EINVAL).to_ne_bytes();
        let mut request = [0; 32];
        request[0] = 32;
        let (error, done, said) = (libc::NLMSG_ERROR, libc::NLMSG_DONE, libc::NLM_F_ACK_TLVS);
        for (kind, flags, between) in [
            (error, said, &request[..]),
            (error, said | libc::NLM_F_CAPPED, &request[..HEADER]),
            (done, said, &[]),
        ] {
            let body = [&number[..], between, words].concat();
            let refusal = outcome(kind, flags, &body).unwrap_err();
            assert_eq!(
                refusal.to_string(),
                "EINVAL: Invalid argument: no such thing"
            );
        }
        assert!(outcome(done, 0, &[0; 4]).is_ok());
        assert!(outcome(error, 0, &[]).is_err());
    }

    #[test]
    fn links_are_dumped_and_a_refusal_has_an_errno() {
        let mut netlink = Netlink::open(SockProtocol::NetlinkRoute).unwrap();
        let request = |kind: u16, index: u32| {
            let mut message = [0; HEADER + 16];
            message[0] = message.len() as u8;
            message[4..6].copy_from_slice(&kind.to_ne_bytes());
            message[HEADER + 4..HEADER + 8].copy_from_slice(&index.to_ne_bytes());
            message
        };
        let mut links = Vec::new();
        let whole = netlink.dump(&mut request(libc::RTM_GETLINK, 0), |answer| {
            links.push((answer.kind, read_u32(answer.body, 4).unwrap()));
        });
        assert!(whole.unwrap());
        assert!(links.contains(&(libc::RTM_NEWLINK, 1)), "lo is there");
        let absent = netlink.request(&mut request(libc::RTM_GETLINK, 0x7fff_0000), |_| {});
        assert_eq!(absent.unwrap_err().errno, Errno::ENODEV);
    }

    proptest! {
        #[test]
        fn whatever_arrives_is_read_without_a_panic(
            kind in 0..5, flags in any::<i32>(), body in prop::collection::vec(any::<u8>(), 0..200)
        ) {
            let _ = outcome(kind, flags, &body);
            prop_assert!(attributes(&body).map(|(_, value)| value.len()).sum::<usize>() <= body.len());
        }
    }
}
