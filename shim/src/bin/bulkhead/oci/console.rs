//! A terminal on the host for a container's: its master goes to the engine over the console socket.

use std::{
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

use crate::failure::Failure;

/// Sent with the descriptor; runc's word.
const NAME: &[u8] = b"/dev/ptmx";

/// Opens a terminal, and sends its master to who listens at `socket`; the slave.
///
/// The slave is raw before the engine has the master: the line discipline is that of the
/// container's own terminal, in the guest. conmon sets ONLCR on what it gets, which means nothing
/// without OPOST.
pub fn open(socket: &Path) -> Result<OwnedFd, Failure> {
    let stream = UnixStream::connect(socket).map_err(|error| {
        let socket = socket.display();
        Failure::new(format!(
            "cannot connect to --console-socket {socket}: {error}"
        ))
    })?;
    let pty = nix::pty::openpty(None, None)?;
    let mut settings = tcgetattr(pty.slave.as_fd())?;
    cfmakeraw(&mut settings);
    tcsetattr(pty.slave.as_fd(), SetArg::TCSANOW, &settings)?;
    linux::packet::send(stream.as_fd(), NAME, &[pty.master.as_raw_fd()])?;
    Ok(pty.slave)
}

/// Refuses what runc refuses, in its words: who detaches without a console socket would lose the
/// terminal.
pub fn check(terminal: bool, detached: bool, socket: Option<&Path>) -> Result<(), Failure> {
    let text = match (terminal, detached, socket) {
        (true, true, None) => {
            "cannot allocate tty if bulkhead will detach without setting console socket"
        }
        (false, _, Some(_)) | (_, false, Some(_)) => {
            "cannot use console socket if bulkhead will not detach or allocate tty"
        }
        _ => return Ok(()),
    };
    Err(Failure::new(text))
}
