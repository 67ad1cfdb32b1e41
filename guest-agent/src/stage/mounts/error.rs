//! What can fail while a container's file system is built.

use nix::errno::Errno;

/// Why a container's file system could not be built.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// A system call failed on one mount of the spec.
    #[error("mount {destination} ({what}): {action} failed: {errno}{detail}")]
    Mount {
        /// Where, in the container.
        destination: String,
        /// The file system type, or the bind mount's source.
        what: String,
        /// What was attempted.
        action: String,
        /// Why it failed.
        #[source]
        errno: Errno,
        /// The kernel's own message or what to do, with its separator; may be empty.
        detail: String,
    },
    /// A mount of the spec that is not allowed or cannot be honoured.
    #[error("mount {destination}: {reason}")]
    Refused {
        /// Where, in the container.
        destination: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A system call failed on the root.
    #[error("container root {root}: {action} failed: {errno}")]
    Root {
        /// The root's guest path.
        root: String,
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        #[source]
        errno: Errno,
    },
    /// A system call failed on a device, a /dev link, a masked or a read-only path.
    #[error("{path}: {action} failed: {errno}")]
    Path {
        /// The path in the container.
        path: String,
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        #[source]
        errno: Errno,
    },
    /// The user namespace of an idmapped mount could not be made.
    #[error("mount {destination}: id mapping: {source}")]
    IdMap {
        /// Where, in the container.
        destination: String,
        /// Why it failed.
        #[source]
        source: crate::idmap::IdMapError,
    },
    /// The descriptors handed over do not belong to this spec.
    #[error("mount sources: got {got} descriptors, the spec needs {want}")]
    Sources {
        /// How many came.
        got: usize,
        /// How many the spec needs.
        want: usize,
    },
}

impl MountError {
    pub(super) fn root(root: &str, action: &'static str, errno: Errno) -> Self {
        Self::Root {
            root: root.to_owned(),
            action,
            errno,
        }
    }

    pub(crate) fn path(path: &str, action: &'static str, errno: Errno) -> Self {
        Self::Path {
            path: path.to_owned(),
            action,
            errno,
        }
    }
}
