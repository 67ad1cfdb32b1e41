//! Connecting to a socket of the host, as nobody in particular.
//!
//! A server may ask who its client is (SO_PEERCRED), and many trust root. So a connection is the pod's uid's, which no other
//! process of the host has but the pod's VMM. Whether a client may connect is what the socket's mode says to the guest's kernel.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
};

use crate::sys::identity;

/// What kind of socket somebody listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Stream,
    Datagrams,
    /// SOCK_SEQPACKET, which is not relayed.
    Packets,
}

impl Kind {
    fn socket(self) -> SockType {
        match self {
            Kind::Stream => SockType::Stream,
            Kind::Datagrams => SockType::Datagram,
            Kind::Packets => SockType::SeqPacket,
        }
    }
}

/// Connects by the open socket `target`, without waiting: `EAGAIN` when the server's queue is full.
pub(super) fn dial(uid: u32, target: &OwnedFd, kind: Kind) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", target.as_raw_fd());
    identity::as_user(uid, move || {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let client = socket(AddressFamily::Unix, kind.socket(), flags, None)?;
        connect(client.as_raw_fd(), &UnixAddr::new(path.as_str())?)?;
        Ok(client)
    })
}

/// Whether somebody listens, and how: he gets a client that leaves at once. Nobody does where the guest itself has made the socket.
pub(super) fn probe(uid: u32, target: &OwnedFd) -> Option<Kind> {
    for kind in [Kind::Stream, Kind::Datagrams, Kind::Packets] {
        match dial(uid, target, kind) {
            Ok(_) => return Some(kind),
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EAGAIN) => return Some(kind),
                Some(Errno::EPROTOTYPE) => {}
                _ => return None,
            },
        }
    }
    None
}
