//! Relays between a process' streams and what the client gave for them. A relay holds a buffer only while bytes move.

use std::{
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use tokio::{
    io::{AsyncWriteExt, Interest, unix::AsyncFd},
    net::UnixStream,
    task::JoinHandle,
};

use crate::sys::watch;

/// Bytes moved at once: what a pipe holds by default.
const CHUNK: usize = 64 << 10;

/// Where output goes.
#[derive(Debug)]
pub(super) enum Sink {
    /// A pipe or a FIFO, non-blocking.
    Pipe(AsyncFd<OwnedFd>),
    /// A regular file.
    File(File),
}

impl Sink {
    /// Takes the writing end of a pipe that is non-blocking.
    pub(super) fn pipe(fd: OwnedFd) -> io::Result<Sink> {
        Ok(Sink::Pipe(watch(fd, Interest::WRITABLE)?))
    }

    /// Writes all of it, and counts what has been.
    async fn write(&mut self, mut bytes: &[u8], passed: &AtomicU64) -> io::Result<()> {
        match self {
            Sink::File(file) => {
                file.write_all(bytes)?;
                passed.fetch_add(bytes.len() as u64, Relaxed);
                Ok(())
            }
            Sink::Pipe(pipe) => {
                while !bytes.is_empty() {
                    let mut ready = pipe.writable().await?;
                    let written = ready.try_io(|fd| {
                        nix::unistd::write(fd.get_ref(), bytes).map_err(io::Error::from)
                    });
                    match written {
                        Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                        Ok(count) => {
                            let count = count?;
                            passed.fetch_add(count as u64, Relaxed);
                            bytes = &bytes[count..];
                        }
                        Err(_would_block) => {}
                    }
                }
                Ok(())
            }
        }
    }
}

/// Passes a client's input on until its end.
pub(super) fn feed(reader: OwnedFd, stream: StdStream) -> io::Result<JoinHandle<()>> {
    let reader = watch(reader, Interest::READABLE)?;
    stream.set_nonblocking(true)?;
    let stream = UnixStream::from_std(stream)?;
    Ok(tokio::spawn(async move {
        if let Err(error) = pass_in(&reader, stream).await {
            tracing::debug!(%error, "input ended early");
        }
    }))
}

async fn pass_in(reader: &AsyncFd<OwnedFd>, mut stream: UnixStream) -> io::Result<()> {
    loop {
        let mut ready = reader.readable().await?;
        let mut buffer = vec![0; CHUNK];
        let read = ready.try_io(|fd| Ok(nix::unistd::read(fd.get_ref().as_fd(), &mut buffer)?));
        match read {
            // All writers are gone, our own holder too: the process reads an end.
            Ok(Ok(0)) => return stream.shutdown().await,
            Ok(Ok(count)) => stream.write_all(&buffer[..count]).await?,
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

/// How far a relay of output has come.
#[derive(Debug, Default)]
pub(super) struct Passed {
    bytes: AtomicU64,
    ended: AtomicBool,
}

impl Passed {
    /// Bytes passed on.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// No more will be.
    pub(super) fn ended(&self) -> bool {
        self.ended.load(Relaxed)
    }
}

/// Says that a relay has ended, however it does.
struct Ending(Arc<Passed>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.ended.store(true, Relaxed);
    }
}

/// Passes a process' output on until its end.
pub(super) fn drain(
    stream: StdStream,
    mut sink: Sink,
    passed: Arc<Passed>,
) -> io::Result<JoinHandle<()>> {
    stream.set_nonblocking(true)?;
    let stream = UnixStream::from_std(stream)?;
    let ending = Ending(passed);
    Ok(tokio::spawn(async move {
        if let Err(error) = pass_out(&stream, &mut sink, &ending.0.bytes).await {
            // A full disk, or a logger that has gone: the container goes on without.
            tracing::warn!(%error, "output is lost from here on");
            let mut buffer = vec![0; CHUNK];
            while matches!(read(&stream, &mut buffer).await, Ok(1..)) {}
        }
    }))
}

async fn pass_out(stream: &UnixStream, sink: &mut Sink, passed: &AtomicU64) -> io::Result<()> {
    loop {
        // Before the buffer is made: nothing is held while nothing comes.
        stream.readable().await?;
        let mut buffer = vec![0; CHUNK];
        match stream.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => sink.write(&buffer[..count], passed).await?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The machine has gone: what it sent has been read before.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        }
        // One stream that is always ready must not keep the others and the requests waiting.
        tokio::task::yield_now().await;
    }
}

async fn read(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        match stream.try_read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

/// A pipe whose writing end is ours and non-blocking, the other one blocking and for a child.
pub(super) fn child_pipe() -> io::Result<(OwnedFd, Sink)> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(write.as_fd(), nix::fcntl::FcntlArg::F_SETFL(flags))?;
    debug_assert!(write.as_raw_fd() > 2);
    Ok((read, Sink::pipe(write)?))
}
