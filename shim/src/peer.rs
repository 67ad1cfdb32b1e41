//! A process of a pod (`bulkhead-vmm run`, `bulkhead-vmm fs`): how it is started and how its end is noticed.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    control::{self, Control},
    ledger::{self, Ledger, Resource},
    logs::{self, Tail},
    sys::{
        self,
        process::{self, Death, ProcessId},
        spawn::{self, Program},
    },
};

/// Why it could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// clone3 or execve failed.
    #[error("cannot start {path}")]
    Start {
        /// The executable.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its plumbing.
    #[error("cannot prepare the start of {path}")]
    Prepare {
        /// The executable.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its control socket.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// It could not be recorded.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
}

/// A started process.
#[derive(Debug)]
pub struct Peer {
    /// Our end of its control socket. When it closes, the process ends.
    pub control: Control,
    /// In the host's pid namespace.
    pub pid: i32,
    /// Where it writes log lines, to be sent to it with its configuration.
    pub log: OwnedFd,
    /// Its last log lines and what it wrote to standard error.
    pub tail: Tail,
    pidfd: AsyncFd<OwnedFd>,
}

/// What all processes of a pod are started with.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// For log lines.
    pub sandbox: &'a str,
    /// `bulkhead-vmm`.
    pub executable: &'a Path,
    /// The pod's cgroup.
    pub cgroup: BorrowedFd<'a>,
}

impl Peer {
    /// Starts `bulkhead-vmm ROLE` and records it. Until the record is written the pod's cgroup, recorded before, stands for it.
    pub fn start(place: Place<'_>, role: &'static str, ledger: &mut Ledger) -> Result<Peer, Error> {
        let prepare = |source: io::Error| Error::Prepare {
            path: place.executable.into(),
            source,
        };
        let (control, theirs) = control::pair()?;
        let (log, reader) = logs::pipe().map_err(prepare)?;
        let null = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(prepare)?;
        let child = spawn::spawn(&Program {
            path: place.executable,
            arguments: &[role],
            control: theirs.as_fd(),
            null: null.as_fd(),
            stderr: log.as_fd(),
            cgroup: place.cgroup,
        })
        .map_err(|source| Error::Start {
            path: place.executable.into(),
            source,
        })?;
        if let Some(id) = ProcessId::of(child.pid) {
            let role = format!("bulkhead-vmm {role}");
            ledger.take(Resource::Process { id, role })?;
        }
        Ok(Peer {
            control,
            pid: child.pid,
            log,
            tail: logs::follow(place.sandbox, role, reader),
            pidfd: sys::watch(child.pidfd, Interest::READABLE).map_err(prepare)?,
        })
    }

    /// Kills it; one that is gone already is no error.
    pub fn kill(&self) {
        // The descriptor is a pidfd of a child of ours: there is no other failure.
        let _ = process::send_signal(self.pidfd.get_ref().as_fd(), libc::SIGKILL);
    }

    /// Waits for its end and collects it. `None`: somebody else has collected it.
    pub async fn death(&self) -> Option<Death> {
        // An error can only mean that the runtime is shutting down.
        let _ = self.pidfd.readable().await;
        process::reap(self.pidfd.get_ref().as_fd())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// A process that waits to be killed, and the other end of its control socket.
    #[allow(clippy::zombie_processes)] // `Peer::death` collects it
    pub(crate) fn idle() -> (Peer, Control) {
        let (control, theirs) = control::pair().unwrap();
        let child = Command::new("sleep")
            .arg("60")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let id = ProcessId::of(child.id() as i32).unwrap();
        let pidfd = id.open().unwrap().unwrap();
        let peer = Peer {
            control,
            pid: id.pid,
            log: File::open("/dev/null").unwrap().into(),
            tail: Tail::default(),
            pidfd: sys::watch(pidfd, Interest::READABLE).unwrap(),
        };
        (peer, control::tests::of(theirs))
    }
}
