//! The last step: what must not be written or seen any more.

use std::os::fd::AsFd;
use std::path::Path;

use bulkhead_agent_protocol::agent::{Container, Mount};
use nix::errno::Errno;
use nix::libc::{MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY};
use nix::sys::stat::SFlag;

use super::{MountError, Prepared, filesystem};
use crate::stage::paths;
use linux::mount::{Depth, MountAttr, attr, mount_setattr, move_mount, open_tree};

pub(super) fn seal(prepared: Prepared, spec: &Container) -> Result<(), MountError> {
    let readonly = MountAttr {
        set: attr::RDONLY,
        ..MountAttr::default()
    };
    for mount in prepared.attached.iter().filter(|m| m.readonly_later) {
        mount_setattr(mount.mount.as_fd(), Depth::Top, readonly)
            .map_err(|e| MountError::path(&mount.destination, "making the mount read-only", e))?;
    }
    if spec.root_readonly {
        mount_setattr(prepared.root.as_fd(), Depth::Top, readonly)
            .map_err(|e| MountError::root(&prepared.name, "making it read-only", e))?;
    }
    for path in &spec.readonly_paths {
        make_readonly(&prepared, path)?;
    }
    let mut nulls = prepared.nulls.iter();
    for path in &spec.masked_paths {
        // One was made for each path: `Sources` checks the count.
        if let Some(null) = nulls.next() {
            mask(&prepared, path, null)?;
        }
    }
    Ok(())
}

/// The file at `path`, or nothing when it does not exist: a kernel need not have every file of the usual lists.
fn find(prepared: &Prepared, path: &str) -> Result<Option<std::os::fd::OwnedFd>, MountError> {
    match prepared.root.resolve(Path::new(path)) {
        Ok(file) => Ok(Some(file)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(errno) => Err(MountError::path(path, "resolving the path", errno)),
    }
}

fn make_readonly(prepared: &Prepared, path: &str) -> Result<(), MountError> {
    let Some(file) = find(prepared, path)? else {
        return Ok(());
    };
    let fail = |action| move |errno| MountError::path(path, action, errno);
    let tree = open_tree(file.as_fd(), c"", Depth::Whole).map_err(fail("copy of its mount"))?;
    let change = MountAttr {
        set: attr::RDONLY,
        ..MountAttr::default()
    };
    mount_setattr(tree.as_fd(), Depth::Whole, change).map_err(fail("making it read-only"))?;
    move_mount(tree.as_fd(), file.as_fd()).map_err(fail("attaching it read-only"))
}

/// A file becomes the null device, a directory an empty read-only one.
fn mask(prepared: &Prepared, path: &str, null: &impl AsFd) -> Result<(), MountError> {
    let Some(file) = find(prepared, path)? else {
        return Ok(());
    };
    let fail = |action| move |errno| MountError::path(path, action, errno);
    if paths::kind(&file).map_err(fail("fstat"))? != SFlag::S_IFDIR {
        return move_mount(null.as_fd(), file.as_fd()).map_err(fail("masking"));
    }
    let empty = Mount {
        fstype: "tmpfs".to_owned(),
        source: "tmpfs".to_owned(),
        flags: MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC,
        data: "size=4096,nr_inodes=1".to_owned(),
        ..Mount::default()
    };
    let tree = filesystem::create(&empty, Some(0o755), false)
        .map_err(|e| MountError::path(path, "creation of an empty directory", e.errno))?;
    move_mount(tree.as_fd(), file.as_fd()).map_err(fail("masking"))
}
