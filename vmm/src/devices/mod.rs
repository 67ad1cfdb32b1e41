//! Guest-visible hardware.
pub mod announce;
pub mod clock;
pub mod ioapic;
pub mod serial;
pub mod virtio;

#[cfg(test)]
mod tests;
