//! The share's mounts in the agent's own mount namespace.
//!
//! virtio-fs mounts a directory that is a mount on the host by itself, as a file system of its own, in the mount namespace of
//! whoever goes there first. So the agent goes there before the container's init is made, whose namespace begins as a copy of the
//! agent's: all containers that use a source then have one superblock of it, and locks and shared mappings reach from one to
//! the other. When the last of them is gone the agent unmounts it, or the guest would keep it for ever.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use bulkhead_agent_protocol::agent;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::container::{is_bind, open_guest_path};
use crate::log;
use crate::machine::SHARE;

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
    pub(crate) fn enter(&self, container: &str, spec: &agent::Container) {
        let binds = spec.mounts.iter().filter(|mount| is_bind(mount));
        let paths: Vec<String> = binds
            .map(|mount| &mount.source)
            .chain([&spec.root])
            .filter(|path| Path::new(path).starts_with(SHARE))
            .cloned()
            .collect();
        // The count before the mount: from here on no other container's end unmounts it.
        self.users().insert(container.to_owned(), paths.clone());
        for path in &paths {
            // What cannot be opened is reported by the step that binds it.
            drop(open_guest_path(path));
        }
    }

    /// Unmounts what only this container used.
    pub(crate) fn leave(&self, container: &str) {
        // Held over the unmounts, so that a container that comes now does not find a mount that is about to go.
        let mut users = self.users();
        let Some(mut paths) = users.remove(container) else {
            return;
        };
        paths.sort();
        paths.dedup();
        for path in paths {
            unmount_unused(&users, &path);
        }
    }

    /// Unmounts a path that sockets kept busy, unless a container uses it.
    pub(crate) fn release(&self, path: &str) {
        unmount_unused(&self.users(), path);
    }
}

/// With the table locked.
fn unmount_unused(users: &HashMap<String, Vec<String>>, path: &str) {
    if users.values().flatten().any(|used| used == path) {
        return;
    }
    match umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
        // A file is in the share's own file system, and a container that failed early never came here.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        // Sockets are served there (`sockets`): it goes with them.
        Err(Errno::EBUSY) => log::info(&format!("{path} stays mounted for those who use it")),
        Err(errno) => log::warn(&format!("cannot unmount {path}: {errno}")),
    }
}
