//! A process as the agent knows it, from clone3 to its exit.
//!
//! ```text
//!            Ready                 Start              execve
//!  (stage) ─────────► Created ──────────► Starting ──────────► Running
//!                        │                   │ Failed             │
//!                        └───────────────────┴────────► Exited ◄──┘
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use bulkhead_agent_protocol::agent;
use linux::process::{Child, send_signal};
use linux::{packet, schedule};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tokio::sync::{oneshot, watch};

use crate::reaper::Exit;
use crate::stage::message;
use crate::stage::message::{Failure, FromStage};
use crate::stage::terminal;
use crate::stdio::Output;
use crate::stream::Stream;

/// Soft limit of open files that a process gets when its spec has none: more slows down programs that close them all.
const DEFAULT_NOFILE: u64 = 1024;
/// Its hard limit.
const MAX_NOFILE: u64 = 1 << 20;

/// Text of the failure of a stage that is gone without a word.
pub const ENDED_EARLY: &str = "the process ended before it was ready";

/// What the agent holds of a stage that is to be made: its end of the socket, and what the child inherits.
#[derive(Debug)]
pub struct Launch {
    ours: OwnedFd,
    inherited: Vec<OwnedFd>,
}

impl Launch {
    /// Prepares descriptors 0 to 4 for a stage, and those from 5 on, which depend on the stage.
    pub fn new(stdio: &[OwnedFd; 3], spec: &[u8], more: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let (ours, theirs) = packet::pair()?;
        let memfd = memfd_create(c"spec", MFdFlags::MFD_CLOEXEC)?;
        let mut file = std::fs::File::from(memfd);
        io::Write::write_all(&mut file, spec)?;
        let mut inherited = Vec::with_capacity(5 + more.len());
        for fd in stdio {
            inherited.push(fd.try_clone()?);
        }
        inherited.extend([theirs, file.into()]);
        for fd in more {
            inherited.push(fd.try_clone_to_owned()?);
        }
        Ok(Self { ours, inherited })
    }

    /// What becomes descriptors 0, 1, 2, …
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.inherited.iter().map(AsFd::as_fd).collect()
    }

    /// The socket's other end, which the child reads before it executes.
    pub fn control(&self) -> BorrowedFd<'_> {
        self.inherited[message::CONTROL_FD as usize].as_fd()
    }

    /// Sends the byte that the child of a user namespace waits for.
    pub fn release(&self) -> io::Result<()> {
        nix::unistd::write(&self.ours, b"m")?;
        Ok(())
    }

    /// Keeps the agent's end alone, so that the child's exec is seen as end of file.
    pub fn into_channel(self) -> io::Result<Channel> {
        Ok(Channel(Stream::non_blocking(self.ours)?))
    }
}

/// The agent's end of a stage's socket.
#[derive(Debug)]
pub struct Channel(Stream);

impl Channel {
    /// The stage's next message.
    pub async fn receive(&self) -> io::Result<FromStage> {
        loop {
            let mut guard = self.0.readiness().readable().await?;
            if let Ok(result) = guard.try_io(|fd| message::receive_from_stage(fd.as_fd())) {
                return match result {
                    // The stage died with a message of ours unread.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                        Ok(FromStage::Closed)
                    }
                    other => other,
                };
            }
        }
    }

    /// Waits until everything but exec is done; answers the terminal's master when the process has one.
    pub async fn ready(&self) -> Result<Option<OwnedFd>, Failure> {
        let mut terminal = None;
        loop {
            match self.receive().await {
                Ok(FromStage::Terminal(master)) => terminal = Some(master),
                Ok(FromStage::Ready) => return Ok(terminal),
                Ok(FromStage::Failed(failure)) => return Err(failure),
                Ok(FromStage::Closed) => return Err(Failure::internal(ENDED_EARLY)),
                Err(error) => {
                    return Err(Failure::internal(format!(
                        "cannot hear the process: {error}"
                    )));
                }
            }
        }
    }

    /// Lets the process execute its program and waits until it does.
    async fn start(&self) -> Result<(), Failure> {
        message::send_start(self.0.as_fd()).map_err(|error| {
            Failure::internal(format!("the process ended before its start: {error}"))
        })?;
        match self.receive().await {
            Ok(FromStage::Closed) => Ok(()),
            Ok(FromStage::Failed(failure)) => Err(failure),
            Ok(_) => Err(Failure::internal("unexpected message from the process")),
            Err(error) => Err(Failure::internal(format!(
                "cannot hear the process: {error}"
            ))),
        }
    }
}

