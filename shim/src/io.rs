//! Relays between a container's streams and the descriptors of whoever runs it.
//!
//! A stream is one end of a socketpair that the VMM joins to a vsock connection. A relay is a thread, because the other side
//! may be anything: a terminal, a pipe, a file. It ends at the end of its source, never by a timer. Where one side is a
//! pipe the bytes are spliced and not copied.

use std::{
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    thread,
};

use linux::retry;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt},
};
use tokio::sync::oneshot;

/// Bytes moved at once; also the size to which pipes are grown.
const CHUNK: usize = 1 << 20;

/// A relay that runs until its source ends.
#[derive(Debug)]
pub struct Relay(oneshot::Receiver<io::Result<u64>>);

impl Relay {
    /// Waits for the end; gives the number of bytes moved.
    pub async fn finished(self) -> io::Result<u64> {
        match self.0.await {
            Ok(result) => result,
            Err(_) => Err(io::Error::other("the relay's thread panicked")),
        }
    }
}

/// Copies from `source` into a container's stdin, then ends the stream's direction so that the container reads an end.
pub fn feed(source: OwnedFd, stream: UnixStream) -> io::Result<Relay> {
    stream.set_nonblocking(true)?;
    start("stdin", move || {
        let moved = copy(source.as_fd(), stream.as_fd());
        // The container may have closed its side first: not connected any more is fine.
        let _ = stream.shutdown(Shutdown::Write);
        moved
    })
}

/// Copies a container's output to `target`. When nobody reads there any more, the stream is closed, so that the container
/// learns what a local process would learn from SIGPIPE.
pub fn drain(name: &'static str, stream: UnixStream, target: OwnedFd) -> io::Result<Relay> {
    stream.set_nonblocking(true)?;
    start(name, move || {
        let moved = copy(stream.as_fd(), target.as_fd());
        if moved.is_err() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        moved
    })
}

fn start(name: &str, work: impl FnOnce() -> io::Result<u64> + Send + 'static) -> io::Result<Relay> {
    let (done, receiver) = oneshot::channel();
    thread::Builder::new().name(name.into()).spawn(move || {
        // Nobody waits for a stdin relay.
        let _ = done.send(work());
    })?;
    Ok(Relay(receiver))
}

fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<u64> {
    let mut moved = 0;
    if is_pipe(from) || is_pipe(to) {
        for pipe in [from, to] {
            // Only pipes take it, and only up to the user's limit: a smaller pipe works too.
            let _ = nix::fcntl::fcntl(pipe, nix::fcntl::FcntlArg::F_SETPIPE_SZ(CHUNK as i32));
        }
        loop {
            match splice(from, to) {
                Ok(0) => return Ok(moved),
                Ok(count) => moved += count as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(from, to)?,
                // A file opened for appending, a terminal: no splice.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
                Err(error) => return Err(error),
            }
        }
    }
    let mut buffer = vec![0; CHUNK / 4];
    loop {
        let count = match retry(|| nix::unistd::read(from, &mut buffer)) {
            Ok(0) => return Ok(moved),
            Ok(count) => count,
            Err(nix::errno::Errno::EAGAIN) => {
                wait_for(from, PollFlags::POLLIN)?;
                continue;
            }
            // The last process behind a terminal has gone; a stream was reset by a container that has gone.
            Err(nix::errno::Errno::EIO | nix::errno::Errno::ECONNRESET) => return Ok(moved),
            Err(error) => return Err(error.into()),
        };
        write_all(to, &buffer[..count])?;
        moved += count as u64;
    }
}

fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match retry(|| nix::unistd::write(to, bytes)) {
            Ok(count) => bytes = &bytes[count..],
            Err(nix::errno::Errno::EAGAIN) => wait_for(to, PollFlags::POLLOUT)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The stream never blocks: splice(2) keeps the pipe locked while it waits for a socket, and whoever is at the pipe's other end
/// could not even read what is in it.
fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<usize> {
    let flags = nix::fcntl::SpliceFFlags::SPLICE_F_MOVE;
    let moved = retry(|| nix::fcntl::splice(from, None, to, None, CHUNK, flags));
    match moved {
        Err(nix::errno::Errno::ECONNRESET) => Ok(0),
        other => Ok(other?),
    }
}

/// The stream is non-blocking, and so may be what the caller gave us; which of them was not ready is not told.
fn wait(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    wait_for(from, PollFlags::POLLIN)?;
    wait_for(to, PollFlags::POLLOUT)
}

fn wait_for(fd: BorrowedFd<'_>, event: PollFlags) -> io::Result<()> {
    retry(|| poll(&mut [PollFd::new(fd, event)], PollTimeout::NONE))?;
    Ok(())
}

fn is_pipe(fd: BorrowedFd<'_>) -> bool {
    nix::sys::stat::fstat(fd).is_ok_and(|found| found.st_mode & libc::S_IFMT == libc::S_IFIFO)
}

/// A stream for the VMM and our end of it.
pub fn stream() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    for end in [&ours, &theirs] {
        // The kernel caps it; a failure leaves the default, which works too.
        let _ = setsockopt(end, sockopt::SndBuf, &CHUNK);
        let _ = setsockopt(end, sockopt::RcvBuf, &CHUNK);
    }
    Ok((ours, theirs.into()))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
    };

    use super::*;

    fn bytes(length: usize) -> Vec<u8> {
        (0..length).map(|index| (index * 31 % 251) as u8).collect()
    }

    #[tokio::test]
    async fn all_bytes_arrive_through_pipes_and_the_end_is_passed_on() {
        let expected = bytes(8 << 20);
        let (read, write) = nix::unistd::pipe().unwrap();
        let (ours, theirs) = stream().unwrap();
        let relay = feed(read, ours).unwrap();
        let sent = expected.clone();
        let writer = thread::spawn(move || File::from(write).write_all(&sent).unwrap());
        let mut got = Vec::new();
        UnixStream::from(theirs).read_to_end(&mut got).unwrap();
        writer.join().unwrap();
        assert!(got == expected);
        assert_eq!(relay.finished().await.unwrap(), expected.len() as u64);
    }

    #[tokio::test]
    async fn all_bytes_arrive_in_a_file_opened_for_appending() {
        let expected = bytes(3 << 20);
        let path = tempfile::NamedTempFile::new().unwrap();
        let file = File::options().append(true).open(path.path()).unwrap();
        let (ours, theirs) = stream().unwrap();
        let relay = drain("stdout", ours, file.into()).unwrap();
        let mut theirs = UnixStream::from(theirs);
        theirs.write_all(&expected).unwrap();
        drop(theirs);
        relay.finished().await.unwrap();
        assert!(std::fs::read(path.path()).unwrap() == expected);
    }

    #[tokio::test]
    async fn what_has_come_can_be_read_while_more_is_awaited() {
        let (read, write) = nix::unistd::pipe().unwrap();
        let (ours, theirs) = stream().unwrap();
        let relay = drain("stdout", ours, write).unwrap();
        let mut theirs = UnixStream::from(theirs);
        let (told, heard) = std::sync::mpsc::channel();
        let reader = thread::spawn(move || {
            let mut read = File::from(read);
            for _ in 0..100 {
                let mut byte = [0];
                read.read_exact(&mut byte).unwrap();
                told.send(byte[0]).unwrap();
            }
            read
        });
        for expected in 0..100 {
            theirs.write_all(&[expected]).unwrap();
            let got = heard.recv_timeout(std::time::Duration::from_secs(60));
            assert_eq!(got, Ok(expected));
        }
        let _read = reader.join().unwrap();
        drop(theirs);
        assert_eq!(relay.finished().await.unwrap(), 100);
    }

    #[tokio::test]
    async fn a_reader_that_went_away_closes_the_stream() {
        let (read, write) = nix::unistd::pipe().unwrap();
        drop(read);
        let (ours, theirs) = stream().unwrap();
        let relay = drain("stdout", ours, write).unwrap();
        let mut theirs = UnixStream::from(theirs);
        // The relay may have seen that the reader is gone before this byte, and closed the stream.
        let _ = theirs.write_all(b"x");
        assert_eq!(
            relay.finished().await.unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
        assert_eq!(
            theirs.write_all(b"y").unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[tokio::test]
    async fn non_blocking_ends_are_waited_for() {
        let expected = bytes(1 << 20);
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let (ours, theirs) = stream().unwrap();
        let relay = drain("stdout", ours, write).unwrap();
        let sent = expected.clone();
        let writer = thread::spawn(move || UnixStream::from(theirs).write_all(&sent).unwrap());
        let mut got: Vec<u8> = Vec::new();
        while got.len() < expected.len() {
            wait_for(read.as_fd(), PollFlags::POLLIN).unwrap();
            let mut buffer = [0; 65536];
            let count = nix::unistd::read(&read, &mut buffer).unwrap();
            got.extend(&buffer[..count]);
        }
        writer.join().unwrap();
        assert!(got == expected);
        relay.finished().await.unwrap();
    }
}
