//! Makes the mount points that a read-only root lacks.
//!
//! The agent makes mount points as it comes to them. In a root that is to be read-only it cannot: the root's mount is read-only on
//! the host before a guest sees it (`rootfs.rs`). So the shim makes what lies on the root itself, as runc does before it remounts a
//! root read-only. What lies beneath an earlier mount stays the agent's.
//!
//! The image chooses what is in the root. Each component is opened by itself and never followed by the kernel; symbolic links and ".."
//! are followed here, with the root as "/": nothing outside of the root can be reached.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{self, AtFlags, OFlag},
    sys::stat::{self, FchmodatFlags, Mode, SFlag},
    unistd::{self, Gid, Uid, UnlinkatFlags},
};

use crate::oci::{MountPoint, PointKind};

/// The kernel's own limit of symbolic links in one path (MAXSYMLINKS).
const MAX_LINKS: usize = 40;
/// Modes of what is made, those of runc.
const DIRECTORY_MODE: Mode = Mode::from_bits_truncate(0o755);
const FILE_MODE: Mode = Mode::from_bits_truncate(0o644);

/// A name that the container needs could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make {path} in the root {}", root.display())]
pub struct Error {
    /// In the container.
    pub path: String,
    /// On the host.
    pub root: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Makes those of `points` that are missing in the directory `root`. What is made belongs to `owner`, a uid and a gid.
pub fn make(root: &Path, points: &[MountPoint], owner: (u32, u32)) -> Result<(), Error> {
    let error = |path: &str| {
        let path = path.to_owned();
        move |errno: Errno| Error {
            path,
            root: root.into(),
            source: errno.into(),
        }
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let top = fcntl::open(root, flags, Mode::empty()).map_err(error("/"))?;
    let mut covered = Vec::new();
    for point in points {
        let walk = Walk {
            root: top.as_fd(),
            owner,
            covered: &covered,
            entered: Vec::new(),
            left: components(Path::new(&point.path)),
            links: 0,
        };
        let place = walk.run(point.kind).map_err(error(&point.path))?;
        if let Some(place) = place.filter(|_| point.covered) {
            covered.push(place);
        }
    }
    Ok(())
}

/// The components of `path` without "/" and ".".
fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_os_string()),
            Component::ParentDir => Some("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

/// The way to one mount point.
struct Walk<'a> {
    root: BorrowedFd<'a>,
    owner: (u32, u32),
    /// Places with a mount on them.
    covered: &'a [Vec<OsString>],
    /// The directories on the way, without the root, and their names: ".." takes the last one away and can never pass the root.
    entered: Vec<(OsString, OwnedFd)>,
    left: VecDeque<OsString>,
    links: usize,
}

impl Walk<'_> {
    /// Goes there and makes what is missing. Answers with the place, in names that are no links; `None` when it is beneath an earlier
    /// mount.
    fn run(mut self, kind: PointKind) -> Result<Option<Vec<OsString>>, Errno> {
        while let Some(name) = self.left.pop_front() {
            if name == ".." {
                self.entered.pop();
                continue;
            }
            let is_last = self.left.is_empty();
            let made = match (is_last, kind) {
                (true, PointKind::Link(target, replace)) => {
                    return self.link(&name, target, replace).map(|()| None);
                }
                (true, PointKind::File | PointKind::Node) => PointKind::File,
                _ => PointKind::Directory,
            };
            let (found, found_kind) = match (self.open_or_make(&name, made)?, kind) {
                ((_, SFlag::S_IFLNK), PointKind::Node) if is_last => {
                    self.remove(&name)?;
                    self.open_or_make(&name, made)?
                }
                (found, _) => found,
            };
            match found_kind {
                SFlag::S_IFLNK => self.follow(&found)?,
                SFlag::S_IFDIR => {
                    self.entered.push((name, found));
                    if !self.left.is_empty() && self.is_covered() {
                        return Ok(None);
                    }
                }
                // Whether a file may be there at all is the agent's to say, by the name of the mount.
                _ if is_last => {
                    let mut place = self.place();
                    place.push(name);
                    return Ok(Some(place));
                }
                _ => return Err(Errno::ENOTDIR),
            }
        }
        Ok(Some(self.place()))
    }

    fn place(&self) -> Vec<OsString> {
        self.entered.iter().map(|(name, _)| name.clone()).collect()
    }

    fn is_covered(&self) -> bool {
        let names = || self.entered.iter().map(|(name, _)| name);
        self.covered.iter().any(|place| place.iter().eq(names()))
    }

    fn here(&self) -> BorrowedFd<'_> {
        self.entered.last().map_or(self.root, |(_, fd)| fd.as_fd())
    }

    /// The child `name` of this directory, itself when it is a symbolic link, and its kind.
    fn open_or_make(&self, name: &OsStr, missing: PointKind) -> Result<(OwnedFd, SFlag), Errno> {
        match self.open(name) {
            Err(Errno::ENOENT) => {}
            found => return found,
        }
        let mode = match missing {
            PointKind::Directory => DIRECTORY_MODE,
            _ => FILE_MODE,
        };
        let made = match missing {
            PointKind::Directory => stat::mkdirat(self.here(), name, mode),
            _ => stat::mknodat(self.here(), name, SFlag::S_IFREG, mode, 0),
        };
        match made {
            Ok(()) => {
                let (fd, kind) = self.open(name)?;
                self.finish(&fd, mode)?;
                Ok((fd, kind))
            }
            // Somebody else made it meanwhile: whatever it is, it is looked at before it is used.
            Err(Errno::EEXIST) => self.open(name),
            Err(errno) => Err(errno),
        }
    }

    fn open(&self, name: &OsStr) -> Result<(OwnedFd, SFlag), Errno> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = fcntl::openat(self.here(), name, flags, Mode::empty())?;
        let mode = stat::fstat(&fd)?.st_mode & SFlag::S_IFMT.bits();
        Ok((fd, SFlag::from_bits_truncate(mode)))
    }

    /// Gives what was made the mode that it was made with, whatever our umask is, and its owner.
    fn finish(&self, fd: &OwnedFd, mode: Mode) -> Result<(), Errno> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        stat::fchmodat(fcntl::AT_FDCWD, &path, mode, FchmodatFlags::FollowSymlink)?;
        let (uid, gid) = self.owner;
        if (uid, gid) != (0, 0) {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            unistd::fchownat(fd, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?;
        }
        Ok(())
    }

    fn remove(&self, name: &OsStr) -> Result<(), Errno> {
        unistd::unlinkat(self.here(), name, UnlinkatFlags::NoRemoveDir)
    }

    fn link(&self, name: &OsStr, target: &str, replace: bool) -> Result<(), Errno> {
        match unistd::symlinkat(target, self.here(), name) {
            Err(Errno::EEXIST) if !replace => return Ok(()),
            Err(Errno::EEXIST) => {}
            other => return other,
        }
        if fcntl::readlinkat(self.here(), name).is_ok_and(|found| found == target) {
            return Ok(());
        }
        self.remove(name)?;
        unistd::symlinkat(target, self.here(), name)
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

#[cfg(test)]
mod tests;
