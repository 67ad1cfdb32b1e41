//! The pod's two processes and its guest: what the shim sends them and what it hears from them.
//!
//! ```text
//! vmm ─► peer, control   the VMM: one control socket, its requests and events, its end
//! fs  ─► peer, control   the fs process: the same
//! agent                  the guest's side of a container: ttrpc over vsock, which the VMM carries
//! hardware               what a machine is made of
//! ```
#![forbid(unsafe_code)]

pub mod agent;
pub mod control;
mod end;
pub mod fs;
pub mod hardware;
pub mod peer;
pub mod vmm;

pub use end::End;
