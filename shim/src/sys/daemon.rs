//! Leaving a daemon behind.

use std::{
    io,
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::{net::UnixListener, process::CommandExt},
    },
    path::Path,
    process::{Command, Stdio},
};

use super::spawn;

/// The daemon's descriptor of its listening socket.
pub const LISTENER: RawFd = 3;

/// Starts `program` in a session of its own, with `listener` as descriptor [`LISTENER`] and /dev/null as its standard streams; its pid.
pub fn spawn(
    program: &Path,
    arguments: &[&str],
    environment: &[(&str, &str)],
    listener: RawFd,
) -> io::Result<u32> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let prepare = move || {
        let copy = spawn::keep(listener).map_err(io::Error::from_raw_os_error)?;
        spawn::place(copy, LISTENER).map_err(io::Error::from_raw_os_error)?;
        // SAFETY: system calls on integers.
        unsafe {
            // Also makes a process group: whoever kills containerd's does not kill this.
            libc::setsid();
            let first = LISTENER as u32 + 1;
            let cloexec = libc::CLOSE_RANGE_CLOEXEC;
            if libc::syscall(libc::SYS_close_range, first, u32::MAX, cloexec) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes async-signal-safe calls on integers only.
    unsafe {
        command.pre_exec(prepare);
    }
    // Never collected: the parent ends at once, and the daemon becomes a child of init.
    Ok(command.spawn()?.id())
}

/// The listening socket that [`spawn()`] has left at [`LISTENER`].
///
/// # Errors
/// Nothing, or something else, is there.
pub fn listener() -> io::Result<UnixListener> {
    // SAFETY: fcntl on an integer.
    if unsafe { libc::fcntl(LISTENER, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and at a program's start nobody else owns what it was started with.
    let listener = UnixListener::from(unsafe { OwnedFd::from_raw_fd(LISTENER) });
    listener.local_addr()?;
    Ok(listener)
}
