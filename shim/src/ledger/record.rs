//! The lines of a ledger.

use std::{
    fmt,
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{netns::Redirect, sys::process::ProcessId};

/// Directory, beneath the state directory, of claims on numbers that must be unique on the host.
pub const CLAIMS: &str = ".claims";

/// The process that a ledger belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner(pub ProcessId);

/// Names an entry of one ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ticket(pub(super) u64);

/// Something of the host that must be given back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Resource {
    /// A directory beneath the sandbox' own; removed when empty, never with its content.
    Directory {
        /// Absolute.
        path: PathBuf,
    },
    /// A file or a socket beneath the sandbox' directory.
    File {
        /// Absolute.
        path: PathBuf,
    },
    /// A mount beneath the sandbox' directory, with whatever is mounted beneath it.
    Mount {
        /// Absolute.
        path: PathBuf,
    },
    /// A cgroup v2; what is in it is killed.
    Cgroup {
        /// Absolute.
        path: PathBuf,
        /// Other pods live beneath it too: it goes with the last of them, and nothing in it is killed.
        shared: bool,
    },
    /// The cgroup of a shim beneath its pod's; who is in it goes back to the shim's home.
    ShimCgroup {
        /// Absolute.
        path: PathBuf,
        /// Absolute.
        home: PathBuf,
    },
    /// A process.
    Process {
        /// Which.
        #[serde(flatten)]
        id: ProcessId,
        /// What it is, for a person.
        role: String,
    },
    /// A symbolic link whose target names its holder: whoever makes it first has the number in its name.
    Claim {
        /// Absolute, beneath the claims' directory.
        path: PathBuf,
        /// The link's target.
        holder: String,
    },
    /// An interface of the pod's network namespace, redirected to a tap.
    Redirect(Redirect),
}

impl Resource {
    /// Whether it is where a sandbox keeps such things. Nothing else is ever removed.
    pub(super) fn belongs_to(&self, directory: &Path, state: &Path) -> bool {
        let beneath = |path: &Path, top: &Path| {
            path != top
                && path.starts_with(top)
                && !path.components().any(|part| part == Component::ParentDir)
        };
        match self {
            Resource::Directory { path } | Resource::File { path } | Resource::Mount { path } => {
                beneath(path, directory)
            }
            Resource::Cgroup { path, .. } => beneath(path, Path::new(crate::cgroup::ROOT)),
            Resource::ShimCgroup { path, home } => {
                let root = Path::new(crate::cgroup::ROOT);
                beneath(path, root) && (home == root || beneath(home, root))
            }
            Resource::Process { id, .. } => id.pid > 1,
            Resource::Claim { path, .. } => beneath(path, &state.join(CLAIMS)),
            Resource::Redirect(redirect) => redirect.is_plausible(),
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Resource::Directory { path } => write!(f, "directory {}", path.display()),
            Resource::File { path } => write!(f, "file {}", path.display()),
            Resource::Mount { path } => write!(f, "mount {}", path.display()),
            Resource::Cgroup { path, .. } => write!(f, "cgroup {}", path.display()),
            Resource::ShimCgroup { path, .. } => write!(f, "cgroup {} (shim)", path.display()),
            Resource::Process { id, role } => write!(f, "process {} ({role})", id.pid),
            Resource::Claim { path, .. } => write!(f, "claim {}", path.display()),
            Resource::Redirect(redirect) => redirect.fmt(f),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub id: Ticket,
    #[serde(flatten)]
    pub resource: Resource,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Line {
    Owner(Owner),
    Take(Entry),
    Release { id: Ticket },
}

impl Line {
    /// As it stands in the file.
    pub(super) fn text(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec(self).expect("a line is made of strings and numbers");
        text.push(b'\n');
        text
    }
}

/// What a ledger's text says is still held, its owner, and the next free ticket. Lines that were cut off are skipped: a line
/// is written before the act, so what such a line would have named was never taken.
pub(super) fn replay(text: &str) -> (Option<Owner>, Vec<Entry>, u64) {
    let mut owner = None;
    let mut held: Vec<Entry> = Vec::new();
    let mut next = 1;
    for line in text.lines() {
        match serde_json::from_str(line) {
            Ok(Line::Owner(who)) => owner = Some(who),
            Ok(Line::Take(entry)) => {
                next = next.max(entry.id.0.saturating_add(1));
                held.push(entry);
            }
            Ok(Line::Release { id }) => held.retain(|entry| entry.id != id),
            Err(_) => {}
        }
    }
    (owner, held, next)
}
