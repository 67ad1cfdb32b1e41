//! Descriptors: what is closed at an exec, what waits in them, what they refer to.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::Result;
use nix::errno::Errno;

use crate::done;

/// Marks every descriptor from `first` on close-on-exec, without a look at /proc.
///
/// # Errors
/// `ENOSYS` before Linux 5.9, `EINVAL` before 5.11.
pub fn close_on_exec_from(first: RawFd) -> Result<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
    // SAFETY: CLOSE_RANGE_CLOEXEC only sets flags; no descriptor changes its owner.
    done(unsafe { libc::close_range(first as u32, u32::MAX, flags) })
}

/// Makes `fd` the process' three standard streams.
///
/// # Errors
/// dup2(2)'s.
pub fn as_standard_streams(fd: BorrowedFd<'_>) -> Result<()> {
    nix::unistd::dup2_stdin(fd)?;
    nix::unistd::dup2_stdout(fd)?;
    nix::unistd::dup2_stderr(fd)
}

/// Bytes that wait to be read from a pipe or a terminal (FIONREAD).
///
/// # Errors
/// `ENOTTY`: it is of another kind.
pub fn unread(source: BorrowedFd<'_>) -> Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the ioctl writes one int that outlives the call.
    done(unsafe { libc::ioctl(source.as_raw_fd(), libc::FIONREAD, &raw mut bytes) })?;
    Ok(bytes.unsigned_abs())
}

/// flock(2); `operation` is `LOCK_*`.
///
/// # Errors
/// `EWOULDBLOCK` with `LOCK_NB`.
pub fn lock(file: BorrowedFd<'_>, operation: libc::c_int) -> Result<()> {
    // SAFETY: takes numbers only.
    crate::retry(|| done(unsafe { libc::flock(file.as_raw_fd(), operation) }))
}

/// Takes the lock of the file at `path`, which is made if it is not there; `operation` is `LOCK_*`.
/// `None`: somebody has it, and `operation` has `LOCK_NB`. Whoever has the lock may remove the file:
/// the lock is of the file that has the name when it is taken.
///
/// # Errors
/// open(2)'s and flock(2)'s.
pub fn lock_file(path: &Path, operation: libc::c_int) -> io::Result<Option<File>> {
    loop {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.mode(0o600).open(path)?;
        match lock(file.as_fd(), operation) {
            Err(Errno::EWOULDBLOCK) => return Ok(None),
            other => other?,
        }
        // It was removed between our open and our lock.
        if file.metadata()?.nlink() > 0 {
            return Ok(Some(file));
        }
    }
}

/// statx(2) of what `fd` refers to; `mask` is `STATX_*`.
///
/// # Errors
/// The file system's.
pub fn status(fd: BorrowedFd<'_>, mask: u32) -> Result<libc::statx> {
    // SAFETY: statx is plain integers; zero is a valid value of each.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a static empty string, and the kernel writes one statx, which outlives
    // the call.
    done(unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            mask,
            &raw mut found,
        )
    })?;
    Ok(found)
}

/// fsetxattr(2): gives what `fd` refers to an extended attribute, or a new value of it.
///
/// # Errors
/// The file system's.
pub fn set_attribute(fd: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> Result<()> {
    // SAFETY: name and value outlive the call, which only reads them.
    done(unsafe {
        libc::fsetxattr(
            fd.as_raw_fd(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_waits_in_a_pipe_is_counted() {
        let (read, write) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&write, b"abc").unwrap();
        assert_eq!(unread(read.as_fd()).unwrap(), 3);
    }

    #[test]
    fn a_directory_has_a_status() {
        let root = std::fs::File::open("/").unwrap();
        let found = status(root.as_fd(), libc::STATX_TYPE | libc::STATX_INO).unwrap();
        assert_eq!(u32::from(found.stx_mode) & libc::S_IFMT, libc::S_IFDIR);
        assert_ne!(found.stx_ino, 0);
    }
}
