//! Volumes of the guest's own memory that repeat directories of the host (agent.proto, `CreateVolume`).
//!
//! virtio-fs brings no word of what changes on the host, so what containers watch lives here: the shim sends each change, and
//! making it raises the events of inotify(7) that the same change has raised on the host.
//!
//! A container that may write to its volume is hostile. So the way to everything is walked by descriptors that never leave the
//! volume and follow no link, and what is made is made anew.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use bulkhead_agent_protocol::agent::{VolumeAttributes, VolumeChange, volume_change::Kind};
use nix::fcntl::{self, AtFlags, OFlag, OpenHow, ResolveFlag};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{self, FchmodatFlags, Mode, SFlag, UtimensatFlags};
use nix::sys::time::TimeSpec;
use nix::unistd::{self, Gid, Uid};

#[cfg(test)]
mod tests;

/// Where volumes are mounted.
const VOLUMES: &str = "/run/bulkhead/volumes";

/// Room for two versions of the largest volume that the shim sends (16 MiB in 4096 files, each in whole pages), and a bound for
/// containers that may write to one. Memory is taken by what is in it only.
const LIMITS: &str = "mode=0755,size=72m,nr_inodes=32768";

/// Why a volume is not as the shim wants it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    /// A change that cannot be.
    #[error("cannot change \"{path}\" of a volume: {reason}")]
    Invalid {
        /// The change's path.
        path: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The system refused.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> VolumeError {
    let what = what.into();
    move |error| VolumeError::System {
        what,
        source: error.into(),
    }
}

fn invalid(path: &str, reason: &'static str) -> VolumeError {
    VolumeError::Invalid {
        path: path.to_owned(),
        reason,
    }
}

/// The volumes. One change at a time.
#[derive(Debug, Default)]
pub(crate) struct Volumes(Mutex<()>);

impl Volumes {
    fn alone(&self) -> MutexGuard<'_, ()> {
        self.0
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// Mounts an empty one.
    pub(crate) fn create(&self, number: u64) -> Result<(), VolumeError> {
        let _alone = self.alone();
        let path = place(number);
        std::fs::create_dir_all(&path).map_err(system(format!("make {}", path.display())))?;
        // Programs in a configMap are run; devices and set-uid programs are in none.
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("volume"), &path, Some("tmpfs"), flags, Some(LIMITS))
            .map_err(system(format!("mount a tmpfs on {}", path.display())))
    }

    /// Makes changes in order, up to the first that fails.
    pub(crate) fn change(&self, number: u64, changes: &[VolumeChange]) -> Result<(), VolumeError> {
        let _alone = self.alone();
        let path = place(number);
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        let volume = fcntl::openat2(fcntl::AT_FDCWD, &path, how)
            .map_err(system(format!("open {}", path.display())))?;
        changes
            .iter()
            .try_for_each(|change| apply(volume.as_fd(), change))
    }

    /// Unmounts one.
    pub(crate) fn delete(&self, number: u64) -> Result<(), VolumeError> {
        let _alone = self.alone();
        let path = place(number);
        umount2(&path, MntFlags::UMOUNT_NOFOLLOW)
            .map_err(system(format!("unmount {}", path.display())))?;
        std::fs::remove_dir(&path).map_err(system(format!("remove {}", path.display())))
    }
}

fn place(number: u64) -> PathBuf {
    Path::new(VOLUMES).join(number.to_string())
}

/// Makes one change beneath `volume`.
fn apply(volume: BorrowedFd<'_>, change: &VolumeChange) -> Result<(), VolumeError> {
    let path = change.path.as_str();
    let Some(kind) = &change.kind else {
        return Err(invalid(path, "the change is of no known kind"));
    };
    if let (Kind::Attributes(attributes), "") = (kind, path) {
        return set_attributes(volume, attributes)
            .map_err(system("set the attributes of a volume"));
    }
    let place = Place::find(volume, path)?;
    let (what, made) = match kind {
        Kind::Directory(_) => ("make the directory", place.make_directory()),
        Kind::File(bytes) => ("make the file", place.make_file(bytes)),
        Kind::Append(bytes) => ("write to the file", place.append(bytes)),
        Kind::Link(target) => ("make the link", place.make_link(target)),
        Kind::Rename(name) => {
            check_name(path, name)?;
            ("rename", place.rename(name))
        }
        Kind::Remove(_) => ("remove", place.clear()),
        Kind::Attributes(attributes) => ("set the attributes of", place.attributes(attributes)),
        // The generated type may grow.
        _ => return Err(invalid(path, "the change is of no known kind")),
    };
    made.map_err(system(format!("{what} \"{path}\" of a volume")))
}

