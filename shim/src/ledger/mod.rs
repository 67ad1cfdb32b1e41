//! The record of every host resource that a sandbox holds.
//!
//! `STATE/NAMESPACE/SANDBOX/ledger` is a file of JSON lines. A line is written before the resource is taken, and another one
//! after it has been given back. So whatever moment the owner dies at, the ledger names a superset of what exists:
//!
//! ```text
//! take (line written) ──► acquire ──► ... ──► give back ──► release (line written)
//!        crash here: nothing to undo   crash here: undone by replay   crash here: undone twice, harmless
//! ```
//!
//! The live owner holds an flock on the file, which the kernel drops when it dies, however it dies. [`gc`](collect) takes
//! over the ledgers whose lock is free and replays them: processes first, else in reverse order, past errors, without following a mount or a
//! symbolic link, without a recursive delete, and without a lazy unmount. What cannot be undone stays in the ledger.
#![forbid(unsafe_code)]

mod gc;
mod list;
mod record;
mod teardown;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

pub use gc::{Collected, Reclaimed, collect, reclaim};
pub use list::{Listed, list};
pub use record::{Owner, Resource, Ticket};
pub use teardown::Leftover;

use record::{Entry, Line};

use crate::sys::{
    files::{Failed, failed},
    process::ProcessId,
};

/// Name of the file in a sandbox' directory.
pub const FILE_NAME: &str = "ledger";
/// A shorter ledger that is about to take the place of the ledger.
const SHORTER: &str = "ledger.new";
/// How often a directory may vanish under our hands before that is an error.
const RACES: usize = 1000;
/// How many lines about what is no longer held are worth a shorter ledger.
const MOST_DEAD: usize = 512;

/// Why a ledger could not be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The id is taken.
    #[error(
        "sandbox {id} exists already in namespace {namespace}; choose another id, or run `bulkhead gc` if its owner is dead"
    )]
    Exists {
        /// The sandbox.
        id: String,
        /// Its namespace.
        namespace: String,
    },
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] Failed),
    /// The resource is not where a sandbox keeps such things.
    #[error("{0} is not a place that this sandbox may hold")]
    Foreign(Resource),
}

/// The record of one sandbox, open for its owner.
#[derive(Debug)]
pub struct Ledger {
    file: File,
    state: PathBuf,
    directory: PathBuf,
    owner: Option<Owner>,
    next: u64,
    held: Vec<Entry>,
    /// Lines of the file about what is no longer held.
    dead: usize,
}

