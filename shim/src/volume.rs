//! When two sources of mounts are one volume, so that a pod's share has it once (docs/adr/0004).
//!
//! The guest's kernel keeps locks and mapped pages by superblock and inode, and each mount of the share is a superblock of its own
//! there. So sources that show the same files have to be one mount, and others must never be.

use std::{
    fs, io,
    os::fd::{AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

use crate::{
    oci::HostPropagation,
    sys::mount::{self, Depth, MountLine, Object},
};

/// What a copy of a source shows. Two that are equal at the time they are taken show the same files from then on, as long as one
/// of the copies exists: it keeps the directory and its file system, so that neither number can become another one's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The file system and the way to the source in it. It goes along with the inode because network file systems exist whose
    /// numbers are not unique.
    device: String,
    path: PathBuf,
    object: ((u32, u32), u64),
    /// Of the source's mount: a read-only or idmapped view is another one.
    options: String,
    beneath: Beneath,
}

/// What of the mounts beneath the source belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Beneath {
    /// These: later ones do not appear. Of each its place, file system, part of it, and options.
    Fixed(Vec<(PathBuf, String, PathBuf, String)>),
    /// Those that the host has and will have beneath this mount.
    Follows(u64, Depth),
}

impl Identity {
    /// Looks at an open source, which is at `path` among `mounts`.
    pub fn of(
        path: &Path,
        mounts: &[MountLine],
        found: &Object,
        depth: Depth,
        propagation: HostPropagation,
    ) -> Identity {
        let object = (found.device, found.inode);
        let Some(own) = mounts.iter().find(|line| line.id == found.mount) else {
            // A chroot(2) hides what is above it: then only its own mount is known to be the same.
            return Identity {
                device: String::new(),
                path: path.into(),
                object,
                options: String::new(),
                beneath: Beneath::Follows(found.mount, depth),
            };
        };
        // An idmapped view of a directory differs from another one in what no list tells.
        let follows = propagation == HostPropagation::Slave || is_idmapped(own);
        let beneath = match (follows, depth) {
            (true, _) => Beneath::Follows(found.mount, depth),
            (false, Depth::Top) => Beneath::Fixed(Vec::new()),
            (false, Depth::Whole) => fixed(mounts, own, path),
        };
        let inside = path.strip_prefix(&own.point).unwrap_or(path);
        Identity {
            device: own.device.clone(),
            path: own.root.join(inside),
            object,
            options: own.options.clone(),
            beneath,
        }
    }
}

/// Where an open object is.
pub fn place(object: BorrowedFd<'_>) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd()))
}

fn is_idmapped(line: &MountLine) -> bool {
    line.options.split(',').any(|option| option == "idmapped")
}

/// What of the mounts beneath `path`, which is in the mount `own`, a recursive copy shows.
fn fixed(mounts: &[MountLine], own: &MountLine, path: &Path) -> Beneath {
    let nested = mount::taken_along(mounts, own, path);
    if nested.iter().any(|(_, line)| is_idmapped(line)) {
        return Beneath::Follows(own.id, Depth::Whole);
    }
    let one = |(place, line): (&Path, &MountLine)| {
        let (device, options) = (line.device.clone(), line.options.clone());
        (place.into(), device, line.root.clone(), options)
    };
    let mut beneath: Vec<_> = nested.into_iter().map(one).collect();
    beneath.sort();
    Beneath::Fixed(beneath)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn identity(path: &Path, depth: Depth) -> Identity {
        let file = fs::File::open(path).unwrap();
        let found = mount::object(file.as_fd()).unwrap();
        let (path, mounts) = (place(file.as_fd()).unwrap(), mount::mounts().unwrap());
        Identity::of(&path, &mounts, &found, depth, HostPropagation::Private)
    }

    fn line(id: u64, parent: u64, point: &str, options: &str) -> MountLine {
        MountLine {
            id,
            parent,
            device: format!("0:{id}"),
            root: "/".into(),
            point: point.into(),
            options: options.into(),
            kind: "tmpfs".into(),
        }
    }

    #[test]
    fn one_directory_by_two_names_is_one_and_two_directories_are_two() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        fs::create_dir(&one).unwrap();
        fs::create_dir(&two).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&one, &link).unwrap();
        assert_eq!(identity(&one, Depth::Top), identity(&link, Depth::Whole));
        assert_ne!(identity(&one, Depth::Top), identity(&two, Depth::Top));
        assert_ne!(identity(dir.path(), Depth::Top), identity(&one, Depth::Top));
    }

    #[test]
    fn what_is_mounted_beneath_counts_and_what_is_mounted_beside_does_not() {
        let own = line(20, 1, "/data", "rw");
        let mut mounts = vec![line(1, 0, "/", "rw"), own.clone()];
        let path = Path::new("/data/volume");
        let none = fixed(&mounts, &own, path);
        assert_eq!(none, Beneath::Fixed(Vec::new()));
        mounts.push(line(21, 20, "/data/volumes", "rw"));
        mounts.push(line(22, 1, "/data/volume/not-in-this-mount", "rw"));
        assert_eq!(fixed(&mounts, &own, path), none);
        mounts.push(line(24, 23, "/data/volume/a/b", "rw"));
        mounts.push(line(23, 20, "/data/volume/a", "ro"));
        let Beneath::Fixed(found) = fixed(&mounts, &own, path) else {
            panic!("a list")
        };
        let places: Vec<&Path> = found.iter().map(|(place, ..)| place.as_path()).collect();
        assert_eq!(places, [Path::new("a"), Path::new("a/b")]);
        mounts.push(line(25, 23, "/data/volume/a/c", "rw,idmapped"));
        assert_eq!(
            fixed(&mounts, &own, path),
            Beneath::Follows(20, Depth::Whole)
        );
    }
}
