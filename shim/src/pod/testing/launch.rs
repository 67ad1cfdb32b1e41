//! In the place of `launch.rs` in unit tests: a pod that takes a ledger and a claim on the host,
//! and has its processes in memory.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bulkhead_agent_protocol::agent as wire;
use bulkhead_vmm_config::{Phase, PluggedStats, Stamp, VmStats};
use tokio::task::{JoinError, yield_now};

use super::{
    Parts, Request, Sandbox,
    error::Error,
    template::{self, Start},
    testing::Guest,
};
use crate::{
    audit::Audit,
    config::Config,
    ledger::{Ledger, Resource, Ticket},
    logs::Tail,
    machine::{
        agent::Agent,
        fs as fs_process,
        vmm::{self, Nic},
    },
    network::Network,
    oci::{HostBind, HostRoot},
    share,
    sys::process::Death,
    template::Origin,
};

/// A pid that no process of Linux can have.
const STUB_PID: i32 = 2_000_000_000;

/// Later, and on this thread: one that waits for another one's turn makes a sequence of
/// microseconds one of milliseconds.
pub(super) async fn aside<T>(work: impl FnOnce() -> T) -> Result<T, JoinError> {
    yield_now().await;
    Ok(work())
}

#[derive(Debug)]
pub(super) struct Taken {
    pub(super) share: Share,
    pub(super) cgroup: Cgroup,
    pub(super) fs: Fs,
    pub(super) vm: Vm,
    pub(super) agent: Agent,
    pub(super) agent_log: Tail,
    pub(super) uid: u32,
    pub(super) network: Option<Network>,
    pub(super) slots: usize,
    pub(super) origin: Origin,
}

impl Taken {
    pub(super) async fn take(
        config: &Config,
        parts: &Parts,
        (request, start): (&Request<'_>, Start<'_>),
        cgroup: &Path,
        ledger: &mut Ledger,
        audit: &Audit,
    ) -> Result<Taken, Error> {
        ledger.claim("uid-1", request.id)?;
        let (origin, _) = match start {
            Start::Pod => template::origin(config, parts, request, ledger.state())?,
            Start::Learn(building) => template::first(building)?,
            Start::Boot | Start::Save(_) => (Origin::Boot, None),
        };
        let (guest, connection) = Guest::boot().await;
        if let Start::Save(building) = start {
            guest.save_to(building.files());
        }
        Ok(Taken {
            share: Share::default(),
            cgroup: Cgroup {
                guest: guest.clone(),
                path: cgroup.into(),
            },
            fs: Fs(guest.clone()),
            vm: Vm(guest.clone()),
            agent: Agent::over(connection, audit),
            agent_log: Tail::default(),
            uid: 1,
            network: None,
            slots: template::slots(request, &origin),
            origin,
        })
    }
}

impl Sandbox {
    /// Nobody is forked: the pid is nobody's.
    pub(super) fn start_stub(&mut self) -> Result<Stub, Error> {
        let pidfd = self.cgroup.guest.stub().map_err(Error::Stub)?;
        Ok(Stub { pidfd })
    }
}

/// A directory for each container that has its files in the pod.
#[derive(Debug, Default)]
pub(super) struct Share(Vec<(String, PathBuf, Ticket)>);

impl Share {
    pub(super) fn add<'a>(
        &mut self,
        ledger: &mut Ledger,
        container: &str,
        _: &HostRoot,
        _: impl IntoIterator<Item = &'a HostBind>,
    ) -> Result<(), share::Error> {
        if self.0.iter().any(|(id, ..)| id == container) {
            return Err(share::Error::Exists(container.into()));
        }
        let path = ledger.directory().join(container);
        let ticket = ledger.take(Resource::Directory { path: path.clone() })?;
        std::fs::create_dir(&path).expect("its name is in no use");
        self.0.push((container.into(), path, ticket));
        Ok(())
    }

    pub(super) fn name_sources(
        &self,
        container: &str,
        _: &mut wire::Container,
    ) -> Result<(), share::Error> {
        match self.0.iter().any(|(id, ..)| id == container) {
            true => Ok(()),
            false => Err(share::Error::Absent(container.into())),
        }
    }

    pub(super) fn places(&self, _: &str) -> impl Iterator<Item = (usize, u64)> {
        std::iter::empty()
    }

    pub(super) async fn remove(
        &mut self,
        ledger: &mut Ledger,
        container: &str,
        fs: &Fs,
    ) -> Result<(), share::Error> {
        let Some(index) = self.0.iter().position(|(id, ..)| id == container) else {
            return Ok(());
        };
        if fs.0.fs_is_gone() {
            return Err(fs.0.fs_end().into());
        }
        let (_, _, ticket) = self.0.remove(index);
        ledger.undo(ticket).map_err(share::Error::Busy)
    }
}

