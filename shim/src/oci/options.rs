//! The mount option words of OCI config.md#linux-mount-options, and what each of them means.

use crate::oci::{Error, unsupported};

/// What the option words of one mount ask for; words that are in no table stay for the file system.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    pub flags: u64,
    pub clear_flags: u64,
    pub propagation: Vec<u64>,
    pub recursive_set: u64,
    pub recursive_clear: u64,
    pub data: Vec<String>,
    pub copy_up: bool,
    pub idmap: Option<Idmap>,
}

/// "idmap" or "ridmap".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Idmap {
    Top,
    Whole,
}

#[derive(Clone, Copy)]
enum Effect {
    Set(u64),
    Clear(u64),
    Propagate(u64),
    /// MOUNT_ATTR_* on the whole tree.
    SetAll(u64),
    ClearAll(u64),
    CopyUp,
    Map(Idmap),
    Nothing,
}

use Effect::*;

const REC: u64 = libc::MS_REC;
/// linux/mount.h; the libc crate lacks it for glibc.
const MS_NOSYMFOLLOW: u64 = 256;

const ATTR_RDONLY: u64 = 0x1;
const ATTR_NOSUID: u64 = 0x2;
const ATTR_NODEV: u64 = 0x4;
const ATTR_NOEXEC: u64 = 0x8;
/// The field of the access time modes: a mode is set by clearing the field and setting its value.
const ATTR_ATIME_FIELD: u64 = 0x70;
const ATTR_RELATIME: u64 = 0x00;
const ATTR_NOATIME: u64 = 0x10;
const ATTR_STRICTATIME: u64 = 0x20;
const ATTR_NODIRATIME: u64 = 0x80;
const ATTR_NOSYMFOLLOW: u64 = 0x0020_0000;

const TABLE: &[(&str, Effect)] = &[
    ("defaults", Nothing),
    ("async", Clear(libc::MS_SYNCHRONOUS)),
    ("atime", Clear(libc::MS_NOATIME)),
    ("bind", Set(libc::MS_BIND)),
    ("dev", Clear(libc::MS_NODEV)),
    ("diratime", Clear(libc::MS_NODIRATIME)),
    ("dirsync", Set(libc::MS_DIRSYNC)),
    ("exec", Clear(libc::MS_NOEXEC)),
    ("iversion", Set(libc::MS_I_VERSION)),
    ("lazytime", Set(libc::MS_LAZYTIME)),
    ("loud", Clear(libc::MS_SILENT)),
    ("mand", Set(libc::MS_MANDLOCK)),
    ("noatime", Set(libc::MS_NOATIME)),
    ("nodev", Set(libc::MS_NODEV)),
    ("nodiratime", Set(libc::MS_NODIRATIME)),
    ("noexec", Set(libc::MS_NOEXEC)),
    ("noiversion", Clear(libc::MS_I_VERSION)),
    ("nolazytime", Clear(libc::MS_LAZYTIME)),
    ("nomand", Clear(libc::MS_MANDLOCK)),
    ("norelatime", Clear(libc::MS_RELATIME)),
    ("nostrictatime", Clear(libc::MS_STRICTATIME)),
    ("nosuid", Set(libc::MS_NOSUID)),
    ("nosymfollow", Set(MS_NOSYMFOLLOW)),
    ("rbind", Set(libc::MS_BIND | REC)),
    ("relatime", Set(libc::MS_RELATIME)),
    ("remount", Set(libc::MS_REMOUNT)),
    ("ro", Set(libc::MS_RDONLY)),
    ("rw", Clear(libc::MS_RDONLY)),
    ("silent", Set(libc::MS_SILENT)),
    ("strictatime", Set(libc::MS_STRICTATIME)),
    ("suid", Clear(libc::MS_NOSUID)),
    ("symfollow", Clear(MS_NOSYMFOLLOW)),
    ("sync", Set(libc::MS_SYNCHRONOUS)),
    ("private", Propagate(libc::MS_PRIVATE)),
    ("rprivate", Propagate(libc::MS_PRIVATE | REC)),
    ("shared", Propagate(libc::MS_SHARED)),
    ("rshared", Propagate(libc::MS_SHARED | REC)),
    ("slave", Propagate(libc::MS_SLAVE)),
    ("rslave", Propagate(libc::MS_SLAVE | REC)),
    ("unbindable", Propagate(libc::MS_UNBINDABLE)),
    ("runbindable", Propagate(libc::MS_UNBINDABLE | REC)),
    ("ratime", ClearAll(ATTR_NOATIME)),
    ("rdev", ClearAll(ATTR_NODEV)),
    ("rdiratime", ClearAll(ATTR_NODIRATIME)),
    ("rexec", ClearAll(ATTR_NOEXEC)),
    ("rnoatime", SetAll(ATTR_NOATIME)),
    ("rnodev", SetAll(ATTR_NODEV)),
    ("rnodiratime", SetAll(ATTR_NODIRATIME)),
    ("rnoexec", SetAll(ATTR_NOEXEC)),
    ("rnorelatime", ClearAll(ATTR_ATIME_FIELD)),
    ("rnostrictatime", ClearAll(ATTR_STRICTATIME)),
    ("rnosuid", SetAll(ATTR_NOSUID)),
    ("rnosymfollow", SetAll(ATTR_NOSYMFOLLOW)),
    ("rrelatime", SetAll(ATTR_RELATIME)),
    ("rro", SetAll(ATTR_RDONLY)),
    ("rrw", ClearAll(ATTR_RDONLY)),
    ("rstrictatime", SetAll(ATTR_STRICTATIME)),
    ("rsuid", ClearAll(ATTR_NOSUID)),
    ("rsymfollow", ClearAll(ATTR_NOSYMFOLLOW)),
    ("tmpcopyup", CopyUp),
    ("idmap", Map(Idmap::Top)),
    ("ridmap", Map(Idmap::Whole)),
];

