//! Giving back one resource. Every act is idempotent, because a replay may repeat it.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::record::Resource;
use crate::{
    error::line,
    netns,
    sys::{
        files::Entry,
        mount,
        process::{self, ProcessId},
    },
};

/// How long a killed process may take to go, and a busy mount to become free.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(5);

/// Something that could not be given back.
#[derive(Clone, Debug, Serialize)]
pub struct Leftover {
    /// What.
    #[serde(flatten)]
    pub resource: Resource,
    /// Why.
    pub error: String,
}

impl std::fmt::Display for Leftover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.resource, self.error)
    }
}

/// Gives it back. `patience` is how long a mount may stay busy: files that a killed process held are let go a little after its
/// end.
pub(super) fn undo(resource: &Resource, patience: Duration) -> io::Result<()> {
    match resource {
        Resource::Directory { path } => gone(Entry::open(path).and_then(|e| e.remove_directory())),
        Resource::File { path } => gone(Entry::open(path).and_then(|e| e.remove_file())),
        Resource::Mount { path } => unmount_tree(path, patience),
        Resource::Cgroup { path, shared } => crate::cgroup::remove(path, *shared),
        Resource::ShimCgroup { path, home } => crate::cgroup::stay::leave(path, home),
        Resource::Process { id, .. } => kill(*id),
        Resource::Claim { path, holder } => give_up_claim(path, holder),
        Resource::Redirect(redirect) => {
            netns::give_back(redirect).map_err(|error| io::Error::other(line(&error)))
        }
    }
}

/// What is not there needs no removal.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Unmounts all that is mounted at or beneath `top`, deepest first.
fn unmount_tree(top: &Path, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let mounts = mount::mounts_beneath(top)?;
        if mounts.is_empty() {
            return Ok(());
        }
        match unmount_all(&mounts) {
            Ok(()) => {}
            Err(error)
                if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline =>
            {
                thread::sleep(RETRY);
            }
            Err(error) => return Err(error),
        }
    }
}

fn unmount_all(mounts: &[PathBuf]) -> io::Result<()> {
    mounts.iter().try_for_each(|path| {
        if mount::unmount(path)? {
            return Ok(());
        }
        // Listed, and yet no mount by this name: it went away meanwhile, or something covers the way to it.
        match mount::mounts_beneath(path)?.is_empty() {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    })
}

fn kill(id: ProcessId) -> io::Result<()> {
    let Some(pidfd) = id.open()? else {
        return Ok(());
    };
    process::send_signal(pidfd.as_fd(), libc::SIGKILL)?;
    if !process::wait_gone(pidfd.as_fd(), PATIENCE)? {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "still there 10 s after SIGKILL",
        ));
    }
    // Collect it when it is a child of ours; otherwise its parent does.
    process::collect(pidfd.as_fd());
    Ok(())
}

fn give_up_claim(path: &Path, holder: &str) -> io::Result<()> {
    match fs::read_link(path) {
        Ok(target) if target.as_os_str() == holder => gone(fs::remove_file(path)),
        // Somebody else's by now.
        Ok(_) => Ok(()),
        Err(error) => gone(Err(error)),
    }
}
