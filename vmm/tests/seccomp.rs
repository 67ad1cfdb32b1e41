//! The filters of system calls, attacked role by role.
//!
//! A program of its own: its children hold copies of all its descriptors, which would keep other
//! tests' mounts busy.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use bulkhead_vmm::seccomp::calls::CALLS;
use bulkhead_vmm::seccomp::{SeccompError, lock_down, report_blocked, spawn};
use bulkhead_vmm_config::{CONTROL_FD, ExitCode, Role};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// A call that nothing in either process makes, or makes so, and its arguments.
type Attack = (&'static str, i64, [i64; 6]);

const fn attack(name: &'static str, call: i64) -> Attack {
    (name, call, [0; 6])
}

/// To every role.
const ATTACKS: &[Attack] = &[
    attack("execve", libc::SYS_execve),
    attack("execveat", libc::SYS_execveat),
    attack("fork", libc::SYS_fork),
    attack("vfork", libc::SYS_vfork),
    (
        "clone",
        libc::SYS_clone,
        [libc::SIGCHLD as i64, 0, 0, 0, 0, 0],
    ),
    attack("clone3", libc::SYS_clone3),
    (
        "unshare a user namespace",
        libc::SYS_unshare,
        [libc::CLONE_NEWUSER as i64, 0, 0, 0, 0, 0],
    ),
    attack("setns", libc::SYS_setns),
    attack("mount", libc::SYS_mount),
    attack("open_tree", libc::SYS_open_tree),
    attack("move_mount", libc::SYS_move_mount),
    attack("fsopen", libc::SYS_fsopen),
    attack("umount2", libc::SYS_umount2),
    attack("pivot_root", libc::SYS_pivot_root),
    attack("chroot", libc::SYS_chroot),
    attack("ptrace", libc::SYS_ptrace),
    attack("process_vm_writev", libc::SYS_process_vm_writev),
    attack("pidfd_open", libc::SYS_pidfd_open),
    attack("pidfd_getfd", libc::SYS_pidfd_getfd),
    attack("kill", libc::SYS_kill),
    (
        "tgkill with SIGKILL",
        libc::SYS_tgkill,
        [1, 1, libc::SIGKILL as i64, 0, 0, 0],
    ),
    (
        "a netlink socket",
        libc::SYS_socket,
        [libc::AF_NETLINK as i64, libc::SOCK_RAW as i64, 0, 0, 0, 0],
    ),
    (
        "a packet socket",
        libc::SYS_socket,
        [libc::AF_PACKET as i64, libc::SOCK_RAW as i64, 0, 0, 0, 0],
    ),
    (
        "a vsock socket",
        libc::SYS_socket,
        [libc::AF_VSOCK as i64, libc::SOCK_STREAM as i64, 0, 0, 0, 0],
    ),
    attack("socketpair", libc::SYS_socketpair),
    attack("connect", libc::SYS_connect),
    attack("bind", libc::SYS_bind),
    attack("io_uring_setup", libc::SYS_io_uring_setup),
    attack("bpf", libc::SYS_bpf),
    attack("perf_event_open", libc::SYS_perf_event_open),
    attack("userfaultfd", libc::SYS_userfaultfd),
    attack("memfd_create", libc::SYS_memfd_create),
    attack("keyctl", libc::SYS_keyctl),
    attack("add_key", libc::SYS_add_key),
    attack("inotify_init1", libc::SYS_inotify_init1),
    attack("fanotify_init", libc::SYS_fanotify_init),
    attack("open_by_handle_at", libc::SYS_open_by_handle_at),
    attack("name_to_handle_at", libc::SYS_name_to_handle_at),
    attack("open", libc::SYS_open),
    attack("init_module", libc::SYS_init_module),
    attack("finit_module", libc::SYS_finit_module),
    attack("kexec_load", libc::SYS_kexec_load),
    attack("reboot", libc::SYS_reboot),
    attack("setuid", libc::SYS_setuid),
    attack("setgroups", libc::SYS_setgroups),
    attack("prlimit64", libc::SYS_prlimit64),
    attack("personality", libc::SYS_personality),
    attack("seccomp", libc::SYS_seccomp),
    attack("rt_sigaction", libc::SYS_rt_sigaction),
    (
        "prctl PR_SET_SECCOMP",
        libc::SYS_prctl,
        [libc::PR_SET_SECCOMP as i64, 0, 0, 0, 0, 0],
    ),
    (
        "prctl PR_SET_DUMPABLE 1",
        libc::SYS_prctl,
        [libc::PR_SET_DUMPABLE as i64, 1, 0, 0, 0, 0],
    ),
    (
        "mmap of executable memory",
        libc::SYS_mmap,
        [
            0,
            4096,
            (libc::PROT_READ | libc::PROT_EXEC) as i64,
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64,
            -1,
            0,
        ],
    ),
    (
        "mprotect of executable memory",
        libc::SYS_mprotect,
        [0, 4096, (libc::PROT_READ | libc::PROT_EXEC) as i64, 0, 0, 0],
    ),
    attack("pkey_mprotect", libc::SYS_pkey_mprotect),
    attack("remap_file_pages", libc::SYS_remap_file_pages),
    (
        "TIOCSTI",
        libc::SYS_ioctl,
        [0, libc::TIOCSTI as i64, 0, 0, 0, 0],
    ),
    ("KVM_CREATE_VM", libc::SYS_ioctl, [0, 0xae01, 0, 0, 0, 0]),
    (
        "KVM_CREATE_DEVICE",
        libc::SYS_ioctl,
        [0, 0xc00c_aee0, 0, 0, 0, 0],
    ),
    (
        "KVM_SET_USER_MEMORY_REGION2",
        libc::SYS_ioctl,
        [0, 0x40a0_ae49, 0, 0, 0, 0],
    ),
    (
        "an ioctl hidden in the upper half",
        libc::SYS_ioctl,
        [0, 0x1_0000_0000 | libc::TIOCSTI as i64, 0, 0, 0, 0],
    ),
    (
        "a call of the x32 ABI",
        0x4000_0000 | libc::SYS_write,
        [0; 6],
    ),
    ("sendmmsg", libc::SYS_sendmmsg, [5, 0, 0, 0, 0, 0]),
];

/// The event loop's alone.
const KVM_SET_USER_MEMORY_REGION: Attack = (
    "KVM_SET_USER_MEMORY_REGION",
    libc::SYS_ioctl,
    [0, 0x4020_ae46, 0, 0, 0, 0],
);

/// To roles that have the call for something else.
const NARROW: &[(Role, Attack)] = &[
    (Role::Vcpu, KVM_SET_USER_MEMORY_REGION),
    (Role::Device, KVM_SET_USER_MEMORY_REGION),
    (Role::Net, KVM_SET_USER_MEMORY_REGION),
    (Role::FsQueue, KVM_SET_USER_MEMORY_REGION),
    (
        Role::Vmm,
        ("KVM_RUN", libc::SYS_ioctl, [0, 0xae80, 0, 0, 0, 0]),
    ),
    (
        Role::FsQueue,
        (
            "mknodat of a block device",
            libc::SYS_mknodat,
            [-1, 0, 0o60600, 0x800, 0, 0],
        ),
    ),
    (
        Role::FsQueue,
        (
            "mknodat of a character device",
            libc::SYS_mknodat,
            [-1, 0, 0o20600, 0x103, 0, 0],
        ),
    ),
    (
        Role::FsVhost,
        (
            "mmap of executable guest memory",
            libc::SYS_mmap,
            [0, 4096, 7, libc::MAP_SHARED as i64, 3, 0],
        ),
    ),
    (
        Role::Vmm,
        (
            "fcntl that lets writes wait",
            libc::SYS_fcntl,
            [1, libc::F_SETFL as i64, libc::O_RDWR as i64, 0, 0, 0],
        ),
    ),
    (
        Role::Vmm,
        ("fallocate that makes no hole", libc::SYS_fallocate, [4; 6]),
    ),
    (
        Role::Vmm,
        (
            "fallocate that cuts a file",
            libc::SYS_fallocate,
            [4, libc::FALLOC_FL_COLLAPSE_RANGE as i64, 0, 4096, 0, 0],
        ),
    ),
    (
        Role::Device,
        (
            "a hole in guest memory",
            libc::SYS_fallocate,
            [4, 3, 0, 4096, 0, 0],
        ),
    ),
    (
        Role::FsVhost,
        (
            "fcntl that changes flags",
            libc::SYS_fcntl,
            [1, libc::F_SETFL as i64, libc::O_RDWR as i64, 0, 0, 0],
        ),
    ),
    (Role::Vcpu, ("openat", libc::SYS_openat, [0; 6])),
    (Role::Vmm, ("openat", libc::SYS_openat, [0; 6])),
    (Role::Device, ("openat2", libc::SYS_openat2, [0; 6])),
    (Role::Net, ("openat", libc::SYS_openat, [0; 6])),
    (Role::FsVhost, ("openat", libc::SYS_openat, [0; 6])),
    (Role::Vcpu, ("recvmsg", libc::SYS_recvmsg, [0; 6])),
    (
        Role::Vcpu,
        (
            "sendto of anything but the last word",
            libc::SYS_sendto,
            [4, 0, 0, 0x4040, 0, 0],
        ),
    ),
    (
        Role::Vcpu,
        (
            "sendto an address",
            libc::SYS_sendto,
            [3, 0, 0, 0x4040, 1, 16],
        ),
    ),
    (
        Role::Net,
        ("KVM_RUN", libc::SYS_ioctl, [0, 0xae80, 0, 0, 0, 0]),
    ),
];

/// Runs `inside` in a child whose descriptor [`CONTROL_FD`] is a socket; what it wrote there, and
/// how it ended.
fn child(inside: impl FnOnce()) -> (String, WaitStatus) {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    // SAFETY: the child works on what it has a copy of, and leaves by _exit.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => {
            drop(theirs);
            let ended = waitpid(child, None).unwrap();
            (packet(&ours), ended)
        }
        ForkResult::Child => {
            // SAFETY: the child runs nothing that owns the descriptor.
            unsafe { libc::dup2(theirs.as_raw_fd(), CONTROL_FD) };
            inside();
            // SAFETY: ends the child without running the test harness' own end.
            unsafe { libc::_exit(0) }
        }
    }
}

