//! What the guest remembers: node ids, each a descriptor of the object.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;

use super::sys::{Result, Status};
use super::version::Seen;
use crate::fs::wire::ROOT_ID;

/// What makes an object one object. Two volumes may both have an inode 17, even of one device (bind
/// mounts of parts, btrfs subvolumes): the mount tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The mount it was reached through.
    pub mount: u64,
    device: u64,
    inode: u64,
}

impl Key {
    /// The key of what statx(2) described.
    pub fn new(status: &Status) -> Key {
        Key {
            mount: status.mount,
            device: status.device(),
            inode: status.raw.stx_ino,
        }
    }
}

/// An object that the guest knows.
pub struct Inode {
    /// Its node id; never used twice.
    pub id: u64,
    /// Its key.
    pub key: Key,
    /// The type bits of its mode.
    pub kind: u32,
    /// Directory that is the root of another mount than its parent's.
    pub submount: bool,
    /// Added (exclusive or) to the inode number that the guest sees: a mounted file shares its
    /// parent's device there.
    pub number_tag: u64,
    /// The version of the file that the guest has.
    pub seen: Seen,
    /// Until when, in milliseconds of the engine's clock, it is taken to have no set-id bits
    /// without a look, which would cost each write a system call more. The guest trusts a mode that
    /// it knows for as long.
    pub plain_until: AtomicU64,
    /// It is known by another mount too, and so is another inode with a cache of its own to the
    /// guest.
    aliased: AtomicBool,
    fd: OwnedFd,
}

impl Inode {
    /// Whether the guest has, or had, the same object as another inode: what it caches of this one
    /// may be out of date.
    pub fn is_aliased(&self) -> bool {
        self.aliased.load(Ordering::Relaxed)
    }
}

impl AsFd for Inode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

struct Entry {
    inode: Arc<Inode>,
    lookups: u64,
}

#[derive(Default)]
struct Table {
    by_id: HashMap<u64, Entry>,
    by_object: HashMap<(u64, u64), Ids>,
    last: u64,
}

/// Node ids of one object, by mount. Nearly every object has one, which costs no allocation.
enum Ids {
    One(u64, u64),
    More(Vec<(u64, u64)>),
}

impl Ids {
    fn all(&self) -> impl Iterator<Item = (u64, u64)> {
        let (one, more) = match self {
            Ids::One(mount, id) => (Some((*mount, *id)), &[][..]),
            Ids::More(list) => (None, &list[..]),
        };
        one.into_iter().chain(more.iter().copied())
    }
}

impl Table {
    fn id_of(&self, key: &Key) -> Option<u64> {
        let ids = self.by_object.get(&(key.device, key.inode))?;
        let mut of_mount = ids.all().filter(|(mount, _)| *mount == key.mount);
        of_mount.next().map(|(_, id)| id)
    }

    /// Notes the id of a key that has none; whether the object has another one.
    fn add_id(&mut self, key: &Key, id: u64) -> bool {
        let new = (key.mount, id);
        let Some(ids) = self.by_object.get_mut(&(key.device, key.inode)) else {
            let one = Ids::One(key.mount, id);
            self.by_object.insert((key.device, key.inode), one);
            return false;
        };
        let others: Vec<_> = ids.all().collect();
        for (_, other) in &others {
            if let Some(entry) = self.by_id.get(other) {
                entry.inode.aliased.store(true, Ordering::Relaxed);
            }
        }
        *ids = Ids::More([others, vec![new]].concat());
        true
    }

    fn remove_id(&mut self, key: &Key) {
        let object = (key.device, key.inode);
        let Some(ids) = self.by_object.get_mut(&object) else {
            return;
        };
        let rest: Vec<_> = ids.all().filter(|(mount, _)| *mount != key.mount).collect();
        match rest[..] {
            [] => {
                self.by_object.remove(&object);
            }
            [(mount, id)] => *ids = Ids::One(mount, id),
            _ => *ids = Ids::More(rest),
        }
    }
}

