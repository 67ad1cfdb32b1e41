//! The process whose pid an engine takes for a container's, or for an exec process'.
//!
//! Whoever calls the runtime (conmon, containerd's shim for runc) waits for the pid in its pid file
//! as for a child, and expects the container's exit status there. So this process is forked by the
//! command that the engine has called, without an exec, and becomes the engine's child when that
//! command ends. It has one end of a connection to the pod's monitor:
//!
//! ```text
//! signal ──► signalfd ──► packet to the monitor ──► the process in the guest
//! the process' end ──► one byte from the monitor ──► exit code
//! SIGKILL ──► the connection breaks ──► the monitor kills the process
//! the monitor dies ──► the connection breaks ──► exit code 255
//! ```
//!
//! Who enters its namespaces finds nothing of the host but the container's files, if it stands for a
//! container, and else nothing, as with the pod's stub.

use std::{
    io::{self, Read},
    os::fd::{AsRawFd, BorrowedFd, RawFd},
};

use linux::process::{Place, clone3};
use nix::errno::Errno;

use super::{
    spawn::pipe,
    stub::{Words, done, drop_capabilities, empty_root},
    view::View,
};

/// The keeper's own descriptors.
const MONITOR: RawFd = 3;
const SIGNALS: RawFd = 4;
const TERMINAL: RawFd = 5;
/// Copies are made from here on before they get their numbers.
const ASIDE: RawFd = 16;

/// First byte of a packet that tells of a signal; its number follows.
pub const SIGNAL: u8 = b'S';

/// Exit code when there is no monitor any more that could say another one.
const ABANDONED: i32 = 255;

/// What a keeper is made with.
pub struct Keeper<'a> {
    /// Its connection to the monitor.
    pub monitor: BorrowedFd<'a>,
    /// The container's terminal on the host: it becomes the keeper's, which is told when its size
    /// changes.
    pub terminal: Option<BorrowedFd<'a>>,
    /// The pod's network namespace.
    pub network: BorrowedFd<'a>,
    /// The pod's cgroup.
    pub cgroup: BorrowedFd<'a>,
    /// What is in its root; `None`: nothing.
    pub view: Option<&'a View>,
    /// Its command line.
    pub title: &'a str,
}

impl Keeper<'_> {
    /// Forks it: its pid. It is a child of this process, to be collected by whoever comes after.
    ///
    /// # Errors
    /// It could not be made, or not settle; then it has ended.
    pub fn start(&self) -> io::Result<i32> {
        let (mut failure, report) = pipe()?;
        let child = Child {
            monitor: self.monitor.as_raw_fd(),
            terminal: self.terminal.map(|fd| fd.as_raw_fd()),
            network: self.network.as_raw_fd(),
            report: report.as_raw_fd(),
            view: self.view,
            title: self.title.as_bytes(),
            words: Words::of_this_process()?,
        };
        let namespaces =
            libc::CLONE_NEWIPC | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS;
        let place = Place {
            namespaces: namespaces as u64,
            cgroup: Some(self.cgroup),
        };
        // SAFETY: the child calls `Child::run`, which makes system calls only, so that no lock held
        // by another thread can matter.
        let made = unsafe { clone3(place, libc::SIGCHLD, || child.run()) }?;
        // Drop our copy now: an end of file is the child's word that it stands.
        drop(report);
        let mut errno = [0; 4];
        match failure.read_exact(&mut errno) {
            Ok(()) => Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
            Err(_) => Ok(made.pid),
        }
    }
}

/// What the child needs; no allocation after the fork.
struct Child<'a> {
    monitor: RawFd,
    terminal: Option<RawFd>,
    network: RawFd,
    report: RawFd,
    view: Option<&'a View>,
    title: &'a [u8],
    words: Words,
}

