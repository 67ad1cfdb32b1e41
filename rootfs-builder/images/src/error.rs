//! Why an image cannot be used.

use std::{io, path::PathBuf};

/// Why there is no root file system.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was named is none of the forms that an image has.
    #[error("{0:?} names no image: {1}")]
    Reference(String, &'static str),
    /// A file or a directory.
    #[error("cannot {action} {path}")]
    Io {
        /// The verb.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Neither a layout nor an archive.
    #[error(
        "{0} is no image: it has neither an index.json (OCI) nor a manifest.json (docker save)"
    )]
    NoImage(PathBuf),
    /// A file that is no archive, or the half of one.
    #[error("{path} is no image: it is neither a whole archive nor a directory")]
    NoArchive {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An overlay cannot have its upper directory in another one.
    #[error(
        "containers cannot write in {0}, which is on an overlay itself: set data_dir in the configuration to a directory on a disk or a tmpfs"
    )]
    Overlay(PathBuf),
    /// A part that is not there.
    #[error("the image {image} lacks its {what} {name}")]
    Missing {
        /// Which image.
        image: PathBuf,
        /// What it is for.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// JSON that is another.
    #[error("the {what} of the image cannot be read")]
    Format {
        /// Which document.
        what: &'static str,
        /// Where.
        #[source]
        source: serde_json::Error,
    },
    /// A number or a name that cannot be.
    #[error("the {what} of the image is not usable: {reason}")]
    Wrong {
        /// Which part.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// Contents that are others.
    #[error("the {what} of the image is damaged: its SHA-256 is {found}, and should be {expected}")]
    Digest {
        /// Which part.
        what: String,
        /// Hexadecimal.
        expected: String,
        /// Hexadecimal.
        found: String,
    },
    /// None for this machine.
    #[error("the image is for {0}, this machine is linux/amd64")]
    Platform(String),
    /// Which one?
    #[error("{path} has several images: add :NAME of one of them: {}", names.join(", "))]
    Several {
        /// Where.
        path: PathBuf,
        /// Their names.
        names: Vec<String>,
    },
    /// Not that one.
    #[error("{path} has no image {name:?}; it has {}", names.join(", "))]
    Unknown {
        /// Where.
        path: PathBuf,
        /// What was asked for.
        name: String,
        /// Those that are there.
        names: Vec<String>,
    },
    /// A layer's entry.
    #[error("layer {layer} of the image cannot be unpacked at {entry:?}")]
    Entry {
        /// From 1.
        layer: usize,
        /// Its path.
        entry: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An engine that has not given it.
    #[error("{engine} cannot export {name:?}: {reason}")]
    Engine {
        /// Its command.
        engine: &'static str,
        /// The image.
        name: String,
        /// Its last line.
        reason: String,
    },
    /// A container runs from it.
    #[error("image {0} is in use by a container that runs")]
    InUse(String),
    /// Which one?
    #[error("{name:?} means several images: say the key of one, {}", keys.join(" or "))]
    Ambiguous {
        /// What was said.
        name: String,
        /// Their keys.
        keys: Vec<String>,
    },
    /// No such name.
    #[error("there is no image {0:?}; `bulkhead image ls` shows all")]
    NotKept(String),
}

impl Error {
    /// For `map_err` of what the file system refuses.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io {
            action,
            path,
            source,
        }
    }
}
