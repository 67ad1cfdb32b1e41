//! Processes: made by clone3(2), named by a pidfd, collected.

use std::convert::Infallible;
use std::ffi::CStr;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::Result;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use crate::descriptor::close_on_exec_from;
use crate::{done, new_descriptor, retry, thread};

/// `CLONE_INTO_CGROUP` of clone3(2).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// keyctl(2): with no name, a new keyring that belongs to nobody else.
const JOIN_SESSION_KEYRING: libc::c_int = 1;

/// Exit code of a child that could not execute its program.
const NOT_EXECUTED: i32 = 125;

/// What a new process is made in.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place<'a> {
    /// `CLONE_NEW*`: namespaces of its own.
    pub namespaces: u64,
    /// Directory of the cgroup v2 that it is made in.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// A new process as its parent knows it.
#[derive(Debug)]
pub struct Child {
    /// Its number in the caller's pid namespace.
    pub pid: i32,
    /// Refers to the process whatever becomes of the number; readable when it has ended.
    pub pidfd: OwnedFd,
}

/// clone3(2): a copy of this process, with the calling thread alone, that runs `run`. `signal` is
/// what the parent gets when it ends, or 0.
///
/// # Errors
/// clone3(2)'s.
///
/// # Safety
/// `run` makes async-signal-safe calls only, and allocates nothing: another thread of this process
/// may hold any lock.
pub unsafe fn clone3(
    place: Place<'_>,
    signal: libc::c_int,
    run: impl FnOnce() -> Infallible,
) -> Result<Child> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is integers; zero is a valid value of each.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = place.namespaces | libc::CLONE_PIDFD as u64;
    arguments.pidfd = (&raw mut pidfd) as u64;
    arguments.exit_signal = signal as u64;
    if let Some(cgroup) = place.cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    let (arguments, size) = (&raw mut arguments, size_of::<libc::clone_args>());
    // SAFETY: `arguments` is a live clone_args of the size passed. Without CLONE_VM the child has
    // its own copy of memory, so that nothing it does there reaches the parent; the caller vouches
    // for what it runs.
    let pid = Errno::result(unsafe { libc::syscall(libc::SYS_clone3, arguments, size) })?;
    if pid == 0 {
        run();
    }
    Ok(Child {
        pid: pid as i32,
        // SAFETY: CLONE_PIDFD has stored a new descriptor that nobody else owns.
        pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
    })
}

/// What a new process executes, and what it begins with.
pub struct Program<'a> {
    /// The file, by descriptor.
    pub file: BorrowedFd<'a>,
    /// Its arguments, the name first. The environment is empty.
    pub arguments: &'a [&'a CStr],
    /// `descriptors[i]` becomes descriptor `i`; every other one closes at the exec.
    pub descriptors: &'a [BorrowedFd<'a>],
    /// Waits for one byte on this descriptor, and then becomes root of the new user namespace:
    /// execve would drop the capabilities of a process whose uid is not mapped.
    pub mapped: Option<BorrowedFd<'a>>,
    /// Leads a session of its own, blocks no signal, dies of SIGPIPE, and has an empty session
    /// keyring.
    pub fresh: bool,
    /// Gets the errno, four bytes, when the program cannot be executed; closed without a byte when
    /// it is.
    pub report: Option<BorrowedFd<'a>>,
}

/// Makes a process that executes `program`. Returns before it has.
///
/// # Errors
/// clone3(2)'s.
pub fn spawn(place: Place<'_>, program: &Program<'_>) -> Result<Child> {
    let mut argv: Vec<*const libc::c_char> =
        program.arguments.iter().map(|word| word.as_ptr()).collect();
    argv.push(std::ptr::null());
    let mut moved = vec![0; program.descriptors.len()];
    let run = || {
        let mut report = program.report.map(|fd| fd.as_raw_fd());
        let Err(errno) = execute(program, &argv, &mut moved, &mut report);
        if let Some(report) = report {
            let errno = (errno as i32).to_ne_bytes();
            // SAFETY: the buffer lives on this stack.
            unsafe { libc::write(report, errno.as_ptr().cast(), errno.len()) };
        }
        exit_now(NOT_EXECUTED)
    };
    // SAFETY: `execute` and what is beside it are system calls on numbers and on memory that was
    // prepared before.
    unsafe { clone3(place, libc::SIGCHLD, run) }
}