/// Why a process cannot do what is asked.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It is in another state.
    #[error("the process {0}")]
    State(&'static str),
    /// It is gone.
    #[error("the process has exited")]
    Exited,
    /// It has no terminal.
    #[error("the process has no terminal")]
    NoTerminal,
    /// Its stage gave up.
    #[error(transparent)]
    Stage(#[from] Failure),
    /// The system refused.
    #[error("cannot {what} process {pid}")]
    System {
        /// What was tried.
        what: &'static str,
        /// On which.
        pid: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What can still be done with a process that has not started.
#[derive(Debug)]
enum Start {
    Created {
        channel: Channel,
        rlimits: Vec<agent::Rlimit>,
    },
    Starting,
    Started,
}

/// A process of a container.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
    start: Mutex<Start>,
    terminal: Option<OwnedFd>,
    output: [Output; 2],
    exit: watch::Receiver<Option<Exit>>,
}

impl Process {
    /// Takes over a stage that is ready.
    pub fn new(
        spawned: Child,
        channel: Channel,
        spec: &agent::Process,
        terminal: Option<OwnedFd>,
        output: [Output; 2],
        exit: watch::Receiver<Option<Exit>>,
    ) -> Self {
        let start = Mutex::new(Start::Created {
            channel,
            rlimits: spec.rlimits.clone(),
        });
        Self {
            pid: spawned.pid,
            pidfd: spawned.pidfd,
            start,
            terminal,
            output,
            exit,
        }
    }

    /// In the guest's initial pid namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Refers to the process even after its exit.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// How it ended, when it has.
    pub fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits until it has ended.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        let value = exit
            .wait_for(Option::is_some)
            .await
            .expect("the watcher of a process outlives it");
        value.expect("waited for a value")
    }

    /// Bytes of stdout and of stderr that have been written to its streams so far, by whomever.
    pub fn written(&self) -> [u64; 2] {
        self.output.each_ref().map(Output::written)
    }

    /// Lets it execute its program; answers when that has happened or failed.
    pub async fn start(&self) -> Result<(), ProcessError> {
        if self.exited().is_some() {
            return Err(ProcessError::State("has exited already"));
        }
        let (channel, rlimits) = {
            let mut start = self
                .start
                .lock()
                .expect("no code panics while it holds this lock");
            match std::mem::replace(&mut *start, Start::Starting) {
                Start::Created { channel, rlimits } => (channel, rlimits),
                Start::Starting => return Err(ProcessError::State("is being started already")),
                Start::Started => {
                    *start = Start::Started;
                    return Err(ProcessError::State("has been started already"));
                }
            }
        };
        // When the limits are refused the channel closes, and with it the stage ends.
        let result = match self.set_rlimits(&rlimits) {
            Ok(()) => channel.start().await.map_err(ProcessError::from),
            Err(error) => Err(error),
        };
        *self
            .start
            .lock()
            .expect("no code panics while it holds this lock") = Start::Started;
        result
    }

    /// By the agent, because raising a hard limit needs a capability in the guest's own user namespace; and this late, because the
    /// limits are the program's and not its stage's.
    fn set_rlimits(&self, rlimits: &[agent::Rlimit]) -> Result<(), ProcessError> {
        if !rlimits
            .iter()
            .any(|limit| limit.resource == libc::RLIMIT_NOFILE)
        {
            // The agent's own soft limit is higher. Where even this is refused (a test without CAP_SYS_RESOURCE),
            // the process keeps what it inherited.
            let _ =
                schedule::set_limit_of(self.pid, libc::RLIMIT_NOFILE, DEFAULT_NOFILE, MAX_NOFILE);
        }
        for limit in rlimits {
            let what = format!(
                "cannot set resource limit {} to {} and {}",
                rlimit_name(limit.resource),
                limit.soft,
                limit.hard
            );
            schedule::set_limit_of(self.pid, limit.resource, limit.soft, limit.hard).map_err(
                |errno| Failure::internal(format!("{what}: {}", io::Error::from(errno))),
            )?;
        }
        Ok(())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: u32) -> Result<(), ProcessError> {
        if self.exited().is_some() {
            return Err(ProcessError::Exited);
        }
        send_signal(self.pidfd.as_fd(), signal as i32).map_err(|errno| match errno {
            Errno::ESRCH => ProcessError::Exited,
            _ => ProcessError::System {
                what: "signal",
                pid: self.pid,
                source: errno.into(),
            },
        })
    }

    /// Sets the terminal's size.
    pub fn resize(&self, rows: u32, columns: u32) -> Result<(), ProcessError> {
        let terminal = self.terminal.as_ref().ok_or(ProcessError::NoTerminal)?;
        linux::terminal::resize(
            terminal.as_fd(),
            terminal::clamp(rows),
            terminal::clamp(columns),
        )
        .map_err(|errno| ProcessError::System {
            what: "resize the terminal of",
            pid: self.pid,
            source: errno.into(),
        })
    }

    /// Ends a stage that will never be a process, and waits for its end.
    pub async fn abandon(spawned: Child, mut exit: watch::Receiver<Option<Exit>>) {
        // Gone already is as good.
        let _ = send_signal(spawned.pidfd.as_fd(), libc::SIGKILL);
        // An error means that the watcher is gone, and the watcher ends with the process.
        let _ = exit.wait_for(Option::is_some).await;
    }
}

/// Turns the reaper's answer into a value that any number of callers can wait for; `at_end` runs before they see it, and
/// says whether the kernel has killed for memory in the container.
pub fn watch_exit(
    reaped: oneshot::Receiver<Exit>,
    at_end: impl FnOnce() -> bool + Send + 'static,
) -> watch::Receiver<Option<Exit>> {
    let (sender, receiver) = watch::channel(None);
    tokio::spawn(async move {
        let exit = reaped
            .await
            .expect("the reaper keeps the sender of a tracked pid until it is reaped");
        let oom_killed = at_end();
        // Nobody is left to know.
        let _ = sender.send(Some(Exit { oom_killed, ..exit }));
    });
    receiver
}

/// Names of RLIMIT_*, by number (asm-generic/resource.h).
fn rlimit_name(resource: u32) -> String {
    const NAMES: [&str; 16] = [
        "cpu",
        "fsize",
        "data",
        "stack",
        "core",
        "rss",
        "nproc",
        "nofile",
        "memlock",
        "as",
        "locks",
        "sigpending",
        "msgqueue",
        "nice",
        "rtprio",
        "rttime",
    ];
    NAMES
        .get(resource as usize)
        .map_or_else(|| resource.to_string(), |name| (*name).to_owned())
}
