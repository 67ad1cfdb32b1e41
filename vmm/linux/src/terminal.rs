//! Pseudo-terminals, without a look-up of a path.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::Result;

use crate::{done, new_descriptor};

/// Opens the other side of the pseudo-terminal behind `master` (TIOCGPTPEER).
///
/// # Errors
/// The terminal is locked, or `master` is none.
pub fn peer(master: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the ioctl takes open flags as a number.
    new_descriptor(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })
}

/// Unlocks a pseudo-terminal (TIOCSPTLCK).
///
/// # Errors
/// `master` is none.
pub fn unlock(master: BorrowedFd<'_>) -> Result<()> {
    let unlock: libc::c_int = 0;
    // SAFETY: the ioctl reads one int that outlives the call.
    done(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) })
}

/// Makes `terminal` the controlling terminal of the calling session leader (TIOCSCTTY).
///
/// # Errors
/// The caller leads no session or has a terminal.
pub fn control(terminal: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the ioctl takes a number.
    done(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) })
}

/// Sets the window size by either side (TIOCSWINSZ).
///
/// # Errors
/// It is no terminal.
pub fn resize(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the ioctl reads one struct that outlives the call.
    done(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
}

/// Rows and columns of the window (TIOCGWINSZ).
///
/// # Errors
/// It is no terminal.
pub fn size(terminal: BorrowedFd<'_>) -> Result<(u16, u16)> {
    // SAFETY: winsize is integers; zero is a valid value of each.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: the ioctl writes one struct that outlives the call.
    done(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) })?;
    Ok((size.ws_row, size.ws_col))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn both_sides_see_the_size() {
        let master = nix::pty::posix_openpt(nix::fcntl::OFlag::O_RDWR).unwrap();
        assert!(peer(master.as_fd()).is_err(), "it is locked");
        unlock(master.as_fd()).unwrap();
        let terminal = peer(master.as_fd()).unwrap();
        resize(master.as_fd(), 12, 34).unwrap();
        assert_eq!(size(terminal.as_fd()), Ok((12, 34)));
    }
}
