//! A shim's stay in its pod's cgroup.
//!
//! A shim is started before anybody knows where its pod's cgroup will be, in the cgroup of the
//! engine. When the pod is made it goes into a group of its own beneath the pod's, and with it the
//! hooks and loggers that it starts from then on: what they take counts for the pod and comes to
//! the pod's ceiling. When the pod ends they all go back to where the shim has come from, since
//! what is then in the pod's cgroup is killed.
//!
//! `bulkhead run` stays with its user, as `runc run` does.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
    time::Instant,
};

use super::{PATIENCE, ROOT, remove_empty, write};

const PROCESSES: &str = "cgroup.procs";

/// The cgroup that this process is in; `None`: outside of what this process sees of them.
pub(crate) fn home() -> Option<PathBuf> {
    of_process(std::process::id()).ok()
}

/// The cgroup that a process is in.
///
/// # Errors
/// There is no such process, or its cgroup is outside of what this process sees of them.
pub fn of_process(pid: u32) -> io::Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let unseen = || {
        io::Error::other(format!(
            "the cgroup of process {pid} is not to be seen here"
        ))
    };
    of(&text).ok_or_else(unseen)
}

fn of(text: &str) -> Option<PathBuf> {
    let path = Path::new(text.lines().find_map(|line| line.strip_prefix("0::/"))?);
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    let inside = path.components().all(plain) && !text.contains(" (deleted)");
    inside.then(|| Path::new(ROOT).join(path))
}

/// Takes this process into the group at `path`. The kernel makes whoever moves a process wait for
/// all processors (RCU): not on the thread that answers requests.
pub(crate) fn enter(path: &Path) -> io::Result<()> {
    write(&path.join(PROCESSES), "0")
}

/// Whether this process is in the cgroup at `path`, or beneath it.
pub(super) fn is_inside(path: &Path) -> bool {
    home().is_some_and(|home| home.starts_with(path))
}

/// Sends all who are in the group at `path` to `home`, or to the root of cgroups where that takes
/// nobody any more, and removes the group. Idempotent.
pub(crate) fn leave(path: &Path, home: &Path) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let inside = match fs::read_to_string(path.join(PROCESSES)) {
            Err(error) if super::is_gone(&error) => return Ok(()),
            other => other?,
        };
        for pid in inside.lines() {
            send(pid, home)?;
        }
        // One may have made another one meanwhile, in its own group.
        if remove_empty(path)? {
            return Ok(());
        }
        if Instant::now() > deadline {
            let text = "there are still processes in it after 10 s";
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
    }
}

fn send(pid: &str, home: &Path) -> io::Result<()> {
    let into = |group: &Path| match write(&group.join(PROCESSES), pid) {
        // It has ended meanwhile.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    };
    into(home).or_else(|error| {
        // Removed, or one that hands controllers down to groups beneath and takes no processes.
        tracing::debug!(home = %home.display(), %error, "a shim cannot go back");
        into(Path::new(ROOT))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_what_the_kernel_says_of_version_2() {
        assert_eq!(of("0::/\n").unwrap(), Path::new("/sys/fs/cgroup"));
        assert_eq!(
            of("1:cpu:/x\n0::/system.slice/containerd.service\n").unwrap(),
            Path::new("/sys/fs/cgroup/system.slice/containerd.service")
        );
        for text in ["", "1:cpu:/x\n", "0::/../x\n", "0::/a (deleted)\n"] {
            assert_eq!(of(text), None, "{text:?}");
        }
    }
}
