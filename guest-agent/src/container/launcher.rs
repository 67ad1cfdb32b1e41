//! What every new process of the guest needs: this binary, the way back from other namespaces, the reaper, the host.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;

use linux::process::{Child, Place, Program};
use tokio::sync::oneshot;

use super::namespaces::{Home, Join, SandboxNamespaces};
use super::process::Launch;
use crate::reaper::{Exit, Reaper};
use crate::stage;
use crate::stream::Host;

/// Makes processes.
#[derive(Debug)]
pub(crate) struct Launcher {
    exe: OwnedFd,
    home: Home,
    reaper: Reaper,
    /// Where streams go.
    pub(crate) host: Host,
    /// What the pod's containers share.
    pub(crate) shared: Mutex<SandboxNamespaces>,
}

/// What a new process is made of besides its descriptors.
#[derive(Default)]
pub(crate) struct Birth<'a> {
    /// Namespaces to be born in.
    pub(crate) joins: &'a [Join<'a>],
    /// Namespaces to make.
    pub(crate) namespaces: u64,
    /// Directory of its cgroup.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

impl Launcher {
    /// Opens what is needed. `exe` is a path to this binary on a mount that containers could not write to even if they
    /// got hold of the file.
    pub(crate) fn new(exe: &str, host: Host, reaper: Reaper) -> io::Result<Self> {
        // Through O_PATH: the mount is remembered, and with it that it is read-only.
        let exe = File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(exe)?;
        Ok(Self {
            exe: exe.into(),
            home: Home::open()?,
            reaper,
            host,
            shared: Mutex::default(),
        })
    }

    /// Makes a process that runs a stage; what the launch holds for the child stays open until it is dropped.
    pub(crate) fn spawn(
        &self,
        stage: &'static std::ffi::CStr,
        birth: &Birth<'_>,
        launch: &Launch,
    ) -> io::Result<(Child, oneshot::Receiver<Exit>)> {
        let new_user = birth.namespaces & libc::CLONE_NEWUSER as u64 != 0;
        let program = Program {
            file: self.exe.as_fd(),
            arguments: &[c"bulkhead-agent", stage],
            descriptors: &launch.descriptors(),
            mapped: new_user.then(|| launch.control()),
            fresh: false,
            report: None,
        };
        let place = Place {
            namespaces: birth.namespaces,
            cgroup: birth.cgroup,
        };
        let spawned = self.home.spawn_in(birth.joins, place, &program)?;
        let exit = self.reaper.track(spawned.pid);
        Ok((spawned, exit))
    }

    /// Makes the process that holds the pod's pid namespace; the pidfd is the namespace as setns(2) takes it.
    pub(crate) fn spawn_pause(&self) -> io::Result<OwnedFd> {
        let null: OwnedFd = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")?
            .into();
        let launch = Launch::new(&[null.try_clone()?, null.try_clone()?, null], &[], &[])?;
        let birth = Birth {
            namespaces: (libc::CLONE_NEWPID | libc::CLONE_NEWNS) as u64,
            ..Birth::default()
        };
        // Its end is the end of the pod: nobody waits for it.
        let (spawned, _exit) = self.spawn(stage::PAUSE, &birth, &launch)?;
        Ok(spawned.pidfd)
    }
}