fn check_name(path: &str, name: &str) -> Result<(), VolumeError> {
    match name {
        "" | "." | ".." => Err(invalid(path, "a name is empty, \".\" or \"..\"")),
        name if name.contains(['/', '\0']) => Err(invalid(path, "a name has a '/' or a NUL")),
        _ => Ok(()),
    }
}

/// A name in an open directory of a volume.
struct Place<'a> {
    parent: OwnedFd,
    name: &'a str,
}

impl<'a> Place<'a> {
    fn find(volume: BorrowedFd<'_>, path: &'a str) -> Result<Place<'a>, VolumeError> {
        for name in path.split('/') {
            check_name(path, name)?;
        }
        let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(
                ResolveFlag::RESOLVE_BENEATH
                    | ResolveFlag::RESOLVE_NO_SYMLINKS
                    | ResolveFlag::RESOLVE_NO_XDEV,
            );
        let parent = fcntl::openat2(volume, parent, how)
            .map_err(system(format!("open the directory of \"{path}\"")))?;
        Ok(Place { parent, name })
    }

    /// By the open directory, for calls that take paths only.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.parent.as_raw_fd())).join(self.name)
    }

    fn clear(&self) -> io::Result<()> {
        let path = self.path();
        let removed = match std::fs::symlink_metadata(&path) {
            // Follows no link, whatever takes the directory's place meanwhile.
            Ok(found) if found.is_dir() => std::fs::remove_dir_all(&path),
            Ok(_) => std::fs::remove_file(&path),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn make_directory(&self) -> io::Result<()> {
        self.clear()?;
        Ok(stat::mkdirat(&self.parent, self.name, Mode::S_IRWXU)?)
    }

    fn make_file(&self, bytes: &[u8]) -> io::Result<()> {
        self.clear()?;
        self.write(OFlag::O_CREAT | OFlag::O_EXCL, bytes)
    }

    fn append(&self, bytes: &[u8]) -> io::Result<()> {
        self.write(OFlag::O_APPEND, bytes)
    }

    fn write(&self, how: OFlag, bytes: &[u8]) -> io::Result<()> {
        // A pipe in the file's place must not hold the agent up.
        let always = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let file = fcntl::openat(&self.parent, self.name, always | how, mode)?;
        std::fs::File::from(file).write_all(bytes)
    }

    fn make_link(&self, target: &str) -> io::Result<()> {
        self.clear()?;
        Ok(unistd::symlinkat(target, &self.parent, self.name)?)
    }

    fn rename(&self, name: &str) -> io::Result<()> {
        Ok(fcntl::renameat(
            &self.parent,
            self.name,
            &self.parent,
            name,
        )?)
    }

    fn attributes(&self, attributes: &VolumeAttributes) -> io::Result<()> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let found = fcntl::openat(&self.parent, self.name, flags, Mode::empty())?;
        set_attributes(found.as_fd(), attributes)
    }
}

/// Touches only what differs: each call is an event to who watches.
fn set_attributes(fd: BorrowedFd<'_>, wanted: &VolumeAttributes) -> io::Result<()> {
    let found = stat::fstat(fd)?;
    if (found.st_uid, found.st_gid) != (wanted.uid, wanted.gid) {
        let (uid, gid) = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
        unistd::fchownat(fd, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?;
    }
    let kind = found.st_mode & SFlag::S_IFMT.bits();
    if kind == SFlag::S_IFLNK.bits() {
        return Ok(());
    }
    // Neither call takes a descriptor of O_PATH itself.
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    // After the owner, whose change takes bits away.
    if stat::fstat(fd)?.st_mode & 0o7777 != wanted.mode & 0o7777 {
        let mode = Mode::from_bits_truncate(wanted.mode & 0o7777);
        let follow = FchmodatFlags::FollowSymlink;
        stat::fchmodat(fcntl::AT_FDCWD, path.as_str(), mode, follow)?;
    }
    if wanted.modified_ns != 0 {
        let time = TimeSpec::new(
            (wanted.modified_ns / 1_000_000_000) as i64,
            (wanted.modified_ns % 1_000_000_000) as i64,
        );
        let follow = UtimensatFlags::FollowSymlink;
        stat::utimensat(fcntl::AT_FDCWD, path.as_str(), &time, &time, follow)?;
    }
    Ok(())
}
