//! Processes by pid and start time, so that a recycled pid is never mistaken for the one that was meant.
#![forbid(unsafe_code)]

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use linux::{process::open_pidfd, retry};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

pub use linux::process::{Death, collect};

/// A process: its pid and the time at which it started, in clock ticks since boot (proc_pid_stat(5), field 22).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ProcessId {
    /// In the host's pid namespace.
    pub pid: i32,
    /// Clock ticks since boot.
    pub start: u64,
}

impl ProcessId {
    /// The process that has this pid now; `None` when there is none.
    pub fn of(pid: i32) -> Option<ProcessId> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command in field 2 may hold blanks and parentheses: count from its last parenthesis, which ends field 2.
        let after = &stat[stat.rfind(')')? + 1..];
        let start = after.split_ascii_whitespace().nth(22 - 3)?.parse().ok()?;
        Some(ProcessId { pid, start })
    }

    /// This process.
    pub fn own() -> ProcessId {
        ProcessId::of(std::process::id() as i32).expect("a process can read its own /proc/PID/stat")
    }

    /// Whether it still exists (as a zombie too).
    pub fn exists(self) -> bool {
        ProcessId::of(self.pid) == Some(self)
    }

    /// A pidfd of it; `None` when it is gone.
    pub fn open(self) -> io::Result<Option<OwnedFd>> {
        let fd = match open_pidfd(self.pid) {
            Err(Errno::ESRCH) => return Ok(None),
            result => result?,
        };
        // The pidfd pins whoever has the pid now: look after opening, not before.
        Ok(self.exists().then_some(fd))
    }
}

/// Sends a signal by pidfd; a process that is gone is no error.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    match linux::process::send_signal(pidfd, signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// How likely the kernel is to take a process when memory runs out: -1000 (never) to 1000 (first), as proc_pid_oom_score_adj(5)
/// has it. One that is gone is no error; the pid must be that of a child of ours that was not collected, or of nobody.
pub fn set_oom_score_adj(pid: i32, value: i32) -> io::Result<()> {
    match fs::write(format!("/proc/{pid}/oom_score_adj"), value.to_string()) {
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(libc::ESRCH) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Waits until the process behind a pidfd has ended; `false` when `limit` passes first.
pub fn wait_gone(pidfd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    Ok(retry(|| poll(&mut fds, timeout))? > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recycled_pid_is_not_mistaken() {
        let own = ProcessId::own();
        assert!(own.exists());
        assert!(own.open().unwrap().is_some());
        let other = ProcessId {
            start: own.start + 1,
            ..own
        };
        assert!(!other.exists());
        assert!(other.open().unwrap().is_none());
    }

    #[test]
    fn the_end_of_a_process_is_seen() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let id = ProcessId::of(child.id() as i32).unwrap();
        let pidfd = id.open().unwrap().unwrap();
        assert!(!wait_gone(pidfd.as_fd(), Duration::from_millis(1)).unwrap());
        send_signal(pidfd.as_fd(), libc::SIGKILL).unwrap();
        assert!(wait_gone(pidfd.as_fd(), Duration::from_secs(10)).unwrap());
        assert_eq!(collect(pidfd.as_fd()), Some(Death::Signal(libc::SIGKILL)));
        let _ = child.wait();
    }
}