/// Between clone3 and execve: system calls only. `moved` has room for the copies of the
/// descriptors.
fn execute(
    program: &Program<'_>,
    argv: &[*const libc::c_char],
    moved: &mut [RawFd],
    report: &mut Option<RawFd>,
) -> Result<Infallible> {
    if let Some(mapped) = program.mapped {
        let mut byte = [0];
        if retry(|| nix::unistd::read(mapped, &mut byte))? != 1 {
            return Err(Errno::ECANCELED);
        }
        thread::set_gids(Some(0), Some(0), Some(0))?;
        thread::set_uids(Some(0), Some(0), Some(0))?;
    }
    // First out of the way of the numbers that are given below. The copies close at the exec.
    let first = moved.len() as RawFd;
    let file = keep(program.file.as_raw_fd(), first)?;
    if let Some(report) = report {
        *report = keep(*report, first)?;
    }
    for (copy, fd) in moved.iter_mut().zip(program.descriptors) {
        *copy = keep(fd.as_raw_fd(), first)?;
    }
    for (number, copy) in (0..).zip(&*moved) {
        put(*copy, number)?;
    }
    close_on_exec_from(first)?;
    if program.fresh {
        begin_afresh()?;
    }
    let environment: [*const libc::c_char; 1] = [std::ptr::null()];
    // SAFETY: both arrays end with a null pointer and hold C strings, and outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file,
            c"".as_ptr(),
            argv.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Err(Errno::result(result).err().unwrap_or(Errno::UnknownErrno))
}

fn begin_afresh() -> Result<()> {
    nix::unistd::setsid()?;
    unblock_signals();
    // Rust's start-up ignores it, and an ignored signal stays ignored over an exec.
    // SAFETY: SIG_DFL is no handler of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    // The session keyring is inherited, and may hold keys or lead to them.
    let none = std::ptr::null::<libc::c_char>();
    // SAFETY: a null pointer stands for a keyring without a name.
    match done(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, none) }) {
        // Without keyrings in the kernel there is none.
        Err(Errno::ENOSYS) => Ok(()),
        result => result,
    }
}

/// A copy of `fd` with the number `lowest` or above, which closes at an exec. Raw, because a child
/// works on numbers.
fn keep(fd: RawFd, lowest: RawFd) -> Result<RawFd> {
    // SAFETY: takes numbers only.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, lowest) })
}

/// Makes `number` a copy of `fd`, another number, that stays open over an exec.
fn put(fd: RawFd, number: RawFd) -> Result<()> {
    // SAFETY: takes numbers only; in a child that is about to execute, no object owns what `number`
    // was.
    done(unsafe { libc::dup2(fd, number) })
}

/// Lets a command's process have copies of `descriptors` at the numbers from `first` on; they stay
/// open here until the command is dropped. With `session` the process leads a session of its own.
pub fn hand_over(command: &mut Command, first: RawFd, descriptors: Vec<OwnedFd>, session: bool) {
    let mut moved = vec![0; descriptors.len()];
    let end = first + descriptors.len() as RawFd;
    let prepare = move || {
        if session {
            nix::unistd::setsid()?;
        }
        for (copy, fd) in moved.iter_mut().zip(&descriptors) {
            *copy = keep(fd.as_raw_fd(), end)?;
        }
        for (number, copy) in (first..).zip(&moved) {
            put(*copy, number)?;
        }
        // Those of the standard library too, which it has opened that way itself.
        close_on_exec_from(end)?;
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec; it makes system calls on numbers, and its
    // memory was made before.
    unsafe { command.pre_exec(prepare) };
}

/// Lets a command's process begin with default signals, as [`reset_signals`] has them.
pub fn default_signals(command: &mut Command) {
    let prepare = || {
        reset_signals();
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes system calls only.
    unsafe { command.pre_exec(prepare) };
}

/// A child that only waits, in namespaces of its own. Drop ends and collects it; whoever collects
/// children by SIGCHLD does not see it.
#[derive(Debug)]
pub struct Idle(Child);

impl Idle {
    /// Makes one.
    ///
    /// # Errors
    /// clone3(2)'s.
    pub fn spawn(namespaces: u64) -> Result<Idle> {
        let place = Place {
            namespaces,
            cgroup: None,
        };
        let run = || loop {
            // SAFETY: pause(2) takes no arguments.
            unsafe { libc::syscall(libc::SYS_pause) };
        };
        // SAFETY: the child makes one system call without memory until it is killed.
        unsafe { clone3(place, 0, run) }.map(Idle)
    }

    /// Its number in the caller's pid namespace.
    pub fn pid(&self) -> i32 {
        self.0.pid
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        // It is a child of ours that was not collected: there is no failure.
        let _ = send_signal(self.0.pidfd.as_fd(), libc::SIGKILL);
        let _ = retry(|| {
            // SAFETY: a null status is allowed; __WALL waits for children without an exit signal
            // too.
            done(unsafe { libc::waitpid(self.0.pid, std::ptr::null_mut(), libc::__WALL) })
        });
    }
}

/// pidfd_open(2).
///
/// # Errors
/// `ESRCH`: there is no such process.
pub fn open_pidfd(pid: i32) -> Result<OwnedFd> {
    // SAFETY: takes numbers only.
    new_descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// pidfd_send_signal(2).
///
/// # Errors
/// `ESRCH`: the process has been collected.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<()> {
    let (pidfd, plain) = (pidfd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: takes numbers only; a null siginfo means one as kill(2) makes it.
    done(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, signal, plain, 0) })
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// Its exit code.
    Code(i32),
    /// Number of the signal that killed it.
    Signal(i32),
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Death::Code(code) => write!(f, "exit code {code}"),
            Death::Signal(signal) => match Signal::try_from(*signal) {
                Ok(name) => write!(f, "signal {name}"),
                Err(_) => write!(f, "signal {signal}"),
            },
        }
    }
}

