//! clone3 and execveat of a process that starts with almost nothing.
//!
//! The child begins in namespaces and in a cgroup of its own, with its control socket at a fixed descriptor, its standard
//! streams where the caller says, an empty session keyring, and every other descriptor closed by the exec. Its program lies on
//! a mount that nobody can write through ([`ReadOnlyFile`]).

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read},
    mem::size_of,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    ptr,
};

use super::mount::ReadOnlyFile;

/// `struct clone_args` of clone3(2) (`CLONE_ARGS_SIZE_VER2`).
#[repr(C)]
#[derive(Default)]
pub(super) struct CloneArgs {
    pub(super) flags: u64,
    pub(super) pidfd: u64,
    pub(super) child_tid: u64,
    pub(super) parent_tid: u64,
    pub(super) exit_signal: u64,
    pub(super) stack: u64,
    pub(super) stack_size: u64,
    pub(super) tls: u64,
    pub(super) set_tid: u64,
    pub(super) set_tid_size: u64,
    pub(super) cgroup: u64,
}

pub(super) const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// keyctl(2): with no name, a new keyring that belongs to nobody else.
const JOIN_SESSION_KEYRING: libc::c_int = 1;
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP) as u64;

/// What to execute.
#[derive(Debug)]
pub struct Executable {
    path: PathBuf,
    file: ReadOnlyFile,
}

impl Executable {
    /// Takes the program at `path`.
    pub fn at(path: &Path) -> io::Result<Executable> {
        Ok(Executable {
            path: path.into(),
            file: ReadOnlyFile::at(path)?,
        })
    }

    /// Where it was found.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// What to start.
pub struct Program<'a> {
    /// The executable.
    pub executable: &'a Executable,
    /// Arguments after the program's name.
    pub arguments: &'a [&'a str],
    /// Becomes descriptor [`bulkhead_vmm_config::CONTROL_FD`].
    pub control: BorrowedFd<'a>,
    /// Becomes standard input and output.
    pub null: BorrowedFd<'a>,
    /// Becomes standard error.
    pub stderr: BorrowedFd<'a>,
    /// Directory of the cgroup v2 to start in.
    pub cgroup: BorrowedFd<'a>,
}

/// A started process.
#[derive(Debug)]
pub struct Child {
    /// In the host's pid namespace.
    pub pid: i32,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
}

