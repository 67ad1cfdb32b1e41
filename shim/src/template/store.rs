//! Where templates are kept: `STATE/.templates`, root's alone, on the tmpfs of the ledgers.
//!
//! ```text
//! KEY/state, memory    what the VMM has written; read-only
//! KEY/touched          what a machine has touched that went on from it, as its VMM has learned
//! KEY/manifest.json    what it was made from, and what the files were when it was finished
//! KEY.tmp-PID          one that is being made, or removed
//! KEY.tmp-PID/trial    the root of a container that shows that it works
//! KEY.lock             locked by who makes it; what stays says why that failed
//! ```
//!
//! A template is whole or not there: its directory gets its name when all of it has been written.
//! A file's change time cannot be set, so that whatever has happened to a file since shows.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::key::{Basis, Host, Key, Shape, ns};

const DIRECTORY: &str = ".templates";
const STATE: &str = "state";
const MEMORY: &str = "memory";
const TOUCHED: &str = "touched";
const MANIFEST: &str = "manifest.json";
const TRIAL: &str = "trial";
const TEMPORARY: &str = ".tmp-";
const LOCK: &str = ".lock";
/// Bytes that are free where a template is made: several times what one takes.
const ROOM: u64 = 128 << 20;
/// Most templates: each has some 30 MiB of the host's memory.
pub(super) const MOST: usize = 8;
/// How long nobody tries again to make one that could not be made.
pub(super) const BACK_OFF: Duration = Duration::from_secs(600);
/// Longest manifest, and longest reason, in bytes.
const MAX_MANIFEST: u64 = 64 << 10;
const MAX_REASON: u64 = 512;

/// All templates of a state directory.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

/// What a finished file was.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Seal {
    inode: u64,
    size: u64,
    ctime_ns: i64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    basis: Basis,
    state: Seal,
    memory: Seal,
    touched: Seal,
}

/// State, memory, and what machines touch of it.
pub type Files = [File; 3];

/// A template, for who only looks.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// Its name.
    pub key: Key,
    /// What it was made from, if that can be read.
    pub basis: Option<Basis>,
    /// What it takes of the host's memory.
    pub bytes: u64,
    /// Since a pod has gone on from it, or since it was made.
    pub idle_secs: u64,
    /// Why no pod will go on from it any more.
    pub refused: Option<String>,
}

/// What was tidied away, or would be.
#[derive(Debug, Serialize)]
pub struct Swept {
    /// In the store.
    #[serde(rename = "template")]
    pub name: String,
    /// Why nobody has a use for it.
    pub reason: String,
    /// Why it is still there.
    pub left: Option<String>,
}

/// Who wants to make a template finds this.
#[derive(Debug)]
pub enum Begun {
    /// It is there.
    There,
    /// Somebody makes it.
    Busy,
    /// It is his to make.
    Building(Box<Building>),
}

/// A template that is being made.
#[derive(Debug)]
pub struct Building {
    store: Store,
    basis: Basis,
    directory: PathBuf,
    files: Files,
    lock: File,
}

impl Store {
    /// Of the state directory.
    pub fn at(state: &Path) -> Store {
        let directory = state.join(DIRECTORY);
        Store { directory }
    }

    /// The files of the template of this basis. One that is damaged is dropped.
    pub fn open(&self, basis: &Basis) -> Option<Files> {
        let key = basis.key();
        let refused = match self.checked(&key) {
            Ok((found, files)) if found == *basis => return Some(files),
            Ok(_) => "its manifest is another one's".to_string(),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.has(&key) => {
                return None;
            }
            Err(error) => error.to_string(),
        };
        tracing::warn!(%key, refused, "a template is damaged and is dropped");
        if let Err(error) = self.drop(&key) {
            tracing::warn!(%key, %error, "a damaged template cannot be removed");
        }
        None
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.directory.join(key.to_string())
    }

    fn beside(&self, key: &Key, suffix: &str) -> PathBuf {
        self.directory.join(format!("{key}{suffix}"))
    }

    /// Whether nobody has ever had a template made here.
    pub fn is_empty(&self) -> bool {
        self.names().map_or(true, |names| names.is_empty())
    }

    /// Whether there is one, in whatever state.
    pub fn has(&self, key: &Key) -> bool {
        self.path(key).symlink_metadata().is_ok()
    }

