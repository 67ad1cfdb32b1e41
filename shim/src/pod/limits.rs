//! Limits of the pod's cgroup on the host, set all or none.

use std::path::{Path, PathBuf};

use super::{Error, Pod};

/// What takes limits back that were set.
#[must_use]
#[derive(Debug)]
pub struct Undo {
    cgroup: PathBuf,
    old: Vec<(String, String)>,
}

impl Undo {
    /// Sets the old limits again.
    pub fn undo(self) {
        for (name, value) in self.old.iter().rev() {
            if let Err(error) = std::fs::write(self.cgroup.join(name), value) {
                tracing::warn!(name, value, %error, "an old limit could not be set again");
            }
        }
    }
}

impl Pod {
    /// Writes limits of the pod's cgroup on the host.
    ///
    /// # Errors
    /// One was refused; the others are as before.
    pub fn limit(&self, files: &[(String, String)]) -> Result<Undo, Error> {
        limit(&self.cgroup, files)
    }
}

/// The same for a cgroup by its path.
pub(super) fn limit(cgroup: &Path, files: &[(String, String)]) -> Result<Undo, Error> {
    let mut undo = Undo {
        cgroup: cgroup.into(),
        old: Vec::new(),
    };
    for (name, value) in files {
        let path = cgroup.join(name);
        // Where there is none, the write says so.
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        if let Err(source) = std::fs::write(&path, value) {
            undo.undo();
            return Err(Error::Limit {
                name: name.clone(),
                value: value.clone(),
                source,
            });
        }
        let old = old_line(name, value, &before);
        undo.old.extend(old.map(|old| (name.clone(), old)));
    }
    Ok(undo)
}

/// What was set before by the key of `line` (a device, or "default") in a file whose text was
/// `before`.
fn old_line(name: &str, line: &str, before: &str) -> Option<String> {
    let key = line.split(' ').next().unwrap_or(line);
    let mut lines = before.lines();
    if let Some(old) = lines.find(|old| old.split(' ').next() == Some(key)) {
        return Some(old.into());
    }
    match name {
        "io.max" => Some(format!("{key} rbps=max wbps=max riops=max wiops=max")),
        "io.weight" => Some(format!("{key} default")),
        "io.latency" => Some(format!("{key} target=0")),
        _ => before.lines().next().map(String::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_refused_limit_and_all_are_the_old_ones() {
        let directory = tempfile::tempdir().unwrap();
        let read = || std::fs::read_to_string(directory.path().join("io.weight")).unwrap();
        std::fs::write(directory.path().join("io.weight"), "default 100\n").unwrap();
        let weight = ("io.weight".to_string(), "default 500".to_string());
        let refused = ("no/such.file".to_string(), "1".to_string());
        let error = limit(directory.path(), &[weight.clone(), refused]).unwrap_err();
        assert!(error.text().contains("no/such.file"), "{}", error.text());
        assert_eq!(read(), "default 100");
        let undo = limit(directory.path(), &[weight]).unwrap();
        assert_eq!(read(), "default 500");
        undo.undo();
        assert_eq!(read(), "default 100");
    }

    #[test]
    fn a_line_is_taken_back_by_its_key() {
        let before = "8:0 rbps=1 wbps=max riops=max wiops=max\n";
        let old = |line| old_line("io.max", line, before).unwrap();
        assert_eq!(old("8:0 rbps=7"), before.trim_end());
        assert_eq!(
            old("8:16 wbps=7"),
            "8:16 rbps=max wbps=max riops=max wiops=max"
        );
        let old = old_line("io.weight", "8:0 7", "default 100\n");
        assert_eq!(old.as_deref(), Some("8:0 default"));
    }
}
