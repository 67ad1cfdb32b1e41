//! One mount of the spec, from its destination's name to its place in the root.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use bulkhead_agent_protocol::agent::Mount;
use linux::mount::{Depth, mount_setattr, move_mount};
use nix::errno::Errno;
use nix::fcntl::{self, OFlag, OpenHow, ResolveFlag};
use nix::libc::{MS_PRIVATE, MS_RDONLY, MS_REMOUNT, MS_SHARED, MS_SLAVE};
use nix::sys::stat::{self, SFlag};
use nix::sys::statfs::{self, PROC_SUPER_MAGIC};

use super::filesystem::{self, FsError};
use super::{Attached, MountError, copy_up, flags, is_shared, set_propagation, sources};
use crate::stage::paths;
use crate::stage::paths::{Missing, RootDir};

/// The files of /proc that may be mounted over: their contents only inform. Anything else there is how a process is
/// confined or a limit is set (/proc/self/attr, /proc/sys), and a fake would make the agent believe it had done it.
const PROC_FILES: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// Puts `mount` into `root`. `bind` is the source of a bind mount. Answers nothing for a remount.
pub(super) fn attach(
    root: &RootDir,
    mount: &Mount,
    bind: Option<OwnedFd>,
    root_propagation: u64,
) -> Result<Option<Attached>, MountError> {
    let step = Step { root, mount };
    step.check_spec()?;
    if bind.is_none() && mount.flags & MS_REMOUNT != 0 {
        return step.remount().map(|()| None);
    }
    let (target, mode) = step.target(bind.as_ref())?;
    step.check_proc(&target, bind.as_ref())?;
    let is_bind = bind.is_some();
    // A tmpfs stays writable until the end: other mounts may need a mount point in it (a read-only /dev).
    let readonly_later = !is_bind && mount.fstype == "tmpfs" && mount.flags & MS_RDONLY != 0;
    let tree = match bind {
        Some(tree) => tree,
        None => step.create(&target, mode, readonly_later)?,
    };
    move_mount(tree.as_fd(), target.as_fd()).map_err(|e| step.fail("attaching", e))?;
    if is_bind {
        step.detach_propagation(&tree, root_propagation)?;
    }
    propagate(&mount.destination, &tree, &mount.propagation)?;
    Ok(Some(Attached {
        destination: mount.destination.clone(),
        mount: tree,
        propagation: mount.propagation.clone(),
        readonly_later,
    }))
}

/// Applies the propagation calls in their order.
pub(super) fn propagate(
    destination: &str,
    tree: &OwnedFd,
    calls: &[u64],
) -> Result<(), MountError> {
    for call in calls {
        let Some((kind, recursive)) = flags::propagation(*call) else {
            return Err(refused(
                destination,
                format!(
                    "propagation {call:#x} is not exactly one of shared, slave, private, unbindable"
                ),
            ));
        };
        set_propagation(tree.as_fd(), kind, recursive).map_err(|errno| MountError::Mount {
            destination: destination.to_owned(),
            what: "mounted".to_owned(),
            action: format!("setting propagation {call:#x}"),
            errno,
            detail: String::new(),
        })?;
    }
    Ok(())
}

fn refused(destination: &str, reason: impl Into<String>) -> MountError {
    MountError::Refused {
        destination: destination.to_owned(),
        reason: reason.into(),
    }
}

struct Step<'a> {
    root: &'a RootDir,
    mount: &'a Mount,
}

