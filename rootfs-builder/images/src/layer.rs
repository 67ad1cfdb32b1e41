//! One layer over what is there (OCI layer.md#applying-changesets).
//!
//! The kernel resolves each path within the root ([`open_in_root`]): a link of the
//! image, `..` or an absolute one, cannot lead out of it, and names are made and removed in the
//! directory that was found.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{CString, OsStr, OsString},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use linux::path::open_in_root;
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat},
    sys::{
        stat::{
            FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, fstatat, makedev, mkdirat,
            mknodat, utimensat,
        },
        time::TimeSpec,
    },
    unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat},
};
use tar::{Entry, EntryType};

use super::{
    Error,
    entries::{Extensions, Meta},
    source::plain,
    tree,
};

/// What stands before the name of what a layer takes away (OCI layer.md#whiteouts).
const WHITEOUT: &[u8] = b".wh.";
/// A directory whose lower contents do not show.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A root that layers are unpacked to.
pub(crate) struct Root {
    directory: OwnedFd,
}

/// A directory that was found, and a name in it.
struct Place {
    parent: OwnedFd,
    name: OsString,
}

impl Place {
    fn parent(&self) -> BorrowedFd<'_> {
        self.parent.as_fd()
    }

    fn name(&self) -> &OsStr {
        &self.name
    }

    fn kind(&self) -> io::Result<Option<SFlag>> {
        match fstatat(self.parent(), self.name(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Some(
                SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT,
            )),
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes what has this name, with all that is in it.
    fn clear(&self) -> io::Result<()> {
        match self.kind()? {
            None => Ok(()),
            Some(SFlag::S_IFDIR) => {
                let parent = format!("/proc/self/fd/{}", self.parent.as_raw_fd());
                tree::remove(&Path::new(&parent).join(&self.name))
            }
            Some(_) => {
                let done = unlinkat(self.parent(), self.name(), UnlinkatFlags::NoRemoveDir);
                Ok(done?)
            }
        }
    }
}

impl Root {
    /// Of a directory that nobody else writes to.
    pub(crate) fn at(path: &Path) -> io::Result<Root> {
        Ok(Root {
            directory: File::open(path)?.into(),
        })
    }

    /// Unpacks one layer; how many bytes its files have.
    pub(crate) fn apply(&self, number: usize, from: impl Read) -> Result<u64, Error> {
        let failed = |entry: &Path| {
            let entry = entry.to_string_lossy().into_owned();
            move |source| Error::Entry {
                layer: number,
                entry,
                source,
            }
        };
        let mut archive = tar::Archive::new(from);
        let (mut seen, mut directories) = (BTreeSet::new(), BTreeMap::new());
        let mut before = Extensions::default();
        let (mut last, mut bytes) = (PathBuf::from("its start"), 0_u64);
        for entry in archive.entries().map_err(failed(&last))?.raw(true) {
            let mut entry = entry.map_err(failed(&last))?;
            if before.take(&mut entry).map_err(failed(&last))? {
                continue;
            }
            let meta = std::mem::take(&mut before).finish(&entry);
            let meta = meta.map_err(failed(&last))?;
            bytes = bytes.saturating_add(entry.size());
            self.unpack(&mut entry, &meta, &mut seen, &mut directories)
                .map_err(failed(&meta.path))?;
            last = meta.path;
        }
        // When nothing more is made in them.
        for (path, at) in directories.into_iter().rev() {
            self.stamp(&path, at).map_err(failed(&path))?;
        }
        Ok(bytes)
    }

    fn unpack<R: Read>(
        &self,
        entry: &mut Entry<'_, R>,
        meta: &Meta,
        seen: &mut BTreeSet<PathBuf>,
        directories: &mut BTreeMap<PathBuf, TimeSpec>,
    ) -> io::Result<()> {
        let path = plain(&meta.path).ok_or_else(|| io::Error::other("its path goes up"))?;
        let mode = Mode::from_bits_truncate(entry.header().mode()? & 0o7777);
        let Some(place) = self.place(&path, true)? else {
            // The root itself.
            return self.complete(meta, mode, None);
        };
        if let Some(hidden) = place.name().as_bytes().strip_prefix(WHITEOUT) {
            return match place.name().as_bytes() == OPAQUE {
                true => self.make_opaque(path.parent().unwrap_or(Path::new("")), seen),
                false => whiteout(&place, hidden),
            };
        }
        let is_directory = place.kind()? == Some(SFlag::S_IFDIR);
        if meta.kind == EntryType::Directory {
            directories.insert(path.clone(), meta.mtime);
        }
        if meta.kind != EntryType::Directory || !is_directory {
            place.clear()?;
            self.make_entry(entry, meta, &place)?;
        }
        // Owner and mode of a hard link are its target's.
        if meta.kind != EntryType::Link {
            self.complete(meta, mode, Some(&place))?;
        }
        seen.insert(path);
        Ok(())
    }

    /// Makes what an entry is, where nothing is.
    fn make_entry<R: Read>(
        &self,
        entry: &mut Entry<'_, R>,
        meta: &Meta,
        place: &Place,
    ) -> io::Result<()> {
        let link = || {
            let link = meta.link.as_deref();
            link.ok_or_else(|| io::Error::other("it is a link to nothing"))
        };
        match meta.kind {
            EntryType::Directory => mkdirat(place.parent(), place.name(), Mode::S_IRWXU)?,
            EntryType::Regular | EntryType::Continuous => {
                let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
                let mode = Mode::S_IRUSR | Mode::S_IWUSR;
                let file = openat(place.parent(), place.name(), flags | OFlag::O_CLOEXEC, mode)?;
                io::copy(entry, &mut File::from(file))?;
            }
            EntryType::Symlink => symlinkat(link()?, place.parent(), place.name())?,
            EntryType::Link => {
                let to = plain(link()?).ok_or_else(|| io::Error::other("its target goes up"))?;
                let other = self.place(&to, false)?;
                let other = other.ok_or_else(|| io::Error::other("its target is the root"))?;
                linkat(
                    other.parent(),
                    other.name(),
                    place.parent(),
                    place.name(),
                    LinkatFlags::empty(),
                )?;
            }
            EntryType::Fifo => {
                mknodat(
                    place.parent(),
                    place.name(),
                    SFlag::S_IFIFO,
                    Mode::empty(),
                    0,
                )?;
            }
            kind @ (EntryType::Char | EntryType::Block) => {
                let header = entry.header();
                let kind = match kind {
                    EntryType::Char => SFlag::S_IFCHR,
                    _ => SFlag::S_IFBLK,
                };
                let major = header.device_major()?.unwrap_or(0);
                let minor = header.device_minor()?.unwrap_or(0);
                let device = makedev(major.into(), minor.into());
                mknodat(place.parent(), place.name(), kind, Mode::empty(), device)?;
            }
            other => {
                let text = format!("it is of the kind {other:?}, which no layer has");
                return Err(io::Error::other(text));
            }
        }
        Ok(())
    }

    /// Owner, attributes, mode and time, in this order: a new owner takes set-id bits and
    /// capabilities away. `None`: of the root.
    fn complete(&self, meta: &Meta, mode: Mode, place: Option<&Place>) -> io::Result<()> {
        let (parent, name) = match place {
            Some(place) => (place.parent(), place.name()),
            None => (self.directory.as_fd(), OsStr::new(".")),
        };
        let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
        let flag = AtFlags::AT_SYMLINK_NOFOLLOW;
        fchownat(parent, name, Some(uid), Some(gid), flag)?;
        if matches!(meta.kind, EntryType::Regular | EntryType::Directory) {
            for (key, value) in &meta.attributes {
                set_attribute((parent, name), key, value)?;
            }
        }
        if meta.kind != EntryType::Symlink {
            // What was made here is no link that could be followed.
            fchmodat(parent, name, mode, FchmodatFlags::FollowSymlink)?;
        }
        let (at, flag) = (meta.mtime, UtimensatFlags::NoFollowSymlink);
        Ok(utimensat(parent, name, &at, &at, flag)?)
    }

    fn stamp(&self, path: &Path, at: TimeSpec) -> io::Result<()> {
        let stamped = self.place(path, false).and_then(|place| {
            let Some(place) = place else { return Ok(()) };
            let flag = UtimensatFlags::NoFollowSymlink;
            Ok(utimensat(place.parent(), place.name(), &at, &at, flag)?)
        });
        match stamped.as_ref().map_err(io::Error::raw_os_error) {
            // A later entry of the layer has taken its place.
            Err(Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => Ok(()),
            _ => stamped,
        }
    }

    /// The directory of a path, made if wanted, and its last name; `None`: it is the root.
    fn place(&self, path: &Path, make: bool) -> io::Result<Option<Place>> {
        let Some(name) = path.file_name() else {
            return Ok(None);
        };
        let up = path.parent().unwrap_or(Path::new(""));
        let parent = match self.open(up) {
            Err(Errno::ENOENT) if make => {
                self.make(up)?;
                self.open(up)
            }
            other => other,
        };
        let name = name.to_owned();
        let parent = parent?;
        Ok(Some(Place { parent, name }))
    }

    fn open(&self, path: &Path) -> nix::Result<OwnedFd> {
        let path = match path.as_os_str().is_empty() {
            true => Path::new("."),
            false => path,
        };
        open_in_root(
            self.directory.as_fd(),
            path,
            OFlag::O_PATH | OFlag::O_DIRECTORY,
        )
    }

    /// Directories that the layer has no entries for.
    fn make(&self, path: &Path) -> io::Result<()> {
        let mut at = PathBuf::new();
        for name in path {
            let parent = self.open(&at)?;
            at.push(name);
            if matches!(self.open(&at), Err(Errno::ENOENT)) {
                let mode = Mode::from_bits_truncate(0o755);
                mkdirat(parent.as_fd(), name, mode)?;
                fchmodat(parent.as_fd(), name, mode, FchmodatFlags::FollowSymlink)?;
            }
        }
        Ok(())
    }

    /// Takes away what lower layers have in a directory, and in those of this layer beneath it.
    fn make_opaque(&self, path: &Path, seen: &BTreeSet<PathBuf>) -> io::Result<()> {
        let mut left = vec![path.to_path_buf()];
        while let Some(path) = left.pop() {
            let directory = self.open(&path)?;
            let listed = format!("/proc/self/fd/{}", directory.as_raw_fd());
            for child in std::fs::read_dir(listed)? {
                let (child, parent) = (child?, directory.try_clone()?);
                let (name, own) = (child.file_name(), path.join(child.file_name()));
                // What is beneath a path follows it.
                let first = seen.range(own.clone()..).next();
                if !first.is_some_and(|first| first.starts_with(&own)) {
                    Place { parent, name }.clear()?;
                } else if child.file_type()?.is_dir() {
                    left.push(own);
                }
            }
        }
        Ok(())
    }

    /// Writes all of it to its disk.
    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(nix::unistd::syncfs(&self.directory)?)
    }
}

fn whiteout(place: &Place, hidden: &[u8]) -> io::Result<()> {
    // `.wh..wh.*` are aufs' own, of old images.
    if hidden.starts_with(WHITEOUT) {
        return Ok(());
    }
    if matches!(hidden, b"" | b"." | b"..") {
        return Err(io::Error::other("it takes away what is no name"));
    }
    let (parent, name) = (place.parent.try_clone()?, OsStr::from_bytes(hidden).into());
    Place { parent, name }.clear()
}

/// Those that mean the same on every host: not the label of another one's policy, and not what
/// overlayfs itself believes (`trusted.overlay.*`).
fn set_attribute(
    (parent, name): (BorrowedFd<'_>, &OsStr),
    key: &CString,
    value: &[u8],
) -> io::Result<()> {
    let is_users = key.as_bytes().starts_with(b"user.");
    if !is_users && key.as_bytes() != b"security.capability" {
        return Ok(());
    }
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = openat(parent, name, flags, Mode::empty())?;
    match linux::descriptor::set_attribute(file.as_fd(), key, value) {
        // The disk has none, as engines have it.
        Err(Errno::EOPNOTSUPP) if is_users => Ok(()),
        done => Ok(done?),
    }
}
