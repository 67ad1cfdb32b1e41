//! The only place that waits for children: one loop that hands each status to whoever tracks the pid.
//!
//! As PID 1 the agent also inherits every orphan of the guest; their statuses interest nobody and are dropped here.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use linux::process::{Death, collect_any};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255, or 128 + the signal.
    pub status: u32,
    /// The signal that ended it, or 0.
    pub signal: u32,
    /// ns since the epoch.
    pub at_ns: u64,
    /// The kernel had killed a process of its container for want of memory by then; not known to the reaper.
    pub oom_killed: bool,
}

/// Waits for all children of the agent.
#[derive(Clone, Debug, Default)]
pub struct Reaper(Arc<Mutex<HashMap<i32, oneshot::Sender<Exit>>>>);

impl Reaper {
    /// Begins to reap, in the background of the current runtime.
    pub fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let mut children = signal(SignalKind::child())?;
        let looping = reaper.clone();
        tokio::spawn(async move {
            while children.recv().await.is_some() {
                looping.reap();
            }
        });
        Ok(reaper)
    }

    /// Asks for the status of a child that was just made.
    ///
    /// No await may stand between making the child and this call: the loop runs on the same thread, so that it cannot
    /// reap the child before it is known.
    pub fn track(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        self.lock().insert(pid, sender);
        receiver
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<i32, oneshot::Sender<Exit>>> {
        self.0
            .lock()
            .expect("no code panics while it holds this lock")
    }

    fn reap(&self) {
        loop {
            let Ok(Some((pid, death))) = collect_any() else {
                return;
            };
            let Some(sender) = self.lock().remove(&pid) else {
                continue;
            };
            let (status, signal) = match death {
                Death::Code(code) => (code as u32, 0),
                Death::Signal(signal) => (128 + signal as u32, signal as u32),
            };
            // Whoever asked may have given up.
            let _ = sender.send(Exit {
                status,
                signal,
                at_ns: now_ns(),
                oom_killed: false,
            });
        }
    }
}

fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}
