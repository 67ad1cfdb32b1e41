//! The root file system that an engine describes as a list of mounts (an overlay, a bind, a device), mounted for one container.
//!
//! The place is in the pod's own tmpfs and not in the bundle: it is private, recorded in the pod's ledger, and goes with the pod
//! whatever happens to the engine.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use nix::{mount::MsFlags, sched::CloneFlags};

use crate::ledger::{self, Ledger, Leftover, Resource, Ticket};

/// mount(2) takes one page of options.
const MAX_OPTIONS: usize = 4095;

/// One mount of an engine's list (containerd's `types.Mount`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// File system, or `bind`.
    pub kind: String,
    /// Device, directory, or a word.
    pub source: String,
    /// As in fstab(5).
    pub options: Vec<String>,
}

/// Why a root could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// mount(2) failed.
    #[error("cannot mount the {kind} root file system of {container} from {from}")]
    Mount {
        /// File system.
        kind: String,
        /// Whose.
        container: String,
        /// The source, or the overlay's options.
        from: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nothing to do with mounts.
    #[error("cannot make the directory {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It could not be recorded.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    /// It could not be unmounted.
    #[error("cannot give back {0}")]
    Busy(Leftover),
}

/// The mounted roots of a pod's containers.
#[derive(Debug, Default)]
pub struct Roots(HashMap<String, (PathBuf, Vec<Ticket>)>);

impl Roots {
    /// Mounts a container's layers over each other, and tells where.
    pub fn mount(
        &mut self,
        ledger: &mut Ledger,
        container: &str,
        layers: &[Layer],
    ) -> Result<PathBuf, Error> {
        let place = ledger.directory().join("pod/roots").join(container);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&place)
            .map_err(|source| Error::Directory {
                path: place.clone(),
                source,
            })?;
        let (_, tickets) = self
            .0
            .entry(container.into())
            .or_insert_with(|| (place.clone(), Vec::new()));
        for layer in layers {
            let path = place.clone();
            tickets.push(ledger.take(Resource::Mount { path })?);
            mount(layer, &place).map_err(|source| Error::Mount {
                kind: layer.kind.clone(),
                container: container.into(),
                from: match layer.source.is_empty() || layer.kind == "overlay" {
                    true => layer.options.join(","),
                    false => layer.source.clone(),
                },
                source,
            })?;
        }
        Ok(place)
    }

    /// Unmounts them; a container without any is no error.
    pub fn unmount(&mut self, ledger: &mut Ledger, container: &str) -> Result<(), Error> {
        let Some((place, tickets)) = self.0.get(container) else {
            return Ok(());
        };
        for ticket in tickets.iter().rev() {
            ledger.undo(*ticket).map_err(Error::Busy)?;
        }
        // Beneath the pod's tmpfs, which takes it along if this fails.
        if fs::remove_dir(place).is_ok()
            && let Some(parent) = place.parent()
        {
            // Others may be there.
            let _ = fs::remove_dir(parent);
        }
        self.0.remove(container);
        Ok(())
    }
}

/// Options of mount(8) that are flags of mount(2): (name, flag, whether it is set).
const FLAGS: &[(&str, u64, bool)] = &[
    ("async", libc::MS_SYNCHRONOUS, false),
    ("atime", libc::MS_NOATIME, false),
    ("bind", libc::MS_BIND, true),
    ("defaults", 0, true),
    ("dev", libc::MS_NODEV, false),
    ("diratime", libc::MS_NODIRATIME, false),
    ("dirsync", libc::MS_DIRSYNC, true),
    ("exec", libc::MS_NOEXEC, false),
    ("mand", libc::MS_MANDLOCK, true),
    ("noatime", libc::MS_NOATIME, true),
    ("nodev", libc::MS_NODEV, true),
    ("nodiratime", libc::MS_NODIRATIME, true),
    ("noexec", libc::MS_NOEXEC, true),
    ("nomand", libc::MS_MANDLOCK, false),
    ("norelatime", libc::MS_RELATIME, false),
    ("nostrictatime", libc::MS_STRICTATIME, false),
    ("nosuid", libc::MS_NOSUID, true),
    ("rbind", libc::MS_BIND | libc::MS_REC, true),
    ("relatime", libc::MS_RELATIME, true),
    ("ro", libc::MS_RDONLY, true),
    ("rw", libc::MS_RDONLY, false),
    ("strictatime", libc::MS_STRICTATIME, true),
    ("suid", libc::MS_NOSUID, false),
    ("sync", libc::MS_SYNCHRONOUS, true),
];

