//! The `MS_*` flags of a mount in the terms of mount_setattr(2) and fsconfig(2).

use std::ffi::CStr;

use nix::libc::{
    MS_DIRSYNC, MS_LAZYTIME, MS_MANDLOCK, MS_NOATIME, MS_NODEV, MS_NODIRATIME, MS_NOEXEC,
    MS_NOSUID, MS_NOSYMFOLLOW, MS_PRIVATE, MS_RDONLY, MS_REC, MS_RELATIME, MS_SHARED, MS_SLAVE,
    MS_STRICTATIME, MS_SYNCHRONOUS, MS_UNBINDABLE,
};

use linux::mount::{MountAttr, attr};

/// Flags with one attribute each. The access time modes are apart: they share one field.
const PLAIN: [(u64, u64); 6] = [
    (MS_RDONLY, attr::RDONLY),
    (MS_NOSUID, attr::NOSUID),
    (MS_NODEV, attr::NODEV),
    (MS_NOEXEC, attr::NOEXEC),
    (MS_NODIRATIME, attr::NODIRATIME),
    (MS_NOSYMFOLLOW, attr::NOSYMFOLLOW),
];

/// Flags that belong to a file system as a whole, by the names fsconfig(2) knows. MS_RDONLY is handled apart.
const SUPERBLOCK: [(u64, &CStr); 4] = [
    (MS_SYNCHRONOUS, c"sync"),
    (MS_DIRSYNC, c"dirsync"),
    (MS_MANDLOCK, c"mand"),
    (MS_LAZYTIME, c"lazytime"),
];

/// The four kinds of propagation.
pub const PROPAGATION: u64 = MS_SHARED | MS_SLAVE | MS_PRIVATE | MS_UNBINDABLE;

/// The change that `set` and `clear` (MS_*) ask for. Attributes named by neither stay as they are, so that what the
/// source of a bind mount forbids stays forbidden unless the spec says otherwise. `now` is the mount's present access
/// time mode: "nostrictatime" and "atime" only change a mount that has the mode they take away.
pub fn attributes(set: u64, clear: u64, now: u64) -> MountAttr {
    let mut change = MountAttr::default();
    for (flag, attribute) in PLAIN {
        if set & flag != 0 {
            change.set |= attribute;
        } else if clear & flag != 0 {
            change.clear |= attribute;
        }
    }
    let mode = if set & MS_STRICTATIME != 0 {
        Some(attr::STRICTATIME)
    } else if set & MS_NOATIME != 0 {
        Some(attr::NOATIME)
    } else if set & MS_RELATIME != 0
        || (clear & MS_NOATIME != 0 && now == attr::NOATIME)
        || (clear & MS_STRICTATIME != 0 && now == attr::STRICTATIME)
    {
        Some(attr::RELATIME)
    } else {
        None
    };
    if let Some(mode) = mode {
        change.clear |= attr::ATIME;
        change.set |= mode;
    }
    change
}

/// What a bind mount keeps of its source's mount, which is `source` (`attr`): all of it, unless the spec sets a flag (`set`, MS_*). Then
/// the spec's are the mount's only ones, as with runc, which remounts by the spec. Two stay in any case: a remount keeps the access time
/// mode that it does not name, and what is read-only on the host cannot be written here.
pub fn inherited(source: u64, set: u64) -> u64 {
    let named = PLAIN.iter().any(|(flag, _)| set & flag != 0)
        || set & (MS_STRICTATIME | MS_NOATIME | MS_RELATIME) != 0;
    match named {
        true => source & (attr::RDONLY | attr::ATIME),
        false => source & attr::OF_MOUNTS,
    }
}

/// `change` on a mount that begins with `inherited`.
pub fn after(inherited: u64, change: MountAttr) -> MountAttr {
    // The host's word on writing is the last; any other flag may be cleared.
    let kept = inherited & attr::OF_MOUNTS & (!change.clear | attr::RDONLY) & !attr::ATIME;
    let mode = match change.clear & attr::ATIME {
        0 => inherited & attr::ATIME,
        _ => 0,
    };
    MountAttr {
        set: change.set | kept | mode,
        clear: change.clear & !kept | attr::ATIME,
        ..change
    }
}