/// Collects a child that has ended. `None`: it still runs, or somebody else has collected it.
pub fn collect(pidfd: BorrowedFd<'_>) -> Option<Death> {
    match waitid(
        Id::PIDFd(pidfd),
        WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
    ) {
        Ok(WaitStatus::Exited(_, code)) => Some(Death::Code(code)),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(Death::Signal(signal as i32)),
        _ => None,
    }
}

/// Collects any child that has ended: its pid and its end, by real-time signals too, of which nix
/// knows nothing.
///
/// # Errors
/// `ECHILD`: there is no child. `None`: none has ended.
pub fn collect_any() -> Result<Option<(i32, Death)>> {
    let mut status = 0;
    // SAFETY: writes one int that outlives the call.
    let wait = || Errno::result(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) });
    let pid = retry(wait)?;
    let death = match libc::WIFSIGNALED(status) {
        true => Death::Signal(libc::WTERMSIG(status)),
        false => Death::Code(libc::WEXITSTATUS(status)),
    };
    Ok((pid != 0).then_some((pid, death)))
}

/// `struct sigaction` as the kernel takes it on x86_64.
#[repr(C)]
struct KernelSigaction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

/// Gives every signal its default disposition and unblocks all: both are inherited over execve.
/// Makes system calls only.
pub fn reset_signals() {
    let default = KernelSigaction {
        handler: libc::SIG_DFL,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
    for signal in 1..=64 {
        // SAFETY: reads a struct that outlives the call; SIG_DFL is no handler of ours. By system
        // call, because glibc keeps 32 and 33 to itself; the kernel refuses SIGKILL and SIGSTOP,
        // which have no other disposition.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                &raw const default,
                std::ptr::null_mut::<KernelSigaction>(),
                size_of::<u64>(),
            )
        };
    }
    unblock_signals();
}

fn unblock_signals() {
    // SAFETY: `none` is initialised by sigemptyset before it is read.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Makes the process ignore SIGPIPE: a closed stream is an error of write(2), not its end.
pub fn ignore_broken_pipes() {
    // SAFETY: SIG_IGN is no handler of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// Whether the process ignores a signal.
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: an all-zero sigaction is a valid value; the kernel overwrites it, and no new action
    // is given.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
    }
}

