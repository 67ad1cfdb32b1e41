//! The pid of a pod: a forked process that does nothing, in the pod's cgroup and network namespace.
//!
//! Engines are given its pid for every task of the pod, enter `/proc/PID/ns/*` and look whether it lives. It is a copy of this
//! process without an exec, so it costs a few pages. It ends when [`Stub::release`] closes its pipe, or when this process dies,
//! which closes the pipe too.

use std::{
    fs::File,
    io::{self, Read},
    mem::size_of,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

use super::{
    process,
    spawn::{CLONE_INTO_CGROUP, CloneArgs, errno, keep, pipe, place},
};

/// How long the stub may take from the end of its pipe to its own.
const FAREWELL: Duration = Duration::from_secs(10);

/// Which network namespace the stub is in.
pub enum Network<'a> {
    /// A fresh one.
    New,
    /// One that the engine has made.
    Given(BorrowedFd<'a>),
}

/// A running stub.
#[derive(Debug)]
pub struct Stub {
    pid: i32,
    pidfd: OwnedFd,
    life: OwnedFd,
}

impl Stub {
    /// Forks it into `cgroup`.
    pub fn start(cgroup: BorrowedFd<'_>, network: Network<'_>) -> io::Result<Stub> {
        let (ends, life) = pipe()?;
        let (mut failure, report) = pipe()?;
        let (flags, join) = match &network {
            Network::New => (libc::CLONE_NEWNET, None),
            Network::Given(fd) => (0, Some(fd.as_raw_fd())),
        };
        let child = Child {
            life: ends.as_raw_fd(),
            report: report.as_raw_fd(),
            network: join,
        };
        let mut pidfd: RawFd = -1;
        let namespaces = flags | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        let arguments = CloneArgs {
            flags: namespaces as u64 | CLONE_INTO_CGROUP | libc::CLONE_PIDFD as u64,
            pidfd: &raw mut pidfd as u64,
            exit_signal: libc::SIGCHLD as u64,
            cgroup: cgroup.as_raw_fd() as u64,
            ..CloneArgs::default()
        };
        // SAFETY: no CLONE_VM: the child has a copy of this memory and, like after fork, only this thread. It calls
        // `Child::run`, which makes system calls only, so that no lock held by another thread can matter.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &arguments, size_of::<CloneArgs>()) };
        match pid {
            0 => child.run(),
            pid if pid < 0 => Err(io::Error::last_os_error()),
            pid => {
                // SAFETY: CLONE_PIDFD has stored a descriptor that nobody else owns.
                let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
                let stub = Stub {
                    pid: pid as i32,
                    pidfd,
                    life,
                };
                // Drop our copies now: an end of file is the child's word that it stands.
                drop((report, ends));
                let mut errno = [0; 4];
                match failure.read_exact(&mut errno) {
                    Ok(()) => {
                        stub.release();
                        Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
                    }
                    Err(_) => Ok(stub),
                }
            }
        }
    }

    /// In the host's pid namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// A descriptor that becomes readable when it has ended, for whatever reason.
    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Lets it end, and collects it.
    pub fn release(self) {
        let Stub { pidfd, life, .. } = self;
        drop(life);
        // It only has to leave a read(2); should it not, the ledger's replay kills it.
        let _ = process::wait_gone(pidfd.as_fd(), FAREWELL);
        process::reap(pidfd.as_fd());
    }
}

/// What the child needs; no allocation after the fork.
struct Child {
    life: RawFd,
    report: RawFd,
    network: Option<RawFd>,
}

impl Child {
    fn run(&self) -> ! {
        let failed = match self.settle() {
            Ok(never) => match never {},
            Err(errno) => errno.to_ne_bytes(),
        };
        // SAFETY: write and _exit are async-signal-safe; the buffer lives on this stack.
        unsafe {
            libc::write(self.report, failed.as_ptr().cast(), failed.len());
            libc::_exit(1)
        }
    }

    /// Only returns with an errno. Async-signal-safe calls only.
    fn settle(&self) -> Result<std::convert::Infallible, i32> {
        if let Some(network) = self.network {
            // SAFETY: setns on an integer.
            if unsafe { libc::setns(network, libc::CLONE_NEWNET) } < 0 {
                return Err(errno());
            }
        }
        let life = keep(self.life)?;
        place(life, 3)?;
        // SAFETY: system calls on integers and on values of this stack; the signal set is initialised before use.
        unsafe {
            libc::setsid();
            // No directory of the host may be busy because of it.
            libc::chdir(c"/".as_ptr());
            libc::prctl(libc::PR_SET_NAME, c"bulkhead-pod".as_ptr());
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::sigprocmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
            // With the rest of this process' descriptors goes `report`: the word that it stands.
            if libc::syscall(libc::SYS_close_range, 4u32, u32::MAX, 0u32) < 0 {
                return Err(errno());
            }
            let mut byte = 0u8;
            while libc::read(3, (&raw mut byte).cast(), 1) < 0 && errno() == libc::EINTR {}
            libc::_exit(0)
        }
    }
}

/// Opens a network namespace by its path.
pub fn open_network(path: &std::path::Path) -> io::Result<OwnedFd> {
    Ok(File::open(path)?.into())
}
