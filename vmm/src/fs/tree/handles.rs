//! What the guest holds open.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;

use super::inodes::Inode;
use super::stream::Stream;
use super::sys::Result;

/// An open file or directory.
pub struct Handle {
    /// What it is open on.
    pub inode: Arc<Inode>,
    /// The position of a directory; files have none, each request brings its offset.
    pub stream: Option<Mutex<Stream>>,
    fd: OwnedFd,
}

impl Handle {
    /// An open file.
    pub fn file(inode: Arc<Inode>, fd: OwnedFd) -> Handle {
        Handle {
            inode,
            stream: None,
            fd,
        }
    }

    /// An open directory.
    pub fn directory(inode: Arc<Inode>, fd: OwnedFd) -> Handle {
        Handle {
            inode,
            stream: Some(Mutex::default()),
            fd,
        }
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[derive(Default)]
struct Table {
    open: HashMap<u64, Arc<Handle>>,
    last: u64,
}

/// The table of handles; numbers are never used twice.
pub struct Handles {
    table: Mutex<Table>,
    most: usize,
}

impl Handles {
    /// An empty table for at most `most` handles.
    pub fn new(most: usize) -> Handles {
        Handles {
            table: Mutex::default(),
            most,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table
            .lock()
            .expect("no code panics with the table locked")
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        self.lock().open.len()
    }

    /// Checks that one more fits: before a file is created for it.
    ///
    /// # Errors
    /// `ENFILE`.
    pub fn check_room(&self) -> Result<()> {
        if self.len() < self.most {
            Ok(())
        } else {
            Err(Errno::ENFILE)
        }
    }

    /// Gives an open file its number.
    ///
    /// # Errors
    /// `ENFILE`: the guest holds as many as it may.
    pub fn insert(&self, handle: Handle) -> Result<u64> {
        let mut table = self.lock();
        if table.open.len() >= self.most {
            return Err(Errno::ENFILE);
        }
        table.last += 1;
        let number = table.last;
        table.open.insert(number, Arc::new(handle));
        Ok(number)
    }

    /// The handle of a number.
    ///
    /// # Errors
    /// `ESTALE`: it was closed or its tree detached; `EBADF`: it was never given out.
    pub fn get(&self, number: u64) -> Result<Arc<Handle>> {
        let table = self.lock();
        match table.open.get(&number) {
            Some(handle) => Ok(handle.clone()),
            None if number <= table.last => Err(Errno::ESTALE),
            None => Err(Errno::EBADF),
        }
    }

    /// Closes a handle; closing what a detach has closed is no error.
    pub fn remove(&self, number: u64) -> Option<Arc<Handle>> {
        self.lock().open.remove(&number)
    }

    /// Takes out all handles for which `leaves` is true.
    pub fn take(&self, leaves: impl Fn(&Handle) -> bool) -> Vec<Arc<Handle>> {
        self.lock()
            .open
            .extract_if(|_, handle| leaves(handle))
            .map(|(_, handle)| handle)
            .collect()
    }
}
