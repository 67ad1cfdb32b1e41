//! The guest's agent: PID 1 of the microVM, which makes the containers that the shim describes.
//!
//! ```text
//!  vsock 1024 ── ttrpc ──► service ──► sandbox ──► container::{create, exec} ── clone3 ──► stage (re-exec of this binary)
//!  vsock 1026… ── bytes ─► stdio ◄── pipes or a terminal ──────────────────────────────────► the container's process
//!                          network: interfaces as the shim tells; what listens in the pod, and connections to it
//!                          sockets: listeners at sockets of the host, and their connections to it
//!                          reaper ◄── SIGCHLD: the only place that waits for children
//! ```
//!
//! One thread runs everything: the stages that need a process of their own run in [`stage`].
#![deny(unsafe_code)] // what it needs of Linux is in `linux`; each exception says why

#[allow(unsafe_code)] // port I/O
pub mod announce;
#[allow(unsafe_code)] // bpf(2) and its ring of memory
mod bpf;
#[allow(unsafe_code)] // port I/O
mod clock;
mod container;
mod error;
mod idmap;
pub mod init;
mod log;
mod machine;
mod network;
mod reaper;
mod rpc;
mod sandbox;
mod service;
mod share;
mod sockets;
pub mod stage;
mod stdio;
#[allow(unsafe_code)] // Tokio's registration of a descriptor
mod stream;
mod volume;

pub use log::install_panic_hook;
pub use stream::Host;

/// Version of the agent, as StartSandbox answers it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