impl Step<'_> {
    fn what(&self) -> String {
        match self.mount.fstype.as_str() {
            "" | "bind" => format!("bind of {}", self.mount.source),
            fstype => fstype.to_owned(),
        }
    }

    fn fail(&self, action: impl Into<String>, errno: Errno) -> MountError {
        MountError::Mount {
            destination: self.mount.destination.clone(),
            what: self.what(),
            action: action.into(),
            errno,
            detail: String::new(),
        }
    }

    fn fail_fs(&self, error: FsError) -> MountError {
        MountError::Mount {
            destination: self.mount.destination.clone(),
            what: self.what(),
            action: error.action,
            errno: error.errno,
            detail: error.detail,
        }
    }

    fn refuse(&self, reason: impl Into<String>) -> MountError {
        refused(&self.mount.destination, reason)
    }

    fn path(&self) -> &Path {
        Path::new(&self.mount.destination)
    }

    /// The destination without "." and "..", as far as names tell.
    fn lexical(&self) -> String {
        let mut parts: Vec<&str> = Vec::new();
        for part in self.mount.destination.split('/') {
            match part {
                "" | "." => {}
                ".." => {
                    parts.pop();
                }
                name => parts.push(name),
            }
        }
        format!("/{}", parts.join("/"))
    }

    fn check_spec(&self) -> Result<(), MountError> {
        let Mount {
            copy_up,
            uid_mappings,
            gid_mappings,
            ..
        } = self.mount;
        let is_bind = sources::is_bind(self.mount);
        if self.lexical() == "/" {
            return Err(self.refuse(
                "the container's root itself cannot be mounted over; set root.path instead",
            ));
        }
        if *copy_up && (is_bind || self.mount.fstype != "tmpfs") {
            return Err(self.refuse("tmpcopyup works for tmpfs only"));
        }
        let translates = !uid_mappings.is_empty() || !gid_mappings.is_empty();
        if translates && !is_bind {
            return Err(self.refuse("id mappings work for bind mounts only"));
        }
        Ok(())
    }

    /// The mount point, made when missing, and its mode when it existed.
    fn target(&self, bind: Option<&OwnedFd>) -> Result<(OwnedFd, Option<u32>), MountError> {
        let fail = |errno| {
            let action = match errno {
                Errno::EROFS => "creation of the mount point in a read-only file system",
                _ => "creation of the mount point",
            };
            self.fail(action, errno)
        };
        if matches!(self.mount.fstype.as_str(), "proc" | "sysfs") && bind.is_none() {
            self.check_plain_directory()?;
        }
        let wants_directory = match bind {
            Some(tree) => paths::kind(tree).map_err(fail)? == SFlag::S_IFDIR,
            None => true,
        };
        let (target, existed) = match self.root.resolve(self.path()) {
            Ok(target) => (target, true),
            Err(Errno::ENOENT) => {
                let missing = match wants_directory {
                    true => Missing::Directory,
                    false => Missing::File,
                };
                let made = self.root.resolve_or_create(self.path(), missing);
                (made.map_err(fail)?, false)
            }
            Err(errno) => return Err(self.fail("resolving the mount point", errno)),
        };
        let status = stat::fstat(&target).map_err(fail)?;
        let is_directory = status.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits();
        if is_directory != wants_directory {
            return Err(self.refuse(match wants_directory {
                true => "the source is a directory, but the mount point is not",
                false => "the source is not a directory, but the mount point is",
            }));
        }
        Ok((target, existed.then_some(status.st_mode & 0o7777)))
    }

    /// /proc and /sys must be where their names say: software that finds them elsewhere, and something of the image in
    /// their place, could be misled about its own confinement.
    fn check_plain_directory(&self) -> Result<(), MountError> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
        match fcntl::openat2(self.root, self.path(), how) {
            Err(Errno::ELOOP) => Err(self.refuse(format!(
                "{} must be mounted on a directory, but the image has a symbolic link there",
                self.mount.fstype
            ))),
            _ => Ok(()),
        }
    }

    /// Nothing but procfs at /proc, and nothing inside procfs but the files that only inform. Decided on the file that
    /// the destination leads to, whatever links the image has put in between.
    fn check_proc(&self, target: &OwnedFd, bind: Option<&OwnedFd>) -> Result<(), MountError> {
        let on_procfs = |fd: &OwnedFd| -> Result<bool, MountError> {
            let status = statfs::fstatfs(fd).map_err(|e| self.fail("fstatfs", e))?;
            Ok(status.filesystem_type() == PROC_SUPER_MAGIC)
        };
        let lexical = self.lexical();
        let brings_proc = match bind {
            Some(tree) => on_procfs(tree)? && is_directory_root(tree),
            None => self.mount.fstype == "proc",
        };
        if lexical == "/proc" {
            return match brings_proc {
                true => Ok(()),
                false => Err(self.refuse("only a proc file system can be mounted on /proc")),
            };
        }
        let inside = on_procfs(target)?;
        let named_inside = lexical.starts_with("/proc/");
        if !inside && !named_inside {
            return Ok(());
        }
        if PROC_FILES.contains(&lexical.as_str()) && (!inside || self.is_at(&lexical, target)) {
            return Ok(());
        }
        Err(self.refuse(format!(
            "it is inside /proc, where only these can be mounted over: {}",
            PROC_FILES.join(", ")
        )))
    }

    /// Whether `target` is the file at `path` without any link on the way (but /proc/net, which is one to self/net).
    fn is_at(&self, path: &str, target: &OwnedFd) -> bool {
        let path = path.replace("/proc/net/", "/proc/thread-self/net/");
        let resolve = match path.contains("/thread-self/") {
            true => ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS,
            false => ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS,
        };
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(resolve);
        let Ok(file) = fcntl::openat2(self.root, Path::new(&path), how) else {
            return false;
        };
        match (stat::fstat(&file), stat::fstat(target)) {
            (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
            _ => false,
        }
    }

    /// A new file system with everything but its place.
    fn create(
        &self,
        target: &OwnedFd,
        mode: Option<u32>,
        writable: bool,
    ) -> Result<OwnedFd, MountError> {
        // A tmpfs takes over the mode of the directory it covers, unless the spec says otherwise.
        let mode = mode.filter(|_| self.mount.fstype == "tmpfs");
        let tree = filesystem::create(self.mount, mode, writable).map_err(|e| self.fail_fs(e))?;
        if self.mount.copy_up {
            copy_up::copy(target, &tree).map_err(|error| {
                let action = format!("copying {} up", error.path.display());
                self.fail(action, error.errno)
            })?;
        }
        sources::recursive_attributes(self.mount, &tree)
            .map_err(|e| self.fail("change of recursive mount flags", e))?;
        Ok(tree)
    }

    /// A bind mount's source was copied with the peer group that it has in the agent. Mount events inside must not
    /// reach the agent unless the root is shared; events of the agent reach the container when a call asks for it.
    fn detach_propagation(&self, tree: &OwnedFd, root_propagation: u64) -> Result<(), MountError> {
        if is_shared(root_propagation) {
            return Ok(());
        }
        let calls = &self.mount.propagation;
        let follows = root_propagation & MS_SLAVE != 0
            || calls.iter().any(|call| call & (MS_SLAVE | MS_SHARED) != 0);
        let kind = if follows { MS_SLAVE } else { MS_PRIVATE };
        set_propagation(tree.as_fd(), kind, true)
            .map_err(|e| self.fail("separating the mount from its source", e))
    }

    /// The "remount" option without a source: new options for what the destination shows already.
    fn remount(&self) -> Result<(), MountError> {
        let target = self
            .root
            .resolve(self.path())
            .map_err(|e| self.fail("resolving the mount point", e))?;
        if !self.mount.data.is_empty() {
            filesystem::reconfigure(self.mount, target.as_fd()).map_err(|e| self.fail_fs(e))?;
        }
        let now = sources::access_time_mode(&target).map_err(|e| self.fail("fstatvfs", e))?;
        let change = flags::attributes(self.mount.flags, self.mount.clear_flags, now);
        mount_setattr(target.as_fd(), Depth::Top, change)
            .map_err(|e| self.fail("change of mount flags", e))
    }
}

/// Whether a procfs bind source is the whole of it: its root is the only inode numbered 1.
fn is_directory_root(tree: &OwnedFd) -> bool {
    stat::fstat(tree).is_ok_and(|status| status.st_ino == 1)
}
