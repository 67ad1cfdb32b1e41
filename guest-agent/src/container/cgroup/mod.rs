//! A container's cgroup (version 2): limits, devices, freezing, killing, counting.
//!
//! ```text
//!  create ─► open_fd (clone3 CLONE_INTO_CGROUP) ─► apply, freeze/thaw, pids, ... ─► kill_all ─► delete
//! ```
//!
//! A container with a writable cgroup mount controls what is beneath its cgroup: how deep and how many is limited when
//! the cgroup is made, names beneath are only counted, read and removed.

mod devices;
mod huge_pages;
mod limits;
mod reclaim;

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_agent_protocol::CGROUP_STATS;
use bulkhead_agent_protocol::agent::{CgroupFile, Resources};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::bpf::{self, Purpose};

pub use devices::RuleError;
use huge_pages::HugePages;
use limits::write_file;
pub use reclaim::reclaim;

/// Where the guest's cgroup hierarchy is mounted.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Freezing and ending are events of the kernel; one that takes longer than this is stuck in an uninterruptible call.
const EVENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Cgroups that a container may make beneath its own, enough for any init system, so that walks have an end.
const NESTING_LIMITS: [(&str, &str); 2] = [
    ("cgroup.max.depth", "32"),
    ("cgroup.max.descendants", "4096"),
];

/// What fails on a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The path is not a plain relative path.
    #[error("cgroup path {path:?} must be relative, without empty, \".\" or \"..\" components")]
    InvalidPath {
        /// What came.
        path: String,
    },
    /// The cgroup exists already.
    #[error("cgroup {path} exists already")]
    Exists {
        /// Its directory.
        path: PathBuf,
    },
    /// A name that is no file of a cgroup.
    #[error("cgroup file name {name:?} is not a plain file name")]
    InvalidFile {
        /// What came.
        name: String,
    },
    /// A limit that the kernel refused.
    #[error("{}cannot set {name} to {value:?}{hint}: {source}", lead(field))]
    Write {
        /// The field of config.json that asked for it; may be empty.
        field: String,
        /// The file of the cgroup.
        name: String,
        /// What was written.
        value: String,
        /// What the guest has instead of a file that is not there.
        hint: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A limit that cannot be: the machine, or what the container uses, is against it.
    #[error("{}{reason}", lead(field))]
    Limit {
        /// The field of config.json that asked for it; may be empty.
        field: String,
        /// What it is and why not.
        reason: String,
    },
    /// Another operation failed.
    #[error("cgroup {path}: {action} failed: {source}")]
    Io {
        /// The directory or file.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A device rule that cannot be honoured.
    #[error("cgroup {path}: {source}")]
    Rule {
        /// The cgroup's directory.
        path: PathBuf,
        /// Which and why.
        #[source]
        source: RuleError,
    },
    /// The kernel did not report an event in time.
    #[error("cgroup {path}: cgroup.events did not reach {wanted:?} within {seconds} s")]
    Timeout {
        /// The cgroup's directory.
        path: PathBuf,
        /// The line waited for.
        wanted: &'static str,
        /// How long.
        seconds: u64,
    },
}

/// A field's name before what is to be said of it.
fn lead(field: &str) -> String {
    match field {
        "" => String::new(),
        field => format!("{field}: "),
    }
}

/// The files by which who has a cgroup to itself runs it
/// (Documentation/ABI/stable/sysfs-kernel-cgroup, `delegate`).
const DELEGATED: &str = "/sys/kernel/cgroup/delegate";

/// A cgroup that this process has made and removes by `delete`.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// Where its hierarchy is mounted.
    root: PathBuf,
    directory: OwnedFd,
    /// The attached device program, which the next one replaces.
    devices: Option<OwnedFd>,
    huge_pages: HugePages,
}

impl Cgroup {
    /// Makes the cgroup at `path`, relative to the guest's cgroup root, with all controllers enabled down to it, and
    /// applies `resources`. Nothing is left behind on failure but parents.
    pub fn create(path: &str, resources: &Resources) -> Result<Self, CgroupError> {
        Self::create_in(Path::new(CGROUP_ROOT), path, resources)
    }