impl Ledger {
    /// Reserves the id: makes `STATE/NAMESPACE/SANDBOX` and the ledger in it, locked by this process.
    ///
    /// # Errors
    /// [`Error::Exists`] when the directory is there already, whoever made it.
    pub fn create(state: &Path, namespace: &str, sandbox: &str) -> Result<Ledger, Error> {
        let guard = lock_namespace(state, namespace)?;
        let directory = state.join(namespace).join(sandbox);
        let made = fs::DirBuilder::new().mode(0o700).create(&directory);
        match made {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::Exists {
                    id: sandbox.into(),
                    namespace: namespace.into(),
                });
            }
            other => other.map_err(failed("make the directory", &directory))?,
        }
        let opened = Ledger::begin(state, &directory);
        if opened.is_err() {
            // A full disk, perhaps: leave the id free.
            let _ = fs::remove_file(directory.join(FILE_NAME));
            let _ = fs::remove_dir(&directory);
            drop(guard);
            remove_if_empty(state, namespace);
        }
        opened
    }

    fn begin(state: &Path, directory: &Path) -> Result<Ledger, Error> {
        let path = directory.join(FILE_NAME);
        let file = open_new(&path)?;
        if !try_lock(&file).map_err(failed("lock", &path))? {
            return Err(failed("lock", &path)(io::ErrorKind::WouldBlock).into());
        }
        let owner = Owner(ProcessId::own());
        let mut ledger = Ledger {
            file,
            state: state.into(),
            directory: directory.into(),
            owner: Some(owner),
            next: 1,
            held: Vec::new(),
            dead: 0,
        };
        ledger.write(&Line::Owner(owner))?;
        Ok(ledger)
    }

    /// `STATE/NAMESPACE/SANDBOX`.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory of all namespaces.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Writes down that `resource` is about to be taken. Take it after this has succeeded, and only then.
    pub fn take(&mut self, resource: Resource) -> Result<Ticket, Error> {
        if !resource.belongs_to(&self.directory, &self.state) {
            return Err(Error::Foreign(resource));
        }
        let entry = Entry {
            id: Ticket(self.next),
            resource,
        };
        self.write(&Line::Take(entry.clone()))?;
        self.next += 1;
        let ticket = entry.id;
        self.held.push(entry);
        Ok(ticket)
    }

    /// Takes a name that must be unique on the host. `false`: another sandbox has it.
    pub fn claim(&mut self, name: &str, holder: &str) -> Result<bool, Error> {
        let claims = self.state.join(record::CLAIMS);
        let path = claims.join(name);
        if path.symlink_metadata().is_ok() {
            return Ok(false);
        }
        let ticket = self.take(Resource::Claim {
            path: path.clone(),
            holder: holder.into(),
        })?;
        loop {
            match fs::DirBuilder::new().mode(0o700).create(&claims) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed("make the directory", &claims)(error).into());
                }
                _ => {}
            }
            match std::os::unix::fs::symlink(holder, &path) {
                Ok(()) => return Ok(true),
                // The last claim went away, and the directory with it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    self.release(ticket)?;
                    return Ok(false);
                }
                Err(error) => return Err(failed("make the claim", &path)(error).into()),
            }
        }
    }

    /// Writes down that the resource has been given back, or was never got.
    pub fn release(&mut self, ticket: Ticket) -> Result<(), Error> {
        self.write(&Line::Release { id: ticket })?;
        self.held.retain(|entry| entry.id != ticket);
        self.dead += 2;
        if self.dead >= MOST_DEAD.max(2 * self.held.len())
            && let Err(error) = self.shorten()
        {
            // The long one is as good; the next lines try again.
            tracing::debug!(%error, "the ledger stays long");
            self.dead = 0;
        }
        Ok(())
    }

    /// Writes what is held to a new file and puts it in the ledger's place, whole and locked, so that whoever looks at any moment
    /// finds one of the two. A pod whose containers restart for months would else fill its host's /run.
    fn shorten(&mut self) -> Result<(), Error> {
        let path = self.directory.join(SHORTER);
        let _ = fs::remove_file(&path);
        let mut text = Vec::new();
        let owner = self.owner.map(Line::Owner);
        let held = self.held.iter().cloned().map(Line::Take);
        for line in owner.into_iter().chain(held) {
            text.extend(line.text());
        }
        let mut file = open_new(&path)?;
        let written = file
            .write_all(&text)
            .and_then(|()| match try_lock(&file)? {
                true => Ok(()),
                false => Err(io::ErrorKind::WouldBlock.into()),
            })
            .and_then(|()| fs::rename(&path, self.directory.join(FILE_NAME)));
        if written.is_err() {
            let _ = fs::remove_file(&path);
        }
        written.map_err(failed("write", &path))?;
        // The old one's lock goes with it: it is no longer the ledger, which whoever waits for the lock sees.
        self.file = file;
        self.dead = 0;
        Ok(())
    }

    /// Gives one resource of a live pod back and writes that down. A mount that is busy is an error at once: the fs process has
    /// let go of it before, and whoever else is there is not waited for.
    pub fn undo(&mut self, ticket: Ticket) -> Result<(), Leftover> {
        self.give_back(ticket, Duration::ZERO)
    }

    fn give_back(&mut self, ticket: Ticket, patience: Duration) -> Result<(), Leftover> {
        let Some(entry) = self.held.iter().find(|entry| entry.id == ticket).cloned() else {
            return Ok(());
        };
        teardown::undo(&entry.resource, patience).map_err(|error| Leftover {
            resource: entry.resource.clone(),
            error: error.to_string(),
        })?;
        // The resource is gone; a line that cannot be written now is replayed harmlessly later.
        let _ = self.release(ticket);
        Ok(())
    }

    /// What is held, oldest first.
    pub fn held(&self) -> impl Iterator<Item = &Resource> {
        self.held.iter().map(|entry| &entry.resource)
    }

    /// Gives everything back, processes first and else newest first, past errors; then removes the ledger and the sandbox' directory.
    ///
    /// What is left stays on record for a later `bulkhead gc`.
    pub fn teardown(mut self) -> Vec<Leftover> {
        let mut left = Vec::new();
        // Processes first, then the cgroup that may hold ones not yet recorded: what they had open makes mounts busy.
        let order = |entry: &Entry| match entry.resource {
            Resource::Process { .. } => 0,
            Resource::Cgroup { shared: false, .. } | Resource::ShimCgroup { .. } => 1,
            _ => 2,
        };
        let mut entries: Vec<&Entry> = self.held.iter().rev().collect();
        entries.sort_by_key(|entry| order(entry));
        let tickets: Vec<Ticket> = entries.iter().map(|entry| entry.id).collect();
        for ticket in tickets {
            if let Err(leftover) = self.give_back(ticket, teardown::PATIENCE) {
                left.push(leftover);
            }
        }
        if left.is_empty()
            && let Err(leftover) = self.remove()
        {
            left.push(leftover);
        }
        left
    }

    /// The last step: the file first, so that a directory without a ledger always means "nothing held".
    fn remove(self) -> Result<(), Leftover> {
        let leftover = |path: &Path| {
            let resource = Resource::Directory { path: path.into() };
            move |error: io::Error| Leftover {
                resource,
                error: error.to_string(),
            }
        };
        // What a kill in the middle of `shorten` has left.
        let _ = fs::remove_file(self.directory.join(SHORTER));
        let file = self.directory.join(FILE_NAME);
        fs::remove_file(&file).map_err(leftover(&file))?;
        fs::remove_dir(&self.directory).map_err(leftover(&self.directory))?;
        if let Some(namespace) = self
            .directory
            .strip_prefix(&self.state)
            .ok()
            .and_then(Path::parent)
        {
            remove_if_empty(&self.state, &namespace.to_string_lossy());
        }
        Ok(())
    }

    /// One line is one write(2) on a descriptor in append mode: whole, or cut off at its end by a full disk or a kill.
    fn write(&mut self, line: &Line) -> Result<(), Error> {
        let path = self.directory.join(FILE_NAME);
        let text = line.text();
        let written = self.file.write(&text).map_err(failed("write to", &path))?;
        if written < text.len() {
            // End the cut line, so that it cannot swallow the next one.
            let _ = self.file.write(b"\n");
            return Err(failed("write to", &path)(io::ErrorKind::WriteZero).into());
        }
        Ok(())
    }
}

