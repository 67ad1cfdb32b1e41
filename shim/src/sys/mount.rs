//! Mounts by the descriptor-based interface (open_tree, mount_setattr, move_mount) and the list of what is mounted.
//!
//! A tree is cloned detached, given its propagation and attributes, and only then attached: at no moment is a copy of a
//! host mount in the host's peer group, so that nothing that happens to the copy can reach the original.
#![forbid(unsafe_code)]

use std::{
    collections::HashSet,
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
};

pub use linux::mount::Depth;
use linux::{
    descriptor,
    mount::{MountAttr, attr, mount_setattr, move_mount, open_tree},
};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, open},
    mount::{MntFlags, umount2},
    sys::stat::Mode,
};

use super::files::{Entry, c_path};

/// Words of mountinfo and the `MOUNT_ATTR_*` that they stand for (show_mnt_opts() of the kernel's fs/proc_namespace.c).
const ATTRIBUTES: [(&str, u64); 8] = [
    ("ro", attr::RDONLY),
    ("nosuid", attr::NOSUID),
    ("nodev", attr::NODEV),
    ("noexec", attr::NOEXEC),
    ("noatime", attr::NOATIME),
    ("nodiratime", attr::NODIRATIME),
    ("nosymfollow", attr::NOSYMFOLLOW),
    // Numerically zero; neither this nor noatime is strictatime.
    ("relatime", attr::RELATIME),
];

/// A copy of a mount that is attached nowhere and vanishes when dropped.
#[derive(Debug)]
pub struct DetachedTree(OwnedFd);

impl DetachedTree {
    /// Clones what `source` names; its last component is followed, as mount(2) with `MS_BIND` does.
    pub fn clone_of(source: &Path, depth: Depth) -> io::Result<DetachedTree> {
        Ok(DetachedTree(open_tree(AT_FDCWD, &c_path(source)?, depth)?))
    }

    /// Clones what is open.
    pub fn clone_of_open(source: BorrowedFd<'_>, depth: Depth) -> io::Result<DetachedTree> {
        Ok(DetachedTree(open_tree(source, c"", depth)?))
    }

    /// Sets the propagation type (`MS_PRIVATE`, `MS_SLAVE`) of every mount of the tree.
    pub fn set_propagation(&self, propagation: u64) -> io::Result<()> {
        let change = MountAttr {
            propagation,
            ..MountAttr::default()
        };
        Ok(mount_setattr(self.0.as_fd(), Depth::Whole, change)?)
    }

    /// Makes the tree read-only.
    pub fn set_read_only(&self, depth: Depth) -> io::Result<()> {
        self.set(depth, attr::RDONLY)
    }

    /// Makes every mount of the tree mere data to whoever on the host reaches it: device nodes do not open, programs do not
    /// execute, set-id bits mean nothing, symbolic links are not followed. A guest notices nothing: its own kernel opens
    /// devices, executes and follows.
    pub fn set_inert(&self) -> io::Result<()> {
        let inert = attr::NODEV | attr::NOSUID | attr::NOEXEC | attr::NOSYMFOLLOW;
        self.set(Depth::Whole, inert)
    }

    /// Makes every mount of the tree mere files: as [`DetachedTree::set_inert`], but links lead on.
    pub fn set_data(&self) -> io::Result<()> {
        self.set(Depth::Whole, attr::NODEV | attr::NOSUID | attr::NOEXEC)
    }

    /// For who attaches it in another mount namespace.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn set(&self, depth: Depth, set: u64) -> io::Result<()> {
        Ok(mount_setattr(
            self.0.as_fd(),
            depth,
            MountAttr::setting(set),
        )?)
    }

    /// Attaches the tree over `target`, of which no component may be a symbolic link.
    pub fn attach(&self, target: &Path) -> io::Result<()> {
        Ok(move_mount(self.0.as_fd(), open_target(target)?.as_fd())?)
    }
}

