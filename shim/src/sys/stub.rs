//! The pid of a pod: a forked process that does nothing, in the pod's cgroup and network namespace.
//!
//! Engines are given its pid for every task of the pod, enter `/proc/PID/ns/*` and look whether it lives. It is a copy of this
//! process without an exec, so it costs a few pages. It ends when [`Stub::release`] closes its pipe, or when this process dies,
//! which closes the pipe too.
//!
//! Whoever enters its namespaces, or looks through `/proc/PID/root`, because he takes it for the container's process, finds nothing of
//! the host: it has a pid namespace of its own, and a root with nothing but that one's /proc. Its command line says what it stands
//! for, and it has no capability.

use std::{
    ffi::CStr,
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    time::Duration,
};

use linux::{
    capability,
    process::{Place, clone3},
};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, umount2},
    unistd::{chdir, pivot_root},
};

use super::{process, spawn::pipe};

/// The stub's end of the pipe that ends it.
const LIFE: RawFd = 3;

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
    /// Forks it into `cgroup`. `title` becomes its command line.
    pub fn start(cgroup: BorrowedFd<'_>, network: Network<'_>, title: &str) -> io::Result<Stub> {
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
            title: title.as_bytes(),
            words: Words::of_this_process()?,
        };
        let namespaces = flags
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWNS
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWUTS;
        let place = Place {
            namespaces: namespaces as u64,
            cgroup: Some(cgroup),
        };
        // SAFETY: the child calls `Child::run`, which makes system calls only, so that no lock held
        // by another thread can matter.
        let made = unsafe { clone3(place, libc::SIGCHLD, || child.run()) }?;
        let stub = Stub {
            pid: made.pid,
            pidfd: made.pidfd,
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
        process::collect(pidfd.as_fd());
    }
}

/// Where the kernel reads a process' command line: arguments and, right after them, the environment (proc_pid_stat(5), fields 48
/// to 51). What does not fit among the arguments may go on in the environment, if their last byte is not 0 any more (setproctitle(3)).
#[derive(Clone, Copy)]
pub(super) struct Words {
    start: usize,
    arguments: usize,
    all: usize,
}

impl Words {
    pub(super) fn of_this_process() -> io::Result<Words> {
        let unusual = || io::Error::other("/proc/self/stat does not say where the arguments are");
        let stat = std::fs::read_to_string("/proc/self/stat")?;
        // The command in field 2 may hold blanks and parentheses: count from its last parenthesis, which ends field 2.
        let after = stat.rfind(')').map(|index| &stat[index + 1..]);
        let mut fields = after
            .ok_or_else(unusual)?
            .split_ascii_whitespace()
            .skip(48 - 3);
        let mut field = || fields.next()?.parse::<usize>().ok();
        let [Some(start), Some(end), Some(more), Some(last)] = [field(), field(), field(), field()]
        else {
            return Err(unusual());
        };
        if start == 0 || start >= end {
            return Err(unusual());
        }
        let last = if more == end && last > more {
            last
        } else {
            end
        };
        Ok(Words {
            start,
            arguments: end - start,
            all: last - start,
        })
    }

    /// Writes a title where the arguments of this process were, and names the thread. In a child:
    /// its copy of the stack changes.
    pub(super) fn rename(self, title: &[u8], name: &CStr) {
        let Words {
            start,
            arguments,
            all,
        } = self;
        // A zero byte ends it.
        let length = title.len().min(all - 1);
        // SAFETY: the kernel has put this process' arguments and environment there, `all` bytes of
        // its writable stack. This is the child's copy, whose only thread reads neither any more.
        unsafe {
            let words = std::ptr::with_exposed_provenance_mut::<u8>(start);
            std::ptr::write_bytes(words, 0, all);
            std::ptr::copy_nonoverlapping(title.as_ptr(), words, length);
            if length < arguments {
                // Else zero bytes would follow it; they do where this needs a capability that this
                // process lacks.
                libc::prctl(
                    libc::PR_SET_MM,
                    libc::PR_SET_MM_ARG_END,
                    start + length + 1,
                    0,
                    0,
                );
            }
            libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        }
    }
}

/// What the child needs; no allocation after the fork.
struct Child<'a> {
    life: RawFd,
    report: RawFd,
    network: Option<RawFd>,
    title: &'a [u8],
    words: Words,
}

impl Child<'_> {
    fn run(&self) -> ! {
        let failed = match self.settle() {
            Ok(never) => match never {},
            Err(errno) => (errno as i32).to_ne_bytes(),
        };
        // SAFETY: write and _exit are async-signal-safe; the buffer lives on this stack.
        unsafe {
            libc::write(self.report, failed.as_ptr().cast(), failed.len());
            libc::_exit(1)
        }
    }

    /// Only returns with an errno. Async-signal-safe calls only.
    fn settle(&self) -> nix::Result<std::convert::Infallible> {
        if let Some(network) = self.network {
            // SAFETY: setns on an integer.
            done(unsafe { libc::setns(network, libc::CLONE_NEWNET) })?;
        }
        // SAFETY: dup2 on numbers; this process keeps no object of what was 3.
        done(unsafe { libc::dup2(self.life, LIFE) })?;
        empty_root()?;
        self.words.rename(self.title, c"bulkhead-pod");
        drop_capabilities()?;
        // SAFETY: system calls on integers and on values of this stack; the signal set is initialised before use.
        unsafe {
            libc::setsid();
            // Who enters the pid namespace and leaves children behind makes them this process': nobody waits for them.
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::sigprocmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
            // With the rest of this process' descriptors goes `report`: the word that it stands.
            done(libc::close_range(LIFE as u32 + 1, u32::MAX, 0))?;
            let mut byte = 0u8;
            while libc::read(LIFE, (&raw mut byte).cast(), 1) < 0 && Errno::last() == Errno::EINTR {
            }
            libc::_exit(0)
        }
    }
}

