//! `bulkhead gc`: the ledgers that nobody owns any more.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    Error, FILE_NAME, Ledger, Leftover, Resource, failed, is_same,
    list::{names, namespaces},
    lock_namespace, record, try_lock,
};
use crate::sys::process::ProcessId;

/// A sandbox whose owner was dead.
#[derive(Debug, Serialize)]
pub struct Collected {
    /// Its namespace.
    pub namespace: String,
    /// Its id.
    pub sandbox: String,
    /// Pid of the dead owner, when the ledger still says.
    pub owner: Option<i32>,
    /// What the ledger held, newest first.
    pub held: Vec<Resource>,
    /// What could not be given back; empty in a dry run.
    pub left: Vec<Leftover>,
}

/// Replays every ledger beneath `state` whose owner is dead. A dry run only says what it would give back.
///
/// # Errors
/// Only when the state directory cannot be read; trouble with one sandbox is in its [`Collected::left`].
pub fn collect(state: &Path, dry_run: bool) -> Result<Vec<Collected>, Error> {
    let mut done = Vec::new();
    for namespace in namespaces(state)? {
        for sandbox in names(&state.join(&namespace))? {
            if let Some(collected) = collect_one(state, &namespace, &sandbox, dry_run)? {
                done.push(collected);
            }
        }
        if !dry_run {
            super::remove_if_empty(state, &namespace);
        }
    }
    Ok(done)
}

fn collect_one(
    state: &Path,
    namespace: &str,
    sandbox: &str,
    dry_run: bool,
) -> Result<Option<Collected>, Error> {
    // While we hold it nobody is between making the directory and locking the ledger in it.
    let guard = lock_namespace(state, namespace)?;
    let directory = state.join(namespace).join(sandbox);
    let mut collected = Collected {
        namespace: namespace.into(),
        sandbox: sandbox.into(),
        owner: None,
        held: Vec::new(),
        left: Vec::new(),
    };
    let ledger = match adopt(state, &directory)? {
        Adopted::Alive => return Ok(None),
        Adopted::Ledger(ledger) => ledger,
        Adopted::Nothing => {
            // A directory without a ledger holds nothing: its owner died between making the two, or removing the two.
            if !dry_run
                && let Err(error) = fs::remove_dir(&directory)
                && error.kind() != io::ErrorKind::NotFound
            {
                collected.left.push(Leftover {
                    resource: Resource::Directory { path: directory },
                    error: error.to_string(),
                });
            }
            return Ok(Some(collected));
        }
    };
    drop(guard);
    collected.owner = ledger.owner.map(|owner| owner.0.pid);
    collected.held = ledger.held().cloned().collect();
    collected.held.reverse();
    if !dry_run {
        collected.left = ledger.teardown();
    }
    Ok(Some(collected))
}

/// What [`reclaim`] found.
#[derive(Debug)]
pub enum Reclaimed {
    /// No such sandbox.
    Nothing,
    /// Its owner lives, and is this process if the ledger says.
    Alive(Option<ProcessId>),
    /// Replayed; this could not be given back.
    Done(Vec<Leftover>),
}

/// Replays the ledger of one sandbox if its owner is dead.
pub fn reclaim(state: &Path, namespace: &str, sandbox: &str) -> Result<Reclaimed, Error> {
    let state = match state.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Reclaimed::Nothing),
        other => other.map_err(failed("find", state))?,
    };
    let path = state.join(namespace).join(sandbox).join(FILE_NAME);
    match path.try_exists() {
        Ok(false) => return Ok(Reclaimed::Nothing),
        Ok(true) => {}
        Err(error) => return Err(failed("look for", &path)(error).into()),
    }
    let directory = state.join(namespace).join(sandbox);
    let guard = lock_namespace(&state, namespace)?;
    let adopted = adopt(&state, &directory)?;
    drop(guard);
    Ok(match adopted {
        Adopted::Nothing => Reclaimed::Nothing,
        Adopted::Ledger(ledger) => Reclaimed::Done(ledger.teardown()),
        Adopted::Alive => {
            let text = fs::read(&path).unwrap_or_default();
            let (owner, _, _) = record::replay(&String::from_utf8_lossy(&text));
            Reclaimed::Alive(owner.map(|owner| owner.0))
        }
    })
}

enum Adopted {
    Alive,
    Nothing,
    Ledger(Ledger),
}

/// Opens a ledger whose lock is free and takes the lock.
fn adopt(state: &Path, directory: &Path) -> Result<Adopted, Error> {
    let path: PathBuf = directory.join(FILE_NAME);
    let mut file: File = match OpenOptions::new().append(true).read(true).open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Adopted::Nothing),
        other => other.map_err(failed("open", &path))?,
    };
    if !try_lock(&file).map_err(failed("lock", &path))? {
        return Ok(Adopted::Alive);
    }
    if !is_same(&file, &path) || file.metadata().is_ok_and(|data| data.nlink() == 0) {
        // Its owner has removed it between our open and our lock.
        return Ok(Adopted::Alive);
    }
    let mut text = Vec::new();
    file.read_to_end(&mut text).map_err(failed("read", &path))?;
    let (owner, mut held, next) = record::replay(&String::from_utf8_lossy(&text));
    held.retain(|entry| entry.resource.belongs_to(directory, state));
    Ok(Adopted::Ledger(Ledger {
        file,
        state: state.into(),
        directory: directory.into(),
        owner,
        next,
        held,
        dead: 0,
    }))
}
