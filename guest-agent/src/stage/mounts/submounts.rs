//! Mounts of the host beneath a source, in the agent's own mount namespace (see `share`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{self, OFlag, OpenHow, ResolveFlag};

use crate::stage::paths;
use linux::mount::{Depth, MountAttr, attr, is_mount_root, mount_setattr, move_mount, open_tree};

/// Goes to the mount at `path` beneath `top` and gives it `attributes`, whatever it took over from the mount that it is in.
///
/// The kernel mounts a directory when it is gone to. A file never gets a mount of its own that way: it is bound over itself. A directory that
/// turns out to be no mount is left as it is: the host has unmounted it.
pub(crate) fn enter(top: BorrowedFd, path: &Path, attributes: u64) -> Result<(), Errno> {
    let found = open(top, path)?;
    let directory = paths::kind(&found)? == nix::sys::stat::SFlag::S_IFDIR;
    let change = MountAttr {
        set: attributes & attr::OF_MOUNTS,
        clear: attr::OF_MOUNTS,
        ..MountAttr::default()
    };
    match (is_mount_root(found.as_fd())?, directory) {
        (true, _) => mount_setattr(found.as_fd(), Depth::Top, change),
        (false, true) => Ok(()),
        (false, false) => {
            let mount = open_tree(found.as_fd(), c"", Depth::Top)?;
            mount_setattr(mount.as_fd(), Depth::Top, change)?;
            move_mount(mount.as_fd(), found.as_fd())
        }
    }
}

/// Without following links: in a volume they are the tenants'.
fn open(top: BorrowedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let open = |kind| {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | kind)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        fcntl::openat2(top, path, how)
    };
    // With O_DIRECTORY the last component is mounted too, as in open_guest_path().
    match open(OFlag::O_DIRECTORY) {
        Err(Errno::ENOTDIR) => open(OFlag::empty()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use nix::mount::{MsFlags, mount};

    use super::super::testing::in_mount_namespace;
    use super::*;

    /// The flags of each mount at `path`.
    fn mounted(path: &Path) -> Vec<String> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let fields = mounts.lines().map(|line| line.split(' ').skip(4));
        fields
            .filter_map(|mut fields| {
                let at_path = fields.next() == path.to_str();
                at_path.then(|| fields.next().expect("flags").to_owned())
            })
            .collect()
    }

    fn flags(path: &Path) -> String {
        mounted(path).pop().unwrap_or_default()
    }

    #[test]
    fn each_mount_gets_its_own_flags_and_a_file_becomes_one() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        in_mount_namespace(|| {
            fs::create_dir_all(top.join("inner")).unwrap();
            fs::create_dir(top.join("plain")).unwrap();
            fs::write(top.join("file"), "").unwrap();
            symlink("inner", top.join("link")).unwrap();
            // What it took over from the mount that it is in.
            let taken_over = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NOATIME;
            let inner = top.join("inner");
            mount(Some("x"), &inner, Some("tmpfs"), taken_over, None::<&str>).unwrap();
            let opened = fs::File::open(&top).unwrap();
            let enter = |path: &str, attributes| enter(opened.as_fd(), Path::new(path), attributes);
            enter("inner", attr::NOEXEC | attr::NODEV).unwrap();
            assert_eq!(flags(&inner), "rw,nodev,noexec,relatime");
            enter("file", attr::RDONLY | attr::NOATIME).unwrap();
            assert_eq!(flags(&top.join("file")), "ro,noatime");
            // Again, for the next container: nothing is stacked.
            enter("file", 0).unwrap();
            assert_eq!(flags(&top.join("file")), "rw,relatime");
            assert_eq!(mounted(&top.join("file")).len(), 1);
            // The host has unmounted it meanwhile.
            enter("plain", attr::RDONLY).unwrap();
            assert_eq!(flags(&top.join("plain")), "");
            assert_eq!(enter("gone", 0), Err(Errno::ENOENT));
            assert_eq!(enter("file/x", 0), Err(Errno::ENOTDIR));
            assert_eq!(enter("link", 0), Err(Errno::ELOOP));
            assert_eq!(enter("../x", 0), Err(Errno::EXDEV));
            assert_eq!(enter("/etc", 0), Err(Errno::EXDEV));
            String::new()
        });
    }
}
