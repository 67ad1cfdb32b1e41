//! The pod's cgroup on the host, cgroup v2 only.
//!
//! ```text
//! <pod>              ceilings of memory and processors, block I/O limits
//!   ├── machine      VMM, fs process, stub: no device opens, so many processes and threads, so much memory
//!   └── shim         the shim, hooks, loggers
//! ```
//!
//! The machine's processes start inside (`CLONE_INTO_CGROUP`), so that their memory is accounted
//! from their first instruction and one write to `cgroup.kill` reaches all of them. The shim comes
//! and goes ([`stay`]).
//!
//! The last component of its path ([`place()`]) must not exist yet.
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
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    ledger::{self, Ledger, Resource},
    sys::device_filter,
};

mod place;
pub(crate) mod stay;

pub use place::place;
pub use stay::of_process;

/// Where cgroup v2 is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// How often a parent may vanish under our hands before that is an error.
const RACES: usize = 1000;
/// The mark of a parent that a pod has made; its value means nothing.
const MARK: &CStr = c"trusted.bulkhead.parent";
const PATIENCE: Duration = Duration::from_secs(10);
/// The group of the machine's processes.
const MACHINE: &str = "machine";
/// The group of a shim.
const SHIM: &str = "shim";
/// Bytes that a shim, its hooks and loggers may have beside the machine.
const SHIM_ROOM: u64 = 64 << 20;

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
    Ok(count(&path.join("memory.events"), "oom_kill")?.unwrap_or(0))
}

/// How often `pids.max` has refused a process or a thread to the machine of the pod whose cgroup is
/// at `path`.
pub fn refused_forks(path: &Path) -> io::Result<u64> {
    Ok(count(&path.join(MACHINE).join("pids.events"), "max")?.unwrap_or(0))
}

/// Processor time that the machine of the pod whose cgroup is at `path` has taken since its start.
/// The shim's, beside it in the pod's cgroup, does not count.
pub fn processor_time(path: &Path) -> io::Result<Duration> {
    let used = count(&path.join(MACHINE).join("cpu.stat"), "usage_usec")?;
    used.map(Duration::from_micros)
        .ok_or_else(|| io::Error::other("cpu.stat has no usage_usec"))
}

/// A count of a file of `NAME COUNT` lines.
fn count(file: &Path, name: &str) -> io::Result<Option<u64>> {
    let text = fs::read_to_string(file)?;
    let mut words = text.lines().filter_map(|line| line.split_once(' '));
    let found = words.find(|(found, _)| *found == name);
    Ok(found.and_then(|(_, count)| count.parse().ok()))
}

/// Refuses a host whose cgroups are not version 2 alone.
pub fn require_v2() -> Result<(), Error> {
    match nix::sys::statfs::statfs(ROOT) {
        Ok(found) if found.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC => Ok(()),
        _ => Err(Error::NotV2),
    }
}

/// A pod's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    machine: OwnedFd,
    shim: Option<PathBuf>,
}

impl Cgroup {
    /// Makes it, with every controller that its parents can give, and writes it into the ledger.
    /// `home` is where the shim is that is to come in ([`Cgroup::shim`]); `None`: nobody is.
    pub fn create(
        ledger: &mut Ledger,
        path: &Path,
        home: Option<PathBuf>,
    ) -> Result<Cgroup, Error> {
        require_v2()?;
        Cgroup::create_in(ledger, Path::new(ROOT), path, home)
    }

    /// The same beneath another mount of cgroup v2.
    fn create_in(
        ledger: &mut Ledger,
        root: &Path,
        path: &Path,
        home: Option<PathBuf>,
    ) -> Result<Cgroup, Error> {
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
        // The replay gives back the newest first: the machine is killed, the shim leaves, the pod's
        // goes.
        let shim = home
            .map(|home| make_shims(ledger, path, home))
            .transpose()?;
        let machine = path.join(MACHINE);
        make(ledger, &machine, false)?;
        for controller in ["memory", "pids"] {
            hand_down(controller, path);
        }
        let opened = File::open(&machine).map_err(|source| Error::Io {
            action: "open",
            path: machine,
            source,
        })?;
        Ok(Cgroup {
            path: path.into(),
            machine: opened.into(),
            shim,
        })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For `CLONE_INTO_CGROUP`: the group of the machine's processes.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.machine.as_fd()
    }

    /// Where the shim belongs ([`stay::enter`]), if it is to come in.
    pub fn shim(&self) -> Option<&Path> {
        self.shim.as_deref()
    }

