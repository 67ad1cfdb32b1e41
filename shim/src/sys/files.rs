//! Path resolution that follows no symbolic link.
#![forbid(unsafe_code)]

use std::{
    ffi::{CString, OsStr},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2},
    unistd::{UnlinkatFlags, unlinkat},
};

/// A system call on a path failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}")]
pub struct Failed {
    /// The verb.
    action: &'static str,
    /// On what.
    path: PathBuf,
    /// Why.
    #[source]
    source: io::Error,
}

/// What a call's error becomes that was to `action` the `path`.
pub fn failed<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> Failed {
    let path = path.to_path_buf();
    move |error| Failed {
        action,
        path,
        source: error.into(),
    }
}

/// Opens a directory as `O_PATH`; any symbolic link on the way is an error (`ELOOP`).
pub fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    Ok(openat2(AT_FDCWD, path, how)?)
}

/// A name inside a directory that was reached without a symbolic link.
///
/// [`Entry::path`] names it through the open directory, so that a later change of the way there cannot redirect a call.
pub struct Entry {
    directory: OwnedFd,
    name: CString,
}

impl Entry {
    /// Opens the parent of `path`. The last component need not exist and is not followed.
    pub fn open(path: &Path) -> io::Result<Entry> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        Ok(Entry {
            directory: open_directory(parent)?,
            name: c_string(name)?,
        })
    }

    /// The entry by way of `/proc/self/fd`.
    pub fn path(&self) -> PathBuf {
        let name = OsStr::from_bytes(self.name.to_bytes());
        PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd())).join(name)
    }

    /// Removes an empty directory.
    pub fn remove_directory(&self) -> io::Result<()> {
        self.unlink(UnlinkatFlags::RemoveDir)
    }

    /// Removes anything but a directory.
    pub fn remove_file(&self) -> io::Result<()> {
        self.unlink(UnlinkatFlags::NoRemoveDir)
    }

    fn unlink(&self, flags: UnlinkatFlags) -> io::Result<()> {
        Ok(unlinkat(&self.directory, self.name.as_c_str(), flags)?)
    }
}

/// A path for a system call; a NUL byte in it is `EINVAL`.
pub fn c_path(path: &Path) -> io::Result<CString> {
    c_string(path.as_os_str())
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn a_symbolic_link_on_the_way_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real");
        fs::create_dir(&real).unwrap();
        fs::create_dir(real.join("victim")).unwrap();
        symlink(&real, dir.path().join("link")).unwrap();
        let error = Entry::open(&dir.path().join("link/victim")).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
        let entry = Entry::open(&real.join("victim")).unwrap();
        entry.remove_directory().unwrap();
        assert!(!real.join("victim").exists());
    }
}