    /// A template whose files are what they were.
    fn checked(&self, key: &Key) -> io::Result<(Basis, Files)> {
        let path = self.path(key);
        let file = regular(&path.join(MANIFEST))?;
        let mut text = Vec::new();
        (&file).take(MAX_MANIFEST).read_to_end(&mut text)?;
        let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| {
            let text = format!("{MANIFEST} is not understood: {error}");
            io::Error::other(text)
        })?;
        let sealed = |name: &str, seal: &Seal| {
            let file = regular(&path.join(name))?;
            match Seal::of(&file)? == *seal {
                true => Ok(file),
                false => Err(io::Error::other(format!(
                    "the file {name} has been written to, or is another one"
                ))),
            }
        };
        let state = sealed(STATE, &manifest.state)?;
        let memory = sealed(MEMORY, &manifest.memory)?;
        let touched = sealed(TOUCHED, &manifest.touched)?;
        Ok((manifest.basis, [state, memory, touched]))
    }

    /// Notes that a pod goes on from it: those that nobody uses go first.
    pub fn touch(&self, key: &Key) {
        let file = File::open(self.path(key).join(MANIFEST));
        // It may have gone meanwhile.
        let _ = file.and_then(|file| file.set_modified(SystemTime::now()));
    }

    /// Why nobody should make this template now.
    pub fn hold_off(&self, key: &Key) -> Option<String> {
        Some(match self.mark(key)?.as_str() {
            "" => "somebody makes it, or has died of it".into(),
            reason => format!("the last one could not be made or used: {reason}"),
        })
    }

    /// What the last one who made it, or tried, has left, if that is not long ago.
    fn mark(&self, key: &Key) -> Option<String> {
        let file = File::open(self.beside(key, LOCK)).ok()?;
        let since = file.metadata().and_then(|data| data.modified()).ok()?;
        if since.elapsed().unwrap_or_default() >= BACK_OFF {
            return None;
        }
        let mut reason = Vec::new();
        file.take(MAX_REASON).read_to_end(&mut reason).ok()?;
        Some(String::from_utf8_lossy(&reason).trim_end().into())
    }

    /// Drops a template that the VMM has refused; nobody makes another one at once.
    pub fn refuse(&self, key: &Key, reason: &str) {
        let lock = self.open_lock(key);
        // Gone first: the reason may find no room.
        let dropped = self.drop(key);
        let marked = lock.and_then(|lock| mark(&lock, reason));
        if let Err(error) = dropped.and(marked) {
            tracing::warn!(%key, %error, "a template that is refused cannot be removed");
        }
    }

    /// `false`: there is none. Pods that go on from it have its files open.
    pub fn drop(&self, key: &Key) -> io::Result<bool> {
        if !self.has(key) {
            return Ok(false);
        }
        let away = self.temporary(key);
        fs::rename(self.path(key), &away)?;
        remove(&away)?;
        self.tidy();
        Ok(true)
    }

    fn temporary(&self, key: &Key) -> PathBuf {
        self.beside(key, &format!("{TEMPORARY}{}", std::process::id()))
    }

    /// Leaves no empty directories behind.
    fn tidy(&self) {
        if fs::remove_dir(&self.directory).is_ok()
            && let Some(state) = self.directory.parent()
        {
            let _ = fs::remove_dir(state);
        }
    }

    fn open_lock(&self, key: &Key) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options.mode(0o600).open(self.beside(key, LOCK))
    }

    /// `None`: somebody has it.
    fn lock(&self, key: &Key) -> io::Result<Option<File>> {
        let path = self.beside(key, LOCK);
        linux::descriptor::lock_file(&path, libc::LOCK_EX | libc::LOCK_NB)
    }

    /// Begins to make the template of this basis.
    pub fn begin(&self, basis: Basis) -> io::Result<Begun> {
        let key = basis.key();
        match DirBuilder::new().mode(0o700).create(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let Some(lock) = self.lock(&key)? else {
            return Ok(Begun::Busy);
        };
        if self.open(&basis).is_some() {
            fs::remove_file(self.beside(&key, LOCK))?;
            return Ok(Begun::There);
        }
        self.has_room()?;
        // What it says is an older try's, and its age that of this one.
        mark(&lock, "")?;
        // And the half of a dead one's.
        let half = format!("{key}{TEMPORARY}");
        for name in self.names()?.iter().filter(|name| name.starts_with(&half)) {
            remove(&self.directory.join(name))?;
        }
        let directory = self.temporary(&key);
        let make = |name: &str| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(0o600);
            options.open(directory.join(name))
        };
        DirBuilder::new().mode(0o700).create(&directory)?;
        let files = [make(STATE)?, make(MEMORY)?, make(TOUCHED)?];
        Ok(Begun::Building(Box::new(Building {
            store: self.clone(),
            basis,
            directory,
            files,
            lock,
        })))
    }

    /// Leaves the state directory, which is small on many nodes, to pods.
    fn has_room(&self) -> io::Result<()> {
        let free = nix::sys::statvfs::statvfs(&self.directory)?;
        let free = free.blocks_available() as u64 * free.fragment_size() as u64;
        match free >= ROOM {
            true => Ok(()),
            false => Err(io::Error::other(format!(
                "{} has {} MiB left, {} are needed; drop templates, or make it larger",
                self.directory.display(),
                free >> 20,
                ROOM >> 20
            ))),
        }
    }

    /// All of them, the one that was used last first.
    pub fn list(&self) -> io::Result<Vec<Listed>> {
        let host = Host::here()?;
        let keys = self
            .names()?
            .into_iter()
            .filter_map(|name| Key::parse(&name));
        let mut listed: Vec<Listed> = keys.map(|key| self.look(key, &host)).collect();
        listed.sort_by_key(|listed| listed.idle_secs);
        Ok(listed)
    }

    fn look(&self, key: Key, host: &Host) -> Listed {
        let path = self.path(&key);
        let size = |name: &str| {
            path.join(name)
                .metadata()
                .map_or(0, |data| data.blocks() * 512)
        };
        let used = path
            .join(MANIFEST)
            .metadata()
            .and_then(|data| data.modified());
        let (basis, refused) = match self.checked(&key) {
            Ok((basis, _)) => {
                let refused = basis.outdated(host);
                (Some(basis), refused)
            }
            Err(error) => (None, Some(error.to_string())),
        };
        Listed {
            bytes: [STATE, MEMORY, TOUCHED].map(size).iter().sum(),
            idle_secs: used.map_or(u64::MAX, |used| {
                used.elapsed().unwrap_or_default().as_secs()
            }),
            key,
            basis,
            refused,
        }
    }

    /// Names of what is in the store; none where there is no store.
    fn names(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        let mut names: Vec<String> = names
            .filter_map(io::Result::transpose)
            .collect::<io::Result<_>>()?;
        names.sort();
        Ok(names)
    }

    /// Removes what no pod will use, and what dead makers have left.
    ///
    /// # Errors
    /// Only when the store cannot be read; what cannot be removed is in [`Swept::left`].
    pub fn sweep(&self, dry_run: bool) -> io::Result<Vec<Swept>> {
        let mut swept = Vec::new();
        let mut note = |name: String, reason: String, remove: &dyn Fn() -> io::Result<()>| {
            let removed = if dry_run { Ok(()) } else { remove() };
            let left = removed.err().map(|error| error.to_string());
            swept.push(Swept { name, reason, left });
        };
        for listed in self.list()? {
            if let Some(reason) = listed.refused {
                let drop = || self.drop(&listed.key).map(|_| ());
                note(listed.key.to_string(), reason, &drop);
            }
        }
        for name in self.names()? {
            let path = self.directory.join(&name);
            let remove = || match name.ends_with(LOCK) {
                true => fs::remove_file(&path),
                false => remove(&path),
            };
            if self.is_left(&name) {
                note(name.clone(), "whoever made it is dead".into(), &remove);
            }
        }
        if !dry_run {
            self.tidy();
        }
        Ok(swept)
    }

    /// Whether this is what a maker has left who does not live any more.
    fn is_left(&self, name: &str) -> bool {
        let parts = name.split_once('.');
        let Some((Some(key), suffix)) = parts.map(|(key, suffix)| (Key::parse(key), suffix)) else {
            return false;
        };
        // A lock that says why there is no template keeps others from trying.
        let says_why = || self.mark(&key).is_some_and(|reason| !reason.is_empty());
        !(self.is_being_made(&key) || suffix == &LOCK[1..] && says_why())
    }

    fn is_being_made(&self, key: &Key) -> bool {
        let Ok(file) = File::open(self.beside(key, LOCK)) else {
            return false;
        };
        linux::descriptor::lock(file.as_fd(), libc::LOCK_SH | libc::LOCK_NB).is_err()
    }
}

