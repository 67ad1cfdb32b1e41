//! virtio devices over the MMIO transport.
//!
//! ```text
//! driver ── registers ──► mmio ── activate, reset ──► device (rng, vsock, fs, net, balloon, mem), on the activator's thread
//!        ── kick (ioeventfd) ───────────────────────►   │ on the event loop's thread (net: its own)
//!        ◄─ interrupt (irqfd) ── signal ◄───────────────┘ queue: checked chains, used ring
//! ```
//!
//! A device knows its queues, guest memory and a [`signal::Signal`]; it never names its transport. Whatever a guest gets
//! wrong is a [`fault::Fault`]: the device stops, asks for a reset and the fault is counted; the process goes on.
pub mod activator;
pub mod balloon;
pub mod chain;
pub mod device;
pub mod fault;
pub mod fs;
#[cfg(test)]
mod fuzz;
pub mod lane;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod registers;
pub mod rng;
pub mod signal;
mod sys;
#[cfg(test)]
mod test_driver;
#[cfg(test)]
mod tests;
pub mod vsock;
