//! The standard streams of the container and of the command, joined.

use std::os::{fd::AsFd, unix::net::UnixStream};

use bulkhead_agent_protocol::agent as wire;
use bulkhead_shim::{
    io as relays,
    io::Relay,
    pod::{self, Pod},
};

use crate::{failure::Failure, terminal};

/// Our ends of the container's streams.
pub struct Streams {
    /// What the agent is told.
    pub stdio: wire::Stdio,
    stdin: UnixStream,
    stdout: UnixStream,
    stderr: Option<UnixStream>,
}

impl Streams {
    /// Offers them to the guest.
    pub async fn open(pod: &Pod, terminal: bool) -> Result<Streams, pod::Error> {
        let mut held = pod.held().await;
        let held = held.as_mut().ok_or_else(|| pod.ended())?;
        // A terminal's errors come with its output.
        let (stdio, [stdin, stdout, stderr]) = held.streams([true, true, !terminal]).await?;
        Ok(Streams {
            stdio,
            stdin: stdin.expect("it was wanted"),
            stdout: stdout.expect("it was wanted"),
            stderr,
        })
    }

    /// Joins the output to ours; gives its relays, which end when the container's last writer is gone, and the input.
    pub fn relay(self, terminal: bool) -> Result<(Vec<Relay>, Input), Failure> {
        if terminal {
            terminal::make_raw();
        }
        let own = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
        let mut output = vec![relays::drain(
            "stdout",
            self.stdout,
            own(std::io::stdout().as_fd())?,
        )?];
        if let Some(stderr) = self.stderr {
            output.push(relays::drain(
                "stderr",
                stderr,
                own(std::io::stderr().as_fd())?,
            )?);
        }
        Ok((output, Input(self.stdin)))
    }
}

/// The container's standard input, for when it runs.
pub struct Input(UnixStream);

impl Input {
    /// Joins ours to it.
    pub fn open(self) -> Result<(), Failure> {
        let ours = std::io::stdin().as_fd().try_clone_to_owned()?;
        relays::feed(ours, self.0)?;
        Ok(())
    }
}
