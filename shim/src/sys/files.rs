//! Path resolution that follows no symbolic link.

use std::{
    ffi::{CString, OsStr},
    io,
    mem::size_of,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

/// `struct open_how` of openat2(2).
#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

/// Opens a directory as `O_PATH`; any symbolic link on the way is an error (`ELOOP`).
pub fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let name = c_path(path)?;
    let how = OpenHow {
        flags: (libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) as u64,
        mode: 0,
        resolve: libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS,
    };
    // SAFETY: name is NUL-terminated and how is a whole open_how; both outlive the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            libc::AT_FDCWD,
            name.as_ptr(),
            &how,
            size_of::<OpenHow>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
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
        self.unlink(libc::AT_REMOVEDIR)
    }

    /// Removes anything but a directory.
    pub fn remove_file(&self) -> io::Result<()> {
        self.unlink(0)
    }

    fn unlink(&self, flags: i32) -> io::Result<()> {
        // SAFETY: the descriptor is open and the name is NUL-terminated.
        let status =
            unsafe { libc::unlinkat(self.directory.as_raw_fd(), self.name.as_ptr(), flags) };
        if status < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
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
