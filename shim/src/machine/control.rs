//! Our end of the control socket of `bulkhead-vmm`: one JSON value a packet, descriptors beside it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
    time::Duration,
};

use bulkhead_vmm_config::{MAX_FDS, MAX_PACKET};
use linux::packet;
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
    /// Whether the other side has closed its end. Every other failure leaves it as it was: its end
    /// does not follow.
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
    let (ours, theirs) = packet::pair().map_err(|errno| io_error("make a pair")(errno.into()))?;
    Ok((Control::of(ours)?, theirs))
}

impl Control {
    /// Takes an end, which does not block from then on.
    fn of(end: OwnedFd) -> Result<Control, Error> {
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&end, nix::fcntl::FcntlArg::F_SETFL(flags))
            .map_err(|errno| io_error("set up")(errno.into()))?;
        let end = watch(end, Interest::READABLE | Interest::WRITABLE).map_err(io_error("watch"))?;
        Ok(Control(end))
    }

    /// Sends one packet.
    pub async fn send<T: Serialize>(&self, value: &T, fds: &[RawFd]) -> Result<(), Error> {
        let bytes = serde_json::to_vec(value)?;
        if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
            return Err(Error::TooLarge(bytes.len(), fds.len()));
        }
        loop {
            let mut ready = self.0.writable().await.map_err(io_error("wait"))?;
            let sent = ready.try_io(|socket| Ok(packet::send(socket.as_fd(), &bytes, fds)?));
            match sent {
                Ok(result) => return result.map(drop).map_err(io_error("send")),
                Err(_would_block) => {}
            }
        }
    }

    /// The same of a process that has gone: what it has left. Somebody whom it has handed its end
    /// to may hold it open for ever.
    pub async fn receive_rest<T: DeserializeOwned>(&self) -> Result<Option<T>, Error> {
        let received = tokio::time::timeout(AT_HAND, self.receive()).await;
        received.unwrap_or(Ok(None))
    }

    /// Receives one packet; `None` when the other side has closed.
    pub async fn receive<T: DeserializeOwned>(&self) -> Result<Option<T>, Error> {
        loop {
            let mut ready = self.0.readable().await.map_err(io_error("wait"))?;
            match ready.try_io(|socket| receive(socket.as_fd())) {
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

/// How long a packet that is there already may take to be seen.
const AT_HAND: Duration = Duration::from_millis(200);

enum Packet {
    Bytes(Vec<u8>),
    Truncated,
    WithDescriptors,
    End,
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<Packet> {
    let mut bytes = vec![0; MAX_PACKET];
    // The other side has no business sending descriptors. Without room for them the kernel makes
    // none for us, and says so: however many they are, there is nothing that we could forget to
    // close.
    let packet = packet::receive(socket, &mut bytes, 0)?;
    Ok(match packet.length {
        _ if packet.lost => Packet::WithDescriptors,
        _ if packet.too_long => Packet::Truncated,
        0 => Packet::End,
        length => {
            bytes.truncate(length);
            Packet::Bytes(bytes)
        }
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::fd::AsRawFd;

    use bulkhead_vmm_config::{Event, Request};

    use super::*;

    /// The process's end.
    pub(crate) fn of(theirs: OwnedFd) -> Control {
        Control::of(theirs).unwrap()
    }

    impl Control {
        /// For a process that says what no event is.
        pub(crate) fn into_socket(self) -> OwnedFd {
            self.0.into_inner()
        }

        /// As small as the kernel lets it be (SOCK_MIN_SNDBUF): a packet of a few kibibytes is too
        /// large to be sent.
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
        theirs
            .send(&Event::Running { landlock: None }, &[])
            .await
            .unwrap();
        drop(theirs);
        assert_eq!(
            ours.receive().await.unwrap(),
            Some(Event::Running { landlock: None })
        );
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
        packet::send(theirs.as_fd(), &bytes, &[]).unwrap();
        assert!(matches!(
            ours.receive::<Event>().await,
            Err(Error::Truncated)
        ));
    }

    #[tokio::test]
    async fn descriptors_that_nobody_asked_for_are_never_ours() {
        let (ours, theirs) = pair().unwrap();
        // One, as many as a contract could allow, and the kernel's own most (SCM_MAX_FD): none may
        // be left in our table.
        for count in [1, MAX_FDS, 253] {
            let (read, write) = nix::unistd::pipe().unwrap();
            let fds = vec![write.as_raw_fd(); count];
            packet::send(theirs.as_fd(), b"\"running\"", &fds).unwrap();
            assert!(matches!(
                ours.receive::<Event>().await,
                Err(Error::Descriptors)
            ));
            // A pipe ends with its last writer: a copy that was kept would keep it from that.
            drop(write);
            let mut end = [nix::poll::PollFd::new(
                read.as_fd(),
                nix::poll::PollFlags::POLLIN,
            )];
            nix::poll::poll(&mut end, 0u8).unwrap();
            let hung_up = end[0].revents().unwrap();
            assert!(hung_up.contains(nix::poll::PollFlags::POLLHUP), "{count}");
        }
    }
}
