//! Paths inside a container's root, which a hostile image or a running container controls.
//!
//! A path is resolved to a descriptor with the container's root as "/" for every symbolic link and "..", and all
//! work goes on with that descriptor: between the check and the use there is no name left that could be exchanged.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{self, OFlag, OpenHow, ResolveFlag};
use nix::sys::stat::{self, Mode, SFlag};

/// The kernel's own limit of symbolic links in one path (MAXSYMLINKS).
const MAX_LINKS: usize = 40;
/// Modes of the directories and files that are made to mount on, those of runc.
const MOUNT_POINT_DIR: Mode = Mode::from_bits_truncate(0o755);
const MOUNT_POINT_FILE: Mode = Mode::from_bits_truncate(0o644);

/// What to make when the last component of a path does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// A directory, with its missing parents.
    Directory,
    /// An empty regular file, and its missing parents.
    File,
}

/// A directory that is "/" for every path resolved in it.
#[derive(Debug)]
pub struct RootDir(OwnedFd);

impl AsFd for RootDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl RootDir {
    /// The directory at the guest path `path`, of which no component may be a symbolic link.
    pub fn open(path: &Path) -> Result<Self, Errno> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        fcntl::openat2(fcntl::AT_FDCWD, path, how).map(Self)
    }

    /// Takes a descriptor of a directory.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The file at `path`, following links inside the root. O_PATH.
    pub fn resolve(&self, path: &Path) -> Result<OwnedFd, Errno> {
        linux::path::open_in_root(self.as_fd(), path, OFlag::O_PATH)
    }

    /// The file at `path`; what is missing is made: parents as directories, the last component as `missing` says.
    /// A dangling symbolic link is followed and its target made, inside the root.
    pub fn resolve_or_create(&self, path: &Path, missing: Missing) -> Result<OwnedFd, Errno> {
        match self.resolve(path) {
            Err(Errno::ENOENT) => Walk::new(self, path)?.run(missing),
            other => other,
        }
    }

    /// The directory that holds the last component of `path` (made when missing), and that component's name.
    /// The name may be that of a symbolic link: work on it without following.
    pub fn parent(&self, path: &Path) -> Result<(OwnedFd, OsString), Errno> {
        let mut parts = components(path);
        let name = parts.pop_back().ok_or(Errno::EINVAL)?;
        if name == ".." {
            return Err(Errno::EINVAL);
        }
        let parent: PathBuf = std::iter::once(OsString::from("/")).chain(parts).collect();
        Ok((self.resolve_or_create(&parent, Missing::Directory)?, name))
    }
}

/// The components of `path` without "/" and ".".
fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_os_string()),
            Component::ParentDir => Some(OsString::from("..")),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

/// Resolution one component at a time, so that each missing one can be made where it is missing.
struct Walk<'a> {
    root: &'a RootDir,
    /// The directories entered, without the root: ".." takes the last one away and can never pass the root.
    entered: Vec<OwnedFd>,
    left: VecDeque<OsString>,
    links: usize,
}

impl<'a> Walk<'a> {
    fn new(root: &'a RootDir, path: &Path) -> Result<Self, Errno> {
        let left = components(path);
        Ok(Self {
            root,
            entered: Vec::new(),
            left,
            links: 0,
        })
    }

    fn here(&self) -> BorrowedFd<'_> {
        self.entered
            .last()
            .map_or(self.root.as_fd(), |directory| directory.as_fd())
    }

    fn run(mut self, missing: Missing) -> Result<OwnedFd, Errno> {
        while let Some(name) = self.left.pop_front() {
            if name == ".." {
                self.entered.pop();
                continue;
            }
            let file = self.open_or_make(&name, missing)?;
            match kind(&file)? {
                SFlag::S_IFLNK => self.follow(&file)?,
                SFlag::S_IFDIR => self.entered.push(file),
                _ if self.left.is_empty() => return Ok(file),
                _ => return Err(Errno::ENOTDIR),
            }
        }
        match self.entered.pop() {
            Some(directory) => Ok(directory),
            None => self.root.0.try_clone().map_err(|_| Errno::EMFILE),
        }
    }

    /// The child `name` of this directory, itself when it is a symbolic link.
    fn open_or_make(&self, name: &OsStr, missing: Missing) -> Result<OwnedFd, Errno> {
        let open = || {
            fcntl::openat(
                self.here(),
                name,
                OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
                Mode::empty(),
            )
        };
        match open() {
            Err(Errno::ENOENT) => {}
            other => return other,
        }
        let made = if self.left.is_empty() && missing == Missing::File {
            stat::mknodat(self.here(), name, SFlag::S_IFREG, MOUNT_POINT_FILE, 0)
        } else {
            stat::mkdirat(self.here(), name, MOUNT_POINT_DIR)
        };
        match made {
            // Somebody else made it meanwhile: whatever it is, it is looked at before it is used.
            Ok(()) | Err(Errno::EEXIST) => open(),
            Err(error) => Err(error),
        }
    }

    fn follow(&mut self, link: &OwnedFd) -> Result<(), Errno> {
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(Errno::ELOOP);
        }
        let target = fcntl::readlinkat(link, "")?;
        if target.as_bytes().first() == Some(&b'/') {
            self.entered.clear();
        }
        for name in components(Path::new(&target)).into_iter().rev() {
            self.left.push_front(name);
        }
        Ok(())
    }
}

/// The S_IFMT part of a file's mode.
pub fn kind(file: impl AsFd) -> Result<SFlag, Errno> {
    Ok(SFlag::from_bits_truncate(
        stat::fstat(file)?.st_mode & SFlag::S_IFMT.bits(),
    ))
}

/// The path of a descriptor for system calls that only take paths. /proc must be the agent's own.
pub fn proc_path(fd: impl AsFd) -> PathBuf {
    use std::os::fd::AsRawFd;
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

#[cfg(test)]
mod tests;
