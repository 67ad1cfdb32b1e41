//! Containers: made, entered and ended here, one subject a file.
//!
//! ```text
//!  agent (create, exec, process)                          stage (a process of its own)
//!    plan namespaces, cgroup, streams ── clone3 ──────────► steps by name (stage)
//!    id maps, oom_score_adj                                 mounts, terminal, user, …
//!    Created ◄──────────────────────────────── Ready ──────
//!    rlimits, Start ──────────────────────────────────────► hooks, capabilities, seccomp, execve
//! ```
#![forbid(unsafe_code)]

pub(crate) mod cgroup;
mod create;
mod exec;
mod launcher;
pub(crate) mod namespaces;
mod process;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use bulkhead_agent_protocol::agent;
use linux::process::{open_pidfd, send_signal};

pub(crate) use super::stage::message::FailureKind;
pub(crate) use create::{CreateError, blocking, create};
pub(crate) use exec::create as create_exec;
pub(crate) use launcher::Launcher;
pub(crate) use process::{Process, ProcessError};

use crate::stage::plan::Plan;
use cgroup::Cgroup;
pub(crate) use cgroup::CgroupError;

/// A container's cgroup; only an update of its limits writes.
pub(crate) type SharedCgroup = Arc<RwLock<Cgroup>>;

/// A container: its init, its exec processes, and what holds them together.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) init: Arc<Process>,
    pub(crate) cgroup: SharedCgroup,
    plan: Plan,
    uid_mappings: Vec<agent::IdMapping>,
    execs: Mutex<HashMap<String, Option<Arc<Process>>>>,
}

impl Container {
    /// The exec processes; `None` for one that is being made.
    pub(crate) fn execs(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Process>>>> {
        self.execs
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// Sends a signal to every process.
    pub(crate) fn signal_all(&self, signal: u32) -> Result<(), CgroupError> {
        let cgroup = self
            .cgroup
            .read()
            .expect("no code panics while it holds this lock");
        if signal == libc::SIGKILL as u32 {
            return cgroup.kill_all();
        }
        let pids = || cgroup.pids();
        // A number may pass to another process between reading it and opening it: only what is still in the cgroup
        // after it was opened is what it was before.
        let opened: Vec<_> = pids()?
            .into_iter()
            .filter_map(|pid| Some((pid, open_pidfd(pid as i32).ok()?)))
            .collect();
        let still = pids()?;
        for (_, pidfd) in opened.iter().filter(|(pid, _)| still.contains(pid)) {
            // It may have exited in the meantime.
            let _ = send_signal(pidfd.as_fd(), signal as i32);
        }
        Ok(())
    }
}
