//! Where unpacked images are kept, and what containers write over them.
//!
//! ```text
//! DATA/images/KEY/root       what all layers make together; KEY is the SHA-256 of the configuration
//! DATA/images/KEY/config     the configuration, as the image has it
//! DATA/images/KEY/about      what it was called, and its size
//! DATA/images/KEY.lock       locked by who unpacks it, shared by who runs from it
//! DATA/images/KEY.tmp-PID    one that is being unpacked
//! DATA/containers/ID         what a container writes, locked as long as it runs
//! ```
//!
//! An image is whole or not there: its directory gets its name when all of it is on the disk. Root
//! alone may enter DATA: programs with set-id bits are of no use to others.

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io::{self, Seek},
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::SystemTime,
};

use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, statfs};
use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use super::{
    Error, Reference,
    layer::Root,
    manifest::{self, Found},
    source::{Hashed, Source, unpacked},
    tree,
};

const IMAGES: &str = "images";
const CONTAINERS: &str = "containers";
const ROOT: &str = "root";
const CONFIG: &str = "config";
const ABOUT: &str = "about";
const LOCK: &str = ".lock";
const TEMPORARY: &str = ".tmp-";

/// All images that were unpacked here.
#[derive(Clone, Debug)]
pub struct Store {
    data: PathBuf,
}

/// An unpacked image, which stays as long as this does.
#[derive(Debug)]
pub struct Image {
    /// The directory that its layers make: nobody writes to it.
    pub root: PathBuf,
    /// What its maker wants run.
    pub config: ImageConfiguration,
    /// SHA-256 of the configuration, hexadecimal.
    pub key: String,
    _lock: File,
}

/// Where a container writes; it goes with this.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    is_gone: bool,
    _lock: File,
}

/// An image, for who only looks.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// SHA-256 of its configuration.
    pub key: String,
    /// What it was called when it was unpacked.
    pub name: String,
    /// What its files have.
    pub bytes: u64,
    /// Since a container has begun from it.
    pub idle_secs: u64,
    /// A container runs from it.
    pub in_use: bool,
}

