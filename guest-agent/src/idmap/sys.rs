//! A process that exists only to own a user namespace.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;

/// A child in a new user namespace that does nothing. Drop ends and reaps it.
#[derive(Debug)]
pub(super) struct Holder {
    pid: libc::pid_t,
    pidfd: OwnedFd,
}

impl Holder {
    pub(super) fn spawn() -> io::Result<Self> {
        let mut pidfd: RawFd = -1;
        let mut args = libc::clone_args {
            flags: (libc::CLONE_NEWUSER | libc::CLONE_PIDFD) as u64,
            pidfd: (&raw mut pidfd) as u64,
            child_tid: 0,
            parent_tid: 0,
            // No signal: the agent's reaper waits for children that end with SIGCHLD only, and this one is ours.
            exit_signal: 0,
            stack: 0,
            stack_size: 0,
            tls: 0,
            set_tid: 0,
            set_tid_size: 0,
            cgroup: 0,
        };
        // SAFETY: `args` is a live clone_args of the size passed; without CLONE_VM the child runs on copies of this
        // stack and heap, and it makes only the system call pause(2) until it is killed.
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw mut args,
                size_of::<libc::clone_args>(),
            )
        };
        match pid {
            0 => loop {
                // SAFETY: pause(2) takes no arguments.
                unsafe { libc::syscall(libc::SYS_pause) };
            },
            pid if pid > 0 => Ok(Self {
                pid: pid as libc::pid_t,
                // SAFETY: CLONE_PIDFD has stored a new descriptor that only we know.
                pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
            }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // SAFETY: the descriptor is open and refers to our unreaped child; no siginfo is passed.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            );
        }
        // SAFETY: a null status is allowed; __WALL waits for children without an exit signal too.
        while unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL) } < 0
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
    }
}
