//! The mounts that the guest has reached.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::sys::{self, Result, Status};

/// How long a detached mount stays closed at most where the kernel may give its id to another (before Linux 6.8), should its
/// unmount go unnoticed.
const CLOSED_FOR: Duration = Duration::from_secs(10);

#[derive(Clone, Copy)]
struct Mount {
    mountinfo_id: u64,
    number: u64,
}

/// A mount that nobody enters any more.
struct Closed {
    /// As `/proc/self/mountinfo` lists it until it is gone.
    mountinfo_id: u64,
    /// At most so long.
    until: Option<Instant>,
}

impl Closed {
    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }
}

#[derive(Default)]
struct State {
    known: HashMap<u64, Mount>,
    closed: HashMap<u64, Closed>,
    last: u64,
}

/// What is known of mounts, by the id that [`Status::mount`] gives.
#[derive(Default)]
pub struct Mounts(Mutex<State>);

impl Mounts {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0
            .lock()
            .expect("no code panics with the mounts locked")
    }

    /// A request reached a mount: its number, small and not used twice.
    ///
    /// # Errors
    /// `ESTALE`: it was detached and waits to be unmounted.
    pub fn enter(&self, fd: BorrowedFd<'_>, status: &Status) -> Result<u64> {
        let mut state = self.lock();
        if let Some(closed) = state.closed.get(&status.mount) {
            if !closed.is_over() {
                return Err(Errno::ESTALE);
            }
            state.closed.remove(&status.mount);
        }
        if let Some(mount) = state.known.get(&status.mount) {
            return Ok(mount.number);
        }
        let mountinfo_id = if status.mount_is_unique {
            sys::mountinfo_id(fd)?
        } else {
            status.mount
        };
        state.last += 1;
        let number = state.last;
        state.known.insert(
            status.mount,
            Mount {
                mountinfo_id,
                number,
            },
        );
        Ok(number)
    }

    /// The ids of the mounts that `/proc/self/mountinfo` lists under these numbers, each with its number.
    pub fn ids(&self, mountinfo_ids: &[u64]) -> HashMap<u64, u64> {
        self.lock()
            .known
            .iter()
            .filter(|(_, mount)| mountinfo_ids.contains(&mount.mountinfo_id))
            .map(|(id, mount)| (*id, mount.mountinfo_id))
            .collect()
    }

    /// Lets nobody enter a mount any more that `/proc/self/mountinfo` lists as `mountinfo_id`.
    pub fn close(&self, id: u64, mountinfo_id: u64, is_unique: bool) {
        let mut state = self.lock();
        state.known.remove(&id);
        state.closed.retain(|_, closed| !closed.is_over());
        let until = (!is_unique).then(|| Instant::now() + CLOSED_FOR);
        state.closed.insert(
            id,
            Closed {
                mountinfo_id,
                until,
            },
        );
    }

    /// Forgets closed mounts that are gone, given those that `/proc/self/mountinfo` lists: whatever has such an id now is
    /// another mount, and nothing gets a unique id again.
    pub fn open_gone(&self, mountinfo_ids: &[u64]) {
        self.lock()
            .closed
            .retain(|_, closed| mountinfo_ids.contains(&closed.mountinfo_id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn reached(mounts: &Mounts, mount: u64, mount_is_unique: bool) -> Result<u64> {
        let file = std::fs::File::open("/").unwrap();
        let status = Status {
            mount,
            mount_is_unique,
            ..sys::status(file.as_fd()).unwrap()
        };
        mounts.enter(file.as_fd(), &status)
    }

    #[test]
    fn an_id_that_is_used_again_is_another_mount_once_the_first_is_gone() {
        let mounts = Mounts::default();
        let first = reached(&mounts, 7, false).unwrap();
        assert_eq!(reached(&mounts, 7, false), Ok(first));
        mounts.close(7, 7, false);
        assert_eq!(reached(&mounts, 7, false), Err(Errno::ESTALE));
        mounts.open_gone(&[5, 7]);
        assert_eq!(reached(&mounts, 7, false), Err(Errno::ESTALE));
        mounts.open_gone(&[5]);
        assert!(reached(&mounts, 7, false).unwrap() > first);
    }

    #[test]
    fn a_unique_id_stays_closed_and_is_forgotten_with_its_mount() {
        let mounts = Mounts::default();
        reached(&mounts, 1 << 40, true).unwrap();
        mounts.close(1 << 40, 7, true);
        mounts.open_gone(&[5, 7]);
        assert_eq!(reached(&mounts, 1 << 40, true), Err(Errno::ESTALE));
        mounts.open_gone(&[5]);
        assert!(mounts.lock().closed.is_empty());
    }
}
