//! A container's cgroup (version 2): limits, devices, freezing, killing, counting.
//!
//! ```text
//!  create ─► open_fd (clone3 CLONE_INTO_CGROUP) ─► apply, freeze/thaw, pids, ... ─► kill_all ─► delete
//! ```
//!
//! A container with a writable cgroup mount controls what is beneath its cgroup: how deep and how many is limited when
//! the cgroup is made, names beneath are only counted, read and removed.

mod devices;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_agent_protocol::agent::{CgroupFile, Resources};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::bpf::{self, Purpose};

pub use devices::RuleError;

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
    #[error("cgroup {path}: write of {value:?} to {name} failed: {source}")]
    Write {
        /// The cgroup's directory.
        path: PathBuf,
        /// The file in it.
        name: String,
        /// What was written.
        value: String,
        /// Why it failed; "not found" when the controller is not there.
        #[source]
        source: io::Error,
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

/// The files that tell what a container uses.
const STATS: [&str; 15] = [
    "cpu.stat",
    "memory.current",
    "memory.events",
    "memory.max",
    "memory.peak",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.max",
    "memory.swap.peak",
    "memory.pressure",
    "cpu.pressure",
    "io.stat",
    "io.pressure",
    "pids.current",
    "pids.max",
];

/// A cgroup that this process has made and removes by `delete`.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
    /// The attached device program, which the next one replaces.
    devices: Option<OwnedFd>,
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
        Self::set_up(&directory, resources).inspect_err(|_| {
            // Empty and just made: this can only fail if the guest's cgroup file system is gone.
            let _ = fs::remove_dir(&directory);
        })
    }

    fn set_up(path: &Path, resources: &Resources) -> Result<Self, CgroupError> {
        let directory = File::open(path).map_err(|e| io_error(path, "open", e))?;
        let mut cgroup = Self {
            path: path.to_path_buf(),
            directory: directory.into(),
            devices: None,
        };
        for (name, value) in NESTING_LIMITS {
            cgroup.write(name, value)?;
        }
        cgroup.set_devices(resources)?;
        cgroup.write_files(resources)?;
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

    /// Writes new limits in their order, then the device rules when they are set. What was applied before an error
    /// stays applied.
    pub fn apply(&mut self, resources: &Resources) -> Result<(), CgroupError> {
        self.write_files(resources)?;
        if resources.set_devices {
            self.set_devices(resources)?;
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

    /// The text of [`STATS`], of those that the kernel has.
    pub fn stats(&self) -> Result<Vec<CgroupFile>, CgroupError> {
        let mut files = Vec::new();
        for name in STATS {
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
            Err(CgroupError::Io { source, .. }) if gone(&source) => return Ok(()),
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
        Ok(())
    }

    fn write_files(&self, resources: &Resources) -> Result<(), CgroupError> {
        resources
            .files
            .iter()
            .try_for_each(|file| self.write(&file.name, &file.value))
    }

    fn write(&self, name: &str, value: &str) -> Result<(), CgroupError> {
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
        {
            return Err(CgroupError::InvalidFile {
                name: name.to_owned(),
            });
        }
        write_file(&self.path, name, value)
    }

    fn set_devices(&mut self, resources: &Resources) -> Result<(), CgroupError> {
        let rules = devices::rules(&resources.devices).map_err(|source| CgroupError::Rule {
            path: self.path.clone(),
            source,
        })?;
        let fail = |action| {
            let path = self.path.clone();
            move |errno: Errno| io_error(&path, action, errno.into())
        };
        let program = bpf::load(Purpose::Devices, &devices::compile(&rules))
            .map_err(fail("load of the device program"))?;
        let old = self.devices.as_ref().map(AsFd::as_fd);
        bpf::attach(
            self.directory.as_fd(),
            Purpose::Devices,
            program.as_fd(),
            old,
        )
        .map_err(fail("attachment of the device program"))?;
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

fn write_file(directory: &Path, name: &str, value: &str) -> Result<(), CgroupError> {
    let written = OpenOptions::new()
        .write(true)
        .open(directory.join(name))
        .and_then(|mut file| {
            // An empty value is a value ("cpuset.cpus"), and an empty write would not reach the kernel.
            let text = if value.is_empty() { "\n" } else { value };
            file.write_all(text.as_bytes())
        });
    written.map_err(|source| CgroupError::Write {
        path: directory.to_path_buf(),
        name: name.to_owned(),
        value: value.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests;
