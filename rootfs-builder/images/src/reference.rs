//! How an image is named: `[TRANSPORT:]PLACE[:NAME]`, with skopeo's words for transports.

use std::path::{Path, PathBuf};

use super::Error;

/// An engine that keeps images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    Podman,
    Docker,
    Containerd,
}

/// Where an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// A directory with an OCI layout, or an archive; which image of several.
    #[doc(hidden)]
    File(PathBuf, Option<String>),
    /// What an engine calls it.
    #[doc(hidden)]
    Engine(EngineImage),
}

/// What an engine calls an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineImage {
    pub(crate) engine: Engine,
    pub(crate) name: String,
}

/// Transports of files: what they name is looked at, so that they all mean the same.
const FILES: [&str; 3] = ["oci", "oci-archive", "docker-archive"];
const ENGINES: [(&str, Engine); 6] = [
    ("containers-storage", Engine::Podman),
    ("podman", Engine::Podman),
    ("docker-daemon", Engine::Docker),
    ("docker", Engine::Docker),
    ("containerd", Engine::Containerd),
    ("nerdctl", Engine::Containerd),
];

const NOWHERE: &str = "there is no such file; name a directory or an archive, or an engine's image as podman:NAME, docker:NAME or containerd:NAME";

impl Reference {
    /// Whether a word names an image, and no container: ids have neither `/` nor `:`. Where there
    /// is no bundle, a file that is there is an image as well.
    pub fn is_one(word: &str) -> bool {
        let is_file = || !Path::new("config.json").exists() && Path::new(word).is_file();
        word.contains(['/', ':']) || is_file()
    }

    /// Reads one.
    ///
    /// # Errors
    /// It is none of the forms.
    pub fn parse(word: &str) -> Result<Reference, Error> {
        let wrong = |why| Err(Error::Reference(word.into(), why));
        let Some((transport, rest)) = word.split_once(':') else {
            return match word {
                "" => wrong("it is empty"),
                path if Path::new(path).exists() => Ok(Reference::File(path.into(), None)),
                _ => wrong(NOWHERE),
            };
        };
        if let Some((_, engine)) = ENGINES.iter().find(|(name, _)| *name == transport) {
            return match rest {
                "" => wrong("no name follows the engine's"),
                name if name.starts_with('/') => wrong(
                    "nothing is fetched from a registry: pull it by an engine, and leave out the slashes",
                ),
                name if name.starts_with('-') => wrong("a name does not begin with a dash"),
                name => Ok(Reference::Engine(EngineImage {
                    engine: *engine,
                    name: name.into(),
                })),
            };
        }
        let place = match FILES.contains(&transport) {
            true => rest,
            false => word,
        };
        // A path may have colons of its own: what is there decides.
        let whole = Path::new(place);
        match place.split_once(':') {
            _ if place.is_empty() => wrong("no path follows"),
            None if !whole.exists() => wrong(NOWHERE),
            Some((path, name)) if !path.is_empty() && !whole.exists() => match name {
                "" => wrong("no name follows the colon"),
                name if Path::new(path).exists() => {
                    Ok(Reference::File(path.into(), Some(name.into())))
                }
                _ => wrong(NOWHERE),
            },
            _ => Ok(Reference::File(place.into(), None)),
        }
    }
}