impl Child<'_> {
    fn run(&self) -> ! {
        let mut report = self.report;
        let Err(errno) = self.settle(&mut report);
        let failed = (errno as i32).to_ne_bytes();
        // SAFETY: write and _exit are async-signal-safe; the buffer lives on this stack.
        unsafe {
            libc::write(report, failed.as_ptr().cast(), failed.len());
            libc::_exit(1)
        }
    }

    /// Only returns with an errno. Async-signal-safe calls only.
    fn settle(&self, report: &mut RawFd) -> nix::Result<std::convert::Infallible> {
        // SAFETY: setns on an integer.
        done(unsafe { libc::setns(self.network, libc::CLONE_NEWNET) })?;
        // Its trees are descriptors, whose numbers may be those that are given below.
        match self.view {
            Some(view) => view.enter()?,
            None => empty_root()?,
        }
        // First out of the way of the numbers that are given below.
        *report = aside(*report)?;
        let monitor = aside(self.monitor)?;
        let terminal = self.terminal.map(aside).transpose()?;
        let signals = aside(catch_signals()?)?;
        for (fd, number) in [(monitor, MONITOR), (signals, SIGNALS)] {
            put(fd, number)?;
        }
        // SAFETY: takes no arguments; a child of a fork leads no process group.
        done(unsafe { libc::setsid() })?;
        if let Some(terminal) = terminal {
            put(terminal, TERMINAL)?;
            // SAFETY: the ioctl takes a number.
            done(unsafe { libc::ioctl(TERMINAL, libc::TIOCSCTTY, 0) })?;
        }
        self.words.rename(self.title, c"bulkhead-keeper");
        drop_capabilities()?;
        let first = TERMINAL + i32::from(terminal.is_some());
        // SAFETY: ranges of numbers that no object of this copy will use again.
        unsafe {
            // The engine waits for the end of its streams: they do not stay open here.
            done(libc::close_range(0, 2, 0))?;
            // With the rest of this process' descriptors goes `report`: the word that it stands.
            done(libc::close_range(first as u32, u32::MAX, 0))?;
        }
        keep()
    }
}

fn aside(fd: RawFd) -> nix::Result<RawFd> {
    // SAFETY: takes numbers only.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, ASIDE) })
}

fn put(fd: RawFd, number: RawFd) -> nix::Result<()> {
    // SAFETY: takes numbers only; no object of this copy will use the second.
    done(unsafe { libc::dup2(fd, number) })
}

/// Blocks every signal, and makes a descriptor from which they are read: also the init of a pid
/// namespace gets those that it blocks.
fn catch_signals() -> nix::Result<RawFd> {
    // SAFETY: system calls on integers and on values of this stack; the signal set is initialised
    // before use.
    unsafe {
        // Who enters the pid namespace and leaves children behind makes them this process': nobody
        // waits for them.
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
        for quiet in [libc::SIGCHLD, libc::SIGPIPE] {
            libc::sigdelset(&mut all, quiet);
        }
        Errno::result(libc::signalfd(-1, &all, libc::SFD_NONBLOCK))
    }
}