/// Splits options into flags and what the file system itself understands.
fn split(options: &[String]) -> (u64, Vec<String>) {
    let (mut flags, mut data) = (0, Vec::new());
    for option in options {
        match FLAGS.iter().find(|(name, _, _)| name == option) {
            Some((_, flag, true)) => flags |= flag,
            Some((_, flag, false)) => flags &= !flag,
            None => data.push(option.clone()),
        }
    }
    (flags, data)
}

fn mount(layer: &Layer, target: &Path) -> io::Result<()> {
    let (mut flags, data) = split(&layer.options);
    let read_only = flags & libc::MS_RDONLY;
    let is_bind = layer.kind == "bind" || flags & libc::MS_BIND != 0;
    if is_bind {
        flags |= libc::MS_BIND;
    }
    let (directory, data) = shorten(&data);
    let text = data.join(",");
    if text.len() > MAX_OPTIONS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{} bytes of options, the kernel takes {MAX_OPTIONS}",
                text.len()
            ),
        ));
    }
    let (source, kind) = (layer.source.clone(), layer.kind.clone());
    let (target, directory) = (
        target.to_path_buf(),
        directory.unwrap_or_else(|| "/".into()),
    );
    // A thread of its own: the working directory of this one alone may change.
    let made = std::thread::spawn(move || -> nix::Result<()> {
        let call = |flags: u64, data: Option<&str>| {
            let flags = MsFlags::from_bits_retain(flags);
            nix::mount::mount(
                Some(source.as_str()),
                &target,
                Some(kind.as_str()),
                flags,
                data,
            )
        };
        nix::sched::unshare(CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(directory.as_str())?;
        call(flags, Some(&text))?;
        // The kernel ignores MS_RDONLY when it makes a bind mount (mount(2)).
        match is_bind && read_only != 0 {
            true => call(libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY, None),
            false => Ok(()),
        }
    });
    made.join()
        .map_err(|_| io::Error::other("the thread that mounts panicked"))?
        .map_err(io::Error::from)
}

/// An overlay of many layers has more options than mount(2) takes. Lower directories that have one parent in common are then
/// named relative to it: the directory to mount from, and the options.
fn shorten(data: &[String]) -> (Option<String>, Vec<String>) {
    let unchanged = || (None, data.to_vec());
    if data.iter().map(|option| option.len() + 1).sum::<usize>() <= MAX_OPTIONS {
        return unchanged();
    }
    let Some(lower) = data
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))
    else {
        return unchanged();
    };
    let paths: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let mut common = paths[0].parent();
    while let Some(directory) = common {
        if paths.iter().all(|path| path.starts_with(directory)) {
            break;
        }
        common = directory.parent();
    }
    let Some(common) = common.filter(|common| common.is_absolute()) else {
        return unchanged();
    };
    let relative: Option<Vec<String>> = paths
        .iter()
        .map(|path| Some(path.strip_prefix(common).ok()?.to_str()?.to_string()))
        .collect();
    let Some(relative) = relative else {
        return unchanged();
    };
    let replaced = data
        .iter()
        .map(|option| match option.starts_with("lowerdir=") {
            true => format!("lowerdir={}", relative.join(":")),
            false => option.clone(),
        });
    (
        Some(common.to_string_lossy().into_owned()),
        replaced.collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_string()).collect()
    }

    #[test]
    fn options_are_flags_or_the_file_systems() {
        let (flags, data) = split(&strings(&["rbind", "ro", "rw", "nodev", "index=off"]));
        assert_eq!(flags, libc::MS_BIND | libc::MS_REC | libc::MS_NODEV);
        assert_eq!(data, ["index=off"]);
    }

    #[test]
    fn only_an_overlay_that_is_too_long_is_shortened() {
        let few = strings(&["lowerdir=/s/1/fs:/s/2/fs", "upperdir=/s/3/fs"]);
        assert_eq!(shorten(&few), (None, few.clone()));
        let paths: Vec<String> = (0..90)
            .map(|n| format!("/var/lib/containerd/snapshots/{n:0>40}/fs"))
            .collect();
        let many = vec![format!("lowerdir={}", paths.join(":")), "index=off".into()];
        let (directory, options) = shorten(&many);
        assert_eq!(directory.unwrap(), "/var/lib/containerd/snapshots");
        assert!(options[0].starts_with(&format!("lowerdir={:0>40}/fs:", 0)));
        assert_eq!(options[1], "index=off");
    }
}
