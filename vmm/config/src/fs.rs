use serde::{Deserialize, Serialize};

use crate::{Blocked, Fd, Layer};

/// Everything that `bulkhead-vmm fs` needs, in one packet.
///
/// The share is a mount that the shim made `MS_SHARED`; the process was started in a mount namespace of its own and
/// makes everything `MS_SLAVE`, so that mounts the shim adds beneath the share later appear in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// [`WIRE_VERSION`](crate::WIRE_VERSION).
    pub version: u32,
    /// The sandbox's id, for log lines only.
    pub sandbox_id: String,
    /// Absolute host path of the share's root directory, bound into the jail as `/share`.
    pub share: String,
    /// The back end's end of the vhost-user socketpair.
    pub socket: Fd,
    /// The fs process's end of the `SOCK_SEQPACKET` socketpair by which it asks the VMM for pages that a template has
    /// lent, if the VMM may go on from one.
    #[serde(default)]
    pub lender: Option<Fd>,
    /// Number of request queues, at least 1.
    pub queues: u32,
    /// What the guest may cache of names and attributes.
    pub cache: CachePolicy,
    /// Most inodes that the guest may hold at once; past it a look-up answers `ENFILE`.
    pub max_inodes: u64,
    /// Most files and directories that the guest may hold open at once; past it an open answers `ENFILE`.
    pub max_handles: u64,
    /// Where log lines go: one JSON object a line; written without blocking, dropped when full.
    pub log: Fd,
    /// As [`VmConfig::accept_missing`](crate::VmConfig::accept_missing).
    #[serde(default)]
    pub accept_missing: Vec<Layer>,
}

/// How long the guest may trust what it has looked up, and whether it keeps file data over an open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CachePolicy {
    /// Validity of a name, in milliseconds.
    pub entry_ms: u64,
    /// Validity of attributes, in milliseconds.
    pub attr_ms: u64,
    /// Data stays cached over opens while size and mtime have not changed.
    pub keep_data: bool,
}

/// shim → fs process, after the config.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FsRequest {
    /// Close every inode and handle at or beneath this path and answer `ESTALE` for them from then on, so that the host can
    /// unmount it.
    Detach {
        /// Relative to the share, components joined by `/`, no `.` or `..`.
        tree: String,
    },
    /// Ask for [`FsEvent::Stats`].
    Stats,
}

/// fs process → shim. Requests are answered in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FsEvent {
    /// The jail is closed and the share can be served. Sent once.
    Serving {
        /// As in [`Event::Running`](crate::Event::Running).
        landlock: Option<u32>,
    },
    /// [`FsRequest::Detach`] is done.
    Detached {
        /// Inodes that were closed.
        inodes: u64,
        /// Handles that were closed.
        handles: u64,
    },
    /// A request could not be done.
    Refused {
        /// Why, for a person.
        reason: String,
    },
    /// Answer to [`FsRequest::Stats`].
    Stats {
        /// Inodes held now.
        inodes: u64,
        /// Files and directories open now.
        handles: u64,
        /// Requests served, by opcode name.
        requests: std::collections::BTreeMap<String, u64>,
        /// Requests that the guard refused, by rule.
        guest_faults: std::collections::BTreeMap<String, u64>,
    },
    /// A thread of the process broke its rules; the last packet.
    Blocked(Blocked),
    /// The process cannot start or go on; the last packet.
    Failed {
        /// What failed, on what, and what to do.
        reason: String,
    },
}
