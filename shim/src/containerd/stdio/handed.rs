//! Streams that another process has handed over as descriptors.
//!
//! Whoever opened them may have others on the same open description: its flags are not changed, but
//! for a socket's, of which there is no second description.

use std::{
    collections::{HashMap, HashSet},
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::stat::{SFlag, fstat, major, minor},
};
use tokio::io::Interest;

use super::{Error, Target, relay::Sink};
use crate::sys::watch;

/// Before the ticket in a stream's name.
pub const SCHEME: &str = "keeper:";

/// /dev/null, as admin-guide/devices.txt numbers it.
const NULL: (u64, u64) = (1, 3);

/// What the clients of a monitor have handed over.
#[derive(Debug, Default)]
pub struct Handed {
    /// Descriptors that wait for the process whose streams they are: its input, output and errors,
    /// by a ticket.
    streams: Mutex<HashMap<String, [Option<OwnedFd>; 3]>>,
    /// The pids by which engines know the pod's processes.
    pids: Mutex<HashSet<i32>>,
}

impl Handed {
    /// Keeps them until they are asked for. `false`: the ticket is taken.
    pub fn put(&self, ticket: &str, streams: [OwnedFd; 3]) -> bool {
        let mut all = self.all();
        let is_new = !all.contains_key(ticket);
        if is_new {
            all.insert(ticket.into(), streams.map(Some));
        }
        is_new
    }

    /// Closes those that nobody has asked for.
    pub fn forget(&self, ticket: &str) {
        self.all().remove(ticket);
    }

    /// Gives out one of them: 0 is the input.
    pub(super) fn take(&self, ticket: &str, index: usize) -> Option<OwnedFd> {
        self.all().get_mut(ticket)?.get_mut(index)?.take()
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, [Option<OwnedFd>; 3]>> {
        self.streams.lock().expect("no panic while it is held")
    }

    /// A pid stands for a process of the pod from now on.
    pub fn stand_in(&self, pid: i32) {
        self.pids().insert(pid);
    }

    /// It does not any more.
    pub fn leave(&self, pid: i32) {
        self.pids().remove(&pid);
    }

    /// A path of /proc/PID/ns with the pid of the pod's stub in place of one by which an engine
    /// knows a process of the pod.
    pub(in crate::containerd) fn of_pod(&self, path: &Path, stub: i32) -> Option<PathBuf> {
        let rest = path.strip_prefix("/proc").ok()?;
        let mut names = rest.components();
        let pid = names.next()?.as_os_str().to_str()?.parse().ok()?;
        let known = self.pids().contains(&pid);
        known.then(|| Path::new("/proc").join(stub.to_string()).join(names))
    }

    fn pids(&self) -> MutexGuard<'_, HashSet<i32>> {
        self.pids.lock().expect("no panic while it is held")
    }
}

/// An input from which can be read without waiting, if it is of a kind that can be watched.
#[derive(Debug)]
pub(super) enum Source {
    Watched(OwnedFd),
    /// A file or a device: reading from it never waits.
    Plain(OwnedFd),
}

/// What to read from; `None`: /dev/null.
pub(super) fn source(fd: OwnedFd) -> Result<Option<Source>, Error> {
    let failed = |source| Error::Open {
        path: "the standard input".into(),
        source,
    };
    if is_null(&fd).map_err(failed)? {
        return Ok(None);
    }
    let fd = patient(fd, false).map_err(failed)?;
    let watched = can_be_watched(&fd, Interest::READABLE);
    Ok(Some(match watched {
        true => Source::Watched(fd),
        false => Source::Plain(fd),
    }))
}

/// Where to write to; `None`: /dev/null.
pub(super) fn target(fd: OwnedFd) -> Result<Option<Target>, Error> {
    let failed = |source| Error::Open {
        path: "a standard output".into(),
        source,
    };
    if is_null(&fd).map_err(failed)? {
        return Ok(None);
    }
    let fd = patient(fd, true).map_err(failed)?;
    let sink = match can_be_watched(&fd, Interest::WRITABLE) {
        true => Sink::pipe(fd).map_err(failed)?,
        false => Sink::File(fd.into()),
    };
    Ok(Some(sink.into()))
}

fn is_null(fd: &OwnedFd) -> io::Result<bool> {
    let found = fstat(fd.as_fd())?;
    let kind = SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT;
    let device = (major(found.st_rdev), minor(found.st_rdev));
    Ok(kind == SFlag::S_IFCHR && device == NULL)
}

/// The same pipe, terminal or socket, so that nobody waits in it.
fn patient(fd: OwnedFd, write: bool) -> io::Result<OwnedFd> {
    let kind = SFlag::from_bits_truncate(fstat(fd.as_fd())?.st_mode) & SFlag::S_IFMT;
    match kind {
        SFlag::S_IFSOCK => {
            let flags = OFlag::from_bits_truncate(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
            fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
            Ok(fd)
        }
        SFlag::S_IFIFO | SFlag::S_IFCHR => {
            let opened = OpenOptions::new()
                .read(!write)
                .write(write)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
            // A pipe that nobody reads, a terminal that hung up: what is done with it will say so.
            Ok(opened.map_or(fd, OwnedFd::from))
        }
        _ => Ok(fd),
    }
}

/// epoll(7) takes pipes, sockets and terminals; one that would wait all the same is not watched.
fn can_be_watched(fd: &OwnedFd, interest: Interest) -> bool {
    let flags = fcntl(fd.as_fd(), FcntlArg::F_GETFL).map(OFlag::from_bits_truncate);
    let waits = !flags.is_ok_and(|flags| flags.contains(OFlag::O_NONBLOCK));
    !waits
        && fd
            .try_clone()
            .is_ok_and(|copy| watch(copy, interest).is_ok())
}