    /// Bounds what a process of the pod can do to the host that fell to its guest: no device node
    /// opens, and there are no more than `tasks` processes and threads, and `memory` bytes. Where
    /// the machine has come to that, the kernel looks for somebody to kill in its group alone, so
    /// that the shim stays to tell of it.
    pub fn contain(&self, tasks: u64, memory: u64) -> Result<(), Error> {
        let failed = |action| {
            move |source| Error::Io {
                action,
                path: self.path.clone(),
                source,
            }
        };
        device_filter::allow_only_null(self.as_fd())
            .map_err(failed("forbid devices (CONFIG_CGROUP_BPF) in"))?;
        let tasks = ("machine/pids.max", tasks.to_string());
        for (file, value) in memory_limits(memory).into_iter().chain([tasks]) {
            match self.write(file, &value) {
                // The parents were not given the controller.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    tracing::warn!(cgroup = %self.path.display(), file, "no such controller: the pod is not bounded by it");
                }
                other => other.map_err(failed("set the limits of"))?,
            }
        }
        Ok(())
    }

    /// Writes one control file.
    pub fn write(&self, name: &str, value: &str) -> io::Result<()> {
        write(&self.path.join(name), value)
    }
}

/// Files of a pod's cgroup that bound it to so many bytes: the machine's group, and room for the
/// shim beside it.
pub fn memory_limits(bytes: u64) -> Vec<(&'static str, String)> {
    let all = bytes.saturating_add(SHIM_ROOM);
    vec![
        ("memory.max", all.to_string()),
        ("machine/memory.max", bytes.to_string()),
    ]
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
#[allow(unsafe_code)] // setxattr(2)
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

#[allow(unsafe_code)] // getxattr(2)
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

/// Makes the group of a shim that comes from `home`.
fn make_shims(ledger: &mut Ledger, pod: &Path, home: PathBuf) -> Result<PathBuf, Error> {
    let path = pod.join(SHIM);
    ledger.take(Resource::ShimCgroup {
        path: path.clone(),
        home,
    })?;
    fs::create_dir(&path).map_err(|source| Error::Io {
        action: "make",
        path: path.clone(),
        source,
    })?;
    Ok(path)
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
        hand_down(controller, path);
    }
}

fn hand_down(controller: &str, path: &Path) {
    let control = path.join("cgroup.subtree_control");
    if let Err(error) = write(&control, &format!("+{controller}")) {
        tracing::debug!(%controller, path = %path.display(), %error, "controller not handed down");
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
    if stay::is_inside(path) {
        return Err(io::Error::other("this process itself is in it"));
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
            let cgroup = Cgroup::create_in(&mut ledger, &self.0, &path, None).unwrap();
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
    fn processor_time_is_that_of_the_machine() {
        let dir = tempfile::TempDir::new().unwrap();
        assert!(processor_time(dir.path()).is_err());
        fs::create_dir(dir.path().join("machine")).unwrap();
        let file = dir.path().join("machine/cpu.stat");
        fs::write(&file, "usage_usec 1500\nuser_usec 7\n").unwrap();
        assert_eq!(
            processor_time(dir.path()).unwrap(),
            Duration::from_micros(1500)
        );
        fs::write(&file, "user_usec 7\n").unwrap();
        assert!(processor_time(dir.path()).is_err());
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
    fn a_shim_comes_in_and_goes_home_before_the_pod_is_killed() {
        let Some(place) = Place::new("shim") else {
            return;
        };
        let state = tempfile::tempdir().unwrap();
        let state = state.path().canonicalize().unwrap().join("state");
        let home = place.0.join("home");
        fs::create_dir(&home).unwrap();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let mut ledger = Ledger::create(&state, "n", "a").unwrap();
        let path = place.0.join("a");
        let cgroup = Cgroup::create_in(&mut ledger, &place.0, &path, Some(home.clone())).unwrap();
        stay::enter(cgroup.shim().unwrap()).unwrap();
        // One that it starts then is beside it.
        let mut hook = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let inside = |group: &Path| {
            let text = fs::read_to_string(group.join("cgroup.procs")).unwrap();
            [std::process::id(), hook.id()]
                .map(|pid| text.lines().any(|line| line == pid.to_string()))
        };
        assert_eq!(inside(cgroup.shim().unwrap()), [true, true]);
        let left = ledger.teardown();
        assert!(left.is_empty(), "{left:?}");
        assert!(!path.exists());
        assert_eq!(inside(&home), [true, true], "nobody was killed");
        hook.kill().unwrap();
        hook.wait().unwrap();
        // Where this process was before.
        let relative = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let before = place.0.parent().unwrap().join(relative.unwrap());
        stay::leave(&home, &before).unwrap();
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
}
