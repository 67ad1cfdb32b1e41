//! kubelet's configMap, secret, projected and downwardAPI volumes: in the guest's memory, following the host's (docs/adr/0007).
//!
//! ```text
//! kubelet ─► the volume's directory ─ inotify ─► follow ─► mirror ─► host     looks at it
//!                                                            │ └───► changes  what the guest lacks, in kubelet's order
//!                                                            └─ ChangeVolume ─► agent ─► tmpfs ─ inotify ─► containers
//! ```
//!
//! Nothing wakes up while nothing changes, and nothing of what the guest answers reaches the host's volume.

mod changes;
mod follow;
mod host;
mod mirror;
#[cfg(test)]
mod tests;

use std::{
    io,
    path::{Component, Path, PathBuf},
};

pub use follow::{Owner, Volumes};

use crate::machine::agent;

/// kubelet's plugins that write by its atomic writer, as they are named in paths.
const PLUGINS: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// Why a volume is not in the guest, or not up to date there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// inotify has no room.
    #[error(
        "cannot watch the volume {path}; the limits are fs.inotify.max_user_instances and fs.inotify.max_user_watches of the host"
    )]
    Watch {
        /// The volume.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be opened.
    #[error("cannot open the volume {path}")]
    Open {
        /// The volume.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something in it cannot be read.
    #[error("cannot read {path:?}")]
    Read {
        /// Beneath the volume.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// kubelet makes no such thing.
    #[error("it has {path:?}, which cannot be repeated in the guest: {reason}")]
    Refused {
        /// Beneath the volume.
        path: String,
        /// Why.
        reason: String,
    },
    /// The host has gone on while it was read.
    #[error("it changes faster than it can be read")]
    Moving,
    /// The agent did not do it.
    #[error(transparent)]
    Agent(#[from] agent::Error),
    /// The same with the volume's name.
    #[error("the volume {path}")]
    In {
        /// The volume.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<Error>,
    },
    /// The container's mounts are not those it was placed with.
    #[error("container {0} has other mounts than it was placed with")]
    Mounts(String),
}

/// Whether the directory at this path is such a volume: `ROOT/pods/UID/volumes/PLUGIN/NAME`, whatever kubelet's root is. What lies
/// beneath one (a single file) or beside it (`volume-subpaths`, kubelet's snapshots for `subPath`) is not.
pub fn is_kubelet_volume(path: &Path) -> bool {
    let mut names = Vec::new();
    for part in path.components() {
        match part {
            Component::RootDir => {}
            Component::Normal(name) => names.push(name.to_str().unwrap_or_default()),
            _ => return false,
        }
    }
    match names.as_slice() {
        [.., "pods", uid, "volumes", plugin, name] => {
            let is_uid = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            path.is_absolute()
                && uid.chars().all(is_uid)
                && PLUGINS.contains(plugin)
                && !name.is_empty()
        }
        _ => false,
    }
}
