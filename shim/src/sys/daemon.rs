//! Leaving a daemon behind.

use std::{
    io,
    os::{
        fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// The daemon's descriptor of its listening socket.
pub const LISTENER: RawFd = 3;

/// Starts `program` in a session of its own, with `listeners` as its descriptors from [`LISTENER`]
/// on and /dev/null as its standard streams; its pid.
pub fn spawn(
    program: &Path,
    arguments: &[&str],
    environment: &[(&str, &str)],
    listeners: Vec<OwnedFd>,
) -> io::Result<u32> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // The session is a process group too: whoever kills containerd's does not kill this.
    linux::process::hand_over(&mut command, LISTENER, listeners, true);
    // Never collected: the parent ends at once, and the daemon becomes a child of init.
    Ok(command.spawn()?.id())
}

/// The event loop of a daemon that looks after one pod.
///
/// # Errors
/// It cannot be made.
pub fn event_loop() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Blocking work is rare: a thread that waits for more costs memory in every pod.
        .thread_keep_alive(Duration::from_secs(1))
        .build()
}

/// The listening socket that [`spawn()`] has left at this number.
///
/// # Errors
/// Nothing, or something else, is there.
pub fn listener(number: RawFd) -> io::Result<UnixListener> {
    let listener = UnixListener::from(inherited(number)?);
    listener.local_addr()?;
    Ok(listener)
}

/// The descriptor that [`spawn()`] has left at this number; once for each.
///
/// # Errors
/// Nothing is there.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: only asked for its flags; the descriptor need not be open for that.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: the descriptor is open, and at a program's start nobody else owns what it was started
    // with.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