    /// `create` beneath another mount of a cgroup2 hierarchy.
    pub fn create_in(root: &Path, path: &str, resources: &Resources) -> Result<Self, CgroupError> {
        let components = plain_components(path)?;
        let mut directory = root.to_path_buf();
        for (index, name) in components.iter().enumerate() {
            enable_controllers(&directory)?;
            directory.push(name);
            let last = index + 1 == components.len();
            match fs::create_dir(&directory) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !last => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(CgroupError::Exists { path: directory });
                }
                Err(source) => return Err(io_error(&directory, "mkdir", source)),
            }
        }
        Self::set_up(root, &directory, resources).inspect_err(|_| {
            // Empty and just made: this can only fail if the guest's cgroup file system is gone.
            let _ = fs::remove_dir(&directory);
        })
    }

    fn set_up(root: &Path, path: &Path, resources: &Resources) -> Result<Self, CgroupError> {
        let directory = File::open(path).map_err(|e| io_error(path, "open", e))?;
        let mut cgroup = Self {
            path: path.to_path_buf(),
            root: root.to_path_buf(),
            directory: directory.into(),
            devices: None,
            huge_pages: HugePages::default(),
        };
        for (name, value) in NESTING_LIMITS {
            cgroup.write(name, value)?;
        }
        let program = cgroup.load_devices(resources)?;
        cgroup.attach_devices(program)?;
        cgroup.set_limits(resources)?;
        Ok(cgroup)
    }

    /// The directory, for CLONE_INTO_CGROUP.
    pub fn open_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Its path in the guest.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets new limits, and the device rules when they are set: all or none.
    pub fn apply(&mut self, resources: &Resources) -> Result<(), CgroupError> {
        let program = match resources.set_devices {
            true => Some(self.load_devices(resources)?),
            false => None,
        };
        self.set_limits(resources)?;
        program.map_or(Ok(()), |program| self.attach_devices(program))
    }

    /// Hands it over to a user, who may then make cgroups in it and distribute what its limits
    /// allow (OCI config-linux.md#cgroup-ownership). The limits themselves stay the agent's.
    pub fn give_to(&self, uid: u32, gid: u32) -> Result<(), CgroupError> {
        let files = fs::read_to_string(DELEGATED)
            .map_err(|source| io_error(Path::new(DELEGATED), "read", source))?;
        let names = files.lines().map(|name| self.path.join(name));
        for path in std::iter::once(self.path.clone()).chain(names) {
            match chown(&path, Some(uid), Some(gid)) {
                // Of a controller that this guest does not have.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other.map_err(|source| io_error(&path, "chown", source))?,
            }
        }
        Ok(())
    }

    /// Stops all processes; answers when they stand still, and thaws again when they do not in time.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", "1")?;
        self.wait_for("frozen 1").inspect_err(|_| {
            let _ = self.thaw();
        })
    }

    /// Lets all processes run again.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", "0")?;
        self.wait_for("frozen 0")
    }

    /// Sends SIGKILL to every process in the cgroup and beneath, also when frozen and while they fork.
    pub fn kill_all(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1")
    }

    /// The processes in the cgroup and beneath, in the agent's pid namespace, ascending.
    pub fn pids(&self) -> Result<Vec<u32>, CgroupError> {
        let mut pids = Vec::new();
        for directory in self.tree()? {
            let path = directory.join("cgroup.procs");
            let text = match fs::read_to_string(&path) {
                Ok(text) => text,
                // Removed by the container meanwhile, or a threaded cgroup, whose processes are counted above it.
                Err(error)
                    if gone(&error) || error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) =>
                {
                    continue;
                }
                Err(source) => return Err(io_error(&path, "read", source)),
            };
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// How many processes the kernel has killed here and beneath for want of memory. 0 in a guest without the memory
    /// controller, where no limit can be reached.
    pub fn memory_events_oom_kill(&self) -> Result<u64, CgroupError> {
        let path = self.path.join("memory.events");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(source) => return Err(io_error(&path, "read", source)),
        };
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.parse().ok()).ok_or_else(|| {
            io_error(
                &path,
                "search for oom_kill",
                io::Error::from(io::ErrorKind::InvalidData),
            )
        })
    }

    /// The text of [`CGROUP_STATS`], of those that the kernel has.
    pub fn stats(&self) -> Result<Vec<CgroupFile>, CgroupError> {
        let mut files = Vec::new();
        for name in CGROUP_STATS {
            let path = self.path.join(name);
            match fs::read_to_string(&path) {
                Ok(value) => files.push(CgroupFile {
                    name: name.to_owned(),
                    value,
                    ..CgroupFile::default()
                }),
                Err(error)
                    if gone(&error) || error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {}
                Err(source) => return Err(io_error(&path, "read", source)),
            }
        }
        Ok(files)
    }

    /// Removes the cgroup and what the container has made beneath it, when its last process is gone; `kill_all` first.
    /// Waits for the event that says so.
    pub fn delete(&self) -> Result<(), CgroupError> {
        match self.wait_for("populated 0") {
            Err(CgroupError::Io { source, .. }) if gone(&source) => {
                self.huge_pages.release();
                return Ok(());
            }
            other => other?,
        }
        // Children follow their parent in the list.
        for directory in self.tree()?.into_iter().rev() {
            match fs::remove_dir(&directory) {
                Ok(()) => {}
                Err(error) if gone(&error) => {}
                Err(source) => return Err(io_error(&directory, "rmdir", source)),
            }
        }
        self.huge_pages.release();
        Ok(())
    }

    /// The limits and the huge pages behind them, all or none.
    fn set_limits(&mut self, resources: &Resources) -> Result<(), CgroupError> {
        let mut files = limits::resolve(&self.path, resources)?;
        let wanted = huge_pages::wanted(&mut files)?;
        let reserved = self.huge_pages.grow(&wanted)?;
        match limits::apply(&self.path, &self.root, &files, resources.check_memory) {
            Ok(()) => {
                self.huge_pages.shrink(&wanted);
                Ok(())
            }
            Err(error) => {
                self.huge_pages.shrink(&reserved);
                Err(error)
            }
        }
    }

    fn write(&self, name: &str, value: &str) -> Result<(), CgroupError> {
        write_file(&self.path, name, value)
    }

    fn load_devices(&self, resources: &Resources) -> Result<OwnedFd, CgroupError> {
        let rules = devices::rules(&resources.devices).map_err(|source| CgroupError::Rule {
            path: self.path.clone(),
            source,
        })?;
        bpf::load(Purpose::Devices, &devices::compile(&rules))
            .map_err(|errno| io_error(&self.path, "load of the device program", errno.into()))
    }

    /// In the place of the program that there is.
    fn attach_devices(&mut self, program: OwnedFd) -> Result<(), CgroupError> {
        let old = self.devices.as_ref().map(AsFd::as_fd);
        let directory = self.directory.as_fd();
        bpf::attach(directory, Purpose::Devices, program.as_fd(), old).map_err(|errno| {
            let action = "attachment of the device program";
            io_error(&self.path, action, errno.into())
        })?;
        self.devices = Some(program);
        Ok(())
    }

    /// Waits until cgroup.events has the line `wanted`.
    fn wait_for(&self, wanted: &'static str) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.events");
        let fail = |action| {
            let path = path.clone();
            move |source| io_error(&path, action, source)
        };
        let mut events = File::open(&path).map_err(fail("open"))?;
        let deadline = Instant::now() + EVENT_TIMEOUT;
        loop {
            // The read takes note of the state: poll answers when it has changed since.
            let mut text = String::new();
            events.rewind().map_err(fail("read"))?;
            events.read_to_string(&mut text).map_err(fail("read"))?;
            if text.lines().any(|line| line == wanted) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CgroupError::Timeout {
                    path: self.path.clone(),
                    wanted,
                    seconds: EVENT_TIMEOUT.as_secs(),
                });
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(
                &mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)],
                timeout,
            ) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(fail("poll")(errno.into())),
            }
        }
    }

    /// This cgroup and all beneath, parents first.
    fn tree(&self) -> Result<Vec<PathBuf>, CgroupError> {
        let mut tree = vec![self.path.clone()];
        let mut next = 0;
        while let Some(directory) = tree.get(next).cloned() {
            next += 1;
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(error) if gone(&error) => continue,
                Err(source) => return Err(io_error(&directory, "read", source)),
            };
            for entry in entries {
                let entry = match entry {
                    Ok(entry) => entry,
                    Err(error) if gone(&error) => break,
                    Err(source) => return Err(io_error(&directory, "read", source)),
                };
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    tree.push(entry.path());
                }
            }
        }
        Ok(tree)
    }
}

