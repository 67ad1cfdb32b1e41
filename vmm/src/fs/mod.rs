//! The other role of the binary: one process a pod serves the pod's share to the guest by virtio-fs.
//!
//! ```text
//! virtqueue ──► transport (vhost-user, one thread a queue) ──► guard ──► tree ──► host's files
//! shim ──control socket──► detach, stats
//! ```
//!
//! [`guard`] refuses what is malformed before [`tree`] sees it; both know bytes and descriptors, not queues or guest memory.
//!
//! What a pod sees: POSIX semantics of the host's file system, with the caller's uid and gid.
//! flock(2) and fcntl(2) locks exclude among all processes of the pod, because its one kernel keeps
//! them; they do not cross the boundary of the VM. `O_DIRECT` bypasses the guest's page cache, not
//! the host's. Device nodes cannot be made. `trusted.*` attributes have another name on the host. A
//! volume must be mounted into the share once for its locks and mappings to be shared between
//! containers: each mount is a file system of its own to the guest, as its device number says.
pub mod guard;
pub mod transport;
pub mod tree;
pub mod wire;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bulkhead_vmm_config::{ExitCode, FsConfig, FsEvent, FsRequest, Role, WIRE_VERSION};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;

use crate::control::{ControlError, ControlSocket, DescriptorError, Descriptors};
use crate::jail::{JailError, fs as jail};
use crate::log::{self, Log};
use crate::seccomp::{self, SeccompError};
use transport::Servers;
use tree::identity::Worker;
use tree::{Engine, Limits, Stats};

/// Fewer inodes or handles than this are of no use to any guest.
const FEWEST: usize = 64;

