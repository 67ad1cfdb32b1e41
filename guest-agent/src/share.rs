//! The share's mounts in the agent's own mount namespace.
//!
//! virtio-fs mounts a directory that is a mount on the host by itself, as a file system of its own, in the mount namespace of
//! whoever goes there first. So the agent goes there before the container's init is made, whose namespace begins as a copy of the
//! agent's: all containers that use a source then have one superblock of it, and locks and shared mappings reach from one to
//! the other. When the last of them is gone the agent unmounts it, or the guest would keep it for ever.
//!
//! A mount that is made so takes over the flags of the mount that it is in (finish_automount() of the kernel's fs/namespace.c). Beneath a
//! container's read-only mount everything would be read-only. So the agent goes to the mounts beneath a source too, while what they
//! are in has no flags yet, and gives them those of the host.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use bulkhead_agent_protocol::agent;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::log;
use crate::stage::mounts;
use crate::stage::mounts::{is_bind, is_of_the_share, open_guest_path};

/// A mount beneath a source could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up the mount {} beneath the source {top}", submount.display())]
pub(crate) struct ShareError {
    top: String,
    submount: PathBuf,
    #[source]
    source: io::Error,
}

/// Who uses which paths of the share.
#[derive(Debug, Default)]
pub(crate) struct Share(Mutex<HashMap<String, Vec<String>>>);

impl Share {
    fn users(&self) -> MutexGuard<'_, HashMap<String, Vec<String>>> {
        self.0
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// Mounts what a new container uses. May wait for the share.
    pub(crate) fn enter(&self, container: &str, spec: &agent::Container) -> Result<(), ShareError> {
        let binds = spec.mounts.iter().filter(|mount| is_bind(mount));
        let sources: Vec<(&String, &[agent::Submount])> = binds
            .map(|mount| (&mount.source, mount.submounts.as_slice()))
            .chain([(&spec.root, spec.root_submounts.as_slice())])
            .filter(|(path, _)| is_of_the_share(path))
            .collect();
        let paths = sources.iter().map(|(path, _)| (*path).clone()).collect();
        // The count before the mount: from here on no other container's end unmounts it.
        self.users().insert(container.to_owned(), paths);
        for (path, submounts) in sources {
            // What cannot be opened is reported by the step that binds it.
            let Ok(top) = open_guest_path(path) else {
                continue;
            };
            for submount in submounts {
                enter_submount(path, top.as_fd(), submount)?;
            }
        }
        Ok(())
    }

    /// Unmounts what only this container used, but those that are kept until [`Share::release`]: sockets are served there, maybe for a
    /// container that has not come yet.
    pub(crate) fn leave(&self, container: &str, is_kept: impl Fn(&str) -> bool) {
        // Held over the unmounts, so that a container that comes now does not find a mount that is about to go.
        let mut users = self.users();
        let Some(mut paths) = users.remove(container) else {
            return;
        };
        paths.sort();
        paths.dedup();
        for path in paths {
            if is_kept(&path) {
                continue;
            }
            unmount_unused(&users, &path);
        }
    }

    /// Unmounts a path that was kept, unless a container uses it.
    pub(crate) fn release(&self, path: &str) {
        unmount_unused(&self.users(), path);
    }
}

/// With the table locked.
fn unmount_unused(users: &HashMap<String, Vec<String>>, path: &str) {
    if users.values().flatten().any(|used| used == path) {
        return;
    }
    // Lazily: with what is mounted beneath, whose names are the containers' and must not be walked any more.
    let flags = MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH;
    match umount2(path, flags) {
        // A file is in the share's own file system, and a container that failed early never came here.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(errno) => log::warn(&format!("cannot unmount {path}: {errno}")),
    }
}

/// Goes to a mount beneath the source `top`, and gives it its flags.
fn enter_submount(
    name: &str,
    top: BorrowedFd<'_>,
    submount: &agent::Submount,
) -> Result<(), ShareError> {
    let path = Path::new(OsStr::from_bytes(&submount.path));
    match mounts::enter_submount(top, path, submount.attributes) {
        // ENOENT: the host has unmounted it meanwhile.
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        // Who may write to the volume has put something in its way: no container comes there by this name.
        Err(errno @ (Errno::ELOOP | Errno::ENOTDIR | Errno::EXDEV)) => {
            log::warn(&format!(
                "the way to the mount {} beneath {name} is blocked: {errno}",
                path.display()
            ));
            Ok(())
        }
        Err(errno) => Err(ShareError {
            top: name.to_owned(),
            submount: path.to_owned(),
            source: errno.into(),
        }),
    }
}
