//! runc's command line as a front end: what an engine calls (`bulkhead create`, `start`, `kill`,
//! ...) and what stays between two calls.
//!
//! ```text
//! conmon ── create ──► monitor   a daemon, one a container: containerd's tasks on ROOT/ID/task.sock
//!              │          ▲ one connection a process of the container, on ROOT/ID/keepers.sock
//!              └─ fork ─► keeper    its pid is in the pid file: conmon's child, which ends as the process in the guest does
//! podman ── start, kill, state, delete ──► the monitor's tasks, by the same calls as containerd's
//! ```
//!
//! There is no second life of a container: `monitor` is the shim's daemon with another front. What
//! it has no call for is which pid stands for a container and when that was made: [`Record`].
#![forbid(unsafe_code)]

mod client;
mod keepers;
mod monitor;
mod room;

pub use client::{Client, Error as ClientError};
pub use keepers::{Connection, ticket};
pub use monitor::{KEEPERS, Monitor};
pub use room::{DEFAULT_ROOT, Error as RoomError, Record, Room, namespace};
