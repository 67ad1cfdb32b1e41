//! A network namespace of the host: its links, taps beside them, and the redirects that tie the two
//! together frame by frame.
//!
//! Everything happens in a thread that enters the namespace and ends, its socket with it: a pod
//! that runs costs nothing here. [`give_back`] undoes a redirect whoever died first: the tap goes
//! with the VMM's descriptors, all of it with the namespace.
#![forbid(unsafe_code)]

mod carrier;
mod counters;
pub(crate) mod link;
pub(crate) mod message;
mod namespace;
pub(crate) mod redirect;
mod release;
pub(crate) mod socket;
pub(crate) mod tap;

use std::{io, path::PathBuf};

pub use carrier::Carriers;
pub use counters::{Counters, Traffic, counters};
pub use namespace::Namespace;
pub(crate) use release::index_of;
pub use release::{Redirect, give_back};
pub use socket::Failure;

/// What is wrong with a namespace, or with what a pod needs of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace is not there, is none, or cannot be entered.
    #[error(
        "cannot enter the network namespace {path}; is it the one that the engine made for the pod?"
    )]
    Namespace {
        /// Of the namespace.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A pod in the host's own network.
    #[error(
        "{path} is the host's own network namespace, which a pod in a virtual machine cannot share; give the pod a namespace of its own"
    )]
    Host {
        /// Of the namespace.
        path: PathBuf,
    },
    /// An interface that a guest cannot have.
    #[error(
        "interface {interface} ({kind}) of the pod's network namespace cannot be given to the guest: {reason}"
    )]
    Refused {
        /// Its name.
        interface: String,
        /// Its kind, as `ip -details link` names it.
        kind: String,
        /// Why, and what to do.
        reason: String,
    },
    /// Two pods in one namespace.
    #[error(
        "interface {interface} of the pod's network namespace belongs to another pod's guest already; give each pod a namespace of its own"
    )]
    Taken {
        /// The interface, or the other pod's tap.
        interface: String,
    },
    /// It came when the machine's devices had been settled.
    #[error(
        "interface {interface} of the pod's network namespace came too late: the machine has no place for it beside the {places} that it was made with; put it there before the container is created, or by a createRuntime hook of a container that is alone in its pod"
    )]
    Late {
        /// Its name.
        interface: String,
        /// How many the machine has.
        places: usize,
    },
    /// Somebody's filter is where ours must be.
    #[error(
        "interface {interface} of the pod's network namespace has an ingress filter of preference 60000 that is not Bulkhead's; give it a smaller one"
    )]
    Preference {
        /// The interface.
        interface: String,
    },
    /// A tap could not be made.
    #[error("cannot make the tap {tap} (it needs /dev/net/tun, from the kernel's tun module)")]
    Tap {
        /// Its name.
        tap: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refused something.
    #[error("cannot {action} {what} in the pod's network namespace")]
    Kernel {
        /// The verb.
        action: &'static str,
        /// On what.
        what: String,
        /// Why.
        #[source]
        source: Failure,
    },
    /// More than the agent takes in one message.
    #[error(
        "the pod's network namespace has {bytes} bytes of addresses, routes, neighbours and rules; at most {most} can be repeated in the guest"
    )]
    TooMuch {
        /// How much.
        bytes: usize,
        /// How much can be.
        most: usize,
    },
}

/// Says what a refusal of the kernel was about.
pub(crate) trait Step<T> {
    fn step(self, action: &'static str, what: &str) -> Result<T, Error>;
}

impl<T> Step<T> for Result<T, Failure> {
    fn step(self, action: &'static str, what: &str) -> Result<T, Error> {
        self.map_err(|source| Error::Kernel {
            action,
            what: what.into(),
            source,
        })
    }
}
