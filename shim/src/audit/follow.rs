//! Reads the log, across its rotations, while others write to it.

use std::{
    collections::VecDeque,
    fs::{File, Metadata, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
};

use super::file::{Log, same};

/// Read at once; the longest line is much shorter.
const CHUNK: usize = 64 << 10;

/// A reader of all lines that there are and that come.
#[derive(Debug)]
pub struct Follower {
    log: Log,
    /// The file that is read, and where its next line begins.
    reading: Option<(File, u64)>,
    /// What has come after it, oldest first.
    newer: VecDeque<File>,
    lines: VecDeque<Vec<u8>>,
    /// Files went before they were read.
    missed: bool,
}

impl Follower {
    /// From the oldest line that is kept.
    pub fn new(log: Log) -> Follower {
        Follower {
            log,
            reading: None,
            newer: VecDeque::new(),
            lines: VecDeque::new(),
            missed: false,
        }
    }

    /// The next line, without its end; `None`: there is none yet.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        while self.lines.is_empty() {
            let newer_known = !self.newer.is_empty();
            if self.read()? {
                continue;
            }
            // What is known to be older than another file is not written to any more: its end, if
            // it was known before the read, is the last.
            if !newer_known {
                self.look_for_newer()?;
                if self.newer.is_empty() {
                    return Ok(None);
                }
                if self.reading.is_some() {
                    continue;
                }
            }
            self.reading = self.newer.pop_front().map(|file| (file, 0));
        }
        Ok(self.lines.pop_front())
    }

    /// Whether lines have gone that were not read, since the last question.
    pub fn missed(&mut self) -> bool {
        std::mem::take(&mut self.missed)
    }

    /// Reads whole lines; `false`: there are none.
    fn read(&mut self) -> io::Result<bool> {
        let Some((file, at)) = &mut self.reading else {
            return Ok(false);
        };
        // Somebody has emptied it.
        *at = (*at).min(file.metadata()?.len());
        let mut chunk = vec![0; CHUNK];
        let count = file.read_at(&mut chunk, *at)?;
        // A line is never left half read: its writer may take it back.
        let whole = match chunk[..count].iter().rposition(|byte| *byte == b'\n') {
            Some(newline) => newline + 1,
            // No line of ours.
            None if count == CHUNK => count,
            None => return Ok(false),
        };
        *at += whole as u64;
        let lines = chunk[..whole].split(|byte| *byte == b'\n');
        let lines = lines.filter(|line| !line.is_empty());
        self.lines.extend(lines.map(<[u8]>::to_vec));
        Ok(true)
    }

    /// Files only ever move to higher numbers: who looks at the lower ones first sees each at least
    /// once, whatever moves meanwhile.
    fn look_for_newer(&mut self) -> io::Result<()> {
        let current = match &self.reading {
            Some((file, _)) => Some(file.metadata()?),
            None => None,
        };
        let mut found: Vec<File> = Vec::new();
        let mut met = false;
        for file in self.files() {
            let file = file?;
            let this = file.metadata()?;
            if current.as_ref().is_some_and(|current| same(current, &this)) {
                met = true;
                break;
            }
            if position(&found, &this)?.is_none() {
                found.push(file);
            }
        }
        self.forget_newcomers(&mut found)?;
        // Without a log there is nothing to go on with, and nothing was missed.
        if !found.is_empty() {
            self.missed |= !met && current.is_some();
            self.newer = found.into_iter().rev().collect();
        }
        Ok(())
    }

    /// Files that came during a look may stand behind older ones in `found`. What now stands before
    /// the first that was found came after it; the next look finds it again.
    fn forget_newcomers(&self, found: &mut Vec<File>) -> io::Result<()> {
        let Some(first) = found.first() else {
            return Ok(());
        };
        let first = first.metadata()?;
        for file in self.files() {
            let this = file?.metadata()?;
            if same(&first, &this) {
                break;
            }
            if let Some(at) = position(found, &this)? {
                found.remove(at);
            }
        }
        Ok(())
    }

    /// The files that there are, newest first.
    fn files(&self) -> impl Iterator<Item = io::Result<File>> + '_ {
        let paths = std::iter::once(self.log.path().to_path_buf()).chain(self.log.older());
        let opened = paths.map(|path| {
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(path)
        });
        opened.filter(|file| !matches!(file, Err(error) if error.kind() == io::ErrorKind::NotFound))
    }
}

/// Which of the files this one is.
fn position(files: &[File], this: &Metadata) -> io::Result<Option<usize>> {
    for (at, file) in files.iter().enumerate() {
        if same(&file.metadata()?, this) {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a look finds when two rotations come between two of its opens.
    #[test]
    fn a_newcomer_does_not_go_before_what_is_older() {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::of(&crate::config::Audit {
            path: dir.path().join("log"),
            max_bytes: 1,
            keep: 3,
        });
        let follower = Follower::new(log.unwrap());
        let open = |path| File::open(path).unwrap();
        follower.log.append(b"oldest\n").unwrap();
        let oldest = open(follower.log.path().to_path_buf());
        // Each line is a file.
        follower.log.append(b"newcomer\n").unwrap();
        follower.log.append(b"newest\n").unwrap();
        let mut found = vec![oldest, open(follower.log.numbered(1))];
        follower.forget_newcomers(&mut found).unwrap();
        let found: Vec<String> = found
            .into_iter()
            .map(|file| io::read_to_string(file).unwrap())
            .collect();
        assert_eq!(found, ["oldest\n"]);
    }
}
