//! Sockets of host servers in what a pod binds: who connects to one in the guest reaches the server (docs/adr/0009).
//!
//! ```text
//! a bound directory, or a socket's ─ inotify ─► follow ─► place   looks for sockets, asks whether somebody listens
//!                                                 └─ ServeSocket, StopSocket ─► agent   listens there in the guest
//! agent ─ NextConnection ─► relay ─► dial ─► the host's socket, as the pod's uid
//!                             └─ AnswerConnection ─► agent ─► a vsock port that was offered ─► bytes both ways
//! ```
//!
//! It is a way out of the virtual machine, and so the operator's to allow (`host_sockets` in the configuration). The guest names
//! no path: it names the number of a socket that it was told of.
#![forbid(unsafe_code)]

mod dial;
mod follow;
mod look;
mod place;
mod relay;
mod table;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::agent::Mount;

pub use follow::{Owner, Sockets};

use self::{
    dial::{Kind, probe},
    place::Place,
};
use crate::{machine::agent, oci::HostBind};

/// Where streams to the guest come from: the pod, which offers their ports.
pub trait Offers: Clone + Send + Sync + 'static {
    /// A stream that the guest may dial: its port, and our end.
    fn stream(&self) -> impl Future<Output = io::Result<(u32, UnixStream)>> + Send;

    /// Takes back one that the guest has not dialled.
    fn withdraw(&self, port: u32) -> impl Future<Output = ()> + Send;
}

/// Why a socket is not served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operator has not allowed it.
    #[error(
        "config.json: {field}: source {path} is not supported: it is a socket, and who listens on it is outside of the virtual machine; set `host_sockets = true` in /etc/bulkhead/config.toml to let pods connect to sockets of the host"
    )]
    NotAllowed {
        /// The mount's name in config.json.
        field: String,
        /// The socket.
        path: PathBuf,
    },
    /// Its boundaries would be lost.
    #[error(
        "config.json: {field}: source {path} is not supported: it is a SOCK_SEQPACKET socket; stream and datagram sockets can be connected to"
    )]
    Packets {
        /// The mount's name in config.json.
        field: String,
        /// The socket.
        path: PathBuf,
    },
    /// It cannot be looked at.
    #[error("cannot look for sockets in {path}")]
    Look {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// inotify has no room.
    #[error(
        "cannot watch the sockets in {path}; the limits are fs.inotify.max_user_instances and fs.inotify.max_user_watches of the host"
    )]
    Watch {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The agent did not do it.
    #[error("cannot serve the sockets of {path} in the guest")]
    Agent {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: agent::Error,
    },
    /// The agent did not answer.
    #[error("the guest took too long to serve the sockets of {0}")]
    Slow(PathBuf),
}

impl Error {
    /// Whether config.json asks for what cannot be.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Error::NotAllowed { .. } | Error::Packets { .. })
    }
}

/// Refuses bind mounts that name a socket which cannot be served.
fn check(binds: &[HostBind], mounts: &[Mount], allowed: bool, uid: u32) -> Result<(), Error> {
    for bind in binds.iter().filter(|bind| !bind.directory) {
        let path = bind.source.clone();
        if !place::is_socket(&path) {
            continue;
        }
        let mount = mounts.get(bind.mount);
        let destination = mount.map_or("", |mount| mount.destination.as_str());
        let field = format!("mounts[{}] ({destination})", bind.mount);
        if !allowed {
            return Err(Error::NotAllowed { field, path });
        }
        if kind_of(&path, uid) == Some(Kind::Packets) {
            return Err(Error::Packets { field, path });
        }
    }
    Ok(())
}

/// What listens at a path now.
fn kind_of(path: &Path, uid: u32) -> Option<Kind> {
    let place = Place::of(path).ok()??;
    let (socket, _) = place.socket(place.only()?).ok()?;
    probe(uid, &socket)
}
