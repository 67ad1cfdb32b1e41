//! Close-to-open: a file that is opened shows what the host last wrote, although the guest has
//! cached an older content.
//!
//! The guest drops what it has cached of a file when it is *told* another size or modification time
//! (`AUTO_INVAL_DATA`), and asks for neither while the attributes that it has are valid. So each
//! OPEN compares the file with what the guest was last told, the change time included, which a
//! rewrite of equal length leaves another even where somebody sets the modification time back.
//!
//! ```text
//! OPEN ── as told ─────────────────────────────────────► keep the cache
//!      ├─ changed, and the guest itself has changed it ─► keep it, or drop it where size or modification time differ
//!      └─ changed by the host ──────────────────────────► ESTALE, and at the next OPEN: drop it
//! ```
//!
//! `ESTALE` makes open(2) walk its path once more with nothing cached (`LOOKUP_REVAL`): the guest
//! finds the file that has been put in the place of this one by a rename, or learns the new
//! attributes of this one.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::sys::Status;

/// An OPEN answers `ESTALE` at most once in this time for a file: open(2) walks its path again only
/// once, and the file may have changed again by then.
const BETWEEN_REFUSALS: Duration = Duration::from_secs(10);

/// What tells one content of a file from another.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version {
    size: u64,
    modified: (i64, u32),
    changed: (i64, u32),
}

impl Version {
    fn of(status: &Status) -> Version {
        let time = |stamp: libc::statx_timestamp| (stamp.tv_sec, stamp.tv_nsec);
        Version {
            size: status.raw.stx_size,
            modified: time(status.raw.stx_mtime),
            changed: time(status.raw.stx_ctime),
        }
    }

    /// The guest, when it is told `other`, keeps its cache of this.
    fn looks_like(&self, other: &Version) -> bool {
        (self.size, self.modified) == (other.size, other.modified)
    }
}

/// What an OPEN does with what the guest has cached of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// It is the file's content.
    Keep,
    /// It may be an older content.
    Drop,
    /// The file may not even be the one of that name: the guest looks again.
    LookAgain,
}

struct State {
    told: Version,
    /// The guest has changed the file since.
    own: bool,
    refused: Option<Instant>,
}

/// The version of a file that the guest's cache stands for.
pub struct Seen(Mutex<State>);

impl Seen {
    /// Of a file that the guest is told about for the first time.
    pub fn new(status: &Status) -> Seen {
        Seen(Mutex::new(State {
            told: Version::of(status),
            own: false,
            refused: None,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no code panics with a version locked")
    }

    /// The guest is told these attributes, and drops its cache itself where size or modification
    /// time are new to it.
    pub fn told(&self, status: &Status) {
        let now = Version::of(status);
        let mut state = self.lock();
        // A new change time alone says nothing to the guest. If the change was the host's, the next
        // OPEN has to find it.
        if state.own || !now.looks_like(&state.told) {
            state.told = now;
            state.own = false;
        }
    }

    /// The guest is about to change the file or its attributes.
    pub fn changed_by_guest(&self) {
        self.lock().own = true;
    }

    /// The guest has opened the file to write it, and it was `before` and is `after`: an overlay of the
    /// host has copied it up, with another change time.
    pub fn copied_up(&self, before: &Status, after: &Status) {
        if Version::of(before) != Version::of(after) {
            self.changed_by_guest();
        }
    }

    /// What an OPEN says that finds the file like this.
    pub fn open(&self, status: &Status) -> Cache {
        let now = Version::of(status);
        let mut state = self.lock();
        if now == state.told {
            return Cache::Keep;
        }
        // Without a name it was removed by the host: the guest, which would know, still finds it by
        // one.
        let own = state.own && status.raw.stx_nlink > 0;
        let refused = state
            .refused
            .is_some_and(|at| at.elapsed() < BETWEEN_REFUSALS);
        if !own && !refused {
            state.refused = Some(Instant::now());
            return Cache::LookAgain;
        }
        let keep = own && now.looks_like(&state.told);
        state.told = now;
        state.own = false;
        match keep {
            true => Cache::Keep,
            false => Cache::Drop,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;
    use crate::fs::tree::sys;

    /// A status with a size, a modification time and a change time.
    fn status(size: u64, modified: i64, changed: i64) -> Status {
        let file = File::open("/").unwrap();
        let mut status = sys::status(file.as_fd()).unwrap();
        status.raw.stx_size = size;
        status.raw.stx_mtime.tv_sec = modified;
        status.raw.stx_ctime.tv_sec = changed;
        status
    }

    #[test]
    fn what_the_host_changes_is_looked_for_again_once_and_then_dropped() {
        let seen = Seen::new(&status(1, 1, 1));
        assert_eq!(seen.open(&status(1, 1, 1)), Cache::Keep);
        assert_eq!(seen.open(&status(1, 2, 2)), Cache::LookAgain);
        // The host goes on changing it: open(2) tries no third time.
        assert_eq!(seen.open(&status(1, 3, 3)), Cache::Drop);
        assert_eq!(seen.open(&status(1, 3, 3)), Cache::Keep);
        assert_eq!(seen.open(&status(1, 4, 4)), Cache::Drop);
    }

    #[test]
    fn a_content_with_an_old_modification_time_is_not_kept() {
        let seen = Seen::new(&status(1, 1, 1));
        assert_eq!(seen.open(&status(1, 1, 2)), Cache::LookAgain);
        // The look-up tells nothing by which the guest would drop its cache.
        seen.told(&status(1, 1, 2));
        assert_eq!(seen.open(&status(1, 1, 2)), Cache::Drop);
        assert_eq!(seen.open(&status(1, 1, 2)), Cache::Keep);
    }

    #[test]
    fn what_the_guest_changes_itself_is_dropped_once_at_most() {
        let seen = Seen::new(&status(1, 1, 1));
        seen.changed_by_guest();
        assert_eq!(seen.open(&status(2, 2, 2)), Cache::Drop);
        assert_eq!(seen.open(&status(2, 2, 2)), Cache::Keep);
        // Told before it is opened, the guest has dropped it already.
        seen.changed_by_guest();
        seen.told(&status(3, 3, 3));
        assert_eq!(seen.open(&status(3, 3, 3)), Cache::Keep);
        // A new mode is no new content.
        seen.changed_by_guest();
        assert_eq!(seen.open(&status(3, 3, 4)), Cache::Keep);
        assert_eq!(seen.open(&status(3, 3, 4)), Cache::Keep);
    }

    #[test]
    fn a_file_that_the_host_removed_is_looked_for_although_the_guest_changed_it() {
        let seen = Seen::new(&status(1, 1, 1));
        seen.changed_by_guest();
        let mut gone = status(1, 1, 2);
        gone.raw.stx_nlink = 0;
        assert_eq!(seen.open(&gone), Cache::LookAgain);
        assert_eq!(seen.open(&gone), Cache::Drop);
    }
}
