//! What the end-to-end suites share: bundles made by real tools, runs of `bulkhead` and of runc, and the host's state before
//! and after.
//!
//! The suites need root, KVM and an installed Bulkhead: they run in the lab (`tests/run`, docs/testing.md).
#![forbid(unsafe_code)]

mod bundle;
mod cni;
pub mod cri;
mod engine;
mod host;
mod kubelet;
mod netns;
mod process;

pub use bundle::{Bundle, debian_root, fresh_id};
pub use cni::Attachment;
pub use engine::{BULKHEAD, Engine, IMAGE, RUNC, sandboxer, tail};
pub use host::Host;
pub use kubelet::KubeletVolume;
pub use netns::Netns;
pub use process::{Ran, Runtime, Started, sha256};

/// The long versions of the suites were asked for (`make soak`).
pub fn soak() -> bool {
    std::env::var_os("BULKHEAD_SOAK").is_some()
}

/// How many samples of a figure are taken: `make bench` says.
pub fn samples() -> usize {
    match std::env::var("BULKHEAD_SAMPLES") {
        Err(_) => 3,
        Ok(text) => text.parse().expect("BULKHEAD_SAMPLES is a number"),
    }
}
