//! What a kubelet volume's directory on the host shows.
//!
//! kubelet's writer (pkg/volume/util/atomic_writer.go) keeps each version in a directory of its own, complete before the link
//! `..data` comes to it and not changed after, and shows its files by links at the top:
//!
//! ```text
//! ..2026_11_22_10_00_00.123   a version: directories and files
//! ..data                      -> ..2026_11_22_10_00_00.123
//! key                         -> ..data/key
//! nested                      a directory that kubelet made for another volume's mount in this one
//! ```
//!
//! Whatever else is there is refused by its name.

use std::{
    collections::BTreeMap,
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path},
};

use nix::{
    dir::Dir,
    fcntl::{self, AtFlags, OFlag, OpenHow, ResolveFlag},
    sys::stat::{self, FileStat, Mode, SFlag},
};

use super::Error;

/// The link to the version that counts.
pub const DATA: &str = "..data";
/// What kubelet renames to it.
pub const NEW_DATA: &str = "..data_tmp";

/// Largest version, in bytes: a ConfigMap or a Secret has at most 1 MiB, and a projected volume joins several.
pub const MAX_BYTES: u64 = 16 << 20;
/// Most files and directories of a version.
pub const MAX_ENTRIES: usize = 4096;
/// Deepest directory of a version.
const MAX_DEPTH: usize = 16;

/// Whose something is, and its permission bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// Tells whether a file's bytes are still the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub inode: u64,
    pub size: u64,
    pub modified_ns: u64,
}

/// A directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    pub attributes: Attributes,
    pub entries: BTreeMap<String, Node>,
}

/// What has a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    Directory(Directory),
    File(Attributes, Stamp),
    Link(String, Attributes),
    /// In the guest only: an attempt to make it, or to remove it, has failed on the way.
    Unsure,
}

impl Attributes {
    fn of(found: &FileStat) -> Attributes {
        Attributes {
            mode: found.st_mode & 0o7777,
            uid: found.st_uid,
            gid: found.st_gid,
        }
    }
}

impl Stamp {
    fn of(found: &FileStat) -> Stamp {
        let since = found.st_mtime.saturating_mul(1_000_000_000);
        Stamp {
            inode: found.st_ino,
            size: found.st_size.unsigned_abs(),
            modified_ns: since.saturating_add(found.st_mtime_nsec).unsigned_abs(),
        }
    }
}

/// Looks at a volume. Of the versions it takes the one that counts, and those of which `has` is true (the guest has them).
pub fn look(volume: BorrowedFd<'_>, has: impl Fn(&str) -> bool) -> Result<Directory, Error> {
    let mut top = Directory {
        attributes: Attributes::of(&stat::fstat(volume).map_err(read(""))?),
        ..Directory::default()
    };
    let mut directories = Vec::new();
    for name in names(volume, "")? {
        let found = status(volume, &name, &name)?;
        match kind(&found) {
            SFlag::S_IFLNK if name == NEW_DATA => {}
            SFlag::S_IFLNK => {
                let attributes = Attributes {
                    mode: 0,
                    ..Attributes::of(&found)
                };
                let link = Node::Link(target(volume, &name)?, attributes);
                top.entries.insert(name, link);
            }
            SFlag::S_IFDIR => directories.push(name),
            other => return Err(refused(&name, format!("it is {}", word(other)))),
        }
    }
    let counts = match top.entries.get(DATA) {
        Some(Node::Link(target, _)) => Some(target.clone()),
        _ => None,
    };
    for name in directories {
        let is_version = name.starts_with("..");
        if !is_version || counts.as_ref() == Some(&name) || has(&name) {
            let directory = Walk::default().beneath(volume, &name, &name, 1)?;
            top.entries.insert(name, Node::Directory(directory));
        }
    }
    match counts {
        // The link was read before the host went on: what was walked then may be a version that is
        // being removed, half of it gone.
        Some(version)
            if !top.entries.contains_key(&version) || target(volume, DATA)? != version =>
        {
            Err(Error::Moving)
        }
        _ => Ok(top),
    }
}

/// Where a link at the top leads; only to what is in the volume.
fn target(volume: BorrowedFd<'_>, name: &str) -> Result<String, Error> {
    let target = fcntl::readlinkat(volume, name).map_err(read(name))?;
    let Some(target) = target.to_str() else {
        return Err(refused(name, "it leads to what is not text"));
    };
    let mut parts = Path::new(target).components();
    let inside = parts.all(|part| matches!(part, Component::Normal(_)));
    if target.is_empty() || !inside {
        return Err(refused(
            name,
            format!("it leads out of the volume, to {target:?}"),
        ));
    }
    if name == DATA && (target.contains('/') || !target.starts_with("..")) {
        let reason = format!("it leads to {target:?}, which is no version");
        return Err(refused(name, reason));
    }
    Ok(target.into())
}

