//! Manifest -> the archive's entries, every check done.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::elf;
use crate::manifest::{Manifest, Source};
use crate::newc::{Content, Entry};

/// Why a manifest cannot become an image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path that could mean something else in the guest than it says.
    #[error(
        "the manifest's path {path:?} must be absolute, without `.`, `..`, empty parts or a slash at its end"
    )]
    Path {
        /// As written.
        path: String,
    },
    /// Longer than Linux takes.
    #[error("the manifest's path {path:?} is longer than 4095 bytes")]
    PathTooLong {
        /// As written.
        path: String,
    },
    /// Bits beyond the permission bits.
    #[error("the mode {mode:#o} of {path} has bits beyond 0o7777")]
    Mode {
        /// The entry.
        path: String,
        /// As written.
        mode: u32,
    },
    /// Two entries of one name.
    #[error("{path} is listed twice in the manifest")]
    Duplicate {
        /// The entry.
        path: String,
    },
    /// The kernel's loader creates no parents.
    #[error("{path} lies in {parent}, which the manifest does not list as a directory: add it")]
    NoParent {
        /// The entry.
        path: String,
        /// What is missing, or is no directory.
        parent: String,
    },
    /// A binary cannot be read.
    #[error("cannot read {} for {path}: build it first, or correct the path", file.display())]
    Binary {
        /// The entry.
        path: String,
        /// The file on this host.
        file: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// A binary is not one that the guest can run.
    #[error("{} cannot be {path} in the guest", file.display())]
    Program {
        /// The entry.
        path: String,
        /// The file on this host.
        file: PathBuf,
        /// What is wrong with it.
        #[source]
        source: elf::Error,
    },
}

/// The entries that `manifest` asks for, sorted by path (so parents come first), with the binaries read and checked.
pub fn stage(manifest: &Manifest, agent: &Path) -> Result<Vec<Entry>, Error> {
    let mut stage = Stage(BTreeMap::new());
    for directory in &manifest.directory {
        stage.add(&directory.path, directory.mode, Content::Directory)?;
    }
    for device in &manifest.device {
        let content = Content::CharacterDevice {
            major: device.major,
            minor: device.minor,
        };
        stage.add(&device.path, device.mode, content)?;
    }
    for executable in &manifest.executable {
        let file = match executable.source {
            Source::Agent => agent,
        };
        stage.add(
            &executable.path,
            executable.mode,
            Content::File(read_program(&executable.path, file)?),
        )?;
    }
    stage.check_parents()?;
    Ok(stage.0.into_values().collect())
}

/// Entries by name; the map's order is the archive's order.
struct Stage(BTreeMap<String, Entry>);

impl Stage {
    fn add(&mut self, path: &str, mode: u32, content: Content) -> Result<(), Error> {
        let name = archive_name(path)?;
        if mode > 0o7777 {
            return Err(Error::Mode {
                path: path.to_owned(),
                mode,
            });
        }
        let entry = Entry {
            name: name.to_owned(),
            permissions: mode,
            content,
        };
        match self.0.insert(name.to_owned(), entry) {
            None => Ok(()),
            Some(_) => Err(Error::Duplicate {
                path: path.to_owned(),
            }),
        }
    }

    fn check_parents(&self) -> Result<(), Error> {
        for name in self.0.keys() {
            let Some((parent, _)) = name.rsplit_once('/') else {
                continue;
            };
            if self
                .0
                .get(parent)
                .is_none_or(|entry| entry.content != Content::Directory)
            {
                return Err(Error::NoParent {
                    path: format!("/{name}"),
                    parent: format!("/{parent}"),
                });
            }
        }
        Ok(())
    }
}

/// The path without its leading slash, once it is known to mean one place only.
fn archive_name(path: &str) -> Result<&str, Error> {
    const PATH_MAX: usize = 4096; // linux/limits.h, the NUL included
    if path.len() >= PATH_MAX {
        return Err(Error::PathTooLong {
            path: path.to_owned(),
        });
    }
    path.strip_prefix('/')
        .filter(|name| !name.contains('\0'))
        .filter(|name| name.split('/').all(|part| !matches!(part, "" | "." | "..")))
        // The name that ends an archive cannot be an entry's.
        .filter(|name| *name != "TRAILER!!!")
        .ok_or_else(|| Error::Path {
            path: path.to_owned(),
        })
}

fn read_program(path: &str, file: &Path) -> Result<Vec<u8>, Error> {
    let image = fs::read(file).map_err(|source| Error::Binary {
        path: path.to_owned(),
        file: file.to_owned(),
        source,
    })?;
    elf::check_static_program(&image).map_err(|source| Error::Program {
        path: path.to_owned(),
        file: file.to_owned(),
        source,
    })?;
    Ok(image)
}