/// A cgroup may vanish under a reader: ENOENT for its name, ENODEV for a file that is open already.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ENODEV as i32)
}

fn io_error(path: &Path, action: &'static str, source: io::Error) -> CgroupError {
    CgroupError::Io {
        path: path.to_path_buf(),
        action,
        source,
    }
}

fn plain_components(path: &str) -> Result<Vec<&str>, CgroupError> {
    let components: Vec<&str> = path.split('/').collect();
    let plain = |name: &&str| !matches!(*name, "" | "." | "..") && !name.contains('\0');
    if components.iter().all(plain) {
        Ok(components)
    } else {
        Err(CgroupError::InvalidPath {
            path: path.to_owned(),
        })
    }
}

/// Enables every controller that `directory` has for its children. Those enabled already are left alone: a redundant
/// write would fail in a cgroup with processes.
fn enable_controllers(directory: &Path) -> Result<(), CgroupError> {
    const ENABLED: &str = "cgroup.subtree_control";
    let read = |name: &str| {
        let path = directory.join(name);
        fs::read_to_string(&path).map_err(|source| io_error(&path, "read", source))
    };
    let enabled = read(ENABLED)?;
    for controller in read("cgroup.controllers")?.split_whitespace() {
        if !enabled.split_whitespace().any(|name| name == controller) {
            write_file(directory, ENABLED, &format!("+{controller}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
