//! What an agent and the stage of a process say to each other before the process executes its program.
//!
//! ```text
//! agent                                        stage (descriptor 3)
//!   spec in a memfd, descriptor 4  ──────────►  reads it whole, closes it
//!                                  ◄──────────  Terminal (with the master), when it has one
//!                                  ◄──────────  Ready | Failed
//!   Start                          ──────────►
//!                                  ◄──────────  end of file (execve closed the socket) | Failed
//! ```
//!
//! One datagram of a SOCK_SEQPACKET socket each, so that nothing needs framing.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use linux::packet;

/// Descriptor of the socket in a stage.
pub const CONTROL_FD: RawFd = 3;
/// Descriptor of the memfd with the spec in a stage.
pub const SPEC_FD: RawFd = 4;
/// Descriptor of the pidfd of the container's init in the stage of an exec process.
pub const INIT_PIDFD: RawFd = 5;
/// First descriptor of the mount sources that the agent has opened for an init in a user namespace.
pub const FIRST_SOURCE_FD: RawFd = 5;

/// Longest text of a failure, in bytes.
const MAX_TEXT: usize = 4096;

/// What went wrong, as far as the answer to the shim depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FailureKind {
    /// The spec asks for something that cannot be.
    Invalid = 1,
    /// The program does not exist.
    ProgramNotFound = 2,
    /// The program exists and cannot be executed.
    ProgramNotExecutable = 3,
    /// Anything else.
    Internal = 4,
}

/// A stage's last words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Failure {
    /// What kind of failure.
    pub kind: FailureKind,
    /// What failed, on what, and why.
    pub text: String,
}

impl Failure {
    /// A failure of the system.
    pub fn internal(text: impl Into<String>) -> Self {
        Self {
            kind: FailureKind::Internal,
            text: text.into(),
        }
    }

    /// A failure of the spec.
    pub fn invalid(text: impl Into<String>) -> Self {
        Self {
            kind: FailureKind::Invalid,
            text: text.into(),
        }
    }

    /// The status that a process leaves when this ends it: 127 and 126 as shells have it, 128 otherwise.
    pub fn exit_code(&self) -> i32 {
        match self.kind {
            FailureKind::ProgramNotFound => 127,
            FailureKind::ProgramNotExecutable => 126,
            FailureKind::Invalid | FailureKind::Internal => 128,
        }
    }
}

/// A message from a stage.
#[derive(Debug)]
pub enum FromStage {
    /// The process has a terminal; this is its master.
    Terminal(OwnedFd),
    /// Everything but exec is done.
    Ready,
    /// The stage gives up.
    Failed(Failure),
    /// The socket is closed: the program runs, or the stage is dead.
    Closed,
}

const TERMINAL: u8 = b'T';
const READY: u8 = b'R';
const FAILED: u8 = b'F';
/// The agent's only message.
const START: u8 = b'S';

/// Sends a message to the agent; of the descriptors only the terminal is sent.
pub fn send_to_agent(agent: BorrowedFd<'_>, message: &FromStage) -> io::Result<()> {
    let mut bytes = Vec::new();
    let mut fds = Vec::new();
    match message {
        FromStage::Terminal(master) => {
            bytes.push(TERMINAL);
            fds.push(master.as_raw_fd());
        }
        FromStage::Ready => bytes.push(READY),
        FromStage::Failed(failure) => {
            bytes.extend([FAILED, failure.kind as u8]);
            let text = failure.text.as_bytes();
            bytes.extend(&text[..text.len().min(MAX_TEXT)]);
        }
        FromStage::Closed => return Ok(()),
    }
    Ok(packet::send(agent, &bytes, &fds)?)
}

/// Waits for the agent's Start; `false` when the agent has closed its end instead.
pub fn wait_for_start(agent: BorrowedFd<'_>) -> io::Result<bool> {
    let mut byte = [0u8; 1];
    let packet = packet::receive(agent, &mut byte, 0)?;
    Ok(packet.length == 1 && byte[0] == START)
}

/// Receives one message from the agent's end.
pub fn receive_from_stage(stage: BorrowedFd<'_>) -> io::Result<FromStage> {
    let mut bytes = [0u8; MAX_TEXT + 2];
    let packet = packet::receive(stage, &mut bytes, 1)?;
    let master = packet.descriptors.into_iter().next();
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed message from a stage");
    if packet.lost {
        return Err(malformed());
    }
    match &bytes[..packet.length] {
        [] => Ok(FromStage::Closed),
        [TERMINAL] => master.map(FromStage::Terminal).ok_or_else(malformed),
        [READY] => Ok(FromStage::Ready),
        [FAILED, kind, text @ ..] => Ok(FromStage::Failed(Failure {
            kind: match kind {
                1 => FailureKind::Invalid,
                2 => FailureKind::ProgramNotFound,
                3 => FailureKind::ProgramNotExecutable,
                _ => FailureKind::Internal,
            },
            text: String::from_utf8_lossy(text).into_owned(),
        })),
        _ => Err(malformed()),
    }
}

/// Sends Start to a stage.
pub fn send_start(stage: BorrowedFd<'_>) -> io::Result<()> {
    Ok(packet::send(stage, &[START], &[])?)
}
