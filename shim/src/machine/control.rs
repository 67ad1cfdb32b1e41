//! Our end of the control socket of `bulkhead-vmm`: one JSON value a packet, descriptors beside it.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use bulkhead_vmm_config::{MAX_FDS, MAX_PACKET};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{Interest, unix::AsyncFd};

use crate::sys::watch;

/// Why a packet could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("control socket: cannot {action}")]
    Io {
        /// The verb.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The other side speaks another language.
    #[error("control socket: a packet is not understood; are all parts of one version?")]
    Parse(#[from] serde_json::Error),
    /// Too large, or too many descriptors.
    #[error("control socket: a packet of {0} bytes and {1} descriptors exceeds the limit")]
    TooLarge(usize, usize),
    /// A packet that was cut off.
    #[error("control socket: a packet is larger than the limit")]
    Truncated,
    /// Nobody asked for one.
    #[error("control socket: a packet came with descriptors")]
    Descriptors,
}

impl Error {
    /// Whether the other side has closed its end. Every other failure leaves it as it was: its end does not follow.
    pub fn is_closed(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
        let Error::Io { source, .. } = self else {
            return false;
        };
        matches!(source.kind(), BrokenPipe | ConnectionReset | NotConnected)
    }
}

fn io_error(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { action, source }
}

/// One end of a `SOCK_SEQPACKET` socketpair.
#[derive(Debug)]
pub struct Control(AsyncFd<OwnedFd>);

/// Our end, and the one to hand to the process.
pub fn pair() -> Result<(Control, OwnedFd), Error> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(|errno| io_error("make a pair")(errno.into()))?;
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(flags))
        .map_err(|errno| io_error("set up")(errno.into()))?;
    let ours = watch(ours, Interest::READABLE | Interest::WRITABLE).map_err(io_error("watch"))?;
    Ok((Control(ours), theirs))
}

impl Control {
    /// Sends one packet.
    pub async fn send<T: Serialize>(&self, value: &T, fds: &[RawFd]) -> Result<(), Error> {
        let bytes = serde_json::to_vec(value)?;
        if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
            return Err(Error::TooLarge(bytes.len(), fds.len()));
        }
        let rights = [ControlMessage::ScmRights(fds)];
        let messages: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        loop {
            let mut ready = self.0.writable().await.map_err(io_error("wait"))?;
            let sent = ready.try_io(|socket| {
                sendmsg::<()>(
                    socket.as_raw_fd(),
                    &[IoSlice::new(&bytes)],
                    messages,
                    MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
                    None,
                )
                .map_err(io::Error::from)
            });
            match sent {
                Ok(result) => return result.map(drop).map_err(io_error("send")),
                Err(_would_block) => {}
            }
        }
    }

    /// Receives one packet; `None` when the other side has closed.
    pub async fn receive<T: DeserializeOwned>(&self) -> Result<Option<T>, Error> {
        loop {
            let mut ready = self.0.readable().await.map_err(io_error("wait"))?;
            match ready.try_io(|socket| receive(socket.as_raw_fd())) {
                Ok(Ok(Packet::End)) => return Ok(None),
                Ok(Ok(Packet::Truncated)) => return Err(Error::Truncated),
                Ok(Ok(Packet::WithDescriptors)) => return Err(Error::Descriptors),
                Ok(Ok(Packet::Bytes(bytes))) => return Ok(Some(serde_json::from_slice(&bytes)?)),
                // The process died with packets of ours unread.
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(None);
                }
                Ok(Err(error)) => return Err(io_error("receive")(error)),
                Err(_would_block) => {}
            }
        }
    }
}

enum Packet {
    Bytes(Vec<u8>),
    Truncated,
    WithDescriptors,
    End,
}

fn receive(socket: RawFd) -> io::Result<Packet> {
    let mut bytes = vec![0; MAX_PACKET];
    // The other side has no business sending descriptors. Without room for them the kernel makes none for us, and says so:
    // however many they are, there is nothing that we could forget to close.
    let (length, flags) = {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(
            socket,
            &mut slices,
            None,
            MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
        )?;
        (message.bytes, message.flags)
    };
    if flags.contains(MsgFlags::MSG_CTRUNC) {
        return Ok(Packet::WithDescriptors);
    }
    if flags.contains(MsgFlags::MSG_TRUNC) {
        return Ok(Packet::Truncated);
    }
    if length == 0 {
        return Ok(Packet::End);
    }
    bytes.truncate(length);
    Ok(Packet::Bytes(bytes))
}

