//! A process of a task as containerd sees it.
//!
//! ```text
//! init:  Created ──► Starting ──► Running ◄──► Paused
//! exec:  Added ──►      │            │           │
//!                       └──► Stopped ◄───────────┘      (and from Created, when it is killed before its start)
//! ```

use std::{
    sync::{Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use tokio::sync::watch;

use super::Error;
use crate::containerd::stdio::{Names, Streams};
use bulkhead_agent_protocol::agent::WaitProcessResponse;

/// How long output may take to be passed on once the process has ended: a client that does not read, or a process left behind that
/// keeps the output open, holds up nothing for longer. As long as containerd's own shim waits.
const DRAIN: Duration = Duration::from_secs(10);

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 and the signal's number.
    pub status: u32,
    /// By the host's clock.
    pub at: SystemTime,
}

impl Exit {
    /// An end that is noticed now.
    pub fn now(status: u32) -> Exit {
        Exit {
            status,
            at: SystemTime::now(),
        }
    }
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// An exec process that is only written down.
    Added,
    /// An init that stands before its exec.
    Created,
    /// On its way to its exec.
    Starting,
    /// It runs.
    Running,
    /// It stands still with its container.
    Paused,
    /// It has ended.
    Stopped(Exit),
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Empty for a task's init.
    pub exec_id: String,
    /// As the client named its streams.
    pub names: Names,
    phase: watch::Sender<Phase>,
    plumbing: Mutex<Plumbing>,
}

#[derive(Debug, Default)]
struct Plumbing {
    streams: Streams,
    /// CloseIO came, perhaps before there was anything to close.
    input_closed: bool,
    /// (rows, columns) asked for before there was a terminal.
    size: Option<(u16, u16)>,
}

impl Process {
    /// One that begins in `phase`.
    pub fn new(exec_id: &str, names: Names, phase: Phase) -> Process {
        Process {
            exec_id: exec_id.into(),
            names,
            phase: watch::Sender::new(phase),
            plumbing: Mutex::default(),
        }
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Goes to `to` if `from` allows it now; else tells where it is.
    pub fn step(&self, from: &[Phase], to: Phase) -> Result<(), Phase> {
        self.step_and(from, to, || ())
    }

    /// The same, and tells of it before anybody can see it, so that what follows from it is told later.
    pub fn step_and(&self, from: &[Phase], to: Phase, tell: impl FnOnce()) -> Result<(), Phase> {
        let mut was = to;
        let stepped = self.phase.send_if_modified(|phase| {
            was = *phase;
            let allowed = from.contains(phase);
            if allowed {
                *phase = to;
                tell();
            }
            allowed
        });
        if stepped { Ok(()) } else { Err(was) }
    }

    /// Ends it. `false`: it had ended before.
    pub fn stop(&self, exit: Exit) -> bool {
        self.stop_and(exit, || ())
    }

    /// The same, and tells of it before anybody can see it.
    pub fn stop_and(&self, exit: Exit, tell: impl FnOnce()) -> bool {
        self.phase.send_if_modified(|phase| {
            let live = !matches!(phase, Phase::Stopped(_));
            if live {
                *phase = Phase::Stopped(exit);
                tell();
            }
            live
        })
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        match self.phase() {
            Phase::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// Waits for its end, at once when that was before.
    pub async fn ended(&self) -> Exit {
        let mut phase = self.phase.subscribe();
        loop {
            if let Phase::Stopped(exit) = *phase.borrow_and_update() {
                return exit;
            }
            // The sender is in `self`.
            let _ = phase.changed().await;
        }
    }

    /// Waits until it is not on its way to its exec.
    pub async fn settled(&self) {
        let mut phase = self.phase.subscribe();
        // The sender is in `self`.
        let _ = phase.wait_for(|phase| *phase != Phase::Starting).await;
    }

    /// Gives it its running streams.
    pub fn connect(&self, streams: Streams) {
        self.plumbing().streams = streams;
    }

    /// Begins to pass its input on; CloseIO may have come before.
    pub fn open_input(&self) -> Result<(), Error> {
        let mut plumbing = self.plumbing();
        plumbing.streams.open_input()?;
        if plumbing.input_closed {
            plumbing.streams.close_input();
        }
        Ok(())
    }

    /// CloseIO: again and before the start are fine.
    pub fn close_input(&self) {
        let mut plumbing = self.plumbing();
        plumbing.input_closed = true;
        plumbing.streams.close_input();
    }

    /// Takes no more input from its client.
    pub fn stop_input(&self) {
        self.plumbing().streams.stop_input();
    }

    /// Remembers a terminal's size for the start.
    pub fn set_size(&self, rows: u16, columns: u16) {
        self.plumbing().size = Some((rows, columns));
    }

    /// The size that was asked for.
    pub fn size(&self) -> Option<(u16, u16)> {
        self.plumbing().size
    }

    /// Waits until its output up to its exit has been read; see [`Streams::heard`].
    pub async fn heard(&self, exit: &WaitProcessResponse) {
        let written = [exit.stdout_bytes, exit.stderr_bytes];
        let heard = self.plumbing().streams.heard(written, DRAIN);
        heard.await;
    }

    /// Waits until its output has been passed on, and closes its streams.
    pub async fn drain(&self) {
        let streams = std::mem::take(&mut self.plumbing().streams);
        if !streams.finish(DRAIN).await {
            tracing::warn!(exec = %self.exec_id, "output was still open or unread when the process was deleted");
        }
    }

    /// Closes its streams now: it never ran.
    pub fn disconnect(&self) {
        self.plumbing().streams = Streams::default();
    }

    /// Refuses with the words of a state error.
    pub fn refuse(&self, verb: &str, phase: Phase) -> Error {
        let state = match phase {
            Phase::Added => "has not been started",
            Phase::Created => "is created and not started",
            Phase::Starting => "is being started",
            Phase::Running => "is running",
            Phase::Paused => "is paused",
            Phase::Stopped(_) => "has ended",
        };
        Error::State(format!("cannot {verb}: the process {state}"))
    }

    fn plumbing(&self) -> MutexGuard<'_, Plumbing> {
        self.plumbing.lock().expect("no panic while it is held")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn an_end_is_told_once_and_to_all() {
        let process = Arc::new(Process::new("", Names::default(), Phase::Created));
        let waiters: Vec<_> = (0..10)
            .map(|_| {
                let process = process.clone();
                tokio::spawn(async move { process.ended().await })
            })
            .collect();
        process.step(&[Phase::Created], Phase::Starting).unwrap();
        process
            .step(&[Phase::Created], Phase::Starting)
            .unwrap_err();
        process.step(&[Phase::Starting], Phase::Running).unwrap();
        let exit = Exit::now(7);
        assert!(process.stop(exit));
        assert!(!process.stop(Exit::now(8)));
        for waiter in waiters {
            assert_eq!(waiter.await.unwrap(), exit);
        }
        assert_eq!(process.ended().await, exit);
        assert_eq!(
            process.step(&[Phase::Running], Phase::Paused),
            Err(Phase::Stopped(exit))
        );
    }
}