fn open_new(path: &Path) -> Result<File, Failed> {
    OpenOptions::new()
        .append(true)
        .read(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed("make the ledger", path))
}

/// The state directory by a path without symbolic links (`/var/run` is one on most hosts); it is made when missing.
pub fn canonical_state(state: &Path) -> Result<PathBuf, Error> {
    loop {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(state)
            .map_err(failed("make the directory", state))?;
        match state.canonicalize() {
            // Tidied away by the last pod to go.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return Ok(other.map_err(failed("find", state))?),
        }
    }
}

/// Keeps creation, collection and removal of a namespace's directory apart. Dropping it unlocks.
struct NamespaceLock(#[allow(dead_code)] /* held for its lock */ File);

fn lock_namespace(state: &Path, namespace: &str) -> Result<NamespaceLock, Error> {
    let path = state.join(namespace);
    let mut races = 0;
    loop {
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&path);
        match made {
            // The last pod to go has tidied away the one above it, in the middle of this; or this
            // one, after mkdir(2) had found it and before the standard library has looked what it
            // is.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists
                ) && races < RACES =>
            {
                races += 1;
                continue;
            }
            other => other.map_err(failed("make the directory", &path))?,
        }
        let Ok(directory) = File::open(&path) else {
            // Another process has just tidied it away.
            continue;
        };
        flock(&directory, libc::LOCK_EX).map_err(failed("lock", &path))?;
        if is_same(&directory, &path) {
            return Ok(NamespaceLock(directory));
        }
    }
}

fn is_same(open: &File, path: &Path) -> bool {
    match (open.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => a.ino() == b.ino() && a.dev() == b.dev(),
        _ => false,
    }
}

/// Leaves no empty directories behind; a directory in use stays.
fn remove_if_empty(state: &Path, namespace: &str) {
    let path = state.join(namespace);
    let Ok(directory) = File::open(&path) else {
        return;
    };
    if flock(&directory, libc::LOCK_EX).is_ok() && is_same(&directory, &path) {
        let _ = fs::remove_dir(&path);
    }
    let _ = fs::remove_dir(state.join(record::CLAIMS));
    let _ = fs::remove_dir(state);
}

/// `false`: another process holds the lock.
fn try_lock(file: &File) -> io::Result<bool> {
    match flock(file, libc::LOCK_EX | libc::LOCK_NB) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

fn flock(file: &File, operation: i32) -> io::Result<()> {
    Ok(linux::descriptor::lock(file.as_fd(), operation)?)
}
