//! The streams of a process: bytes between its pipes or terminal and one connection to the host each.
//!
//! ```text
//!  host ── stdin ──► pipe ──► 0   end of file closes the pipe; a pipe without readers closes the connection
//!  host ◄── stdout ── pipe ◄── 1   end of file only when the last writer is gone, whoever that is
//!  host ◄─► master ◄─► terminal    end of file of the host's side means nothing to a terminal
//! ```
//!
//! Exit statuses do not pass here: a grandchild that holds stdout keeps the stream, not the answer to WaitProcess. That answer
//! says how much had been written, so that the host can tell the exit after the output.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use bulkhead_agent_protocol::agent;
use linux::descriptor::unread;
use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};

use crate::stream::{Host, Stream};

/// Size of the buffer between two descriptors, and of the pipes, in bytes. Above 64 KiB the pipe's own copying dominates.
const BUFFER: usize = 64 << 10;
const PIPE_SIZE: i32 = 256 << 10;

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

/// How much a process has written to one of its streams; nothing when the host did not want it.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// Bytes that were taken from the process.
    taken: Arc<AtomicU64>,
    /// Where the others wait, until the copying ends.
    source: Weak<Stream>,
}

impl Output {
    fn of(source: OwnedFd) -> io::Result<(Arc<Stream>, Output)> {
        let stream = Arc::new(Stream::non_blocking(source)?);
        let output = Output {
            taken: Arc::default(),
            source: Arc::downgrade(&stream),
        };
        Ok((stream, output))
    }

    /// Bytes that have been written so far. Copying takes and counts in one step of the agent's only thread, so none is missed or
    /// counted twice.
    pub fn written(&self) -> u64 {
        let waiting = self.source.upgrade().map_or(0, |stream| {
            // A pipe and a terminal have no reason to refuse.
            unread(stream.as_fd()).unwrap_or(0)
        });
        self.taken.load(Relaxed) + u64::from(waiting)
    }

    fn count(&self, bytes: usize) {
        self.taken.fetch_add(bytes as u64, Relaxed);
    }
}

/// Begins to copy between pipes and connections, in the background. Gives stdout and stderr.
pub fn copy_pipes(
    ends: [Option<OwnedFd>; 3],
    connections: [Option<Stream>; 3],
) -> io::Result<[Output; 2]> {
    let [stdin, stdout, stderr] = connections;
    let [input, out, err] = ends;
    if let (Some(pipe), Some(connection)) = (input, stdin) {
        tokio::spawn(copy_in(connection, Stream::non_blocking(pipe)?));
    }
    let copy = |pipe, connection| match (pipe, connection) {
        (Some(pipe), Some(connection)) => {
            let (pipe, output) = Output::of(pipe)?;
            tokio::spawn(copy_out(pipe, output.clone(), connection));
            Ok(output)
        }
        _ => io::Result::Ok(Output::default()),
    };
    Ok([copy(out, stdout)?, copy(err, stderr)?])
}

/// Begins to copy between a terminal's master and the connections, in the background. Gives the terminal's output, and nothing
/// for stderr.
pub fn copy_terminal(master: OwnedFd, connections: [Option<Stream>; 3]) -> io::Result<[Output; 2]> {
    let [stdin, stdout, _] = connections;
    if let Some(stdin) = stdin {
        let master = Stream::non_blocking(master.try_clone()?)?;
        tokio::spawn(copy_to_terminal(stdin, master));
    }
    let (master, output) = Output::of(master)?;
    tokio::spawn(copy_from_terminal(master, output.clone(), stdout));
    Ok([output, Output::default()])
}

/// Host to process. Ends with the host's end of file or when nobody can read the pipe any more; dropping the pipe is the
/// process' end of file.
async fn copy_in(connection: Stream, pipe: Stream) {
    tokio::select! {
        biased;
        _ = pipe_closed(&pipe) => {}
        // An error of either side ends the stream like its end of file.
        _ = splice_all(&connection, &pipe, |_| ()) => {}
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
async fn copy_out(pipe: Arc<Stream>, output: Output, connection: Stream) {
    let copied = splice_all(&pipe, &connection, |bytes| output.count(bytes));
    if copied.await.is_ok() {
        connection.finish();
    }
}

/// Moves bytes from one descriptor to the other, one of which is a pipe, until end of file: one copy by the kernel
/// instead of two through a buffer of ours, and no memory while nothing moves.
async fn splice_all(from: &Stream, to: &Stream, moved: impl Fn(usize)) -> io::Result<()> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    loop {
        let mut readable = from.readiness().readable().await?;
        let mut writable = to.readiness().writable().await?;
        match splice(from, None, to, None, PIPE_SIZE as usize, flags) {
            Ok(0) => return Ok(()),
            Ok(bytes) => moved(bytes),
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
                if !output {
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
async fn copy_from_terminal(master: Arc<Stream>, output: Output, mut connection: Option<Stream>) {
    let mut buffer = vec![0u8; BUFFER];
    loop {
        match (&*master).read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(length) => {
                output.count(length);
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
