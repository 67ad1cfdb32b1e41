//! What sandboxes hold, for who only looks.

use std::{fs, io, path::Path};

use super::{Error, FILE_NAME, Resource, failed, record};

/// A sandbox and what its ledger says.
#[derive(Debug)]
pub struct Listed {
    /// Its namespace.
    pub namespace: String,
    /// Its id.
    pub sandbox: String,
    /// What it holds, oldest first.
    pub held: Vec<Resource>,
}

/// What every sandbox beneath `state` holds now, whoever owns it. Nothing is locked or changed.
///
/// # Errors
/// The state directory cannot be read.
pub fn list(state: &Path) -> Result<Vec<Listed>, Error> {
    let mut listed = Vec::new();
    for namespace in namespaces(state)? {
        for sandbox in names(&state.join(&namespace))? {
            let path = state.join(&namespace).join(&sandbox).join(FILE_NAME);
            let text = match fs::read(&path) {
                // It has just ended, or not quite begun.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(failed("read", &path))?,
            };
            let (_, held, _) = record::replay(&String::from_utf8_lossy(&text));
            listed.push(Listed {
                namespace: namespace.clone(),
                sandbox,
                held: held.into_iter().map(|entry| entry.resource).collect(),
            });
        }
    }
    Ok(listed)
}

/// Those that have sandboxes. Under dotted names there are claims, templates, and no sandboxes.
pub(super) fn namespaces(state: &Path) -> Result<Vec<String>, Error> {
    let mut names = names(state)?;
    names.retain(|name| !name.starts_with('.'));
    Ok(names)
}

/// Names of the directories in a directory; none when it is not there.
pub(super) fn names(directory: &Path) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed("read", directory))?,
    };
    let mut names: Vec<String> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}