/// The size of a version so far.
#[derive(Default)]
struct Walk {
    bytes: u64,
    entries: usize,
}

impl Walk {
    fn beneath(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &str,
        path: &str,
        depth: usize,
    ) -> Result<Directory, Error> {
        if depth > MAX_DEPTH {
            return Err(refused(
                path,
                format!("it is more than {MAX_DEPTH} directories deep"),
            ));
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let opened = fcntl::openat(parent, name, flags, Mode::empty()).map_err(read(path))?;
        let mut directory = Directory {
            attributes: Attributes::of(&stat::fstat(&opened).map_err(read(path))?),
            ..Directory::default()
        };
        for name in names(opened.as_fd(), path)? {
            let path = format!("{path}/{name}");
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                let reason = format!("the volume has more than {MAX_ENTRIES} files");
                return Err(refused(&path, reason));
            }
            let found = status(opened.as_fd(), &name, &path)?;
            let node = match kind(&found) {
                SFlag::S_IFDIR => {
                    Node::Directory(self.beneath(opened.as_fd(), &name, &path, depth + 1)?)
                }
                SFlag::S_IFREG => self.file(&found, &path)?,
                other => return Err(refused(&path, format!("it is {}", word(other)))),
            };
            directory.entries.insert(name, node);
        }
        Ok(directory)
    }

    fn file(&mut self, found: &FileStat, path: &str) -> Result<Node, Error> {
        let stamp = Stamp::of(found);
        self.bytes = self.bytes.saturating_add(stamp.size);
        if self.bytes > MAX_BYTES {
            let reason = format!("the volume has more than {} MiB", MAX_BYTES >> 20);
            return Err(refused(path, reason));
        }
        Ok(Node::File(Attributes::of(found), stamp))
    }
}

/// Opens a file that [`look`] has found, if it is still the same.
pub fn open(volume: BorrowedFd<'_>, path: &str, stamp: &Stamp) -> Result<File, Error> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let file: OwnedFd = fcntl::openat2(volume, path, how).map_err(read(path))?;
    match Stamp::of(&stat::fstat(&file).map_err(read(path))?) == *stamp {
        true => Ok(file.into()),
        false => Err(Error::Moving),
    }
}

/// What is not there any more means that the host goes on.
pub fn read<E: Into<io::Error>>(path: &str) -> impl FnOnce(E) -> Error {
    let path = path.to_owned();
    move |error| match error.into() {
        gone if gone.kind() == io::ErrorKind::NotFound => Error::Moving,
        source => Error::Read { path, source },
    }
}

fn refused(path: &str, reason: impl Into<String>) -> Error {
    Error::Refused {
        path: path.into(),
        reason: reason.into(),
    }
}

fn names(directory: BorrowedFd<'_>, path: &str) -> Result<Vec<String>, Error> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut opened = Dir::openat(directory, ".", flags, Mode::empty()).map_err(read(path))?;
    let mut names = Vec::new();
    for entry in opened.iter() {
        let entry = entry.map_err(read(path))?;
        let name: &CStr = entry.file_name();
        match name.to_str() {
            Ok("." | "..") => {}
            Ok(name) => names.push(name.to_owned()),
            Err(_) => {
                let name = name.to_string_lossy();
                return Err(refused(&format!("{path}/{name}"), "its name is not text"));
            }
        }
        // A bound before the walk has counted.
        if names.len() > 2 * MAX_ENTRIES {
            return Err(refused(
                path,
                format!("it has more than {MAX_ENTRIES} names"),
            ));
        }
    }
    Ok(names)
}

fn status(directory: BorrowedFd<'_>, name: &str, path: &str) -> Result<FileStat, Error> {
    stat::fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(read(path))
}

fn kind(found: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT
}

fn word(kind: SFlag) -> &'static str {
    match kind {
        SFlag::S_IFREG => "a file beside the versions",
        SFlag::S_IFLNK => "a symbolic link in a version",
        SFlag::S_IFIFO => "a pipe",
        SFlag::S_IFSOCK => "a socket",
        _ => "a device",
    }
}
