//! What the end-to-end suites share: bundles made by real tools, runs of `bulkhead` and of runc, and the host's state before
//! and after.
//!
//! The suites need root, KVM and an installed Bulkhead: they run in the lab (`tests/run`, docs/testing.md).
#![forbid(unsafe_code)]

mod bundle;
mod cni;
pub mod cri;
mod engine;
mod failure;
mod host;
mod image;
mod kubelet;
mod netns;
mod process;

pub use bundle::{Bundle, busybox_root, debian_root, fresh_id, must};
pub use cni::Attachment;
pub use engine::{BULKHEAD, Engine, IMAGE, RUNC, sandboxer, tail};
pub use host::Host;
pub use image::save_image;
pub use kubelet::KubeletVolume;
pub use netns::Netns;
pub use process::{PATIENCE, Ran, Runtime, Started, run, sha256};

/// The long versions of the suites were asked for (`make soak`).
pub fn soak() -> bool {
    std::env::var_os("BULKHEAD_SOAK").is_some()
}

/// How long something may take that does not wait for a guest which does not answer: the shim gives such a one up after 10 s.
/// On a quiet machine all of it takes a second or two.
pub const SOON: std::time::Duration = std::time::Duration::from_secs(9);

/// Waits for something that must come.
///
/// # Panics
/// When it does not: with `what`, and what `more` has to say.
#[track_caller]
pub fn eventually(what: &str, mut happened: impl FnMut() -> bool, more: impl FnOnce() -> String) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !happened() {
        assert!(
            std::time::Instant::now() < deadline,
            "waited {PATIENCE:?} in vain: {what}\n{}",
            more()
        );
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// How many samples of a figure are taken: `make bench` says.
pub fn samples() -> usize {
    match std::env::var("BULKHEAD_SAMPLES") {
        Err(_) => 1,
        Ok(text) => text.parse().expect("BULKHEAD_SAMPLES is a number"),
    }
}