pub(super) fn done(result: i32) -> nix::Result<()> {
    Errno::result(result).map(drop)
}

/// Leaves the host's mounts, of which this mount namespace has a copy, for a root that has the /proc of this pid namespace and nothing
/// else. So no directory of the host is busy because of this process. Async-signal-safe calls only.
pub(super) fn empty_root() -> nix::Result<()> {
    const FLAGS: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    let none = std::ptr::null::<libc::c_char>();
    let mount = |source: *const libc::c_char, target: &CStr, kind, flags, data: *const _| {
        // SAFETY: strings that end with a zero byte, or null pointers where the kernel takes them.
        done(unsafe { libc::mount(source, target.as_ptr(), kind, flags, data) })
    };
    let null = std::ptr::null::<libc::c_void>();
    keep_mounts_private()?;
    let name = c"bulkhead-pod".as_ptr();
    let limits = c"mode=0755,size=4k,nr_inodes=4".as_ptr().cast();
    // Over a directory that every host has; nobody else sees it.
    mount(name, c"/proc", c"tmpfs".as_ptr(), FLAGS, limits)?;
    // SAFETY: system calls on constant strings that end with a zero byte.
    unsafe {
        done(libc::chdir(c"/proc".as_ptr()))?;
        done(libc::mkdir(c"proc".as_ptr(), 0o555))?;
    }
    let proc = c"proc".as_ptr();
    mount(proc, c"proc", proc, FLAGS, null)?;
    pivot()?;
    let read_only = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | FLAGS;
    mount(none, c"/", none, read_only, null)
}

/// What is mounted in this mount namespace from here on is mounted in no other.
pub(super) fn keep_mounts_private() -> nix::Result<()> {
    let (none, flags) = (None::<&CStr>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
    nix::mount::mount(none, c"/", none, flags, none)
}

/// Makes the working directory, a mount, the root, and takes the old root off: it comes to lie on the new one (pivot_root(2),
/// "pivot_root(".", ".")").
pub(super) fn pivot() -> nix::Result<()> {
    pivot_root(c".", c".")?;
    umount2(c".", MntFlags::MNT_DETACH)?;
    chdir(c"/")
}

/// Gives up every capability for good. Async-signal-safe calls only.
pub(super) fn drop_capabilities() -> nix::Result<()> {
    // A kernel without ambient capabilities has none to clear.
    let _ = capability::clear_ambient();
    capability::limit_bounding(0).map_err(|(_, errno)| errno)?;
    nix::sys::prctl::set_no_new_privs()?;
    capability::set(capability::Sets::default())
}

/// Opens a network namespace by its path.
pub fn open_network(path: &std::path::Path) -> io::Result<OwnedFd> {
    Ok(File::open(path)?.into())
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    fn cgroup() -> Option<File> {
        let places = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let found = places.iter().find(|p| p.join("cgroup.procs").exists());
        // Only root may put a process there.
        let found = found.filter(|_| nix::unistd::geteuid().is_root());
        if found.is_none() {
            println!("NOT RUN: this needs root and cgroup v2");
        }
        File::open(found?).ok()
    }

    fn start(title: &str) -> Option<Stub> {
        let cgroup = cgroup()?;
        Some(Stub::start(cgroup.as_fd(), Network::New, title).unwrap())
    }

    fn of(stub: &Stub, name: &str) -> String {
        let bytes = fs::read(format!("/proc/{}/{name}", stub.pid())).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn it_says_what_it_stands_for() {
        // One that fits where this test's arguments are, and one that does not.
        for title in ["x", &format!("bulkhead: pod {} (...)", "y".repeat(300))] {
            let Some(stub) = start(title) else { return };
            assert_eq!(of(&stub, "cmdline").trim_end_matches('\0'), title);
            assert_eq!(of(&stub, "comm"), "bulkhead-pod\n");
            let own = fs::read_to_string("/proc/self/cmdline").unwrap();
            assert!(!own.contains(title) || title == "x", "{own}");
            stub.release();
        }
    }

    #[test]
    fn who_enters_it_finds_nothing_of_the_host() {
        let Some(stub) = start("x") else { return };
        let process = format!("/proc/{}", stub.pid());
        for kind in ["pid", "mnt", "net", "ipc", "uts"] {
            let [own, its] = ["/proc/self", &process]
                .map(|process| fs::read_link(format!("{process}/ns/{kind}")).unwrap());
            assert_ne!(own, its, "{kind}");
        }
        let names = |path: String| -> Vec<String> {
            let entries = fs::read_dir(path).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name());
            names.map(|name| name.into_string().unwrap()).collect()
        };
        assert_eq!(names(format!("{process}/root")), ["proc"]);
        let numbers = names(format!("{process}/root/proc"));
        let processes = numbers.iter().filter(|name| name.parse::<u32>().is_ok());
        assert_eq!(processes.collect::<Vec<_>>(), ["1"]);
        fs::write(format!("{process}/root/x"), "").unwrap_err();
        assert_eq!(of(&stub, "mountinfo").lines().count(), 2);
        stub.release();
    }

    #[test]
    fn it_has_no_capability() {
        let Some(stub) = start("x") else { return };
        let status = of(&stub, "status");
        for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            assert!(line.ends_with("\t0000000000000000"), "{line}");
        }
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        stub.release();
    }
}
