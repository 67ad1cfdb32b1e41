//! The streams of a process: bytes between its pipes or terminal and one connection to the host each.
//!
//! ```text
//!  host ── stdin ──► pipe ──► 0   end of file closes the pipe; a pipe without readers closes the connection
//!  host ◄── stdout ── pipe ◄── 1   end of file only when the last writer is gone, whoever that is
//!  host ◄─► master ◄─► terminal    end of file of the host's side means nothing to a terminal
//! ```
//!
//! Exit statuses do not pass here: a grandchild that holds stdout keeps the stream, not the answer to WaitProcess.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use bulkhead_agent_protocol::agent;
use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};

use crate::stream::{Host, Stream};

/// Size of the buffer between two descriptors, and of the pipes, in bytes. Above 64 KiB the pipe's own copying dominates.
const BUFFER: usize = 64 << 10;
const PIPE_SIZE: i32 = 256 << 10;

/// How long output waits for its connection to say that it has room, before the connection is asked.
///
/// It can have room and not say so: some one of twenty bursts of 8 MiB stood still in the lab until something else woke the guest.
/// Why is not known. Nothing is looked at while no output waits.
const LOOK: Duration = Duration::from_millis(50);

/// A stream could not be made.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The host does not answer.
    #[error("cannot connect to port {port} of the host for a standard stream")]
    Dial {
        /// The port.
        port: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest has no descriptors left, or the like.
    #[error("cannot make a pipe for a standard stream")]
    Pipe(#[source] io::Error),
    /// The request contradicts itself.
    #[error("a process with a terminal has no stderr of its own, but the request names port {0}")]
    TerminalWithStderr(u32),
}

/// The agent's and the process' ends of the streams, before there is a process.
#[derive(Debug)]
pub struct Ends {
    /// What the stage gets as descriptors 0, 1 and 2.
    pub child: [OwnedFd; 3],
    agent: [Option<OwnedFd>; 3],
}

impl Ends {
    /// Makes pipes for the streams that the host wants, /dev/null for the others and for a terminal.
    ///
    /// The pipes belong to `owner`, a user of the guest, so that the process can open /dev/stdout again. A process in a user
    /// namespace could not take them over by itself.
    pub fn new(stdio: &agent::Stdio, terminal: bool, owner: u32) -> Result<Self, StdioError> {
        if terminal && stdio.stderr_port != 0 {
            return Err(StdioError::TerminalWithStderr(stdio.stderr_port));
        }
        let mut agent = [None, None, None];
        let mut child = Vec::with_capacity(3);
        for (stream, port) in [stdio.stdin_port, stdio.stdout_port, stdio.stderr_port]
            .into_iter()
            .enumerate()
        {
            if port == 0 || terminal {
                child.push(null().map_err(StdioError::Pipe)?);
                continue;
            }
            let (read, write) = pipe(owner).map_err(StdioError::Pipe)?;
            let (ours, theirs) = if stream == 0 {
                (write, read)
            } else {
                (read, write)
            };
            agent[stream] = Some(ours);
            child.push(theirs);
        }
        let child = <[OwnedFd; 3]>::try_from(child).expect("the loop above pushed three");
        Ok(Self { child, agent })
    }

    /// Splits off the agent's ends and closes the process' ones, so that end of file can come.
    pub fn into_agent(self) -> [Option<OwnedFd>; 3] {
        self.agent
    }
}

fn null() -> io::Result<OwnedFd> {
    Ok(std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?
        .into())
}

fn pipe(owner: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    nix::unistd::fchown(&write, Some(owner.into()), None)?;
    // A container's user may be at its limit of pipe pages; then the default size has to do.
    let _ = nix::fcntl::fcntl(&write, nix::fcntl::FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
    Ok((read, write))
}

/// Connections to the host for the streams that it wants, in the order stdin, stdout, stderr.
pub async fn dial(host: &Host, stdio: &agent::Stdio) -> Result<[Option<Stream>; 3], StdioError> {
    let connect = async |port: u32| match port {
        0 => Ok(None),
        port => host
            .dial(port)
            .await
            .map(Some)
            .map_err(|source| StdioError::Dial { port, source }),
    };
    let (stdin, stdout, stderr) = tokio::try_join!(
        connect(stdio.stdin_port),
        connect(stdio.stdout_port),
        connect(stdio.stderr_port)
    )?;
    Ok([stdin, stdout, stderr])
}

/// Begins to copy between pipes and connections, in the background.
pub fn copy_pipes(ends: [Option<OwnedFd>; 3], connections: [Option<Stream>; 3]) -> io::Result<()> {
    for (stream, pair) in ends.into_iter().zip(connections).enumerate() {
        let (Some(pipe), Some(connection)) = pair else {
            continue;
        };
        let pipe = Stream::non_blocking(pipe)?;
        if stream == 0 {
            tokio::spawn(copy_in(connection, pipe));
        } else {
            tokio::spawn(copy_out(pipe, connection));
        }
    }
    Ok(())
}

/// Begins to copy between a terminal's master and the connections, in the background.
pub fn copy_terminal(master: OwnedFd, connections: [Option<Stream>; 3]) -> io::Result<()> {
    let [stdin, stdout, _] = connections;
    if let Some(stdin) = stdin {
        let master = Stream::non_blocking(master.try_clone()?)?;
        tokio::spawn(copy_to_terminal(stdin, master));
    }
    tokio::spawn(copy_from_terminal(Stream::non_blocking(master)?, stdout));
    Ok(())
}

/// Host to process. Ends with the host's end of file or when nobody can read the pipe any more; dropping the pipe is the
/// process' end of file.
async fn copy_in(connection: Stream, pipe: Stream) {
    tokio::select! {
        biased;
        _ = pipe_closed(&pipe) => {}
        // An error of either side ends the stream like its end of file.
        _ = splice_all(&connection, &pipe, Duration::MAX) => {}
    }
}

/// Resolves when a pipe that we write to has lost its last reader: POLLERR on its write end (pipe(7)).
async fn pipe_closed(pipe: &Stream) {
    loop {
        match pipe.readiness().ready(Interest::ERROR).await {
            Ok(guard) if guard.ready().is_error() => return,
            Ok(mut guard) => guard.clear_ready(),
            // The event loop is shutting down, and the next write fails as well.
            Err(_) => return,
        }
    }
}

/// Process to host. Ends with the last writer, or, as a broken pipe for the process, with the host's connection.
async fn copy_out(pipe: Stream, connection: Stream) {
    if splice_all(&pipe, &connection, LOOK).await.is_ok() {
        connection.finish();
    }
}

/// Moves bytes from one descriptor to the other, one of which is a pipe, until end of file: one copy by the kernel
/// instead of two through a buffer of ours, and no memory while nothing moves.
///
/// Room is looked for after `patience` although nobody said that there is any.
async fn splice_all(from: &Stream, to: &Stream, patience: Duration) -> io::Result<()> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    loop {
        let mut readable = from.readiness().readable().await?;
        let mut writable = tokio::time::timeout(patience, to.readiness().writable())
            .await
            .ok()
            .transpose()?;
        match splice(from, None, to, None, PIPE_SIZE as usize, flags) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => {
                // splice(2) does not say which side it would have to wait for.
                let mut sides = [
                    PollFd::new(from.as_fd(), PollFlags::POLLIN),
                    PollFd::new(to.as_fd(), PollFlags::POLLOUT),
                ];
                poll(&mut sides, PollTimeout::ZERO)?;
                let [input, output] = sides.map(|side| side.any().unwrap_or(true));
                if !input {
                    readable.clear_ready();
                }
                if let Some(writable) = writable.as_mut().filter(|_| !output) {
                    writable.clear_ready();
                }
            }
            Err(errno) => return Err(errno.into()),
        }
        // A stream that is always ready must not keep the others and the RPCs waiting.
        tokio::task::yield_now().await;
    }
}

/// Host to terminal. The end of the host's stream leaves the terminal as it is: somebody may attach again.
async fn copy_to_terminal(mut connection: Stream, mut master: Stream) {
    let mut buffer = vec![0u8; BUFFER];
    loop {
        match connection.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => {
                if master.write_all(&buffer[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Terminal to host. A master answers EIO when no process has the terminal open any more. Without a reader on the host
/// the output is read all the same, or the process would stop when the terminal's buffer is full.
async fn copy_from_terminal(mut master: Stream, mut connection: Option<Stream>) {
    let mut buffer = vec![0u8; BUFFER];
    loop {
        match master.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(length) => {
                let Some(host) = connection.as_mut() else {
                    continue;
                };
                if host.write_all(&buffer[..length]).await.is_err() {
                    connection = None;
                }
            }
        }
    }
    if let Some(host) = connection {
        host.finish();
    }
}
