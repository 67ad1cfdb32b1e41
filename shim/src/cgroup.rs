//! The pod's cgroup on the host, cgroup v2 only.
//!
//! Every process of a pod starts inside it (`CLONE_INTO_CGROUP`), so that its memory is accounted from its first instruction
//! and one write to `cgroup.kill` reaches all of it.
//!
//! Where: `linux.cgroupsPath` of config.json when given, absolute from the cgroup root (OCI config-linux.md#cgroups-path), a
//! relative one beneath `/bulkhead`; else `/bulkhead/NAMESPACE/SANDBOX`. The last component must not exist yet.
//!
//! Parents that are missing on the way are made, and marked as ours by an extended attribute. Whoever removes a pod's cgroup removes
//! the marked ones above it that are empty then, whoever made them: so the last pod takes them with it, in whatever order pods end.

use std::{
    ffi::{CStr, CString},
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
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
const RACES: usize = 1000;
/// The mark of a parent that a pod has made; its value means nothing.
const MARK: &CStr = c"trusted.bulkhead.parent";
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

/// How many processes the kernel has killed for memory in the cgroup at `path`.
pub fn oom_kills(path: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(path.join("memory.events"))?;
    let mut words = text.lines().filter_map(|line| line.split_once(' '));
    let found = words.find(|(name, _)| *name == "oom_kill");
    Ok(found.and_then(|(_, count)| count.parse().ok()).unwrap_or(0))
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
        Cgroup::create_in(ledger, Path::new(ROOT), path)
    }

    /// The same beneath another mount of cgroup v2.
    fn create_in(ledger: &mut Ledger, root: &Path, path: &Path) -> Result<Cgroup, Error> {
        let relative = path
            .strip_prefix(root)
            .map_err(|_| Error::Path(path.into()))?;
        let mut races = 0;
        loop {
            make_parents(ledger, root, relative)?;
            match make(ledger, path, false) {
                // The last pod beneath a shared parent has just taken the parent with it.
                Err(Error::Io { source, .. }) if is_gone(&source) && races < RACES => races += 1,
                other => break other?,
            }
        }
        // Now that there is a cgroup beneath them no parent can go, or be a new one that lacks what was handed down to the old one.
        ancestors(root, relative).for_each(|parent| enable_controllers(&parent));
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

/// The directories from the root of cgroups to the parent of `relative`.
fn ancestors(root: &Path, relative: &Path) -> impl Iterator<Item = PathBuf> {
    let names = relative.parent().into_iter().flat_map(Path::components);
    let parents = names.scan(root.to_path_buf(), |parent, name| {
        parent.push(name);
        Some(parent.clone())
    });
    std::iter::once(root.to_path_buf()).chain(parents.collect::<Vec<_>>())
}

/// Makes, records and marks what is missing on the way.
fn make_parents(ledger: &mut Ledger, root: &Path, relative: &Path) -> Result<(), Error> {
    let mut races = 0;
    let mut parents: Vec<PathBuf> = ancestors(root, relative).skip(1).collect();
    parents.reverse();
    // From the outermost that is missing; one more time from there when an outer one has gone meanwhile.
    while let Some(index) = parents.iter().rposition(|parent| !parent.exists()) {
        match make(ledger, &parents[index], true) {
            Err(Error::Io { source, .. }) if is_gone(&source) && races < RACES => races += 1,
            other => other?,
        }
    }
    Ok(())
}

/// There is no such directory, or it is being removed.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// Marks a parent as one that a pod has made. Where it cannot be marked, it goes with the pod that has made it or not at all.
fn mark(path: &Path) {
    let Ok(name) = CString::new(path.as_os_str().as_bytes()) else {
        return;
    };
    // SAFETY: two strings that end with a zero byte, and one byte.
    let marked =
        unsafe { libc::setxattr(name.as_ptr(), MARK.as_ptr(), c"1".as_ptr().cast(), 1, 0) };
    if marked < 0 {
        let error = io::Error::last_os_error();
        tracing::debug!(path = %path.display(), %error, "a cgroup is not marked as ours");
    }
}

fn is_marked(path: &Path) -> bool {
    let Ok(name) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: two strings that end with a zero byte; a size of 0 asks for the value's size only.
    unsafe { libc::getxattr(name.as_ptr(), MARK.as_ptr(), std::ptr::null_mut(), 0) >= 0 }
}

fn make(ledger: &mut Ledger, path: &Path, shared: bool) -> Result<(), Error> {
    let ticket = ledger.take(Resource::Cgroup {
        path: path.into(),
        shared,
    })?;
    match fs::create_dir(path) {
        Ok(()) => {
            if shared {
                mark(path);
            }
            Ok(())
        }
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

/// Kills what is in a cgroup that is not shared, waits until it is empty, and removes it, with the parents that pods have made and
/// nobody uses any more. Idempotent.
pub(crate) fn remove(path: &Path, shared: bool) -> io::Result<()> {
    if shared {
        return match remove_empty(path) {
            Ok(false) => {
                // Its maker may have died before it was marked: whoever uses it now takes it away.
                mark(path);
                // Or has gone without seeing the mark, in this very moment.
                remove_empty(path).map(drop)
            }
            other => other.map(drop),
        };
    }
    remove_own(path)?;
    for parent in path.ancestors().skip(1) {
        // One that has gone already may have left its own parent behind: whoever removed it may have died.
        if parent.exists() && !(is_marked(parent) && remove_empty(parent)?) {
            break;
        }
    }
    Ok(())
}

/// `false`: it is in use.
fn remove_empty(path: &Path) -> io::Result<bool> {
    match fs::remove_dir(path) {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EBUSY | libc::ENOTEMPTY) => Ok(false),
            // Another pod was the last one.
            Some(libc::ENOENT | libc::ENODEV) => Ok(true),
            _ => Err(error),
        },
    }
}

fn remove_own(path: &Path) -> io::Result<()> {
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

    /// A directory of cgroup v2 of this test's own; its name keeps it apart from other runs.
    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Option<Place> {
            let text = fs::read_to_string("/proc/self/mounts").unwrap();
            let mounted = text.lines().find_map(|line| {
                let mut words = line.split(' ');
                let point = words.nth(1)?;
                (words.next() == Some("cgroup2")).then(|| PathBuf::from(point))
            });
            let place = mounted?.join(format!("bulkhead-test-{name}-{}", std::process::id()));
            match fs::create_dir(&place) {
                Ok(()) => Some(Place(place)),
                Err(error) => {
                    println!("NOT RUN: cannot make {}: {error}", place.display());
                    None
                }
            }
        }

        fn pod(&self, state: &Path, id: &str, parents: &str) -> (Ledger, Cgroup) {
            let mut ledger = Ledger::create(state, "n", id).unwrap();
            let path = self.0.join(parents).join(id);
            let cgroup = Cgroup::create_in(&mut ledger, &self.0, &path).unwrap();
            (ledger, cgroup)
        }

        fn end(&self, (ledger, cgroup): (Ledger, Cgroup)) {
            let left = ledger.teardown();
            assert!(left.is_empty(), "{left:?}");
            assert!(!cgroup.path().exists());
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let removed = fs::remove_dir(&self.0);
            if !thread::panicking() {
                removed.expect("empty again");
            }
        }
    }

    #[test]
    fn parents_go_with_the_last_pod_whoever_made_them() {
        let Some(place) = Place::new("last") else {
            return;
        };
        let state = tempfile::tempdir().unwrap();
        let state = state.path().canonicalize().unwrap().join("state");
        for first in [0, 1, 2] {
            let ids = ["a", "b", "c"];
            let mut pods: Vec<_> = ids.map(|id| place.pod(&state, id, "x/y")).into();
            place.end(pods.remove(first));
            assert!(place.0.join("x/y").exists(), "in use");
            for pod in pods {
                place.end(pod);
            }
            assert!(!place.0.join("x").exists(), "pod {first} ended first");
        }
    }

    #[test]
    fn a_parent_that_was_there_before_stays() {
        let Some(place) = Place::new("stays") else {
            return;
        };
        let state = tempfile::tempdir().unwrap();
        let state = state.path().canonicalize().unwrap().join("state");
        fs::create_dir(place.0.join("slice")).unwrap();
        let pod = place.pod(&state, "a", "slice/made");
        place.end(pod);
        assert!(!place.0.join("slice/made").exists());
        fs::remove_dir(place.0.join("slice")).expect("still there");
    }

    #[test]
    fn the_parents_of_a_maker_that_died_go_with_the_last_pod() {
        let Some(place) = Place::new("died") else {
            return;
        };
        let state = tempfile::tempdir().unwrap();
        let state = state.path().canonicalize().unwrap().join("state");
        // Between mkdir and the mark.
        let mut maker = Ledger::create(&state, "n", "maker").unwrap();
        let parent = place.0.join("x");
        let resource = Resource::Cgroup {
            path: parent.clone(),
            shared: true,
        };
        maker.take(resource).unwrap();
        fs::create_dir(&parent).unwrap();
        let pod = place.pod(&state, "a", "x");
        assert!(maker.teardown().is_empty());
        assert!(parent.exists());
        place.end(pod);
        assert!(!parent.exists());
    }

    #[test]
    fn many_pods_that_come_and_go_at_once_leave_no_parent() {
        let Some(place) = Place::new("many") else {
            return;
        };
        let state = tempfile::tempdir().unwrap();
        let state = state.path().canonicalize().unwrap().join("state");
        thread::scope(|scope| {
            for worker in 0..8 {
                let (place, state) = (&place, &state);
                scope.spawn(move || {
                    for round in 0..40 {
                        let pod = place.pod(state, &format!("{worker}-{round}"), "x/y");
                        place.end(pod);
                    }
                });
            }
        });
        assert!(!place.0.join("x").exists());
    }

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