/// Why the process cannot serve.
#[derive(Debug, Error)]
pub enum FsError {
    /// The control socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The descriptors beside the config.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// Shim and VMM are not of one installation.
    #[error(
        "config has version {0}, this program speaks {WIRE_VERSION}; install shim and VMM together"
    )]
    Version(u32),
    /// A number in the config is out of range.
    #[error("{what} is {value}, allowed are {allowed}")]
    Range {
        /// Field of the config.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// The share is not an absolute path.
    #[error("share {0:?} is not an absolute path")]
    Share(String),
    /// The limit of open files.
    #[error(
        "only {0} files may be open, at least {FEWEST} are needed; raise RLIMIT_NOFILE or fs.nr_open"
    )]
    TooFewFiles(usize),
    /// The jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The share's root.
    #[error("cannot look at the share's root")]
    Root(#[source] nix::errno::Errno),
    /// The list of mounts.
    #[error("cannot open /proc/self/mountinfo")]
    Mounts(#[source] std::io::Error),
    /// Waiting for the shim.
    #[error("cannot wait for requests of the shim")]
    Poll(#[source] Errno),
    /// The main thread's own identity.
    #[error("the main thread cannot become a worker")]
    Worker(#[source] std::io::Error),
    /// The threads and their filters.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

/// `bulkhead-vmm fs`: takes the config from the control socket, enters the jail and serves until the socket closes.
///
/// Call it before any thread is started; it changes the process's mounts and capabilities.
pub fn main(control: &ControlSocket) -> ExitCode {
    match run(control) {
        Ok(()) | Err(FsError::Control(ControlError::Closed)) => ExitCode::Ok,
        Err(error) => {
            let reason = log::chain(&error);
            // The shim may have gone; then nobody asks why.
            let _ = control.send(&FsEvent::Failed { reason });
            ExitCode::Failed
        }
    }
}

fn run(control: &ControlSocket) -> Result<(), FsError> {
    let (config, fds) = control.receive::<FsConfig>()?;
    let mut fds = Descriptors::new(fds);
    let socket = fds.take(config.socket, "socket")?;
    let lender = config.lender.map(|fd| fds.take(fd, "lender")).transpose()?;
    let log = Log::new(fds.take(config.log, "log")?, "fs", &config.sandbox_id);
    let hook_log = log.clone();
    std::panic::set_hook(Box::new(move |info| bug(&hook_log, &info.to_string())));
    fds.finish()?;
    check(&config)?;
    let (inodes, handles) = jail::raise_file_limit(config.max_inodes, config.max_handles)?;
    if inodes < FEWEST || handles < FEWEST {
        return Err(FsError::TooFewFiles(inodes.min(handles)));
    }
    if (inodes as u64) < config.max_inodes || (handles as u64) < config.max_handles {
        log.info(&format!(
            "RLIMIT_NOFILE allows {inodes} inodes and {handles} open files"
        ));
    }
    let (root, landlock) = jail::enter(&config.share, &config.accept_missing)?;
    let limits = Limits { inodes, handles };
    let engine = Engine::new(root, config.cache, limits).map_err(FsError::Root)?;
    let engine = Arc::new(engine);
    seccomp::report_blocked()?;
    serve_queues((socket, lender), &config, &engine, log.clone())?;
    let worker = Worker::new().map_err(FsError::Worker)?;
    // proc_pid_mountinfo(5): each change of the mounts is an exceptional condition of the open
    // file.
    let mounts = File::open("/proc/self/mountinfo").map_err(FsError::Mounts)?;
    seccomp::lock_down(Role::FsControl)?;
    control.send(&FsEvent::Serving { landlock })?;
    let end = answer(control, &mounts, &engine, &worker, &log);
    log.info(&format!("served {}", summary(&engine.stats())));
    end
}

/// A panic is a bug: say where, and end the process, locks and all.
fn bug(log: &Log, what: &str) {
    log.error(&format!("bug: {what}"));
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(ExitCode::Bug as i32) };
}

fn check(config: &FsConfig) -> Result<(), FsError> {
    if config.version != WIRE_VERSION {
        return Err(FsError::Version(config.version));
    }
    if !config.share.starts_with('/') {
        return Err(FsError::Share(config.share.clone()));
    }
    let range = |what, value, allowed, fits: bool| match fits {
        true => Ok(()),
        false => Err(FsError::Range {
            what,
            value,
            allowed,
        }),
    };
    let (inodes, handles) = (config.max_inodes, config.max_handles);
    range(
        "queues",
        config.queues.into(),
        "1 to 32",
        (1..=32).contains(&config.queues),
    )?;
    range("max_inodes", inodes, "64 and more", inodes >= FEWEST as u64)?;
    range(
        "max_handles",
        handles,
        "64 and more",
        handles >= FEWEST as u64,
    )
}

/// Serves the VMM from a thread of its own: when it goes, the shim is still answered.
fn serve_queues(
    (socket, lender): (OwnedFd, Option<OwnedFd>),
    config: &FsConfig,
    engine: &Arc<Engine>,
    log: Log,
) -> Result<(), FsError> {
    // One more than the request queues: the one for FORGETs.
    let queues = config.queues as usize + 1;
    let servers = Servers::start(queues, engine)?;
    let serve = move |()| match transport::serve(socket, lender, servers) {
        Ok(()) => log.info("the VMM has gone"),
        Err(error) => log.error(&format!("vhost-user failed: {error}")),
    };
    seccomp::spawn("fs-vhost".to_owned(), Role::FsVhost, || Ok(()), serve)?;
    Ok(())
}

/// Answers the shim until it goes.
fn answer(
    control: &ControlSocket,
    mounts: &File,
    engine: &Engine,
    worker: &Worker,
    log: &Log,
) -> Result<(), FsError> {
    loop {
        let mut fds = [
            PollFd::new(mounts.as_fd(), PollFlags::POLLPRI),
            PollFd::new(control.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(FsError::Poll(error)),
        }
        let happened = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        if happened(&fds[0])
            && let Err(error) = engine.mounts_changed()
        {
            log.warn(&log::chain(&error));
        }
        if !happened(&fds[1]) {
            continue;
        }
        let (request, fds) = control.receive::<FsRequest>()?;
        Descriptors::new(fds).finish()?;
        let event = match request {
            FsRequest::Detach { tree } => match engine.detach(worker, &tree) {
                Ok(closed) => FsEvent::Detached {
                    inodes: closed.inodes,
                    handles: closed.handles,
                },
                Err(error) => FsEvent::Refused {
                    reason: log::chain(&error),
                },
            },
            FsRequest::Stats => {
                let stats = engine.stats();
                FsEvent::Stats {
                    inodes: stats.inodes,
                    handles: stats.handles,
                    requests: owned(&stats.requests),
                    guest_faults: owned(&stats.faults),
                }
            }
        };
        control.send(&event)?;
    }
}

fn owned(counts: &[(&'static str, u64)]) -> BTreeMap<String, u64> {
    counts
        .iter()
        .map(|(name, count)| ((*name).to_owned(), *count))
        .collect()
}

fn summary(stats: &Stats) -> String {
    let requests: u64 = stats.requests.iter().map(|(_, count)| count).sum();
    let faults: Vec<String> = stats
        .faults
        .iter()
        .map(|(rule, count)| format!("{rule} {count}"))
        .collect();
    if faults.is_empty() {
        format!("{requests} requests")
    } else {
        format!(
            "{requests} requests; refused by rule: {}",
            faults.join(", ")
        )
    }
}
