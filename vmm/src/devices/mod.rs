//! Guest-visible hardware.
pub mod virtio;
