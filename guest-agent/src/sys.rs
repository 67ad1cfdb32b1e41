//! System calls that nix has no safe wrapper for.
//!
//! Each function is safe to call: it passes only memory that it owns, and turns the result into an error or a value.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Turns the result of a raw system call into a value or errno.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// `struct clone_args` of clone3(2), as of Linux 5.7 (CLONE_ARGS_SIZE_VER2).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// CLONE_INTO_CGROUP of clone3(2).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What the child of [`spawn`] does between clone3 and execve, prepared beforehand because it may not allocate.
pub struct Child<'a> {
    /// The binary to execute, by descriptor.
    pub exe: BorrowedFd<'a>,
    /// Its only argument besides the name.
    pub stage: &'a CStr,
    /// `fds[i]` becomes descriptor `i`; all of them must be numbered above the last target.
    pub fds: &'a [RawFd],
    /// Wait for one byte on this descriptor and become root of the user namespace first.
    pub wait_for_mappings: Option<RawFd>,
}

/// A new process as the parent knows it.
#[derive(Debug)]
pub struct Spawned {
    /// Its number in the caller's pid namespace.
    pub pid: i32,
    /// Refers to the process whatever becomes of the number.
    pub pidfd: OwnedFd,
}

/// clone3(2) with `namespaces` (CLONE_NEW* flags), into `cgroup`, then execve of `child.exe` in the child.
pub fn spawn(
    namespaces: u64,
    cgroup: Option<BorrowedFd<'_>>,
    child: &Child<'_>,
) -> io::Result<Spawned> {
    let argv = [
        c"bulkhead-agent".as_ptr(),
        child.stage.as_ptr(),
        std::ptr::null(),
    ];
    let envp = [std::ptr::null::<libc::c_char>()];
    let mut pidfd: RawFd = -1;
    let mut args = CloneArgs {
        flags: namespaces | libc::CLONE_PIDFD as u64,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the child has its own copy of memory, so nothing it does reaches the parent; `args`
    // and `pidfd` outlive the call. The child calls only `run_child`, which neither allocates nor takes locks.
    let pid =
        check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) })?;
    if pid == 0 {
        // SAFETY: argv and envp are null-terminated arrays of C strings that live in this frame.
        unsafe { run_child(child, argv.as_ptr(), envp.as_ptr()) }
    }
    // SAFETY: CLONE_PIDFD stored a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Spawned {
        pid: pid as i32,
        pidfd,
    })
}

/// The child's side: system calls only.
///
/// # Safety
///
/// Only in the child of clone3, with null-terminated `argv` and `envp`.
unsafe fn run_child(
    child: &Child<'_>,
    argv: *const *const libc::c_char,
    envp: *const *const libc::c_char,
) -> ! {
    // SAFETY: plain system calls on numbers and on memory that outlives them; failure ends the process.
    unsafe {
        if let Some(fd) = child.wait_for_mappings {
            let mut byte = 0u8;
            if libc::read(fd, (&raw mut byte).cast(), 1) != 1 {
                libc::_exit(125);
            }
            // The uid outside is not mapped: execve would drop all capabilities unless the process is root inside.
            if libc::syscall(libc::SYS_setresgid, 0, 0, 0) != 0
                || libc::syscall(libc::SYS_setresuid, 0, 0, 0) != 0
            {
                libc::_exit(125);
            }
        }
        for (target, &fd) in child.fds.iter().enumerate() {
            if libc::dup2(fd, target as libc::c_int) < 0 {
                libc::_exit(125);
            }
        }
        libc::syscall(
            libc::SYS_execveat,
            child.exe.as_raw_fd(),
            c"".as_ptr(),
            argv,
            envp,
            libc::AT_EMPTY_PATH,
        );
        libc::_exit(125)
    }
}

/// pidfd_open(2).
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// pidfd_send_signal(2).
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: u32) -> io::Result<()> {
    // SAFETY: takes numbers only; a null siginfo means one as kill(2) makes it.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })?;
    Ok(())
}

