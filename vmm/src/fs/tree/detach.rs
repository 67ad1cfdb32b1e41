//! Letting go of a tree, so that the host can unmount it while the guest still holds files of it open.
//!
//! A descriptor of any kind keeps its mount busy. A detach waits for the requests under way, closes every inode and handle in
//! the tree, and closes the mounts in it to look-ups, so that the guest cannot come back before the host has unmounted.
//!
//! A look-up that comes in between finds the mount before it is refused, and keeps it busy for that moment: the host's unmount
//! may have to be tried again, as the shim does.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use thiserror::Error;

use super::identity::Worker;
use super::inodes::Inode;
use super::{Engine, sys};

/// Why a detach could not be done.
#[derive(Debug, Error)]
pub enum DetachError {
    /// The tree is not named as the contract says.
    #[error("tree {0:?} is not a relative path of plain components")]
    BadTree(String),
    /// The mounts are not known.
    #[error("cannot read /proc/self/mountinfo")]
    Mounts(#[source] std::io::Error),
    /// The share has no path.
    #[error("cannot find the share's own path")]
    Share(#[source] Errno),
}

/// What a detach closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Detached {
    /// Inodes.
    pub inodes: u64,
    /// Files and directories that were open.
    pub handles: u64,
}

struct MountLine {
    id: u64,
    point: PathBuf,
}

/// What of the table goes: whole mounts, and the part of one mount that lies in the tree.
struct Leaving {
    mounts: HashMap<u64, u64>,
    around: HashMap<u64, u64>,
    tree: PathBuf,
}

impl Leaving {
    fn has(&self, worker: &Worker, inode: &Inode) -> bool {
        if self.mounts.contains_key(&inode.key.mount) {
            return true;
        }
        // A removed file's path ends in " (deleted)", which changes nothing about what it begins with.
        self.around.contains_key(&inode.key.mount)
            && sys::path_of(&worker.name(inode.as_fd()))
                .is_ok_and(|path| Path::new(OsStr::from_bytes(&path)).starts_with(&self.tree))
    }
}

impl Engine {
    /// Closes everything at and beneath `tree`, a path relative to the share.
    ///
    /// # Errors
    /// The tree is badly named, or the mounts cannot be listed. That it does not exist is no error.
    pub fn detach(&self, worker: &Worker, tree: &str) -> Result<Detached, DetachError> {
        let plain = |component| matches!(component, Component::Normal(_));
        if tree.is_empty() || !Path::new(tree).components().all(plain) {
            return Err(DetachError::BadTree(tree.to_owned()));
        }
        let root = sys::path_of(&worker.name(self.root.as_fd())).map_err(DetachError::Share)?;
        let tree = Path::new(OsStr::from_bytes(&root)).join(tree);
        // Alone: requests under way end first, new ones wait.
        let _alone = self.gate.write().expect("no request panics");
        let mounts = mount_lines()?;
        let (within, rest): (Vec<MountLine>, Vec<MountLine>) = mounts
            .into_iter()
            .partition(|mount| mount.point.starts_with(&tree));
        let is_mounted = within.iter().any(|mount| mount.point == tree);
        let around: Vec<u64> = if is_mounted {
            Vec::new()
        } else {
            holders(&rest, &tree)
        };
        let within_ids: Vec<u64> = within.iter().map(|mount| mount.id).collect();
        let leaving = Leaving {
            mounts: self.mounts.ids(&within_ids),
            around: self.mounts.ids(&around),
            tree,
        };
        let handles = self
            .handles
            .take(|handle| leaving.has(worker, &handle.inode));
        let inodes = self.inodes.take(|inode| leaving.has(worker, inode));
        for (id, mountinfo_id) in &leaving.mounts {
            self.mounts
                .close(*id, *mountinfo_id, self.mounts_are_unique());
        }
        for mount in &within {
            self.close_mount(mount);
        }
        let count = Detached {
            inodes: inodes.len() as u64,
            handles: handles.len() as u64,
        };
        // Nothing is being served, so these are the last references: the descriptors close here.
        drop(handles);
        drop(inodes);
        Ok(count)
    }

    /// Mounts have come or gone: what was detached and is unmounted no longer bars its id.
    ///
    /// # Errors
    /// The mounts cannot be listed.
    pub fn mounts_changed(&self) -> Result<(), DetachError> {
        let ids: Vec<u64> = mount_lines()?.iter().map(|mount| mount.id).collect();
        self.mounts.open_gone(&ids);
        Ok(())
    }

    fn mounts_are_unique(&self) -> bool {
        sys::status(self.root.as_fd()).is_ok_and(|status| status.mount_is_unique)
    }

    /// Closes a mount that the guest has not reached yet.
    fn close_mount(&self, mount: &MountLine) {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let Ok(fd) = open(&mount.point, flags, Mode::empty()) else {
            return;
        };
        let Ok(status) = sys::status(fd.as_fd()) else {
            return;
        };
        // Another mount may cover this one, at the same place or above: then nobody can reach it.
        if sys::mountinfo_id(fd.as_fd()) == Ok(mount.id) {
            self.mounts
                .close(status.mount, mount.id, status.mount_is_unique);
        }
    }
}

/// The mounts that the path of `tree` goes through last: the longest mount point above it, however often it is mounted upon.
fn holders(mounts: &[MountLine], tree: &Path) -> Vec<u64> {
    let above = |mount: &&MountLine| tree.starts_with(&mount.point);
    let longest = mounts
        .iter()
        .filter(above)
        .map(|mount| mount.point.components().count())
        .max();
    mounts
        .iter()
        .filter(above)
        .filter(|mount| Some(mount.point.components().count()) == longest)
        .map(|mount| mount.id)
        .collect()
}

fn mount_lines() -> Result<Vec<MountLine>, DetachError> {
    let text = fs::read("/proc/self/mountinfo").map_err(DetachError::Mounts)?;
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(mount_line)
        .collect())
}

/// proc_pid_mountinfo(5): id, parent, device, root, mount point, ...
fn mount_line(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let point = unescaped(fields.nth(3)?);
    let point = PathBuf::from(std::ffi::OsString::from_vec(point));
    Some(MountLine { id, point })
}

/// Space, tab, newline and backslash are written as a backslash and three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        let digits = tail.get(..3).filter(|_| byte == b'\\');
        match digits.and_then(|digits| std::str::from_utf8(digits).ok()) {
            Some(digits) if u8::from_str_radix(digits, 8).is_ok() => {
                out.push(u8::from_str_radix(digits, 8).expect("just parsed"));
                rest = &tail[3..];
            }
            _ => out.push(byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_odd_characters_is_read_as_it_is() {
        let line = br"36 35 98:0 /mnt1 /mnt\0402/a\134b rw,noatime master:1 - ext3 /dev/root rw";
        let mount = mount_line(line).unwrap();
        assert_eq!(mount.id, 36);
        assert_eq!(mount.point, Path::new(r"/mnt 2/a\b"));
        assert_eq!(unescaped(br"\9"), br"\9");
        assert_eq!(unescaped(br"a\777"), br"a\777");
        assert!(mount_line(b"").is_none());
    }
}