/// Starts it in new namespaces of every kind but user, in its cgroup, and returns when its execve has succeeded.
pub fn spawn(program: &Program<'_>) -> io::Result<Child> {
    let c_string =
        |bytes: &[u8]| CString::new(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let path = program.executable.path.as_os_str();
    let mut words = vec![c_string(path.as_bytes())?];
    for word in program.arguments {
        words.push(c_string(word.as_bytes())?);
    }
    let mut argv: Vec<*const libc::c_char> = words.iter().map(|word| word.as_ptr()).collect();
    argv.push(ptr::null());
    let (mut failure, report) = pipe()?;
    let plan = Plan {
        executable: program.executable.file.as_fd().as_raw_fd(),
        argv: argv.as_ptr(),
        control: program.control.as_raw_fd(),
        null: program.null.as_raw_fd(),
        stderr: program.stderr.as_raw_fd(),
        report: report.as_raw_fd(),
    };
    let mut pidfd: RawFd = -1;
    let arguments = CloneArgs {
        flags: NAMESPACES | CLONE_INTO_CGROUP | libc::CLONE_PIDFD as u64,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: program.cgroup.as_raw_fd() as u64,
        ..CloneArgs::default()
    };
    // SAFETY: no CLONE_VM: the child has a copy of this memory and, like after fork, only this thread. It calls
    // `Plan::run`, which makes system calls only, so that no lock held by another thread can matter.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &arguments, size_of::<CloneArgs>()) };
    match pid {
        0 => plan.run(),
        pid if pid < 0 => Err(io::Error::last_os_error()),
        pid => {
            // SAFETY: CLONE_PIDFD has stored a descriptor that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            // Drop our copy now: the pipe reaches its end only when the child's copy is closed by the exec.
            drop(report);
            let mut errno = [0; 4];
            match failure.read_exact(&mut errno) {
                Ok(()) => {
                    let _ = super::process::wait_gone(
                        std::os::fd::AsFd::as_fd(&pidfd),
                        std::time::Duration::from_secs(10),
                    );
                    super::process::reap(std::os::fd::AsFd::as_fd(&pidfd));
                    Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
                }
                Err(_) => Ok(Child {
                    pid: pid as i32,
                    pidfd,
                }),
            }
        }
    }
}

pub(super) fn pipe() -> io::Result<(File, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    Ok((File::from(read), write))
}

/// What the child does between clone3 and execve; all of it prepared before.
struct Plan {
    executable: RawFd,
    argv: *const *const libc::c_char,
    control: RawFd,
    null: RawFd,
    stderr: RawFd,
    report: RawFd,
}

impl Plan {
    fn run(&self) -> ! {
        let errno = match self.exec() {
            Ok(never) => match never {},
            Err(errno) => errno.to_ne_bytes(),
        };
        // SAFETY: write and _exit are async-signal-safe; the buffer lives on this stack.
        unsafe {
            libc::write(self.report, errno.as_ptr().cast(), errno.len());
            libc::_exit(127)
        }
    }

    /// Only returns with an errno. Async-signal-safe calls only.
    fn exec(&self) -> Result<std::convert::Infallible, i32> {
        // First out of the way of the numbers that are given below. The copies close at the exec.
        let control = keep(self.control)?;
        let null = keep(self.null)?;
        let stderr = keep(self.stderr)?;
        let executable = keep(self.executable)?;
        place(null, 0)?;
        place(null, 1)?;
        place(stderr, 2)?;
        place(control, bulkhead_vmm_config::CONTROL_FD)?;
        let first = (bulkhead_vmm_config::CONTROL_FD + 1) as u32;
        // SAFETY: system calls on integers, and on pointers that the caller of `spawn` keeps alive; the signal set is
        // initialised by sigemptyset before use.
        unsafe {
            if libc::syscall(
                libc::SYS_close_range,
                first,
                u32::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            ) < 0
            {
                return Err(errno());
            }
            // A terminal's Ctrl-C goes to its foreground process group: not to the machine, which ends by its socket.
            libc::setsid();
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
            // Rust's start-up ignores SIGPIPE, and an ignored signal stays ignored over an exec.
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            // The session keyring is inherited: that of whoever started us may hold keys of root's, or lead to them. Without
            // keyrings in the kernel (ENOSYS) there is none.
            if libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, ptr::null::<u8>()) < 0
                && errno() != libc::ENOSYS
            {
                return Err(errno());
            }
            let environment: [*const libc::c_char; 1] = [ptr::null()];
            libc::syscall(
                libc::SYS_execveat,
                executable,
                c"".as_ptr(),
                self.argv,
                environment.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
        }
        Err(errno())
    }
}

pub(super) fn keep(fd: RawFd) -> Result<RawFd, i32> {
    // SAFETY: fcntl on an integer.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10) };
    if copy < 0 { Err(errno()) } else { Ok(copy) }
}

pub(super) fn place(fd: RawFd, number: RawFd) -> Result<(), i32> {
    // SAFETY: dup2 on integers; the copy is not close-on-exec.
    if unsafe { libc::dup2(fd, number) } < 0 {
        return Err(errno());
    }
    Ok(())
}

pub(super) fn errno() -> i32 {
    // SAFETY: the address of this thread's errno is always valid.
    unsafe { *libc::__errno_location() }
}

/// Lets a command's child have `fds` at the numbers from `first` on, and no other descriptor above its standard streams.
pub fn keep_at<const N: usize>(
    command: &mut tokio::process::Command,
    first: RawFd,
    fds: [RawFd; N],
) {
    let prepare = move || {
        let set = || -> Result<(), i32> {
            let mut copies = [0; N];
            for (copy, fd) in copies.iter_mut().zip(fds) {
                // Out of the way of the numbers that are given below. The copies close at the exec.
                *copy = keep(fd)?;
            }
            for (number, copy) in (first..).zip(copies) {
                place(copy, number)?;
            }
            Ok(())
        };
        set().map_err(io::Error::from_raw_os_error)
    };
    // SAFETY: the closure runs between fork and exec and makes async-signal-safe calls on integers only.
    unsafe {
        command.pre_exec(prepare);
    }
}

#[cfg(test)]
pub(crate) mod tests;
