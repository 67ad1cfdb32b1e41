//! Connected byte streams between the agent and the host: vsock in a guest, Unix sockets in a test on a normal host.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::sys::socket::{
    AddressFamily, Shutdown, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, connect,
    getsockopt, shutdown, socket, sockopt,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// VMADDR_CID_HOST.
const HOST_CID: u32 = 2;

/// Where the agent's connections go.
#[derive(Clone, Debug)]
pub enum Host {
    /// The host of this guest.
    Vsock,
    /// Port N is the Unix socket `N` in this directory.
    Unix(PathBuf),
}

impl Host {
    /// Connects to a port of the host.
    pub async fn dial(&self, port: u32) -> io::Result<Stream> {
        let (fd, pending) = match self {
            Self::Vsock => start_connect(AddressFamily::Vsock, &VsockAddr::new(HOST_CID, port))?,
            Self::Unix(directory) => start_connect(
                AddressFamily::Unix,
                &UnixAddr::new(&directory.join(port.to_string()))?,
            )?,
        };
        let stream = Stream::new(fd)?;
        if pending {
            stream.0.writable().await?.retain_ready();
            match getsockopt(&stream, sockopt::SocketError)? {
                0 => {}
                errno => return Err(io::Error::from_raw_os_error(errno)),
            }
        }
        Ok(stream)
    }
}

/// Begins to connect; true when it is still under way.
fn start_connect(family: AddressFamily, address: &dyn SockaddrLike) -> io::Result<(OwnedFd, bool)> {
    let fd = socket(
        family,
        SockType::Stream,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    match connect(fd.as_raw_fd(), address) {
        Ok(()) => Ok((fd, false)),
        Err(nix::Error::EINPROGRESS) => Ok((fd, true)),
        Err(errno) => Err(errno.into()),
    }
}

/// A stream socket, a pipe's end or a terminal's master that does not block.
#[derive(Debug)]
pub struct Stream(AsyncFd<OwnedFd>);

impl Stream {
    /// Takes a descriptor that is in non-blocking mode.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: AsyncFd needs the descriptor to stay open and the same while it is registered: it owns it, nothing here
        // takes it out or replaces it, and OwnedFd answers the same number until it is dropped with the AsyncFd.
        Ok(Self(unsafe { AsyncFd::register(fd) }?))
    }

    /// Takes a descriptor and puts it into non-blocking mode, which all copies of it share.
    pub fn non_blocking(fd: OwnedFd) -> io::Result<Self> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Self::new(fd)
    }

    /// The registration with the event loop, for what is neither reading nor writing.
    pub fn readiness(&self) -> &AsyncFd<OwnedFd> {
        &self.0
    }

    /// Ends our direction of a socket, so that the other side reads end of file; a pipe does so when it is dropped.
    pub fn finish(&self) {
        // Not a socket, or the other side is gone already: in both cases dropping it is all that is left to do.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Write);
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut &*self).poll_read(context, buffer)
    }
}

/// For one that others look at meanwhile.
impl AsyncRead for &Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            match guard.try_io(|fd| Ok(nix::unistd::read(fd, buffer.initialize_unfilled())?)) {
                Ok(Ok(length)) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            match guard.try_io(|fd| Ok(nix::unistd::write(fd, bytes)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finish();
        Poll::Ready(Ok(()))
    }
}