fn packet(socket: &OwnedFd) -> String {
    let mut bytes = [0; 256];
    let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
    let length = nix::sys::socket::recv(socket.as_raw_fd(), &mut bytes, flags).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

fn make((_, call, arguments): Attack) {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the filter refuses the call, or it fails on its arguments.
    unsafe { libc::syscall(call, a, b, c, d, e, f) };
}

fn attacked(role: Role, attack: Attack) {
    let (said, ended) = child(|| {
        report_blocked().unwrap();
        lock_down(role).unwrap();
        make(attack);
    });
    let code = match ended {
        WaitStatus::Exited(_, code) => code,
        other => panic!("{role}: {} ended by {other:?}", attack.0),
    };
    assert_eq!(code, ExitCode::Blocked as i32, "{role} made {}", attack.0);
    let expected = format!(r#"{{"blocked":{{"role":"{role}","call":{}}}}}"#, attack.1);
    assert_eq!(said, expected);
}

#[test]
fn what_no_thread_needs_ends_the_process_and_is_named() {
    for role in Role::ALL {
        for &attack in ATTACKS {
            attacked(role, attack);
        }
    }
    for &(role, attack) in NARROW {
        attacked(role, attack);
    }
}

#[test]
fn without_the_filter_the_same_calls_go_through() {
    // Which shows that what ends the process above is the filter. These fail by their arguments and
    // change nothing.
    for name in ["bpf", "keyctl", "open", "memfd_create", "socketpair"] {
        let &attack = ATTACKS.iter().find(|attack| attack.0 == name).unwrap();
        let (said, ended) = child(|| {
            report_blocked().unwrap();
            make(attack);
        });
        assert!(
            matches!(ended, WaitStatus::Exited(_, 0)),
            "{name}: {ended:?}"
        );
        assert_eq!(said, "");
    }
}

#[test]
fn a_full_socket_does_not_keep_the_process() {
    let (_, ended) = child(|| {
        report_blocked().unwrap();
        lock_down(Role::Vcpu).unwrap();
        let word = [0_u8; 32];
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the bytes are alive.
        while unsafe { libc::send(CONTROL_FD, word.as_ptr().cast(), word.len(), flags) } > 0 {}
        make(attack("execve", libc::SYS_execve));
    });
    assert!(matches!(ended, WaitStatus::Exited(_, code) if code == ExitCode::Blocked as i32));
}

#[test]
fn a_thread_has_its_filter_when_its_starter_goes_on() {
    let (said, ended) = child(|| {
        report_blocked().unwrap();
        let work = |number: i32| {
            assert_eq!(number, 7);
            make(attack("execve", libc::SYS_execve));
        };
        let thread = spawn("attacker".to_owned(), Role::Net, || Ok(7), work).unwrap();
        let _ = thread.join();
    });
    assert!(said.contains(r#""role":"net""#), "{said}");
    assert!(matches!(ended, WaitStatus::Exited(_, code) if code == ExitCode::Blocked as i32));
}

#[test]
fn a_thread_that_cannot_be_made_ready_is_an_error() {
    let failing = || Err::<(), _>(io::Error::other("no"));
    let error = spawn("x".to_owned(), Role::Net, failing, |()| ()).unwrap_err();
    assert!(matches!(error, SeccompError::Prepare { .. }), "{error}");
    let panicking = || -> io::Result<()> { panic!("as a test") };
    let error = spawn("x".to_owned(), Role::Net, panicking, |()| ()).unwrap_err();
    assert!(matches!(error, SeccompError::Prepare { .. }), "{error}");
}

/// Firecracker's published lists have 50 calls for the VMM's thread and 27 for a vCPU's.
#[test]
fn the_lists_are_short() {
    for role in Role::ALL {
        let numbers: BTreeSet<i64> = CALLS
            .iter()
            .filter(|call| call.roles.contains(&role))
            .map(|call| call.number)
            .collect();
        let most = match role {
            Role::Vmm | Role::Template | Role::Device | Role::Net => 50,
            Role::Vcpu => 27,
            Role::FsControl | Role::FsVhost => 40,
            Role::FsQueue => 60,
        };
        eprintln!("{role}: {} calls", numbers.len());
        assert!(numbers.len() <= most, "{role} has {} calls", numbers.len());
    }
}