/// The file system options that `set` and `clear` stand for, in the names of fsconfig(2).
pub fn superblock_options(set: u64, clear: u64) -> Vec<&'static CStr> {
    let mut options = Vec::new();
    for (flag, name) in SUPERBLOCK {
        if set & flag != 0 {
            options.push(name);
        }
    }
    if clear & MS_SYNCHRONOUS != 0 {
        options.push(c"async");
    }
    if clear & MS_LAZYTIME != 0 {
        options.push(c"nolazytime");
    }
    options
}

/// One propagation call: the kind, and whether the mounts beneath are meant too. `None` when it is not exactly one kind.
pub fn propagation(flags: u64) -> Option<(u64, bool)> {
    let kind = flags & PROPAGATION;
    (kind.count_ones() == 1).then_some((kind, flags & MS_REC != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_wins_over_clear_and_the_rest_is_left() {
        let change = attributes(MS_RDONLY | MS_NOSUID, MS_NOSUID | MS_NODEV, attr::RELATIME);
        assert_eq!(change.set, attr::RDONLY | attr::NOSUID);
        assert_eq!(change.clear, attr::NODEV);
    }

    #[test]
    fn access_time_modes_replace_each_other() {
        for (flag, mode) in [
            (MS_NOATIME, attr::NOATIME),
            (MS_STRICTATIME, attr::STRICTATIME),
            (MS_RELATIME, attr::RELATIME),
        ] {
            let change = attributes(flag, 0, attr::RELATIME);
            assert_eq!((change.set, change.clear), (mode, attr::ATIME));
        }
    }

    #[test]
    fn clearing_an_access_time_mode_touches_only_that_mode() {
        let change = attributes(0, MS_STRICTATIME, attr::NOATIME);
        assert_eq!((change.set, change.clear), (0, 0));
        let change = attributes(0, MS_NOATIME, attr::NOATIME);
        assert_eq!((change.set, change.clear), (attr::RELATIME, attr::ATIME));
    }

    #[test]
    fn a_bind_mount_is_as_its_source_until_the_spec_sets_a_flag() {
        let source = attr::NOSUID | attr::NODEV | attr::NOATIME;
        let result = |source, set, clear| {
            let inherited = inherited(source, set);
            let change = attributes(set, clear, inherited & attr::ATIME);
            let change = after(inherited, change);
            assert_eq!(change.set & change.clear, change.set & attr::ATIME);
            assert_eq!(change.clear & attr::ATIME, attr::ATIME);
            change.set
        };
        assert_eq!(result(source, 0, 0), source);
        assert_eq!(
            result(source, 0, MS_RDONLY | MS_NODEV),
            attr::NOSUID | attr::NOATIME
        );
        assert_eq!(result(source, MS_RDONLY, 0), attr::RDONLY | attr::NOATIME);
        assert_eq!(result(source, MS_NOEXEC | MS_RELATIME, 0), attr::NOEXEC);
        assert_eq!(result(source, 0, MS_NOATIME), attr::NOSUID | attr::NODEV);
        // Cleared or not: the host does not let it be written.
        assert_eq!(result(attr::RDONLY, 0, MS_RDONLY), attr::RDONLY);
        assert_eq!(
            result(attr::RDONLY, MS_NOSUID, 0),
            attr::RDONLY | attr::NOSUID
        );
        assert_eq!(
            result(0, MS_RDONLY | MS_NOSUID, 0),
            attr::RDONLY | attr::NOSUID
        );
    }

    #[test]
    fn propagation_is_exactly_one_kind() {
        assert_eq!(propagation(MS_SLAVE | MS_REC), Some((MS_SLAVE, true)));
        assert_eq!(propagation(MS_SHARED), Some((MS_SHARED, false)));
        assert_eq!(propagation(MS_SHARED | MS_SLAVE), None);
        assert_eq!(propagation(MS_REC), None);
    }
}
