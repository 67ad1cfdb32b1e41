//! The host's side of a pod's network.
//!
//! The pod's network namespace is made and filled by CNI (or Docker, or Podman). For each interface
//! in it the guest has a virtio-net device with the same name, Ethernet address and MTU, on a tap
//! in the same namespace; a redirect ([`netns`]) ties the two together frame by frame. The agent
//! repeats the namespace's addresses, routes, neighbours and rules in the guest, from the very
//! messages in which the namespace's kernel lists them ([`guest`]).
//!
//! ```text
//! namespace: eth0 ◄─ redirect ─► bulkhead1a2b3c ◄─ descriptors ─► VMM ◄─ virtio-net ─► guest: eth0
//!   links, addresses, routes, ... ── snapshot ──► requests of rtnetlink ── agent ──► the same
//! ```
//!
//! Each redirect is in the ledger before it is made
//! ([`Resource::Redirect`](crate::ledger::Resource::Redirect)).
#![forbid(unsafe_code)]

mod attach;
mod guest;
mod routes;
mod snapshot;

pub use attach::{Device, Network};

use crate::{ledger, netns};

/// Why a pod has no network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace, or what it would need there.
    #[error(transparent)]
    Namespace(#[from] netns::Error),
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
}
