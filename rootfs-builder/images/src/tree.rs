//! Removal of what others have made: however deep it is, with few descriptors and no recursion.

use std::{fs, io, path::Path};

/// Removes a directory with all that is in it, or a file. What is not there is removed.
pub(crate) fn remove(top: &Path) -> io::Result<()> {
    let gone = |done: io::Result<()>| match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    };
    match top.symlink_metadata() {
        Err(error) => return gone(Err(error)),
        Ok(data) if !data.is_dir() => return gone(fs::remove_file(top)),
        Ok(_) => {}
    }
    let mut number = 0_u64;
    loop {
        let mut is_empty = true;
        for entry in fs::read_dir(top)? {
            is_empty = false;
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                gone(fs::remove_file(entry.path()))?;
                continue;
            }
            // What is in it comes up beside it, so that no path grows.
            for inner in fs::read_dir(entry.path())? {
                let inner = inner?;
                match inner.file_type()?.is_dir() {
                    false => gone(fs::remove_file(inner.path()))?,
                    true => {
                        let mut to = top.join(format!(".remove-{number}"));
                        while to.symlink_metadata().is_ok() {
                            number += 1;
                            to = top.join(format!(".remove-{number}"));
                        }
                        number += 1;
                        fs::rename(inner.path(), to)?;
                    }
                }
            }
            gone(fs::remove_dir(entry.path()))?;
        }
        if is_empty {
            return gone(fs::remove_dir(top));
        }
    }
}
