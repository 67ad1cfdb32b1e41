//! File systems that are no files but the host's kernel: the fs process must never serve one.

use std::{
    io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{self, FsType, fstatfs};

use crate::sys::mount::{MountLine, Object, taken_along};

/// By magic number and by the name that mountinfo has.
const HOST_INTERFACES: &[(FsType, &str)] = &[
    (statfs::PROC_SUPER_MAGIC, "proc"),
    (statfs::SYSFS_MAGIC, "sysfs"),
    (statfs::CGROUP_SUPER_MAGIC, "cgroup"),
    (statfs::CGROUP2_SUPER_MAGIC, "cgroup2"),
    (statfs::DEBUGFS_MAGIC, "debugfs"),
    (statfs::TRACEFS_MAGIC, "tracefs"),
    (statfs::SECURITYFS_MAGIC, "securityfs"),
    (statfs::BPF_FS_MAGIC, "bpf"),
    // linux/magic.h, and those that live in their own sources.
    (FsType(0xf97c_ff8c), "selinuxfs"),
    (FsType(0x4341_5d53), "smackfs"),
    (FsType(0x6265_6570), "configfs"),
    (FsType(0x6165_676c), "pstore"),
    (FsType(0xde5e_81e4), "efivarfs"),
    (FsType(0x4249_4e4d), "binfmt_misc"),
    (FsType(0x0765_5821), "resctrl"),
    (FsType(0x6e66_7364), "nfsd"),
];

/// The interface that an open object is part of.
pub fn of_open(fd: BorrowedFd<'_>) -> io::Result<Option<&'static str>> {
    Ok(name(fstatfs(fd)?.filesystem_type()))
}

/// The interface that a path leads to now.
pub(super) fn of_path(path: &Path) -> io::Result<Option<&'static str>> {
    Ok(name(statfs::statfs(path)?.filesystem_type()))
}

fn name(kind: FsType) -> Option<&'static str> {
    let mut all = HOST_INTERFACES.iter();
    all.find(|(magic, _)| *magic == kind).map(|(_, name)| *name)
}

/// The first one that a recursive copy of `path`, found in the list as `found`, would take along, and its place beneath `path`.
pub fn taken_along_with(
    mounts: &[MountLine],
    found: &Object,
    path: &Path,
) -> Option<(PathBuf, &'static str)> {
    let own = mounts.iter().find(|line| line.id == found.mount)?;
    let nested = taken_along(mounts, own, path);
    let mut interfaces = nested.into_iter().filter_map(|(place, line)| {
        let mut all = HOST_INTERFACES.iter();
        let (_, name) = all.find(|(_, name)| *name == line.kind)?;
        Some((place.to_path_buf(), *name))
    });
    interfaces.next()
}