/// setns(2) with a namespace descriptor (`flags` its type) or a pidfd (`flags` a set of types).
pub fn setns(fd: BorrowedFd<'_>, flags: u64) -> io::Result<()> {
    // SAFETY: takes numbers only.
    check(libc::c_long::from(unsafe {
        libc::setns(fd.as_raw_fd(), flags as libc::c_int)
    }))?;
    Ok(())
}

/// unshare(2).
pub fn unshare(flags: u64) -> io::Result<()> {
    // SAFETY: takes numbers only.
    check(libc::c_long::from(unsafe {
        libc::unshare(flags as libc::c_int)
    }))?;
    Ok(())
}

/// Marks every descriptor from `first` on close-on-exec, without looking at /proc (which a container may shadow).
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    // SAFETY: CLOSE_RANGE_CLOEXEC only sets flags; no descriptor changes its owner.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first as u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })?;
    Ok(())
}

/// prctl(2) with up to two arguments.
pub fn prctl(option: libc::c_int, arg2: u64, arg3: u64) -> io::Result<i32> {
    // SAFETY: used only for options whose arguments are numbers.
    Ok(check(libc::c_long::from(unsafe {
        libc::prctl(option, arg2, arg3, 0, 0)
    }))? as i32)
}

/// Capability sets of the calling thread, as capset(2) takes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilitySets {
    /// Used in permission checks.
    pub effective: u64,
    /// The limit of the effective set.
    pub permitted: u64,
    /// Kept over execve where the file agrees.
    pub inheritable: u64,
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// _LINUX_CAPABILITY_VERSION_3.
const CAP_VERSION: u32 = 0x2008_0522;

/// capset(2). Bits beyond the kernel's last capability are ignored by the kernel.
pub fn capset(sets: CapabilitySets) -> io::Result<()> {
    let header = CapHeader {
        version: CAP_VERSION,
        pid: 0,
    };
    let data = [0, 32].map(|shift| CapData {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    });
    // SAFETY: version 3 reads exactly two data structs, and both objects outlive the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    Ok(())
}

/// capget(2) of the calling thread.
pub fn capget() -> io::Result<CapabilitySets> {
    let header = CapHeader {
        version: CAP_VERSION,
        pid: 0,
    };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 writes exactly two data structs, and both objects outlive the call.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) })?;
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    Ok(CapabilitySets {
        effective: join(data[0].effective, data[1].effective),
        permitted: join(data[0].permitted, data[1].permitted),
        inheritable: join(data[0].inheritable, data[1].inheritable),
    })
}

/// Loads a seccomp filter: `program` is an array of `struct sock_filter` as bytes.
pub fn seccomp_set_filter(program: &[u8], flags: u64) -> io::Result<()> {
    let count = program.len() / size_of::<libc::sock_filter>();
    if count == 0 || !program.len().is_multiple_of(size_of::<libc::sock_filter>()) || count > 4096 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // The bytes come from a message and need not be aligned as the kernel's struct is.
    let filter: Vec<libc::sock_filter> = program
        .chunks_exact(size_of::<libc::sock_filter>())
        .map(|b| libc::sock_filter {
            code: u16::from_ne_bytes([b[0], b[1]]),
            jt: b[2],
            jf: b[3],
            k: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
        })
        .collect();
    let fprog = libc::sock_fprog {
        len: count as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies `len` instructions from `filter`, which outlives the call, and checks the program.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const fprog,
        )
    })?;
    Ok(())
}

/// `struct sched_attr` of sched_setattr(2), SCHED_ATTR_SIZE_VER0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SchedAttr {
    /// Size of this struct; set by [`sched_setattr`].
    pub size: u32,
    /// SCHED_*.
    pub policy: u32,
    /// SCHED_FLAG_*.
    pub flags: u64,
    /// For SCHED_OTHER and SCHED_BATCH.
    pub nice: i32,
    /// For SCHED_FIFO and SCHED_RR.
    pub priority: u32,
    /// ns, for SCHED_DEADLINE, as are the next two.
    pub runtime: u64,
    /// ns.
    pub deadline: u64,
    /// ns.
    pub period: u64,
}