/// What is in it is the guest, which ends with it.
#[derive(Debug)]
pub(super) struct Cgroup {
    guest: Arc<Guest>,
    path: PathBuf,
}

impl Cgroup {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.guest.kill();
    }
}

#[derive(Debug)]
pub(super) struct Vm(Arc<Guest>);

impl Vm {
    pub(super) fn jailed(&self) -> (i32, Option<u32>) {
        (0, None)
    }

    pub(super) fn stamps(&self) -> Vec<Stamp> {
        vec![Stamp {
            phase: Phase::AgentDialled,
            at_ns: 0,
            exits: 0,
            irq_exits: 0,
        }]
    }

    pub(super) fn template_refused(&self) -> Option<String> {
        self.0.refusal.lock().unwrap().clone()
    }

    pub(super) async fn save(&self) -> Result<(), vmm::Error> {
        self.0.save();
        Ok(())
    }

    pub(super) async fn stats(&self) -> Result<VmStats, vmm::Error> {
        let plugged = PluggedStats {
            plugged_bytes: self.0.move_memory() << 20,
            ..PluggedStats::default()
        };
        Ok(VmStats {
            plugged: Some(plugged),
            kvm: [("exits".into(), self.0.count_exits())].into(),
            ..VmStats::default()
        })
    }

    pub(super) async fn plug_memory(&self, mib: u64) -> Result<(), vmm::Error> {
        self.0.requested.store(mib, Ordering::Relaxed);
        Ok(())
    }

    pub(super) async fn offer_port(&self, port: u32, fd: OwnedFd) -> Result<(), vmm::Error> {
        if self.0.has_ended() {
            return Err(vmm::Error::Gone(self.ended().await));
        }
        self.0.offer(port, UnixStream::from(fd));
        Ok(())
    }

    pub(super) async fn withdraw_port(&self, port: u32) -> Result<(), vmm::Error> {
        self.0.withdraw(port);
        Ok(())
    }

    pub(super) async fn plug(&self, _: Nic) -> Result<(), vmm::Error> {
        Ok(())
    }

    pub(super) async fn set_paused(&self, _: bool) -> Result<(), vmm::Error> {
        match self.0.has_ended() {
            true => Err(vmm::Error::Gone(self.ended().await)),
            false => Ok(()),
        }
    }

    pub(super) async fn set_link(&self, _: u32, _: bool) -> Result<(), vmm::Error> {
        Ok(())
    }

    pub(super) async fn stop(&self) -> Result<(), vmm::Error> {
        self.0.kill();
        Ok(())
    }

    pub(super) fn end(&self) -> Option<vmm::End> {
        self.0.has_ended_by()
    }

    pub(super) async fn ended(&self) -> vmm::End {
        self.0.ended().await
    }

    pub(super) fn is_killed(&self) -> bool {
        self.0.killed.load(Ordering::Relaxed)
    }

    pub(super) fn kill(&self) {
        self.0.kill();
    }

    pub(super) fn set_oom_score_adj(&self, _: i32) {}
}

#[derive(Debug)]
pub(super) struct Fs(Arc<Guest>);

impl Fs {
    pub(super) async fn jailed(&self) -> (i32, Option<u32>) {
        (0, None)
    }

    pub(super) async fn serving(&self, _: Duration) -> Result<(), fs_process::Error> {
        match self.0.fs_is_gone() {
            true => Err(self.0.fs_end()),
            false => Ok(()),
        }
    }

    pub(super) async fn gone(&self) -> fs_process::Error {
        self.0.fs_gone().await
    }

    pub(super) fn kill(&self) {
        self.0.end_fs(Death::Signal(libc::SIGKILL));
    }

    pub(super) fn set_oom_score_adj(&self, _: i32) {}
}

/// The pid that stands for the pod.
#[derive(Debug)]
pub(super) struct Stub {
    pidfd: OwnedFd,
}

impl Stub {
    pub(super) fn pid(&self) -> i32 {
        STUB_PID
    }

    pub(super) fn pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    pub(super) fn release(self) {}
}
