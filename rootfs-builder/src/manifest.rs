//! The manifest: what the image holds, as its author wrote it.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Why a manifest could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the manifest {path}")]
    Read {
        /// The manifest.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The file is no TOML, lacks a key or has one that does not exist.
    #[error("the manifest {path} is not valid")]
    Parse {
        /// The manifest.
        path: PathBuf,
        /// Line, column and reason.
        #[source]
        source: Box<toml::de::Error>,
    },
}

/// A whole manifest. Unknown keys are errors: a misspelt entry must not vanish from the image.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Manifest {
    /// Directories, empty unless another entry lies in them.
    pub directory: Vec<Directory>,
    /// Programs that run in the guest.
    pub executable: Vec<Executable>,
    /// Character devices that must exist before devtmpfs is mounted.
    pub device: Vec<Device>,
}

/// One directory.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Directory {
    /// Absolute path in the guest.
    pub path: String,
    /// Permission bits, at most 0o7777.
    pub mode: u32,
}

/// One program.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Executable {
    /// Absolute path in the guest.
    pub path: String,
    /// Permission bits, at most 0o7777.
    pub mode: u32,
    /// Which binary of the command line it is.
    pub source: Source,
}

/// The binaries that the command line can supply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// `--agent`.
    Agent,
}

/// One character device.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Absolute path in the guest.
    pub path: String,
    /// Permission bits, at most 0o7777.
    pub mode: u32,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl Manifest {
    /// Reads and parses the manifest at `path`.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = fs::read_to_string(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        toml::from_str(&text).map_err(|source| Error::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }
}