/// A file on a read-only mount of its own, which is attached nowhere.
///
/// A process that executes it, or is handed a descriptor of it, can reach the file by `/proc/self/exe` and `/proc/self/fd/N`,
/// whatever else was taken from it; a file of the host that such a process could open for writing would be the host's
/// (CVE-2019-5736). Through this mount every way ends in `EROFS`, and nobody can make the mount writable: it is in no mount
/// namespace.
#[derive(Debug)]
pub struct ReadOnlyFile(DetachedTree);

impl ReadOnlyFile {
    /// Takes the file that `path` names; symbolic links are followed.
    pub fn at(path: &Path) -> io::Result<ReadOnlyFile> {
        let tree = DetachedTree::clone_of(path, Depth::Top)?;
        tree.set_propagation(libc::MS_PRIVATE)?;
        tree.set(Depth::Top, attr::RDONLY | attr::NOSUID | attr::NODEV)?;
        Ok(ReadOnlyFile(tree))
    }

    /// Opens it for reading.
    pub fn open(&self) -> io::Result<fs::File> {
        fs::File::open(format!("/proc/self/fd/{}", self.0.0.as_raw_fd()))
    }

    /// For execveat(2) with `AT_EMPTY_PATH`.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}

/// Opens a mount point as `O_PATH` without following a symbolic link anywhere.
fn open_target(target: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(open(&Entry::open(target)?.path(), flags, Mode::empty())?)
}

/// Unmounts what is mounted exactly at `path`, now or never: not lazily, and never through a symbolic link.
/// `false`: nothing is mounted there.
pub fn unmount(path: &Path) -> io::Result<bool> {
    let entry = match Entry::open(path) {
        Ok(entry) => entry,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match umount2(&entry.path(), MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(true),
        // Not a mount point, or not there.
        Err(Errno::EINVAL | Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// A line of `/proc/self/mountinfo`, as proc_pid_mountinfo(5) names its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountLine {
    /// Of the mount; used again after it is gone.
    pub id: u64,
    /// Of the mount that it is mounted in.
    pub parent: u64,
    /// `major:minor` of the file system.
    pub device: String,
    /// What of the file system it shows.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// Options of the mount, not of its file system.
    pub options: String,
    /// Type of the file system.
    pub kind: String,
}

impl MountLine {
    /// Its options as `MOUNT_ATTR_*`.
    pub fn attributes(&self) -> u64 {
        let has = |word: &str| self.options.split(',').any(|option| option == word);
        let strict = match has("noatime") || has("relatime") {
            true => 0,
            false => attr::STRICTATIME,
        };
        let found = ATTRIBUTES.iter().filter(|(word, _)| has(word));
        found.fold(strict, |all, (_, attribute)| all | attribute)
    }
}

/// All mounts of this process' mount namespace, in the kernel's order.
pub fn mounts() -> io::Result<Vec<MountLine>> {
    let text = fs::read("/proc/self/mountinfo")?;
    let lines = text.split(|byte| *byte == b'\n');
    Ok(lines.filter_map(mount_line).collect())
}

fn mount_line(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut text = || Some(String::from_utf8_lossy(fields.next()?).into_owned());
    let (id, parent) = (text()?.parse().ok()?, text()?.parse().ok()?);
    let device = text()?;
    Some(MountLine {
        id,
        parent,
        device,
        root: unescape(fields.next()?),
        point: unescape(fields.next()?),
        options: String::from_utf8_lossy(fields.next()?).into_owned(),
        // Optional fields of any number end with a hyphen.
        kind: fields
            .skip_while(|field| *field != b"-")
            .nth(1)
            .map(|kind| String::from_utf8_lossy(kind).into_owned())?,
    })
}

/// The mounts that a recursive copy of `path`, which is in the mount `own`, takes along, each with its place beneath `path`.
pub fn taken_along<'a>(
    mounts: &'a [MountLine],
    own: &MountLine,
    path: &Path,
) -> Vec<(&'a Path, &'a MountLine)> {
    let mut taken = HashSet::from([own.id]);
    let mut found = Vec::new();
    // A mount is listed after its parent, unless it was moved: go on until there are no more.
    loop {
        let before = found.len();
        for line in mounts {
            let is_new = taken.contains(&line.parent) && !taken.contains(&line.id);
            if let Some(place) = line.point.strip_prefix(path).ok().filter(|_| is_new) {
                taken.insert(line.id);
                found.push((place, line));
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

/// The mount points at and beneath `top`, the one to unmount first in front.
pub fn mounts_beneath(top: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = mounts()?
        .into_iter()
        .map(|line| line.point)
        .filter(|path| path.starts_with(top))
        .collect();
    // Deepest first; among equals the one mounted last, which the stable sort of the reversed list keeps in front.
    found.reverse();
    found.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    Ok(found)
}

/// What statx(2) says of an open object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    /// Major and minor number of its device.
    pub device: (u32, u32),
    /// Its number there.
    pub inode: u64,
    /// Whether it is a directory.
    pub directory: bool,
    /// Whether it is a device node.
    pub is_device: bool,
    /// The mount that it was reached through, as [`MountLine::id`] has it.
    pub mount: u64,
}

/// Looks at an open object.
pub fn object(fd: BorrowedFd<'_>) -> io::Result<Object> {
    let mask = libc::STATX_BASIC_STATS | libc::STATX_MNT_ID;
    let found = descriptor::status(fd, mask)?;
    let kind = u32::from(found.stx_mode) & libc::S_IFMT;
    Ok(Object {
        device: (found.stx_dev_major, found.stx_dev_minor),
        inode: found.stx_ino,
        directory: kind == libc::S_IFDIR,
        is_device: [libc::S_IFCHR, libc::S_IFBLK].contains(&kind),
        mount: found.stx_mnt_id,
    })
}

/// proc(5): space, tab, newline and backslash stand as three octal digits after a backslash.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'\\' && tail.len() >= 3 && tail[..3].iter().all(|d| (b'0'..=b'7').contains(d)) {
            let digits = tail[..3]
                .iter()
                .fold(0u32, |n, d| n * 8 + u32::from(d - b'0'));
            bytes.push(digits as u8);
            rest = &tail[3..];
        } else {
            bytes.push(byte);
            rest = tail;
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_escapes_are_undone() {
        assert_eq!(unescape(b"/a\\040b\\134c"), PathBuf::from("/a b\\c"));
        assert_eq!(unescape(b"/plain\\9"), PathBuf::from("/plain\\9"));
    }

    #[test]
    fn options_are_attributes() {
        let attributes = |options| {
            let line = format!("20 1 0:20 / /mnt {options} - tmpfs tmpfs rw");
            mount_line(line.as_bytes()).unwrap().attributes()
        };
        assert_eq!(attributes("rw,relatime"), 0);
        assert_eq!(attributes("rw"), 0x20);
        assert_eq!(attributes("ro,nosuid,nodev,noexec,noatime"), 0x1f);
        assert_eq!(attributes("rw,nosymfollow,nodiratime,relatime"), 0x20_0080);
    }

    #[test]
    fn a_line_has_its_type_behind_its_optional_fields() {
        let kind = |text: &[u8]| mount_line(text).map(|line| line.kind);
        let plain = kind(b"22 1 0:21 / /proc rw,nosuid - proc proc rw");
        assert_eq!(plain.as_deref(), Some("proc"));
        let shared = kind(b"22 1 8:1 / / rw shared:1 master:2 - ext4 /dev/- rw");
        assert_eq!(shared.as_deref(), Some("ext4"));
        assert_eq!(kind(b"22 1 0:21 / /proc rw"), None);
    }

    #[test]
    fn the_root_is_a_mount_and_comes_last() {
        let mounts = mounts_beneath(Path::new("/")).unwrap();
        assert_eq!(mounts.last().unwrap(), Path::new("/"));
        assert!(mounts.iter().any(|path| path == Path::new("/proc")));
    }

    #[test]
    fn unmounting_what_is_no_mount_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        assert!(!unmount(&dir).unwrap());
        assert!(!unmount(&dir.join("absent/deeper")).unwrap());
    }
}