/// sched_setattr(2) of the calling thread.
pub fn sched_setattr(mut attr: SchedAttr) -> io::Result<()> {
    attr.size = size_of::<SchedAttr>() as u32;
    // SAFETY: the kernel reads `size` bytes of a struct that outlives the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) })?;
    Ok(())
}

/// ioprio_set(2) of the calling process.
pub fn ioprio_set(value: u32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: takes numbers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) })?;
    Ok(())
}

/// personality(2).
pub fn personality(persona: u64) -> io::Result<()> {
    // SAFETY: takes a number only.
    check(libc::c_long::from(unsafe {
        libc::personality(persona as libc::c_ulong)
    }))?;
    Ok(())
}

/// prlimit(2) on another process; RLIM_INFINITY is `u64::MAX`.
pub fn set_rlimit_of(pid: i32, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: reads a struct that outlives the call; the old limit is not asked for.
    check(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            resource,
            &raw const limit,
            std::ptr::null_mut::<libc::rlimit64>(),
        )
    })?;
    Ok(())
}

/// The current directory, raw: a path that begins with "(unreachable)" lies outside the root (getcwd(2)).
pub fn raw_getcwd() -> io::Result<Vec<u8>> {
    let mut buffer = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: the kernel writes at most the length given.
    let length =
        check(unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) })?
            as usize;
    buffer.truncate(length.saturating_sub(1));
    Ok(buffer)
}

/// Opens the other side of the pseudo-terminal behind `master` (TIOCGPTPEER): no path is looked up.
pub fn terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the ioctl takes open flags as a number.
    let fd = unsafe {
        libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCGPTPEER,
            libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
        )
    };
    check(libc::c_long::from(fd))?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Unlocks a pseudo-terminal (TIOCSPTLCK).
pub fn terminal_unlock(master: BorrowedFd<'_>) -> io::Result<()> {
    let unlock: libc::c_int = 0;
    // SAFETY: the ioctl reads one int that outlives the call.
    check(libc::c_long::from(unsafe {
        libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock)
    }))?;
    Ok(())
}

/// Makes `terminal` the controlling terminal of the calling session leader (TIOCSCTTY).
pub fn terminal_control(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the ioctl takes a number.
    check(libc::c_long::from(unsafe {
        libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0)
    }))?;
    Ok(())
}

/// Sets the window size of a terminal by either side (TIOCSWINSZ).
pub fn terminal_resize(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the ioctl reads one struct that outlives the call.
    check(libc::c_long::from(unsafe {
        libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size)
    }))?;
    Ok(())
}

/// Bytes that wait to be read from a pipe or a terminal (FIONREAD).
pub fn unread(source: BorrowedFd<'_>) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the ioctl writes one int that outlives the call.
    check(libc::c_long::from(unsafe {
        libc::ioctl(source.as_raw_fd(), libc::FIONREAD, &raw mut bytes)
    }))?;
    Ok(bytes.unsigned_abs())
}

/// setgroups(2).
pub fn setgroups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the kernel reads `len` numbers of a slice that outlives the call.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    Ok(())
}

/// setresgid(2), then setresuid(2), of the calling thread (a stage has only one).
pub fn set_ids(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: take numbers only.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
    Ok(())
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
pub fn reset_signals() {
    let default = KernelSigaction {
        handler: libc::SIG_DFL,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
    for signal in 1..=64 {
        // SAFETY: reads a struct that outlives the call; SIG_DFL is no handler of ours. By system call, because glibc
        // keeps 32 and 33 to itself; the kernel refuses SIGKILL and SIGSTOP, which have no other disposition.
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
    // SAFETY: `set` is initialised by sigemptyset before it is read.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}

/// Brings the loopback interface of the current network namespace up.
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: takes numbers only.
    let fd = check(libc::c_long::from(unsafe {
        libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0)
    }))?;
    // SAFETY: a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    // SAFETY: ifreq is a plain struct for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the ioctl reads one ifreq that outlives the call.
    check(libc::c_long::from(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)
    }))?;
    Ok(())
}
