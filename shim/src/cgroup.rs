//! The pod's cgroup on the host, cgroup v2 only.
//!
//! Every process of a pod starts inside it (`CLONE_INTO_CGROUP`), so that its memory is accounted from its first instruction
//! and one write to `cgroup.kill` reaches all of it.
//!
//! Where: `linux.cgroupsPath` of config.json when given, absolute from the cgroup root (OCI config-linux.md#cgroups-path), a
//! relative one beneath `/bulkhead`; else `/bulkhead/NAMESPACE/SANDBOX`. The last component must not exist yet.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    ledger::{self, Ledger, Resource},
    sys::device_filter,
};

/// Where cgroup v2 is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// How often a parent may vanish under our hands before that is an error.
const RACES: usize = 16;
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no cgroup.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a cgroup v2 host.
    #[error(
        "{ROOT} is not a cgroup v2 file system: this host uses cgroup v1 or both; boot it with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 there"
    )]
    NotV2,
    /// systemd's form, malformed.
    #[error("linux.cgroupsPath {0:?} is not slice:prefix:name with a slice that ends in .slice")]
    Systemd(String),
    /// Something else than plain names.
    #[error("linux.cgroupsPath {0:?} has a component that is no plain name")]
    Path(PathBuf),
    /// The place is taken.
    #[error("cgroup {0} exists already; choose another linux.cgroupsPath, or remove it")]
    Exists(PathBuf),
    /// A system call failed.
    #[error("cannot {action} cgroup {path}")]
    Io {
        /// The verb.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It could not be recorded.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
}

/// Refuses a host whose cgroups are not version 2 alone.
pub fn require_v2() -> Result<(), Error> {
    match nix::sys::statfs::statfs(ROOT) {
        Ok(found) if found.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC => Ok(()),
        _ => Err(Error::NotV2),
    }
}

/// The directory for a pod (see the module's text).
pub fn place(
    cgroups_path: Option<&Path>,
    namespace: &str,
    sandbox: &str,
) -> Result<PathBuf, Error> {
    let own = Path::new(ROOT).join("bulkhead");
    let Some(path) = cgroups_path.filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(own.join(namespace).join(sandbox));
    };
    let text = path.to_string_lossy();
    if !path.is_absolute() && text.matches(':').count() == 2 {
        let place =
            systemd_place(&text).ok_or_else(|| Error::Systemd(text.clone().into_owned()))?;
        return Ok(Path::new(ROOT).join(place));
    }
    let plain = |part: &Component<'_>| matches!(part, Component::Normal(_) | Component::RootDir);
    if !path.components().all(|part| plain(&part)) || path == Path::new("/") {
        return Err(Error::Path(path.into()));
    }
    Ok(match path.strip_prefix("/") {
        Ok(absolute) => Path::new(ROOT).join(absolute),
        Err(_) => own.join(path),
    })
}

/// `slice:prefix:name`, which kubelets with systemd's driver write: the scope PREFIX-NAME.scope in the slice, where a dash in a
/// slice's name is a level (systemd.slice(5)). The slice is there; its scope is made by us, without systemd.
fn systemd_place(text: &str) -> Option<PathBuf> {
    let mut parts = text.splitn(3, ':');
    let (slice, prefix, name) = (parts.next()?, parts.next()?, parts.next()?);
    let plain = |word: &str| !word.contains('/') && !word.starts_with('.');
    if name.is_empty() || ![slice, prefix, name].into_iter().all(plain) {
        return None;
    }
    let mut place = PathBuf::new();
    match slice {
        "" => place.push("system.slice"),
        "-.slice" => {}
        slice => {
            let stem = slice.strip_suffix(".slice")?;
            if stem.split('-').any(str::is_empty) {
                return None;
            }
            let ends = stem.match_indices('-').map(|(index, _)| index);
            for end in ends.chain([stem.len()]) {
                place.push(format!("{}.slice", &stem[..end]));
            }
        }
    }
    place.push(match prefix {
        "" => format!("{name}.scope"),
        prefix => format!("{prefix}-{name}.scope"),
    });
    Some(place)
}

/// A pod's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// Makes it, with every controller that its parents can give, and writes it into the ledger.
    pub fn create(ledger: &mut Ledger, path: &Path) -> Result<Cgroup, Error> {
        require_v2()?;
        let relative = path
            .strip_prefix(ROOT)
            .map_err(|_| Error::Path(path.into()))?;
        let parents = make_parents(ledger, relative)?;
        let mut made = make(ledger, path, false);
        for _ in 0..RACES {
            match &made {
                // The last pod beneath a shared parent has just taken the parent with it.
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    for parent in &parents {
                        let _ = fs::create_dir(parent);
                        enable_controllers(parent);
                    }
                    made = make(ledger, path, false);
                }
                _ => break,
            }
        }
        made?;
        let directory = File::open(path).map_err(|source| Error::Io {
            action: "open",
            path: path.into(),
            source,
        })?;
        Ok(Cgroup {
            path: path.into(),
            directory: directory.into(),
        })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For `CLONE_INTO_CGROUP`.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Bounds what a process of the pod can do to the host that fell to its guest: no device node opens, and there are no more
    /// than `tasks` processes and threads.
    pub fn contain(&self, tasks: u64) -> Result<(), Error> {
        let failed = |action| {
            move |source| Error::Io {
                action,
                path: self.path.clone(),
                source,
            }
        };
        device_filter::allow_only_null(self.as_fd())
            .map_err(failed("forbid devices (CONFIG_CGROUP_BPF) in"))?;
        match self.write("pids.max", &tasks.to_string()) {
            // The parents were not given the controller.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::warn!(cgroup = %self.path.display(), "no pids controller: the pod's processes are not counted");
                Ok(())
            }
            other => other.map_err(failed("set pids.max of")),
        }
    }

    /// Writes one control file.
    pub fn write(&self, name: &str, value: &str) -> io::Result<()> {
        write(&self.path.join(name), value)
    }
}

