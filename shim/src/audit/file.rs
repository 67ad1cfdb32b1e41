//! The file that all shims of a node append to.
//!
//! ```text
//! open ──► flock ──► still the one at the path? ──► mend a torn end ──► full? rotate, again ──► one write(2)
//! ```
//!
//! The lock is the file's own, and goes with its holder, however that ends. A writer that is killed
//! in the middle of its write(2) leaves a piece of a line, which the next writer cuts off. A writer
//! that is killed between two renames leaves a number free, which the next rotation fills.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use crate::config;

/// Longest line, with its end, in bytes.
pub const MAX_LINE: usize = 4096;

/// Where lines go, and how many of them are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    path: PathBuf,
    max_bytes: u64,
    keep: u32,
}

impl Log {
    /// The one that the operator wants; `None`: none.
    pub fn of(settings: &config::Audit) -> Option<Log> {
        (!settings.path.as_os_str().is_empty()).then(|| Log {
            path: settings.path.clone(),
            max_bytes: settings.max_bytes,
            keep: settings.keep,
        })
    }

    /// The file with the newest lines.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Older files, the newest of them first, and as many as may be there.
    pub(super) fn older(&self) -> impl Iterator<Item = PathBuf> {
        (1..=self.keep).map(|number| self.numbered(number))
    }

    /// Appends a line that ends with a newline. Waits for the lock.
    ///
    /// # Errors
    /// The line is not in the file, in whole or in part.
    pub(super) fn append(&self, line: &[u8]) -> io::Result<()> {
        let (mut file, mut length) = self.locked()?;
        if length > 0 && length.saturating_add(line.len() as u64) > self.max_bytes {
            self.rotate()?;
            // Not unlocked before: somebody else would make the new one, and fill it.
            let full = file;
            (file, length) = self.locked()?;
            drop(full);
        }
        match file.write(line) {
            Ok(written) if written == line.len() => Ok(()),
            // A full disk may have room for a piece of it.
            Ok(_) => {
                file.set_len(length)?;
                Err(io::ErrorKind::StorageFull.into())
            }
            Err(error) => Err(error),
        }
    }

    /// The file at the path, locked, and the length of its whole lines.
    fn locked(&self) -> io::Result<(File, u64)> {
        loop {
            let file = self.open()?;
            linux::descriptor::lock(file.as_fd(), libc::LOCK_EX)?;
            // It may have been rotated while we waited.
            match fs::symlink_metadata(&self.path) {
                Ok(there) if same(&there, &file.metadata()?) => {
                    let length = mend(&file)?;
                    return Ok((file, length));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn open(&self) -> io::Result<File> {
        let open = || {
            OpenOptions::new()
                .read(true)
                .append(true)
                .create(true)
                .mode(0o600)
                // Nobody but root can put something else there. If root does, it is not waited for.
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&self.path)
        };
        let opened = match (open(), self.path.parent()) {
            (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound => {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(parent)?;
                open()
            }
            (opened, _) => opened,
        };
        let file = opened?;
        match file.metadata()?.is_file() {
            true => Ok(file),
            false => Err(io::Error::other("it is not a regular file")),
        }
    }

    /// Moves the full file and the older ones on by one; the oldest goes.
    fn rotate(&self) -> io::Result<()> {
        let is_free = |number: &u32| self.numbered(*number).symlink_metadata().is_err();
        let last = (1..=self.keep).find(is_free).unwrap_or(self.keep);
        for number in (1..last).rev() {
            fs::rename(self.numbered(number), self.numbered(number + 1))?;
        }
        fs::rename(&self.path, self.numbered(1))
    }

    pub(super) fn numbered(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }
}

pub(super) fn same(one: &fs::Metadata, other: &fs::Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Cuts off the piece of a line that a killed writer has left: the length of what is whole.
fn mend(file: &File) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let begin = length.saturating_sub(MAX_LINE as u64);
    let mut end = vec![0; (length - begin) as usize];
    file.read_exact_at(&mut end, begin)?;
    let whole = match end.iter().rposition(|byte| *byte == b'\n') {
        Some(newline) => newline + 1,
        None if begin == 0 => 0,
        None => end.len(),
    };
    // Somebody else's text is not ours to cut.
    if end.get(whole) == Some(&b'{') {
        file.set_len(begin + whole as u64)?;
        return Ok(begin + whole as u64);
    }
    if end.last().is_some_and(|last| *last != b'\n') {
        (&*file).write_all(b"\n")?;
        return Ok(length + 1);
    }
    Ok(length)
}
