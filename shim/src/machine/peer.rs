//! A process of a pod (`bulkhead-vmm run`, `bulkhead-vmm fs`): how it is started and how its end is noticed.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    audit::Audit,
    ledger::{self, Ledger, Resource},
    logs::{self, Tail},
    machine::control::{self, Control},
    sys::{
        self,
        process::{self, Death, ProcessId},
        spawn::{self, Executable, Program},
    },
};

/// How long a process may live on once its control socket is closed.
const FAREWELL: Duration = Duration::from_secs(10);

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
    /// For what it does that is worth a line.
    pub audit: Audit,
    farewell: Duration,
    pidfd: AsyncFd<OwnedFd>,
}

/// What all processes of a pod are started with.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// For log lines.
    pub sandbox: &'a str,
    /// `bulkhead-vmm`.
    pub executable: &'a Executable,
    /// The pod's cgroup.
    pub cgroup: BorrowedFd<'a>,
    /// The pod's oom_score_adj.
    pub oom_score_adj: i32,
    /// What is told of the pod.
    pub audit: &'a Audit,
}

impl Peer {
    /// Starts `bulkhead-vmm ROLE` and records it. Until the record is written the pod's cgroup, recorded before, stands for it.
    pub fn start(place: Place<'_>, role: &'static str, ledger: &mut Ledger) -> Result<Peer, Error> {
        let path = place.executable.path();
        let prepare = |source: io::Error| Error::Prepare {
            path: path.into(),
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
            executable: place.executable,
            arguments: &[role],
            control: theirs.as_fd(),
            null: null.as_fd(),
            stderr: log.as_fd(),
            cgroup: place.cgroup,
        })
        .map_err(|source| Error::Start {
            path: path.into(),
            source,
        })?;
        if let Some(id) = ProcessId::of(child.pid) {
            let role = format!("bulkhead-vmm {role}");
            ledger.take(Resource::Process { id, role })?;
        }
        // It was ours that it inherited, which is containerd's: nearly never. Before it has its configuration, and with that a
        // use for memory.
        process::set_oom_score_adj(child.pid, place.oom_score_adj).map_err(prepare)?;
        Ok(Peer {
            control,
            pid: child.pid,
            log,
            tail: logs::follow(place.sandbox, name(role), place.audit, reader),
            audit: place.audit.clone(),
            farewell: FAREWELL,
            pidfd: sys::watch(child.pidfd, Interest::READABLE).map_err(prepare)?,
        })
    }

    /// Kills it; one that is gone already is no error.
    pub fn kill(&self) {
        // The descriptor is a pidfd of a child of ours: there is no other failure.
        let _ = process::send_signal(self.pidfd.get_ref().as_fd(), libc::SIGKILL);
    }

    /// Changes how likely the kernel is to take it when memory runs out.
    pub fn set_oom_score_adj(&self, value: i32) {
        // Once it is collected the pid may be another one's; only we collect it.
        let pidfd = self.pidfd.get_ref().as_fd();
        if process::wait_gone(pidfd, Duration::ZERO).unwrap_or(true) {
            return;
        }
        // A failure leaves what it has.
        if let Err(error) = process::set_oom_score_adj(self.pid, value) {
            tracing::warn!(pid = self.pid, value, %error, "cannot set oom_score_adj");
        }
    }

    /// Kills it if it lives on although its control socket is closed; what is to be told of that.
    pub async fn end_at_last(&self, whose: &str) -> Option<String> {
        let ended = self.pidfd.readable();
        if tokio::time::timeout(self.farewell, ended).await.is_ok() {
            return None;
        }
        self.kill();
        let secs = self.farewell.as_secs();
        Some(format!(
            "{whose} process closed its control socket, did not end within {secs} s and was killed"
        ))
    }

    /// Waits for its end.
    pub async fn gone(&self) {
        // An error can only mean that the runtime is shutting down.
        let _ = self.pidfd.readable().await;
    }

    /// Waits for its end and collects it. `None`: somebody else has collected it.
    pub async fn death(&self) -> Option<Death> {
        self.gone().await;
        process::collect(self.pidfd.get_ref().as_fd())
    }
}

/// What a process is called by its role.
fn name(role: &'static str) -> &'static str {
    match role {
        "run" => "vmm",
        role => role,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::sys::spawn::tests::OwnCgroup;

    #[tokio::test]
    async fn the_kernel_takes_it_as_readily_as_the_pod_wants() {
        let Some(cgroup) = OwnCgroup::new("oom") else {
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().canonicalize().unwrap().join("state");
        let mut ledger = Ledger::create(&state, "default", "oom").unwrap();
        let (executable, cgroup) = (
            Executable::at("/bin/sleep".as_ref()).unwrap(),
            cgroup.open(),
        );
        let place = Place {
            sandbox: "oom",
            executable: &executable,
            cgroup: cgroup.as_fd(),
            oom_score_adj: 321,
            audit: &Audit::default(),
        };
        // Its role is how long it sleeps.
        let peer = Peer::start(place, "60", &mut ledger).unwrap();
        let score = || {
            let text = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", peer.pid));
            text.unwrap().trim().to_owned()
        };
        assert_eq!(score(), "321");
        peer.set_oom_score_adj(654);
        assert_eq!(score(), "654");
        peer.kill();
        peer.death().await;
        // Nobody's now, or somebody else's.
        peer.set_oom_score_adj(1);
        assert!(ledger.teardown().is_empty());
    }

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
            audit: Audit::default(),
            farewell: Duration::from_millis(100),
            pidfd: sys::watch(pidfd, Interest::READABLE).unwrap(),
        };
        (peer, control::tests::of(theirs))
    }
}