/// Words of user space tools that mean nothing to the kernel (mount(8)).
const IGNORED: &[&str] = &[
    "_netdev", "auto", "noauto", "nofail", "user", "nouser", "users", "owner", "group",
];

/// All the words that mean something.
pub(super) fn known() -> impl Iterator<Item = &'static str> {
    TABLE.iter().map(|(word, _)| *word)
}

/// Reads the words of one mount in order: a later word overrides an earlier one.
pub(super) fn parse(field: &str, words: &[String]) -> Result<Options, Error> {
    let mut options = Options::default();
    for word in words.iter().filter(|word| !word.is_empty()) {
        match TABLE.iter().find(|(known, _)| known == word) {
            Some((_, effect)) => options.apply(*effect),
            None if IGNORED.contains(&word.as_str()) => {}
            None if word.contains(',') => {
                let reason = "one option a word is expected".to_string();
                return Err(unsupported(format!("{field}: option {word:?}"), reason));
            }
            None => options.data.push(word.clone()),
        }
    }
    Ok(options)
}

impl Options {
    fn apply(&mut self, effect: Effect) {
        match effect {
            Set(flags) => {
                self.flags |= flags;
                self.clear_flags &= !flags;
            }
            Clear(flags) => {
                self.flags &= !flags;
                self.clear_flags |= flags;
            }
            Propagate(flags) => self.propagation.push(flags),
            SetAll(attributes) => self.set_all(attributes),
            ClearAll(attributes) => self.clear_all(attributes),
            CopyUp => self.copy_up = true,
            Map(depth) => self.idmap = Some(depth),
            Nothing => {}
        }
    }

    /// What is to be shared gets the other side's mounts and gives none.
    pub(super) fn share_as_slave(&mut self) {
        for flags in &mut self.propagation {
            if *flags & libc::MS_SHARED != 0 {
                *flags ^= libc::MS_SHARED | libc::MS_SLAVE;
            }
        }
    }

    /// mount_setattr(2): an access time mode may be set only together with clearing the whole field.
    fn set_all(&mut self, attributes: u64) {
        let is_mode = attributes & !ATTR_ATIME_FIELD == 0;
        if is_mode {
            self.recursive_set &= !ATTR_ATIME_FIELD;
            self.recursive_clear |= ATTR_ATIME_FIELD;
        } else {
            self.recursive_clear &= !attributes;
        }
        self.recursive_set |= attributes;
    }

    fn clear_all(&mut self, attributes: u64) {
        self.recursive_set &= !attributes;
        self.recursive_clear |= match attributes & ATTR_ATIME_FIELD {
            0 => attributes,
            _ => ATTR_ATIME_FIELD,
        };
    }
}

/// A propagation word alone, as `linux.rootfsPropagation` has it.
pub(super) fn propagation(word: &str) -> Option<u64> {
    TABLE.iter().find_map(|(known, effect)| match effect {
        Propagate(flags) if *known == word => Some(*flags),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Options {
        let words: Vec<String> = words.split_ascii_whitespace().map(String::from).collect();
        super::parse("mounts[0]", &words).unwrap()
    }

    /// OCI config.md#linux-mount-options, the words that a runtime MUST or SHOULD know.
    const SPECIFICATION: &str = "async atime bind defaults dev diratime dirsync exec iversion lazytime loud noatime nodev \
        nodiratime noexec noiversion nolazytime norelatime nostrictatime nosuid nosymfollow private ratime rbind rdev rdiratime \
        relatime remount rexec rnoatime rnodiratime rnoexec rnorelatime rnostrictatime rnosuid rnosymfollow ro rprivate \
        rrelatime rro rrw rshared rslave rstrictatime rsuid rsymfollow runbindable rw shared silent slave strictatime suid \
        symfollow sync tmpcopyup unbindable idmap ridmap rnodev mand nomand";

    #[test]
    fn every_word_of_the_specification_is_known_once() {
        let words: Vec<&str> = known().collect();
        for word in SPECIFICATION.split_ascii_whitespace() {
            assert_eq!(
                words.iter().filter(|known| **known == word).count(),
                1,
                "{word}"
            );
            assert!(parse(word).data.is_empty(), "{word}");
        }
    }

    #[test]
    fn the_later_word_wins() {
        let options = parse("ro nosuid rw");
        assert_eq!(options.flags, libc::MS_NOSUID);
        assert_eq!(options.clear_flags, libc::MS_RDONLY);
        assert_eq!(parse("exec noexec").clear_flags, 0);
        assert_eq!(parse("rro rrw").recursive_set, 0);
        assert_eq!(parse("rrw rro").recursive_clear, 0);
    }

    #[test]
    fn access_time_modes_replace_each_other() {
        let options = parse("rnoatime rstrictatime rnosuid");
        assert_eq!(options.recursive_set, ATTR_STRICTATIME | ATTR_NOSUID);
        assert_eq!(options.recursive_clear, ATTR_ATIME_FIELD);
        assert_eq!(parse("rrelatime").recursive_clear, ATTR_ATIME_FIELD);
        assert_eq!(parse("rnodiratime").recursive_clear, 0);
    }

    #[test]
    fn other_words_are_the_file_systems() {
        let options = parse("nosuid size=64m mode=1777 nofail rprivate");
        assert_eq!(options.data, ["size=64m", "mode=1777"]);
        assert_eq!(options.propagation, [libc::MS_PRIVATE | libc::MS_REC]);
        let words = vec!["ro,size=1".to_string()];
        super::parse("mounts[0]", &words).unwrap_err();
    }
}
