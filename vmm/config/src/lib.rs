//! The words that the shim and `bulkhead-vmm` exchange; wire types only, no behaviour.
//!
//! Each process that the shim starts (`bulkhead-vmm run`, `bulkhead-vmm fs`) finds one end of a `SOCK_SEQPACKET`
//! socketpair as file descriptor [`CONTROL_FD`]. One packet is one JSON value of at most [`MAX_PACKET`] bytes.
//! File descriptors travel beside the packet by `SCM_RIGHTS`; a [`Fd`] in the JSON is an index into that array.
//!
//! ```text
//! shim                                   bulkhead-vmm run
//!   ── VmConfig + fds ─────────────────────►   validate, map memory, load the kernel, enter the jail
//!   ◄──────────────────────── Event::Running ─   vCPUs run
//!   ── Request::OfferPort + fd ────────────►   (any number, any time; each answered by Event::Done or Event::Refused)
//!   ◄──────────────────────── Event::Ended ───   the guest ended; the process exits with the same code
//!
//! shim                                   bulkhead-vmm fs
//!   ── FsConfig + fds ─────────────────────►   enter the jail
//!   ◄──────────────────────── FsEvent::Serving ─
//!   ── FsRequest::Detach ──────────────────►   close everything beneath the tree
//!   ◄──────────────────────── FsEvent::Detached ─
//! ```
//!
//! Either process ends when the shim's end of its socket closes.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

mod blocked;
mod exit;
mod fs;
mod layer;
mod vm;

pub use blocked::{Blocked, Role};
pub use exit::{ExitCode, GuestEnd};
pub use fs::{CachePolicy, FsConfig, FsEvent, FsRequest};
pub use layer::Layer;
pub use vm::{
    BalloonStats, Event, FsDevice, MAX_RESETS, NetDevice, NetStats, Phase, PluggedStats, PortOffer,
    RateLimit, Request, SerialConsole, Stamp, TemplateFiles, VmConfig, VmStats,
};

/// Version of these types; a process refuses a config with another one. Shim and VMM are installed together.
pub const WIRE_VERSION: u32 = 1;

/// The file descriptor number at which a started process finds its control socket.
pub const CONTROL_FD: i32 = 3;

/// Largest packet on a control socket, in bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// Most file descriptors beside one packet (the kernel's own limit, `SCM_MAX_FD`, is 253).
pub const MAX_FDS: usize = 240;

/// Most virtio-fs and network devices of a machine, with the places for those that may come later.
pub const MAX_DEVICES: usize = 13;

/// An index into the `SCM_RIGHTS` array of the packet that names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fd(pub u32);

/// What the guest's agent appends to a socket's name when it binds there, to listen in the place of the host's server: the fs
/// process makes nothing then, and answers with the socket that has the name without it. No more than 107 bytes are left for both
/// (unix(7)).
pub const LISTEN_SUFFIX: &str = "\u{1}listen";

/// The I/O port to which the guest's agent announces what it is about to do, one byte a write ([`announce`]).
///
/// Nothing else answers port I/O in the machine, so that each write is one exit.
pub const ANNOUNCE_PORT: u16 = 0x8900;

/// The I/O port that tells the host's wall clock: a read of 4 bytes is the low half of the µs since the epoch.
///
/// The guest's kernel has the time from KVM (kvm-clock) early in its boot, and then counts ticks of a timer that does not run yet: its
/// clock is behind by most of the boot. The agent knows the higher half from the time of its first request.
pub const CLOCK_PORT: u16 = 0x8904;

/// The bytes that the agent writes to [`ANNOUNCE_PORT`].
pub mod announce {
    /// PID 1 runs its first instructions ([`Phase::Init`](crate::Phase::Init)).
    pub const INIT: u8 = 0x01;
    /// The agent is about to power the machine off; it calls `reboot(2)` next.
    pub const POWER_OFF: u8 = 0x10;
    /// The agent is about to reboot the machine; it calls `reboot(2)` next.
    pub const REBOOT: u8 = 0x11;
}

/// vsock ports of the host (CID 2) that the agent dials.
pub mod port {
    /// The agent serves ttrpc on the connection that it dials here; the shim is the client.
    pub const AGENT: u32 = 1024;
    /// The agent writes its log lines here, one JSON object a line.
    pub const LOG: u32 = 1025;
    /// First of the ports that the shim chooses for stdio streams, one connection each.
    pub const FIRST_STREAM: u32 = 1026;
}