/// Makes and records what is missing on the way. Those beneath our own are recorded by every pod: the last one removes them.
fn make_parents(ledger: &mut Ledger, relative: &Path) -> Result<Vec<PathBuf>, Error> {
    let own = Path::new(ROOT).join("bulkhead");
    let mut parents = Vec::new();
    let mut parent = PathBuf::from(ROOT);
    enable_controllers(&parent);
    for part in relative.parent().into_iter().flat_map(Path::components) {
        parent.push(part);
        if parent.starts_with(&own) || !parent.exists() {
            make(ledger, &parent, true)?;
            parents.push(parent.clone());
        }
        enable_controllers(&parent);
    }
    Ok(parents)
}

fn make(ledger: &mut Ledger, path: &Path, shared: bool) -> Result<(), Error> {
    let ticket = ledger.take(Resource::Cgroup {
        path: path.into(),
        shared,
    })?;
    match fs::create_dir(path) {
        Ok(()) => Ok(()),
        // Another pod was faster with a shared parent.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && shared => Ok(()),
        Err(source) => {
            // Not ours: nothing may be killed in it.
            ledger.release(ticket)?;
            Err(match source.kind() {
                io::ErrorKind::AlreadyExists => Error::Exists(path.into()),
                _ => Error::Io {
                    action: "make",
                    path: path.into(),
                    source,
                },
            })
        }
    }
}

/// Hands the controllers down. A parent that holds processes of its own, or was not given a controller, cannot: then the
/// pod lacks that controller, and a limit that needs it fails by name when it is set.
fn enable_controllers(path: &Path) {
    let Ok(available) = fs::read_to_string(path.join("cgroup.controllers")) else {
        return;
    };
    let enabled = fs::read_to_string(path.join("cgroup.subtree_control")).unwrap_or_default();
    for controller in available.split_ascii_whitespace() {
        if enabled
            .split_ascii_whitespace()
            .any(|word| word == controller)
        {
            continue;
        }
        if let Err(error) = write(
            &path.join("cgroup.subtree_control"),
            &format!("+{controller}"),
        ) {
            tracing::debug!(%controller, path = %path.display(), %error, "controller not handed down");
        }
    }
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

/// Kills what is in a cgroup that is not shared, waits until it is empty, and removes it. Idempotent.
pub(crate) fn remove(path: &Path, shared: bool) -> io::Result<()> {
    if shared {
        return match fs::remove_dir(path) {
            // Still in use by another pod, or gone.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EBUSY | libc::ENOTEMPTY | libc::ENOENT)
                ) =>
            {
                Ok(())
            }
            other => other,
        };
    }
    match write(&path.join("cgroup.kill"), "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => other?,
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        wait_empty(path, deadline)?;
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // Empty of live processes, but a zombie may pin it a moment longer.
            Err(error)
                if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error),
        }
    }
}

/// Waits for `populated 0` by the file's own notification (cgroup-v2.rst, section "\[Un\]populated Notification").
fn wait_empty(path: &Path, deadline: Instant) -> io::Result<()> {
    let events = path.join("cgroup.events");
    loop {
        let file = match File::open(&events) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        let text = io::read_to_string(&file)?;
        if !text.lines().any(|line| line == "populated 1") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "still populated 10 s after cgroup.kill",
            ));
        }
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_follows_cgroups_path() {
        let place = |path: &str| place(Some(Path::new(path)), "default", "a");
        assert_eq!(
            super::place(None, "default", "a").unwrap(),
            Path::new("/sys/fs/cgroup/bulkhead/default/a")
        );
        assert_eq!(
            place("").unwrap(),
            Path::new("/sys/fs/cgroup/bulkhead/default/a")
        );
        assert_eq!(place("/x/y").unwrap(), Path::new("/sys/fs/cgroup/x/y"));
        assert_eq!(place("x").unwrap(), Path::new("/sys/fs/cgroup/bulkhead/x"));
        assert_eq!(
            place("kubepods-burstable-pod1.slice:cri-containerd:a").unwrap(),
            Path::new(
                "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-a.scope"
            )
        );
        assert_eq!(
            place(":run:a").unwrap(),
            Path::new("/sys/fs/cgroup/system.slice/run-a.scope")
        );
        for bad in [
            "user:run:a",
            "a--b.slice:run:a",
            "a.slice:run:../x",
            "a.slice:run:",
        ] {
            assert!(matches!(place(bad), Err(Error::Systemd(_))), "{bad}");
        }
        assert!(matches!(place("/x/../../etc"), Err(Error::Path(_))));
        assert!(matches!(place("/"), Err(Error::Path(_))));
    }
}