impl Building {
    /// Where VMMs write.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// The same from their start, to be read.
    pub fn reopened(&self) -> io::Result<Files> {
        let open = |name: &str| regular(&self.directory.join(name));
        Ok([open(STATE)?, open(MEMORY)?, open(TOUCHED)?])
    }

    /// Its name.
    pub fn key(&self) -> Key {
        self.basis.key()
    }

    /// Where a container may have its root until this is published.
    pub fn trial(&self) -> PathBuf {
        self.directory.join(TRIAL)
    }

    /// Where it is made.
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// Of the machine that is wanted.
    pub fn shape(&self) -> &Shape {
        &self.basis.shape
    }

    /// Gives it its name. When there are too many, those that were used least recently go.
    pub fn publish(self) -> io::Result<Key> {
        let key = self.key();
        let published = self.try_publish(&key);
        match &published {
            Ok(()) => fs::remove_file(self.store.beside(&key, LOCK))?,
            Err(error) => self.fail(&error.to_string()),
        }
        published?;
        let others = self.store.list().unwrap_or_default().into_iter();
        for listed in others.filter(|listed| listed.key != key).skip(MOST - 1) {
            if let Err(error) = self.store.drop(&listed.key) {
                tracing::warn!(key = %listed.key, %error, "a template too many cannot be removed");
            }
        }
        Ok(key)
    }