#[cfg(test)]
pub(crate) mod tests {
    use bulkhead_vmm_config::{Event, Request};

    use super::*;

    /// The process's end.
    pub(crate) fn of(theirs: OwnedFd) -> Control {
        Control(watch(theirs, Interest::READABLE | Interest::WRITABLE).unwrap())
    }

    impl Control {
        /// As small as the kernel lets it be (SOCK_MIN_SNDBUF): a packet of a few kibibytes is too large to be sent.
        pub(crate) fn shrink(&self) {
            nix::sys::socket::setsockopt(&self.0, nix::sys::socket::sockopt::SndBuf, &0).unwrap();
        }
    }

    #[tokio::test]
    async fn packets_keep_their_bounds_and_an_end_is_seen() {
        let (ours, theirs) = pair().unwrap();
        let theirs = of(theirs);
        ours.send(&Request::Stats, &[]).await.unwrap();
        ours.send(&Request::Stop, &[]).await.unwrap();
        assert_eq!(theirs.receive().await.unwrap(), Some(Request::Stats));
        assert_eq!(theirs.receive().await.unwrap(), Some(Request::Stop));
        theirs.send(&Event::Running, &[]).await.unwrap();
        drop(theirs);
        assert_eq!(ours.receive().await.unwrap(), Some(Event::Running));
        assert_eq!(ours.receive::<Event>().await.unwrap(), None);
        let error = ours.send(&Request::Stop, &[]).await.unwrap_err();
        assert!(error.is_closed(), "{error:?}");
    }

    #[tokio::test]
    async fn a_packet_that_the_kernel_refuses_is_no_end() {
        let (ours, theirs) = pair().unwrap();
        let theirs = of(theirs);
        // EBADF.
        let error = ours.send(&Request::Stop, &[-1]).await.unwrap_err();
        assert!(
            matches!(error, Error::Io { .. }) && !error.is_closed(),
            "{error:?}"
        );
        ours.send(&Request::Stats, &[]).await.unwrap();
        assert_eq!(theirs.receive().await.unwrap(), Some(Request::Stats));
    }

    #[tokio::test]
    async fn an_oversized_packet_is_refused_on_both_sides() {
        let (ours, theirs) = pair().unwrap();
        let large = "x".repeat(MAX_PACKET);
        assert!(matches!(
            ours.send(&large, &[]).await,
            Err(Error::TooLarge(..))
        ));
        let bytes = vec![b'1'; MAX_PACKET + 1];
        nix::sys::socket::send(theirs.as_raw_fd(), &bytes, MsgFlags::empty()).unwrap();
        assert!(matches!(
            ours.receive::<Event>().await,
            Err(Error::Truncated)
        ));
    }

    #[tokio::test]
    async fn descriptors_that_nobody_asked_for_are_never_ours() {
        let (ours, theirs) = pair().unwrap();
        // One, as many as a contract could allow, and the kernel's own most (SCM_MAX_FD): none may be left in our table.
        for count in [1, MAX_FDS, 253] {
            let (read, write) = nix::unistd::pipe().unwrap();
            let fds = vec![write.as_raw_fd(); count];
            sendmsg::<()>(
                theirs.as_raw_fd(),
                &[IoSlice::new(b"\"running\"")],
                &[ControlMessage::ScmRights(&fds)],
                MsgFlags::empty(),
                None,
            )
            .unwrap();
            assert!(matches!(
                ours.receive::<Event>().await,
                Err(Error::Descriptors)
            ));
            // A pipe ends with its last writer: a copy that was kept would keep it from that.
            drop(write);
            let mut end = [nix::poll::PollFd::new(
                std::os::fd::AsFd::as_fd(&read),
                nix::poll::PollFlags::POLLIN,
            )];
            nix::poll::poll(&mut end, 0u8).unwrap();
            let hung_up = end[0].revents().unwrap();
            assert!(hung_up.contains(nix::poll::PollFlags::POLLHUP), "{count}");
        }
    }
}
