//! kubelet's configMap, secret, projected and downwardAPI volumes: in the guest's memory, following the host's (docs/adr/0007).
//!
//! ```text
//! kubelet ─► the volume's directory ─ inotify ─► follow ─► mirror ─► host     looks at it
//!                                                            │ └───► changes  what the guest lacks, in kubelet's order
//!                                                            └─ ChangeVolume ─► agent ─► tmpfs ─ inotify ─► containers
//! ```
//!
//! Nothing wakes up while nothing changes, and nothing of what the guest answers reaches the host's volume.
#![forbid(unsafe_code)]

mod changes;
mod follow;
mod host;
mod mirror;
#[cfg(test)]
mod tests;

use std::{io, path::PathBuf};

pub use follow::{Owner, Volumes};

use crate::machine::agent;

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