    fn try_publish(&self, key: &Key) -> io::Result<()> {
        for file in &self.files {
            file.set_permissions(Permissions::from_mode(0o400))?;
        }
        remove_trial(&self.directory)?;
        let [state, memory, touched] = &self.files;
        if state.metadata()?.len() == 0 || memory.metadata()?.len() == 0 {
            return Err(io::Error::other("the machine has written nothing"));
        }
        let manifest = Manifest {
            basis: self.basis.clone(),
            state: Seal::of(state)?,
            memory: Seal::of(memory)?,
            touched: Seal::of(touched)?,
        };
        let mut options = OpenOptions::new();
        let options = options.write(true).create_new(true).mode(0o400);
        let mut file = options.open(self.directory.join(MANIFEST))?;
        file.write_all(&serde_json::to_vec_pretty(&manifest)?)?;
        fs::rename(&self.directory, self.store.path(key))
    }

    /// Leaves nothing but the reason, by which nobody tries again at once.
    pub fn fail(&self, reason: &str) {
        // Room first: the files may have taken all that there was.
        let removed = remove(&self.directory);
        if let Err(error) = removed.and(mark(&self.lock, reason)) {
            tracing::warn!(%error, "a template that was not finished is left for `bulkhead gc`");
        }
    }
}

impl Seal {
    fn of(file: &File) -> io::Result<Seal> {
        let data = file.metadata()?;
        Ok(Seal {
            inode: data.ino(),
            size: data.size(),
            ctime_ns: ns(data.ctime(), data.ctime_nsec()),
        })
    }
}

/// Opens a file of whoever runs this, which is root, for reading.
fn regular(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    // A pipe in its place is not waited for.
    let options = options
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path)?;
    let data = file.metadata()?;
    match data.is_file() && data.uid() == nix::unistd::geteuid().as_raw() {
        true => Ok(file),
        false => Err(io::Error::other(format!(
            "{} is no file of root's",
            path.display()
        ))),
    }
}

/// Writes why there is no template, and when that was.
fn mark(mut lock: &File, reason: &str) -> io::Result<()> {
    lock.set_len(0)?;
    lock.write_all(reason.as_bytes())?;
    lock.set_modified(SystemTime::now())
}

fn remove_trial(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory.join(TRIAL)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes the directory of a template and what belongs into it, nothing else.
fn remove(directory: &Path) -> io::Result<()> {
    remove_trial(directory)?;
    for name in [STATE, MEMORY, TOUCHED, MANIFEST] {
        match fs::remove_file(directory.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    match fs::remove_dir(directory) {
        // Somebody else has come first.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}