/// Passes signals on until the monitor has said how to end.
fn keep() -> ! {
    let wanted = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    loop {
        let mut fds = [wanted(MONITOR), wanted(SIGNALS)];
        // SAFETY: system calls on values of this stack, with their lengths.
        unsafe {
            if libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) < 0 {
                continue;
            }
            if fds[0].revents != 0 {
                let mut status = 0u8;
                let read = libc::recv(MONITOR, (&raw mut status).cast(), 1, 0);
                if read < 0 && Errno::last() == Errno::EINTR {
                    continue;
                }
                libc::_exit(if read == 1 { status.into() } else { ABANDONED });
            }
            let mut signal: libc::signalfd_siginfo = std::mem::zeroed();
            let size = size_of::<libc::signalfd_siginfo>();
            let read = libc::read(SIGNALS, (&raw mut signal).cast(), size);
            if read == size as isize {
                let packet = [SIGNAL, signal.ssi_signo as u8];
                // A monitor that does not read has worse troubles: nobody waits for it here.
                let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
                libc::send(MONITOR, packet.as_ptr().cast(), packet.len(), flags);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::fd::{AsFd, OwnedFd},
        path::Path,
    };

    use nix::sys::{
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    };
    use nix::unistd::Pid;

    use super::*;

    fn start(terminal: Option<BorrowedFd<'_>>) -> Option<(i32, OwnedFd)> {
        let places = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let found = places.iter().find(|p| p.join("cgroup.procs").exists());
        // Only root may put a process there.
        let found = found.filter(|_| nix::unistd::geteuid().is_root());
        if found.is_none() {
            println!("NOT RUN: this needs root and cgroup v2");
        }
        let cgroup = File::open(found?).unwrap();
        let network = File::open("/proc/self/ns/net").unwrap();
        let (ours, theirs) = linux::packet::pair().unwrap();
        let keeper = Keeper {
            monitor: theirs.as_fd(),
            terminal,
            network: network.as_fd(),
            cgroup: cgroup.as_fd(),
            view: None,
            title: "a keeper",
        };
        let pid = keeper.start().unwrap();
        Some((pid, ours))
    }

    fn packet(monitor: &OwnedFd) -> Vec<u8> {
        let mut bytes = [0; 16];
        let packet = linux::packet::receive(monitor.as_fd(), &mut bytes, 0).unwrap();
        bytes[..packet.length].to_vec()
    }

    fn end(pid: i32) -> WaitStatus {
        waitpid(Pid::from_raw(pid), None).unwrap()
    }

    #[test]
    fn it_ends_as_it_is_told() {
        for status in [0, 42, 255] {
            let Some((pid, monitor)) = start(None) else {
                return;
            };
            linux::packet::send(monitor.as_fd(), &[status], &[]).unwrap();
            assert_eq!(
                end(pid),
                WaitStatus::Exited(Pid::from_raw(pid), status.into())
            );
        }
    }

    #[test]
    fn it_ends_with_its_monitor() {
        let Some((pid, monitor)) = start(None) else {
            return;
        };
        drop(monitor);
        assert_eq!(end(pid), WaitStatus::Exited(Pid::from_raw(pid), ABANDONED));
    }

    #[test]
    fn signals_are_passed_on_and_sigkill_is_the_connections_end() {
        let Some((pid, monitor)) = start(None) else {
            return;
        };
        for signal in [Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGQUIT] {
            kill(Pid::from_raw(pid), signal).unwrap();
            assert_eq!(packet(&monitor), [SIGNAL, signal as u8]);
        }
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        assert_eq!(packet(&monitor), [0; 0]);
        assert!(matches!(end(pid), WaitStatus::Signaled(..)));
    }

    #[test]
    fn it_holds_nothing_of_the_command_and_shows_nothing_of_the_host() {
        let Some((pid, monitor)) = start(None) else {
            return;
        };
        let process = format!("/proc/{pid}");
        let fds = fs::read_dir(format!("{process}/fd")).unwrap();
        let mut fds: Vec<String> = fds
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        fds.sort();
        assert_eq!(fds, ["3", "4"]);
        let root = fs::read_dir(format!("{process}/root")).unwrap();
        assert_eq!(root.count(), 1);
        let words = fs::read_to_string(format!("{process}/cmdline")).unwrap();
        assert_eq!(words.trim_end_matches('\0'), "a keeper");
        drop(monitor);
        end(pid);
    }

    #[test]
    fn a_terminals_new_size_is_a_signal() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let Some((pid, monitor)) = start(Some(pty.slave.as_fd())) else {
            return;
        };
        linux::terminal::resize(pty.master.as_fd(), 33, 99).unwrap();
        assert_eq!(packet(&monitor), [SIGNAL, Signal::SIGWINCH as u8]);
        assert_eq!(linux::terminal::size(pty.slave.as_fd()), Ok((33, 99)));
        drop(monitor);
        end(pid);
    }
}
