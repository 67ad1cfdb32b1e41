//! Where sockets are on the host: the directory that a pod binds, or that of one socket.

use std::{
    collections::VecDeque,
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    dir::{Dir, Type},
    errno::Errno,
    fcntl::{self, AtFlags, OFlag, OpenHow, ResolveFlag},
    sys::{
        inotify::{AddWatchFlags, Inotify, WatchDescriptor},
        stat::{self, SFlag},
    },
};

/// What is looked at of a directory: those beneath it down to this depth, so many of them, and so many names in all. The guest may
/// fill a directory.
const DEPTH: usize = 3;
const MOST_DIRECTORIES: usize = 64;
const MOST_NAMES: usize = 4096;
/// Most sockets of a place.
pub(super) const MOST_SOCKETS: usize = 64;

/// What of a directory wakes us. Attributes too: a server that sets its socket's mode listens by then.
const EVENTS: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_ONLYDIR);

/// A directory. It is not kept open: a mount that is only open could not be unmounted.
#[derive(Debug)]
pub(super) struct Place {
    base: PathBuf,
    /// Of the directory that was bound. The directory of a single socket is what its path says.
    identity: Option<(u64, u64)>,
    only: Option<String>,
}

/// A socket in a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Beneath the place.
    pub(super) path: String,
    pub(super) inode: (u64, u64),
}

/// What a look at a place gives.
#[derive(Debug, Default)]
pub(super) struct Look {
    pub(super) sockets: Vec<Found>,
    pub(super) watches: Vec<WatchDescriptor>,
}

pub(super) fn is_socket(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

impl Place {
    /// Of a bind mount's source; `None` when it is neither a directory nor a socket.
    pub(super) fn of(source: &Path) -> io::Result<Option<Place>> {
        let found = fs::metadata(source)?;
        if found.is_dir() {
            return Ok(Some(Place {
                base: source.into(),
                identity: Some((found.dev(), found.ino())),
                only: None,
            }));
        }
        if !found.file_type().is_socket() {
            return Ok(None);
        }
        let path = source.canonicalize()?;
        let name = path.file_name().and_then(|name| name.to_str());
        let (Some(base), Some(name)) = (path.parent(), name) else {
            return Err(io::Error::other("a socket whose name is not text"));
        };
        Ok(Some(Place {
            base: base.into(),
            identity: None,
            only: Some(name.into()),
        }))
    }

    pub(super) fn path(&self) -> &Path {
        &self.base
    }

    /// The name of the socket, when it is a single one.
    pub(super) fn only(&self) -> Option<&str> {
        self.only.as_deref()
    }

    fn open(&self) -> io::Result<OwnedFd> {
        let how = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let base = fcntl::open(&self.base, how, stat::Mode::empty())?;
        let found = stat::fstat(&base)?;
        match self.identity {
            // Another directory has its path now; the pod has the old one.
            Some(identity) if identity != (found.st_dev, found.st_ino) => Err(Errno::ESTALE.into()),
            _ => Ok(base),
        }
    }

    /// A socket, by its name at this moment, and its inode. Whatever the guest has put on the way,
    /// nothing outside of the place is reached.
    pub(super) fn socket(&self, path: &str) -> io::Result<(OwnedFd, (u64, u64))> {
        let socket = beneath(&self.open()?, path, OFlag::O_PATH)?;
        let found = stat::fstat(&socket)?;
        match found.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFSOCK.bits() {
            true => Ok((socket, (found.st_dev, found.st_ino))),
            false => Err(Errno::ENOTSOCK.into()),
        }
    }

    /// Looks for sockets, and watches each directory before it is read.
    pub(super) fn look(&self, inotify: &Inotify) -> io::Result<Look> {
        let base = self.open()?;
        let mut look = Look::default();
        if let Some(name) = &self.only {
            look.watch(&base, inotify)?;
            look.sockets.extend(socket_at(&base, name, name));
            return Ok(look);
        }
        let mut ways = VecDeque::from([(String::new(), 0)]);
        let mut names = 0;
        while let Some((way, depth)) = ways.pop_front() {
            let name = match way.as_str() {
                "" => ".",
                way => way,
            };
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            let directory = match beneath(&base, name, flags) {
                Ok(directory) => directory,
                Err(error) if depth == 0 => return Err(error),
                // It has gone, or is the root of another file system.
                Err(_) => continue,
            };
            look.watch(&directory, inotify)?;
            let mut listing = Dir::from_fd(directory.try_clone()?)?;
            for entry in listing.iter() {
                names += 1;
                if names > MOST_NAMES {
                    return Ok(look);
                }
                let entry = entry?;
                // What is not text has no name in the agent's contract.
                let Ok(name) = entry.file_name().to_str() else {
                    continue;
                };
                if matches!(name, "." | "..") {
                    continue;
                }
                let path = match way.as_str() {
                    "" => name.to_owned(),
                    way => format!("{way}/{name}"),
                };
                match kind(&directory, name, entry.file_type()) {
                    Some(Type::Socket) if look.sockets.len() < MOST_SOCKETS => {
                        look.sockets.extend(socket_at(&directory, name, &path));
                    }
                    Some(Type::Directory)
                        if depth < DEPTH && ways.len() + look.watches.len() < MOST_DIRECTORIES =>
                    {
                        ways.push_back((path, depth + 1));
                    }
                    _ => {}
                }
            }
        }
        Ok(look)
    }
}

impl Look {
    fn watch(&mut self, directory: &OwnedFd, inotify: &Inotify) -> io::Result<()> {
        // By the open directory: one that is watched already has the same watch again.
        let name = format!("/proc/self/fd/{}", directory.as_raw_fd());
        self.watches.push(inotify.add_watch(name.as_str(), EVENTS)?);
        Ok(())
    }
}

/// In the same file system: a mount beneath is another one to the guest.
fn beneath(base: &OwnedFd, path: &str, flags: OFlag) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_XDEV,
        );
    Ok(fcntl::openat2(base, path, how)?)
}

fn kind(directory: &OwnedFd, name: &str, told: Option<Type>) -> Option<Type> {
    told.or_else(|| {
        let found = stat::fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
        match SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFDIR => Some(Type::Directory),
            SFlag::S_IFSOCK => Some(Type::Socket),
            _ => None,
        }
    })
}

fn socket_at(directory: &OwnedFd, name: &str, path: &str) -> Option<Found> {
    let found = stat::fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
    let is_socket = found.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFSOCK.bits();
    is_socket.then(|| Found {
        path: path.into(),
        inode: (found.st_dev, found.st_ino),
    })
}