/// The table of inodes. Taking one out of it closes its descriptor as soon as no request uses it.
pub struct Inodes {
    table: Mutex<Table>,
    most: usize,
}

/// What a new inode is made of, beside its key.
pub struct Found {
    /// A descriptor of the object, `O_PATH`.
    pub fd: OwnedFd,
    /// What statx(2) says of it.
    pub status: Status,
    /// See [`Inode::submount`].
    pub submount: bool,
    /// See [`Inode::number_tag`].
    pub number_tag: u64,
}

impl Inodes {
    /// An empty table for at most `most` inodes beside the root.
    pub fn new(most: usize) -> Inodes {
        Inodes {
            table: Mutex::new(Table {
                last: ROOT_ID,
                ..Table::default()
            }),
            most,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table
            .lock()
            .expect("no code panics with the table locked")
    }

    /// Forgets everything and starts over with this root.
    pub fn reset(&self, root: OwnedFd, status: &Status) {
        let mut table = self.lock();
        let old = std::mem::take(&mut table.by_id);
        table.by_object.clear();
        insert(
            &mut table,
            ROOT_ID,
            Found {
                fd: root,
                status: *status,
                submount: false,
                number_tag: 0,
            },
        );
        drop(table);
        drop(old);
    }

    /// How many inodes are held.
    pub fn len(&self) -> usize {
        self.lock().by_id.len()
    }

    /// Whether one more inode fits.
    pub fn has_room(&self) -> bool {
        self.lock().by_id.len() <= self.most
    }

    /// The inode of a node id.
    ///
    /// # Errors
    /// `ESTALE`: it was never given out, was forgotten, or its tree was detached.
    pub fn get(&self, id: u64) -> Result<Arc<Inode>> {
        match self.lock().by_id.get(&id) {
            Some(entry) => Ok(entry.inode.clone()),
            None => Err(Errno::ESTALE),
        }
    }

    /// The inode of what statx(2) described, if the guest knows it.
    pub fn known(&self, status: &Status) -> Option<Arc<Inode>> {
        let table = self.lock();
        let id = table.id_of(&Key::new(status))?;
        table.by_id.get(&id).map(|entry| entry.inode.clone())
    }

    /// The inode for an object that was found, new or known; the guest remembers it once more, and
    /// is told its attributes.
    ///
    /// # Errors
    /// `ENFILE`: the guest holds as many as it may.
    pub fn remember(&self, found: Found) -> Result<Arc<Inode>> {
        let key = Key::new(&found.status);
        let mut guard = self.lock();
        let table = &mut *guard;
        if let Some(entry) = table.id_of(&key).and_then(|id| table.by_id.get_mut(&id)) {
            entry.lookups = entry.lookups.saturating_add(1);
            let inode = entry.inode.clone();
            drop(guard);
            inode.seen.told(&found.status);
            // The descriptor just opened is closed outside the lock.
            drop(found);
            return Ok(inode);
        }
        if table.by_id.len() > self.most {
            return Err(Errno::ENFILE);
        }
        table.last += 1;
        let id = table.last;
        Ok(insert(table, id, found))
    }

    /// The guest forgets `count` of its look-ups. More than it made is as many as it made.
    pub fn forget(&self, id: u64, count: u64) {
        if id == ROOT_ID {
            return;
        }
        let mut guard = self.lock();
        let table = &mut *guard;
        let Some(entry) = table.by_id.get_mut(&id) else {
            return;
        };
        entry.lookups = entry.lookups.saturating_sub(count);
        if entry.lookups == 0 {
            let gone = table.by_id.remove(&id);
            if let Some(entry) = &gone {
                table.remove_id(&entry.inode.key);
            }
            drop(guard);
            drop(gone);
        }
    }

    /// Takes out all inodes but the root for which `leaves` is true.
    pub fn take(&self, leaves: impl Fn(&Inode) -> bool) -> Vec<Arc<Inode>> {
        let mut guard = self.lock();
        let table = &mut *guard;
        let gone: Vec<Arc<Inode>> = table
            .by_id
            .extract_if(|id, entry| *id != ROOT_ID && leaves(&entry.inode))
            .map(|(_, entry)| entry.inode)
            .collect();
        for inode in &gone {
            table.remove_id(&inode.key);
        }
        gone
    }
}

fn insert(table: &mut Table, id: u64, found: Found) -> Arc<Inode> {
    let key = Key::new(&found.status);
    let aliased = table.add_id(&key, id);
    let inode = Arc::new(Inode {
        id,
        key,
        aliased: AtomicBool::new(aliased),
        kind: found.status.kind(),
        submount: found.submount,
        number_tag: found.number_tag,
        seen: Seen::new(&found.status),
        plain_until: AtomicU64::new(0),
        fd: found.fd,
    });
    let entry = Entry {
        inode: inode.clone(),
        lookups: 1,
    };
    table.by_id.insert(id, entry);
    inode
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::tree::sys;

    fn found(dir: &tempfile::TempDir, name: &str) -> Found {
        let path = dir.path().join(name);
        std::fs::write(&path, name).unwrap();
        let fd = OwnedFd::from(std::fs::File::open(path).unwrap());
        let status = sys::status(fd.as_fd()).unwrap();
        Found {
            fd,
            status,
            submount: false,
            number_tag: 0,
        }
    }

    #[test]
    fn forgetting_more_than_was_looked_up_forgets_once() {
        let dir = tempfile::tempdir().unwrap();
        let inodes = Inodes::new(10);
        let first = inodes.remember(found(&dir, "a")).unwrap();
        assert_eq!(inodes.remember(found(&dir, "a")).unwrap().id, first.id);
        inodes.forget(first.id, 1);
        assert!(inodes.get(first.id).is_ok());
        inodes.forget(first.id, u64::MAX);
        assert_eq!(inodes.get(first.id).err(), Some(Errno::ESTALE));
        inodes.forget(first.id, u64::MAX);
        assert_ne!(
            inodes.remember(found(&dir, "a")).unwrap().id,
            first.id,
            "ids are not used again"
        );
    }

    /// As a part of a volume that is a volume of its own is found.
    #[test]
    fn an_object_that_two_mounts_have_is_aliased() {
        let dir = tempfile::tempdir().unwrap();
        let inodes = Inodes::new(10);
        let by = |mount: u64, name: &str| {
            let mut found = found(&dir, name);
            found.status.mount = mount;
            inodes.remember(found).unwrap()
        };
        let first = by(1, "a");
        assert!(!first.is_aliased() && !by(1, "a").is_aliased());
        let second = by(2, "a");
        assert_ne!(first.id, second.id);
        assert!(first.is_aliased() && second.is_aliased());
        assert!(!by(2, "b").is_aliased());
        // Each is found and forgotten by itself.
        let third = by(3, "a");
        assert_eq!([by(1, "a").id, by(2, "a").id], [first.id, second.id]);
        inodes.forget(second.id, u64::MAX);
        assert_eq!([by(1, "a").id, by(3, "a").id], [first.id, third.id]);
        inodes.take(|inode| inode.key.mount != 3);
        assert_eq!(by(3, "a").id, third.id);
        inodes.forget(third.id, u64::MAX);
        assert!(inodes.lock().by_object.is_empty());
        assert!(!by(1, "a").is_aliased());
    }

    #[test]
    fn the_inode_past_the_cap_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let inodes = Inodes::new(2);
        let root = found(&dir, "root");
        let status = root.status;
        inodes.reset(root.fd, &status);
        let first = inodes.remember(found(&dir, "a")).unwrap();
        inodes.remember(found(&dir, "b")).unwrap();
        assert_eq!(inodes.remember(found(&dir, "c")).err(), Some(Errno::ENFILE));
        inodes.remember(found(&dir, "a")).unwrap();
        inodes.forget(first.id, 2);
        inodes.remember(found(&dir, "c")).unwrap();
    }
}
