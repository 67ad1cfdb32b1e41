//! When two sources of mounts are one volume, so that a pod's share has it once (docs/adr/0004).
//!
//! The guest's kernel keeps locks and mapped pages by superblock and inode, and each mount of the share is a superblock of its own
//! there. So sources that show the same files have to be one mount, and others must never be.

use std::{
    collections::HashSet,
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

/// The mounts that a source consists of, as they are now. A copy of it takes them along.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// `MOUNT_ATTR_*` of the source's own mount.
    pub attributes: u64,
    /// Those beneath that can be seen, a mount before those in it. None where they are not copied.
    pub beneath: Vec<Submount>,
}

/// A mount beneath a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submount {
    /// Where, relative to the source.
    pub place: PathBuf,
    /// Its `MOUNT_ATTR_*`.
    pub attributes: u64,
}

/// Looks at an open source, which is at `path` among `mounts`.
pub fn look(
    path: &Path,
    mounts: &[MountLine],
    found: &Object,
    depth: Depth,
    propagation: HostPropagation,
) -> (Identity, Layout) {
    let object = (found.device, found.inode);
    let Some(own) = mounts.iter().find(|line| line.id == found.mount) else {
        // A chroot(2) hides what is above it: then only its own mount is known to be the same.
        let identity = Identity {
            device: String::new(),
            path: path.into(),
            object,
            options: String::new(),
            beneath: Beneath::Follows(found.mount, depth),
        };
        return (identity, Layout::default());
    };
    let taken = match depth {
        Depth::Top => Vec::new(),
        Depth::Whole => mount::taken_along(mounts, own, path),
    };
    // An idmapped view of a directory differs from another one in what no list tells.
    let mut all = taken.iter().map(|(_, line)| *line).chain([own]);
    let follows = propagation == HostPropagation::Slave || all.any(is_idmapped);
    let beneath = match follows {
        true => Beneath::Follows(found.mount, depth),
        false => fixed(&taken),
    };
    let inside = path.strip_prefix(&own.point).unwrap_or(path);
    let identity = Identity {
        device: own.device.clone(),
        path: own.root.join(inside),
        object,
        options: own.options.clone(),
        beneath,
    };
    let layout = Layout {
        attributes: own.attributes(),
        beneath: visible(&taken, own),
    };
    (identity, layout)
}

/// Where an open object is.
pub fn place(object: BorrowedFd<'_>) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd()))
}

fn is_idmapped(line: &MountLine) -> bool {
    line.options.split(',').any(|option| option == "idmapped")
}

fn fixed(taken: &[(&Path, &MountLine)]) -> Beneath {
    let describe = |(place, line): &(&Path, &MountLine)| {
        let (device, options) = (line.device.clone(), line.options.clone());
        (place.to_path_buf(), device, line.root.clone(), options)
    };
    let mut beneath: Vec<_> = taken.iter().map(describe).collect();
    beneath.sort();
    Beneath::Fixed(beneath)
}

/// Those of `taken` that a walk through the source meets.
fn visible(taken: &[(&Path, &MountLine)], own: &MountLine) -> Vec<Submount> {
    let is_parent_of = |id: u64| move |(_, line): &&(&Path, &MountLine)| line.parent == id;
    let mut reached = HashSet::from([own.id]);
    let mut found = Vec::new();
    for (place, line) in taken {
        // Another mount in the same one, on a directory on the way, hides it.
        let mut beside = taken.iter().filter(is_parent_of(line.parent));
        let hidden = beside.any(|(_, m)| m.id != line.id && line.point.starts_with(&m.point));
        if hidden || !reached.contains(&line.parent) {
            continue;
        }
        reached.insert(line.id);
        // A mount in it, on its own root, stands in its place.
        let mut inside = taken.iter().filter(is_parent_of(line.id));
        if inside.all(|(_, m)| m.point != line.point) {
            found.push(Submount {
                place: place.to_path_buf(),
                attributes: line.attributes(),
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn identity(path: &Path, depth: Depth) -> Identity {
        let file = fs::File::open(path).unwrap();
        let found = mount::object(file.as_fd()).unwrap();
        let (path, mounts) = (place(file.as_fd()).unwrap(), mount::mounts().unwrap());
        look(&path, &mounts, &found, depth, HostPropagation::Private).0
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
        let fixed = |mounts: &[MountLine]| fixed(&mount::taken_along(mounts, &own, path));
        assert_eq!(fixed(&mounts), Beneath::Fixed(Vec::new()));
        mounts.push(line(21, 20, "/data/volumes", "rw"));
        mounts.push(line(22, 1, "/data/volume/not-in-this-mount", "rw"));
        assert_eq!(fixed(&mounts), Beneath::Fixed(Vec::new()));
        mounts.push(line(24, 23, "/data/volume/a/b", "rw"));
        mounts.push(line(23, 20, "/data/volume/a", "ro"));
        let Beneath::Fixed(found) = fixed(&mounts) else {
            panic!("a list")
        };
        let places: Vec<&Path> = found.iter().map(|(place, ..)| place.as_path()).collect();
        assert_eq!(places, [Path::new("a"), Path::new("a/b")]);
    }

    #[test]
    fn a_walk_meets_what_nothing_else_covers() {
        let own = line(20, 1, "/v", "rw,relatime");
        let places = |mounts: &[MountLine]| -> Vec<(String, u64)> {
            let found = visible(&mount::taken_along(mounts, &own, Path::new("/v")), &own);
            let mut found: Vec<_> = found
                .iter()
                .map(|submount| {
                    let place = submount.place.to_str().expect("text");
                    (place.to_owned(), submount.attributes)
                })
                .collect();
            found.sort();
            found
        };
        let seen = |place: &str, attributes| (place.to_owned(), attributes);
        let mut mounts = vec![
            own.clone(),
            line(21, 20, "/v/a", "ro,relatime"),
            line(22, 21, "/v/a/b", "rw,nosuid,noatime"),
            line(23, 20, "/v/c/d", "rw,relatime"),
        ];
        let (a, b, d) = (seen("a", 1), seen("a/b", 0x12), seen("c/d", 0));
        assert_eq!(places(&mounts), [a, b, d.clone()]);
        // Over a mount: its own mounts go with it.
        mounts.push(line(24, 21, "/v/a", "rw,noexec,relatime"));
        assert_eq!(places(&mounts), [seen("a", 8), d]);
        // Over a directory on the way, and then beneath that one.
        mounts.push(line(25, 20, "/v/c", "rw,relatime"));
        mounts.push(line(26, 25, "/v/c/d", "rw,nodev,relatime"));
        assert_eq!(
            places(&mounts),
            [seen("a", 8), seen("c", 0), seen("c/d", 4)]
        );
    }
}