/// What was tidied away, or would be.
#[derive(Debug, Serialize)]
pub struct Swept {
    /// Beneath DATA.
    #[serde(rename = "data")]
    pub name: String,
    /// Why nobody has a use for it.
    pub reason: &'static str,
    /// Why it is still there.
    pub left: Option<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct About {
    name: String,
    bytes: u64,
}

fn is_key(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn make(path: &Path) -> Result<(), Error> {
    let mut builder = DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(path);
    made.map_err(Error::io("make", path))
}

/// `false`: somebody else has it.
fn locked(file: &File) -> io::Result<bool> {
    match linux::descriptor::lock(file.as_fd(), libc::LOCK_EX | libc::LOCK_NB) {
        Ok(()) => Ok(true),
        Err(nix::errno::Errno::EWOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

impl Store {
    /// Of the data directory, which is made when there is something to keep.
    pub fn at(data: &Path) -> Store {
        let data = data.into();
        Store { data }
    }

    fn images(&self) -> PathBuf {
        self.data.join(IMAGES)
    }

    fn beside(&self, key: &str, suffix: &str) -> PathBuf {
        self.images().join(format!("{key}{suffix}"))
    }

    /// The image that is called so, unpacked if it is not yet; `told` hears what takes its time.
    ///
    /// # Errors
    /// It is not there, not for this machine, damaged, or does not fit the disk; nothing is left.
    pub fn image(&self, word: &str, told: &dyn Fn(&str)) -> Result<Image, Error> {
        let reference = Reference::parse(word)?;
        make(&self.images())?;
        let (source, name) = match &reference {
            Reference::File(path, name) => (Source::open(path, &self.images())?, name.as_deref()),
            Reference::Engine(image) => {
                let kept = image.kept();
                if let Some((key, _)) = &kept
                    && let Some(found) = self.kept(key)?
                {
                    return Ok(found);
                }
                let format = kept.map_or("oci-archive", |(_, format)| format);
                told("the engine exports its image");
                let images = self.images();
                let failed = || Error::io("write in", &images);
                let mut file = tempfile::tempfile_in(&images).map_err(failed())?;
                image.export(format, &file)?;
                file.rewind().map_err(failed())?;
                (Source::archive(Path::new(word), file, &images)?, None)
            }
        };
        let found = manifest::find(&source, name)?;
        match self.kept(&found.key)? {
            Some(image) => Ok(image),
            None => self.unpack(&source, &found, word, told),
        }
    }

    /// The lock of a key; `None`: somebody has it, and `operation` has `LOCK_NB`.
    fn lock(&self, key: &str, operation: libc::c_int) -> Result<Option<File>, Error> {
        let path = self.beside(key, LOCK);
        let taken = linux::descriptor::lock_file(&path, operation);
        taken.map_err(Error::io("lock", &path))
    }

    /// An image that is there. `key` may be what somebody else says.
    fn kept(&self, key: &str) -> Result<Option<Image>, Error> {
        let directory = self.images().join(key);
        if !is_key(key) || !directory.is_dir() {
            return Ok(None);
        }
        let Some(lock) = self.lock(key, libc::LOCK_SH)? else {
            return Ok(None);
        };
        let path = directory.join(CONFIG);
        let text = match fs::read(&path) {
            // Removed before the lock was ours.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(Error::io("read", &path))?,
        };
        let config = serde_json::from_slice(&text);
        let about = File::open(directory.join(ABOUT));
        // Those that nobody uses are seen by their age.
        let _ = about.and_then(|file| file.set_modified(SystemTime::now()));
        Ok(Some(Image {
            root: directory.join(ROOT),
            config: config.map_err(|source| Error::Format {
                what: "configuration",
                source,
            })?,
            key: key.into(),
            _lock: lock,
        }))
    }

    fn unpack(
        &self,
        source: &Source,
        found: &Found,
        word: &str,
        told: &dyn Fn(&str),
    ) -> Result<Image, Error> {
        let key = &found.key;
        loop {
            if let Some(_lock) = self.lock(key, libc::LOCK_EX | libc::LOCK_NB)? {
                if !self.images().join(key).is_dir() {
                    self.make(source, found, word, told)?;
                }
            } else {
                told("another process unpacks the same image: waiting for it");
                // Shared, as whoever runs from it has it: a container is not waited for.
                self.lock(key, libc::LOCK_SH)?;
            }
            if let Some(image) = self.kept(key)? {
                return Ok(image);
            }
        }
    }

    /// Unpacks an image that is not there; its lock is ours.
    fn make(
        &self,
        source: &Source,
        found: &Found,
        word: &str,
        told: &dyn Fn(&str),
    ) -> Result<(), Error> {
        let key = &found.key;
        // The halves of dead ones.
        let half = format!("{key}{TEMPORARY}");
        for name in names(&self.images())? {
            if name.starts_with(&half) {
                let path = self.images().join(name);
                tree::remove(&path).map_err(Error::io("remove", &path))?;
            }
        }
        let half = self.beside(key, &format!("{TEMPORARY}{}", std::process::id()));
        let done = fill(&half, source, found, word, told).and_then(|()| {
            let to = self.images().join(key);
            fs::rename(&half, &to).map_err(Error::io("finish", to))
        });
        if done.is_err() {
            // What has failed says more than what cannot be removed, which gc tells.
            let _ = tree::remove(&half);
            let _ = fs::remove_file(self.beside(key, LOCK));
        }
        done
    }

    /// A place for what a container writes over an image.
    ///
    /// # Errors
    /// One of this id runs.
    pub fn scratch(&self, id: &str, image: &Image) -> Result<Scratch, Error> {
        let path = self.data.join(CONTAINERS).join(id);
        let lock = loop {
            make(&path)?;
            let lock = match File::open(&path) {
                // The one before has just ended, or gc has come by.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                lock => lock.map_err(Error::io("open", &path))?,
            };
            let busy = || io::Error::other("a container of this name runs: choose another --name");
            match locked(&lock) {
                Ok(true) => {}
                Ok(false) => return Err(Error::io("use", &path)(busy())),
                Err(error) => return Err(Error::io("lock", &path)(error)),
            }
            let same = |one: &fs::Metadata, other: &fs::Metadata| {
                (one.dev(), one.ino()) == (other.dev(), other.ino())
            };
            match (lock.metadata(), path.metadata()) {
                (Ok(ours), Ok(there)) if same(&ours, &there) => break lock,
                _ => {}
            }
        };
        let mut scratch = Scratch {
            path,
            is_gone: false,
            _lock: lock,
        };
        let kind = statfs(&scratch.path);
        let kind = kind.map_err(|error| Error::io("look at", &scratch.path)(error.into()))?;
        if kind.filesystem_type() == OVERLAYFS_SUPER_MAGIC {
            scratch.clear()?;
            return Err(Error::Overlay(self.data.clone()));
        }
        for name in [Scratch::UPPER, Scratch::WORK, Scratch::FILES] {
            let path = scratch.path.join(name);
            // What a dead one of this id has left.
            tree::remove(&path).map_err(Error::io("empty", &path))?;
            make(&path)?;
        }
        // It shows as the container's root.
        let upper = scratch.path.join(Scratch::UPPER);
        let dressed = image.root.metadata().and_then(|data| {
            std::os::unix::fs::chown(&upper, Some(data.uid()), Some(data.gid()))?;
            fs::set_permissions(&upper, Permissions::from_mode(data.mode() & 0o7777))
        });
        dressed.map_err(Error::io("make", &upper))?;
        Ok(scratch)
    }

    /// All of them, the one that was used last first.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let mut listed = Vec::new();
        for name in names(&self.images())?
            .into_iter()
            .filter(|name| is_key(name))
        {
            let about = self.images().join(&name).join(ABOUT);
            let (Ok(text), Ok(data)) = (fs::read(&about), about.metadata()) else {
                continue;
            };
            let about: About = serde_json::from_slice(&text).unwrap_or_default();
            let used = data
                .modified()
                .and_then(|at| at.elapsed().map_err(io::Error::other));
            let free = self.lock(&name, libc::LOCK_EX | libc::LOCK_NB)?;
            listed.push(Listed {
                key: name,
                name: about.name,
                bytes: about.bytes,
                idle_secs: used.unwrap_or_default().as_secs(),
                in_use: free.is_none(),
            });
        }
        listed.sort_by_key(|one| one.idle_secs);
        Ok(listed)
    }

    /// Removes one, by its key, the beginning of it, or its name.
    ///
    /// # Errors
    /// It is not there, or a container runs from it.
    pub fn remove(&self, word: &str) -> Result<String, Error> {
        let mut found = self.list()?;
        found.retain(|one| one.name == word || word.len() >= 6 && one.key.starts_with(word));
        let key = match found.as_slice() {
            [] => return Err(Error::NotKept(word.into())),
            [one] => one.key.clone(),
            several => {
                let keys = several.iter().map(|one| one.key[..12].to_owned());
                let (name, keys) = (word.into(), keys.collect());
                return Err(Error::Ambiguous { name, keys });
            }
        };
        let Some(_lock) = self.lock(&key, libc::LOCK_EX | libc::LOCK_NB)? else {
            return Err(Error::InUse(key));
        };
        let path = self.images().join(&key);
        // Half of an image is none: its name goes first.
        let away = self.beside(&key, &format!("{TEMPORARY}{}", std::process::id()));
        tree::remove(&away).map_err(Error::io("remove", &away))?;
        fs::rename(&path, &away).map_err(Error::io("remove", &path))?;
        tree::remove(&away).map_err(Error::io("remove", &away))?;
        let lock = self.beside(&key, LOCK);
        fs::remove_file(&lock).map_err(Error::io("remove", lock))?;
        Ok(key)
    }

    /// Removes what the dead have left.
    ///
    /// # Errors
    /// Only when the store cannot be read; what cannot be removed is in [`Swept::left`].
    pub fn sweep(&self, dry_run: bool) -> Result<Vec<Swept>, Error> {
        let mut swept = Vec::new();
        let mut note = |name: String, reason, path: &Path| {
            let removed = match dry_run {
                true => Ok(()),
                false => tree::remove(path),
            };
            let left = removed.err().map(|error| error.to_string());
            swept.push(Swept { name, reason, left });
        };
        for name in names(&self.images())? {
            let key = match (name.split_once(TEMPORARY), name.strip_suffix(LOCK)) {
                (Some((key, _)), _) => key,
                (_, Some(key)) if !self.images().join(key).is_dir() => key,
                _ => continue,
            };
            if let Some(_lock) = self.lock(key, libc::LOCK_EX | libc::LOCK_NB)? {
                let path = self.images().join(&name);
                note(
                    format!("{IMAGES}/{name}"),
                    "whoever unpacked it is dead",
                    &path,
                );
                if name.contains(TEMPORARY) && !dry_run && !self.images().join(key).is_dir() {
                    let _ = fs::remove_file(self.beside(key, LOCK));
                }
            }
        }
        for name in names(&self.data.join(CONTAINERS))? {
            let path = self.data.join(CONTAINERS).join(&name);
            let free = File::open(&path).and_then(|file| Ok((locked(&file)?, file)));
            if let Ok((true, _lock)) = free {
                note(
                    format!("{CONTAINERS}/{name}"),
                    "its container has ended",
                    &path,
                );
            }
        }
        Ok(swept)
    }
}

/// Unpacks an image into a directory that is made for it.
fn fill(
    half: &Path,
    source: &Source,
    found: &Found,
    word: &str,
    told: &dyn Fn(&str),
) -> Result<(), Error> {
    make(half)?;
    let path = half.join(ROOT);
    make(&path)?;
    let opened = fs::set_permissions(&path, Permissions::from_mode(0o755));
    let root = opened
        .and_then(|()| Root::at(&path))
        .map_err(Error::io("make", &path))?;
    let (count, mut bytes) = (found.layers.len(), 0_u64);
    for (index, (name, sum)) in found.layers.iter().enumerate() {
        told(&format!("unpacking layer {} of {count}", index + 1));
        let part = source.part("layer", name)?;
        let wrong = |source| Error::Entry {
            layer: index + 1,
            entry: "its start".into(),
            source,
        };
        let mut from = Hashed::new(unpacked(part).map_err(wrong)?);
        bytes = root.apply(index + 1, &mut from)?.saturating_add(bytes);
        manifest::check(index + 1, sum, from.sum())?;
    }
    // As one would say it from elsewhere.
    let name = match fs::canonicalize(word) {
        Ok(path) => path.to_string_lossy().into_owned(),
        Err(_) => word.to_owned(),
    };
    let about = serde_json::to_vec(&About { name, bytes }).expect("made of strings and numbers");
    for (name, text) in [(CONFIG, &found.text), (ABOUT, &about)] {
        let path = half.join(name);
        fs::write(&path, text).map_err(Error::io("write", path))?;
    }
    root.sync().map_err(Error::io("write", half))
}

fn names(directory: &Path) -> Result<Vec<String>, Error> {
    let read = || -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(io::Result::transpose).collect()
    };
    let mut names = read().map_err(Error::io("read", directory))?;
    names.sort();
    Ok(names)
}

impl Scratch {
    const UPPER: &str = "upper";
    const WORK: &str = "work";
    const FILES: &str = "files";

    /// Options of an overlay of this over an image.
    pub fn overlay(&self, image: &Image) -> Vec<String> {
        [
            ("lowerdir", &image.root),
            ("upperdir", &self.path.join(Scratch::UPPER)),
            ("workdir", &self.path.join(Scratch::WORK)),
        ]
        .map(|(key, path)| format!("{key}={}", path.display()))
        .into()
    }

    /// Writes a file that the container sees somewhere.
    ///
    /// # Errors
    /// The disk's.
    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf, Error> {
        let path = self.path.join(Scratch::FILES).join(name);
        let written = fs::write(&path, text)
            .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o644)));
        written.map_err(Error::io("write", &path))?;
        Ok(path)
    }

    /// Removes all that the container has written.
    ///
    /// # Errors
    /// What stays is removed by `bulkhead gc`.
    pub fn remove(mut self) -> Result<(), Error> {
        self.clear()
    }

    /// Once: then somebody else may have the path.
    fn clear(&mut self) -> Result<(), Error> {
        match std::mem::replace(&mut self.is_gone, true) {
            true => Ok(()),
            false => tree::remove(&self.path).map_err(Error::io("remove", &self.path)),
        }
    }
}

/// On the way out of an error, which says more than what cannot be removed.
impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = self.clear();
    }
}