/// Loads a seccomp filter: `program` is an array of `struct sock_filter` as bytes.
///
/// # Errors
/// `EINVAL`: it is no program; `EACCES`: neither no_new_privs nor CAP_SYS_ADMIN.
pub fn set_seccomp_filter(program: &[u8], flags: u64) -> Result<()> {
    let count = program.len() / size_of::<libc::sock_filter>();
    if count == 0 || !program.len().is_multiple_of(size_of::<libc::sock_filter>()) || count > 4096 {
        return Err(Errno::EINVAL);
    }
    // The bytes need not be aligned as the kernel's struct is.
    let filter: Vec<libc::sock_filter> = program
        .chunks_exact(size_of::<libc::sock_filter>())
        .map(|b| libc::sock_filter {
            code: u16::from_ne_bytes([b[0], b[1]]),
            jt: b[2],
            jf: b[3],
            k: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
        })
        .collect();
    let program = libc::sock_fprog {
        len: count as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    let (call, mode) = (libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER);
    // SAFETY: the kernel copies `len` instructions from `filter`, which outlives the call, and
    // checks the program.
    done(unsafe { libc::syscall(call, mode, flags, &raw const program) })
}

/// personality(2), any bits of it.
///
/// # Errors
/// None on x86_64.
pub fn set_personality(persona: u64) -> Result<()> {
    // SAFETY: takes a number only.
    done(unsafe { libc::personality(persona as libc::c_ulong) })
}

/// setdomainname(2): of the UTS namespace.
///
/// # Errors
/// `EPERM`; `EINVAL`: it is longer than 64 bytes.
pub fn set_domain_name(name: &str) -> Result<()> {
    // SAFETY: the kernel reads `len` bytes of a slice that outlives the call.
    done(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) })
}

/// The current directory as the kernel says it: a path that begins with "(unreachable)" lies
/// outside the root (getcwd(2)).
///
/// # Errors
/// `ENOENT`: it was removed.
pub fn working_directory() -> Result<Vec<u8>> {
    let mut buffer = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: the kernel writes at most the length given.
    let length = Errno::result(unsafe {
        libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len())
    })?;
    buffer.truncate((length as usize).saturating_sub(1));
    Ok(buffer)
}

/// Ends the process at once: no destructor and no handler runs, and other threads end where they
/// are.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no precondition.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    /// Runs the shell; what it wrote to its standard output, and what the report says.
    fn shell(file: &str, script: &CStr) -> (String, Vec<u8>) {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let (failure, report) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let null = File::open("/dev/null").unwrap();
        let file = File::open(file).unwrap();
        let program = Program {
            file: file.as_fd(),
            arguments: &[c"sh", c"-c", script],
            descriptors: &[null.as_fd(), write.as_fd(), null.as_fd(), write.as_fd()],
            mapped: None,
            fresh: true,
            report: Some(report.as_fd()),
        };
        let child = spawn(Place::default(), &program).unwrap();
        drop((write, report));
        let (mut said, mut failed) = (String::new(), Vec::new());
        File::from(failure).read_to_end(&mut failed).unwrap();
        File::from(read).read_to_string(&mut said).unwrap();
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child.pid), None).unwrap();
        (said, failed)
    }

    #[test]
    fn a_program_has_the_descriptors_that_it_was_given_and_no_other() {
        let (said, failed) = shell("/bin/sh", c"ls /proc/self/fd; env; echo x >&3");
        // The fifth is of the directory that ls reads.
        assert_eq!(
            said.lines().collect::<Vec<_>>()[..5],
            ["0", "1", "2", "3", "4"]
        );
        assert!(said.ends_with("x\n"), "{said}");
        assert!(!said.contains("CARGO"), "{said}");
        assert!(failed.is_empty());
    }

    #[test]
    fn a_program_that_cannot_be_executed_is_reported() {
        let (said, failed) = shell("/dev/null", c"");
        assert_eq!(said, "");
        assert_eq!(failed, libc::EACCES.to_ne_bytes());
    }

    #[test]
    fn a_child_that_only_waits_ends_with_its_owner() {
        let idle = Idle::spawn(0).unwrap();
        let pidfd = open_pidfd(idle.pid()).unwrap();
        send_signal(pidfd.as_fd(), 0).unwrap();
        drop(idle);
        assert_eq!(send_signal(pidfd.as_fd(), 0), Err(Errno::ESRCH));
    }

    #[test]
    fn a_command_hands_descriptors_over() {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo handed >&7; ls /proc/self/fd >&7"]);
        hand_over(&mut command, 7, vec![write], true);
        let mut child = command.spawn().unwrap();
        drop(command);
        let mut said = String::new();
        File::from(read).read_to_string(&mut said).unwrap();
        assert!(child.wait().unwrap().success());
        assert!(said.starts_with("handed\n"), "{said}");
        assert!(
            said.lines().all(|line| line.len() < 2 || line == "handed"),
            "{said}"
        );
    }

    #[test]
    fn a_filter_that_is_no_program_is_refused() {
        for program in [&[][..], &[0; 7], &vec![0; 8 * 4097]] {
            assert_eq!(set_seccomp_filter(program, 0), Err(Errno::EINVAL));
        }
    }
}
