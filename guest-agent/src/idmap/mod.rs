//! User and group id mappings: of a container's user namespace, and of idmapped mounts.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::agent::IdMapping;
use linux::process::Idle;

/// The kernel's limit of lines in a map (user_namespaces(7)).
const MAX_LINES: usize = 340;

/// Why ids cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum IdMapError {
    /// The list is empty, too long, or has an entry that maps nothing or runs past the last id.
    #[error("{which} mappings {reason}")]
    Invalid {
        /// "uid" or "gid".
        which: &'static str,
        /// What is wrong with them.
        reason: String,
    },
    /// No process could be made to own the user namespace.
    #[error("creation of a user namespace failed: {0}")]
    Namespace(#[source] io::Error),
    /// The kernel refused a map.
    #[error("write of {map:?} to {path} failed: {source}")]
    Write {
        /// The map's file.
        path: PathBuf,
        /// The text refused.
        map: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Writes the id maps of the process `pid` (in the agent's pid namespace), whose user namespace is new. The caller
/// needs CAP_SETUID and CAP_SETGID in the parent user namespace.
pub fn write_maps(pid: i32, uids: &[IdMapping], gids: &[IdMapping]) -> Result<(), IdMapError> {
    for (which, file, mappings) in [("uid", "uid_map", uids), ("gid", "gid_map", gids)] {
        let map = map_text(which, mappings)?;
        let path = Path::new("/proc").join(pid.to_string()).join(file);
        // One write: the kernel takes a map whole or not at all.
        fs::write(&path, &map).map_err(|source| IdMapError::Write { path, map, source })?;
    }
    Ok(())
}

/// A user namespace with these mappings and no process in it, for idmapped mounts.
pub fn user_namespace(uids: &[IdMapping], gids: &[IdMapping]) -> Result<OwnedFd, IdMapError> {
    // Until the namespace is open, a process has to own it.
    let holder = Idle::spawn(libc::CLONE_NEWUSER as u64)
        .map_err(|errno| IdMapError::Namespace(errno.into()))?;
    write_maps(holder.pid(), uids, gids)?;
    let path = format!("/proc/{}/ns/user", holder.pid());
    File::open(path)
        .map(OwnedFd::from)
        .map_err(IdMapError::Namespace)
}

/// The id outside the namespace of `id` inside; `None` when it is not mapped.
pub fn outside(mappings: &[IdMapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container_id)?;
        (offset < mapping.size).then(|| mapping.host_id.checked_add(offset))?
    })
}

fn map_text(which: &'static str, mappings: &[IdMapping]) -> Result<String, IdMapError> {
    let invalid = |reason: String| IdMapError::Invalid { which, reason };
    if mappings.is_empty() {
        return Err(invalid("are missing".to_owned()));
    }
    if mappings.len() > MAX_LINES {
        return Err(invalid(format!(
            "have {} entries, the kernel takes {MAX_LINES}",
            mappings.len()
        )));
    }
    let mut text = String::new();
    for IdMapping {
        container_id,
        host_id,
        size,
        ..
    } in mappings
    {
        // The last id is "no id" (uid_t)-1, which no range may contain.
        let fits = |first: &u32| u64::from(*first) + u64::from(*size) <= u64::from(u32::MAX);
        if *size == 0 || !fits(container_id) || !fits(host_id) {
            return Err(invalid(format!(
                "have a range that maps nothing or ends past the last id: {container_id} {host_id} {size}"
            )));
        }
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{container_id} {host_id} {size}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mapping(container_id: u32, host_id: u32, size: u32) -> IdMapping {
        IdMapping {
            container_id,
            host_id,
            size,
            ..IdMapping::default()
        }
    }

    #[test]
    fn ids_are_translated_outwards() {
        let mappings = [mapping(0, 1000, 1), mapping(1, 100_000, 65_535)];
        assert_eq!(outside(&mappings, 0), Some(1000));
        assert_eq!(outside(&mappings, 65_535), Some(165_534));
        assert_eq!(outside(&mappings, 65_536), None);
    }

    #[test]
    fn maps_that_the_kernel_would_refuse_are_refused_with_the_reason() {
        for (mappings, word) in [
            (vec![], "missing"),
            (vec![mapping(0, 0, 0)], "maps nothing"),
            (vec![mapping(u32::MAX, 0, 1)], "past the last id"),
            (vec![mapping(0, u32::MAX - 1, 2)], "past the last id"),
            (vec![mapping(0, 0, 1); 341], "341 entries"),
        ] {
            let error = map_text("uid", &mappings).unwrap_err().to_string();
            assert!(error.starts_with("uid mappings"), "{error}");
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_namespace_for_idmapped_mounts_has_the_maps() {
        let uids = [mapping(0, 5000, 10), mapping(20, 7000, 1)];
        let gids = [mapping(0, 6000, 10)];
        // The descriptor outlives its process; a child that joins it sees the maps.
        let fd = user_namespace(&uids, &gids).expect("root may make user namespaces");
        let maps = crate::stage::mounts::testing::in_child(|| {
            nix::sched::setns(&fd, nix::sched::CloneFlags::CLONE_NEWUSER).expect("setns");
            let read = |name| fs::read_to_string(name).expect("a map");
            read("/proc/self/uid_map") + &read("/proc/self/gid_map")
        });
        let lines: Vec<Vec<&str>> = maps
            .lines()
            .map(|l| l.split_whitespace().collect())
            .collect();
        assert_eq!(
            lines,
            [
                ["0", "5000", "10"],
                ["20", "7000", "1"],
                ["0", "6000", "10"]
            ]
        );
    }

    proptest! {
        #[test]
        fn translation_never_panics_and_stays_in_range(
            ranges in proptest::collection::vec((any::<u32>(), any::<u32>(), any::<u32>()), 0..5),
            id in any::<u32>(),
        ) {
            let mappings: Vec<_> = ranges.iter().map(|&(c, h, s)| mapping(c, h, s)).collect();
            if let Some(outer) = outside(&mappings, id) {
                let covered = ranges.iter().any(|&(c, h, s)| {
                    id >= c && id - c < s && outer >= h && outer - h == id - c
                });
                prop_assert!(covered);
            }
        }
    }
}
