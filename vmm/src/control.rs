//! The control socket: one JSON value a packet, file descriptors beside it.
//!
//! Both roles of the binary find their end as descriptor [`CONTROL_FD`] (the contract is in `bulkhead_vmm_config`). The peer
//! is the shim, which is trusted; the checks here turn a version mix-up or a bug into a clear error instead of a guess.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use bulkhead_vmm_config::{CONTROL_FD, Fd, MAX_FDS, MAX_PACKET};
use linux::packet;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// What can go wrong on a control socket. All but [`ControlError::Closed`] end the process.
#[derive(Debug, Error)]
pub enum ControlError {
    /// Descriptor 3 is not what it must be.
    #[error(
        "file descriptor {CONTROL_FD} is not a SOCK_SEQPACKET socket ({0}); this program is started by the shim"
    )]
    NotASocket(#[source] Errno),
    /// The other end has closed.
    #[error("the control socket was closed by the other end")]
    Closed,
    /// recvmsg(2) failed.
    #[error("receiving from the control socket failed")]
    Receive(#[source] Errno),
    /// The packet is longer than [`MAX_PACKET`].
    #[error("a control packet is longer than {MAX_PACKET} bytes")]
    TooLong,
    /// Descriptors were lost on the way, for instance because the process has reached its limit.
    #[error("descriptors beside a control packet were lost; check RLIMIT_NOFILE")]
    DescriptorsLost,
    /// More descriptors than the contract allows.
    #[error("{0} descriptors beside a control packet, at most {MAX_FDS} are allowed")]
    TooManyDescriptors(usize),
    /// The packet is not the JSON that was expected.
    #[error("a control packet is not understood; are shim and VMM of the same version?")]
    NotUnderstood(#[source] serde_json::Error),
    /// A value of ours could not be written as JSON.
    #[error("a control packet could not be written as JSON")]
    NotWritten(#[source] serde_json::Error),
    /// sendmsg(2) failed.
    #[error("sending to the control socket failed")]
    Send(#[source] Errno),
}

/// One end of a `SOCK_SEQPACKET` socketpair.
#[derive(Debug)]
pub struct ControlSocket(OwnedFd);

impl ControlSocket {
    /// Takes the socket that the shim left as descriptor [`CONTROL_FD`].
    ///
    /// # Errors
    /// There is no such descriptor, or it is not a `SOCK_SEQPACKET` socket.
    ///
    /// # Safety
    /// Nothing else in the process owns descriptor [`CONTROL_FD`]: call it once, first thing in `main`.
    pub unsafe fn inherited() -> Result<ControlSocket, ControlError> {
        // SAFETY: only asked for its flags; the descriptor need not be open for that.
        let fd = unsafe { BorrowedFd::borrow_raw(CONTROL_FD) };
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(ControlError::NotASocket)?;
        match getsockopt(&fd, sockopt::SockType) {
            Ok(SockType::SeqPacket) => {}
            Ok(_) => return Err(ControlError::NotASocket(Errno::EPROTOTYPE)),
            Err(error) => return Err(ControlError::NotASocket(error)),
        }
        // SAFETY: it is open, and the caller vouches that nobody else owns it.
        Ok(ControlSocket(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) }))
    }

    /// Wraps one end of a socketpair.
    pub fn new(fd: OwnedFd) -> ControlSocket {
        ControlSocket(fd)
    }

    /// Another handle to the same socket.
    ///
    /// # Errors
    /// fcntl(2)'s.
    pub fn try_clone(&self) -> io::Result<ControlSocket> {
        self.0.try_clone().map(ControlSocket)
    }

    /// Waits for the next packet. The descriptors beside it are close-on-exec.
    ///
    /// # Errors
    /// [`ControlError::Closed`] when the peer has gone; otherwise the packet breaks the contract, and its descriptors are closed.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ControlError> {
        // One byte more than allowed, so that a packet of exactly the limit is told from a longer one.
        let mut bytes = vec![0_u8; MAX_PACKET + 1];
        let packet = packet::receive(self.as_fd(), &mut bytes, packet::MOST_DESCRIPTORS).map_err(
            |errno| {
                match errno {
                    // The peer died with packets of ours unread.
                    Errno::ECONNRESET => ControlError::Closed,
                    error => ControlError::Receive(error),
                }
            },
        )?;
        if packet.too_long || packet.length > MAX_PACKET {
            return Err(ControlError::TooLong);
        }
        // There was room for as many as the kernel ever sends: the descriptor table is full.
        if packet.lost {
            return Err(ControlError::DescriptorsLost);
        }
        if packet.length == 0 {
            return Err(ControlError::Closed);
        }
        let fds = packet.descriptors;
        if fds.len() > MAX_FDS {
            return Err(ControlError::TooManyDescriptors(fds.len()));
        }
        let value =
            serde_json::from_slice(&bytes[..packet.length]).map_err(ControlError::NotUnderstood)?;
        Ok((value, fds))
    }

    /// Sends one packet without descriptors.
    ///
    /// # Errors
    /// The value is too long, or the peer has gone.
    pub fn send<T: Serialize>(&self, value: &T) -> Result<(), ControlError> {
        self.send_with(value, &[])
    }

    /// Sends one packet and copies of `fds`.
    ///
    /// # Errors
    /// The value is too long, there are too many descriptors, or the peer has gone.
    pub fn send_with<T: Serialize>(
        &self,
        value: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ControlError> {
        let bytes = serde_json::to_vec(value).map_err(ControlError::NotWritten)?;
        if bytes.len() > MAX_PACKET {
            return Err(ControlError::TooLong);
        }
        if fds.len() > MAX_FDS {
            return Err(ControlError::TooManyDescriptors(fds.len()));
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        packet::send(self.as_fd(), &bytes, &raw).map_err(|errno| match errno {
            Errno::EPIPE | Errno::ECONNRESET => ControlError::Closed,
            error => ControlError::Send(error),
        })
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for ControlSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A packet names a descriptor wrongly.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DescriptorError {
    /// The index is past the end of the array, or was named before.
    #[error("{what} names descriptor {index}, which is not beside the packet or was named already")]
    Missing {
        /// The field that names it.
        what: &'static str,
        /// The index.
        index: u32,
    },
    /// Some descriptors were named by nobody.
    #[error("{count} descriptors beside the packet are not named in it")]
    Unnamed {
        /// How many.
        count: usize,
    },
}

/// The descriptors beside a packet; each is taken exactly once.
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Wraps what [`ControlSocket::receive`] returned.
    pub fn new(fds: Vec<OwnedFd>) -> Descriptors {
        Descriptors(fds.into_iter().map(Some).collect())
    }

    /// Takes the descriptor that the field `what` names.
    ///
    /// # Errors
    /// There is no such descriptor, or it was taken already.
    pub fn take(&mut self, fd: Fd, what: &'static str) -> Result<OwnedFd, DescriptorError> {
        self.0
            .get_mut(fd.0 as usize)
            .and_then(Option::take)
            .ok_or(DescriptorError::Missing { what, index: fd.0 })
    }

    /// Checks that every descriptor was taken.
    ///
    /// # Errors
    /// Some were not; they are closed.
    pub fn finish(self) -> Result<(), DescriptorError> {
        match self.0.iter().flatten().count() {
            0 => Ok(()),
            count => Err(DescriptorError::Unnamed { count }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_vmm_config::{Event, Request};
    use std::fs::File;
    use std::io::{Read, Write};

    fn pair() -> (ControlSocket, ControlSocket) {
        let (left, right) = packet::pair().unwrap();
        (ControlSocket::new(left), ControlSocket::new(right))
    }

    fn send_bytes(socket: &ControlSocket, bytes: &[u8], fds: &[RawFd]) {
        packet::send(socket.as_fd(), bytes, fds).unwrap();
    }

    #[test]
    fn a_value_and_its_descriptors_arrive_together() {
        let (left, right) = pair();
        let (mut reader, mut writer) = {
            let (r, w) = nix::unistd::pipe().unwrap();
            (File::from(r), File::from(w))
        };
        left.send_with(&Request::Stats, &[reader.as_fd()]).unwrap();
        let (request, fds): (Request, _) = right.receive().unwrap();
        assert_eq!(request, Request::Stats);
        assert_eq!(fds.len(), 1);
        let flags = fcntl(&fds[0], FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        reader = File::from(fds.into_iter().next().unwrap());
        writer.write_all(b"x").unwrap();
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn the_end_of_the_peer_is_told_from_an_error() {
        let (left, right) = pair();
        drop(left);
        assert!(matches!(
            right.receive::<Request>(),
            Err(ControlError::Closed)
        ));
        assert!(matches!(
            right.send(&Event::Done),
            Err(ControlError::Closed)
        ));
        let (left, right) = pair();
        right.send(&Event::Done).unwrap();
        drop(left);
        assert!(matches!(
            right.receive::<Request>(),
            Err(ControlError::Closed)
        ));
    }

    #[test]
    fn a_packet_of_the_limit_passes_and_a_longer_one_does_not() {
        let (left, right) = pair();
        let mut text = vec![b' '; MAX_PACKET];
        text[..7].copy_from_slice(b"\"stats\"");
        send_bytes(&left, &text, &[]);
        assert_eq!(right.receive::<Request>().unwrap().0, Request::Stats);
        text.push(b' ');
        send_bytes(&left, &text, &[]);
        assert!(matches!(
            right.receive::<Request>(),
            Err(ControlError::TooLong)
        ));
        let reason = "x".repeat(MAX_PACKET);
        assert!(matches!(
            left.send(&Event::Failed { reason }),
            Err(ControlError::TooLong)
        ));
    }

    #[test]
    fn too_many_descriptors_are_refused_and_closed() {
        let (left, right) = pair();
        let null = File::open("/dev/null").unwrap();
        let fds = vec![null.as_raw_fd(); MAX_FDS + 1];
        send_bytes(&left, b"\"stats\"", &fds);
        assert!(matches!(
            right.receive::<Request>(),
            Err(ControlError::TooManyDescriptors(count)) if count == MAX_FDS + 1
        ));
        left.send_with(&Request::Stats, &vec![null.as_fd(); MAX_FDS])
            .unwrap();
        assert_eq!(right.receive::<Request>().unwrap().1.len(), MAX_FDS);
    }

    #[test]
    fn other_words_are_not_understood() {
        let (left, right) = pair();
        for text in [&b"\"dance\""[..], b"{", b"\xff", b"\"stats\" 1"] {
            send_bytes(&left, text, &[]);
            assert!(matches!(
                right.receive::<Request>(),
                Err(ControlError::NotUnderstood(_))
            ));
        }
    }

    #[test]
    fn each_descriptor_is_named_exactly_once() {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let mut fds = Descriptors::new(vec![null(), null()]);
        fds.take(Fd(1), "kvm").unwrap();
        let again = fds.take(Fd(1), "kernel").unwrap_err();
        assert_eq!(
            again,
            DescriptorError::Missing {
                what: "kernel",
                index: 1
            }
        );
        assert!(fds.take(Fd(2), "initrd").is_err());
        assert!(fds.take(Fd(u32::MAX), "initrd").is_err());
        assert_eq!(fds.finish(), Err(DescriptorError::Unnamed { count: 1 }));
    }
}
