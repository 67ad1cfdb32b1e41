//! The list: each system call, the threads that may make it, with which arguments, and why.
//!
//! A rule looks at the values of arguments, never at what they point to: that a path is harmless is
//! the jail's work, not the filter's. Numbers are compared in 32 bits where the kernel takes an
//! int, so that nothing hides in the upper half.

use std::collections::BTreeMap;
use std::fmt;

use bulkhead_vmm_config::{CONTROL_FD, Role};
use seccompiler::{
    BackendError, SeccompCmpArgLen::Dword, SeccompCmpOp, SeccompCondition, SeccompRule,
};

use Role::{Device, FsControl, FsQueue, FsVhost, Net, Template, Vcpu, Vmm};

/// A condition on one argument, counted from 0.
#[derive(Clone, Copy, Debug)]
pub enum Test {
    /// It has this value.
    Is(u8, u64),
    /// The bits of the first number have the values of the second.
    Bits(u8, u64, u64),
}

use Test::{Bits, Is};

/// Any way.
const ANY: &[&[Test]] = &[];

/// One system call.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Its name in the manual.
    pub name: &'static str,
    /// Its number.
    pub number: i64,
    /// The threads that may make it.
    pub roles: &'static [Role],
    /// Each line is one way in which it may be made, with all its tests passed; none: any way.
    pub ways: &'static [&'static [Test]],
    /// Why.
    pub why: &'static str,
}

macro_rules! calls {
    ($($name:literal $number:ident $roles:expr, $ways:expr, $why:literal;)*) => {
        &[$(Call {
            name: $name,
            number: libc::$number,
            roles: $roles,
            ways: $ways,
            why: $why,
        }),*]
    };
}

const ALL: &[Role] = &[
    Vmm, Template, Device, Vcpu, Net, FsControl, FsVhost, FsQueue,
];

/// ioctl(2) numbers of KVM (Documentation/virt/kvm/api.rst), which kvm-ioctls keeps to itself.
mod kvm {
    use kvm_bindings::{
        KVMIO, kvm_clock_data, kvm_debugregs, kvm_irq_routing, kvm_lapic_state, kvm_mp_state,
        kvm_msrs, kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs,
        kvm_xsave,
    };
    use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

    pub const RUN: u64 = ioctl_expr(_IOC_NONE, KVMIO, 0x80, 0);
    pub const GET_REGS: u64 = read::<kvm_regs>(0x81);
    pub const SET_USER_MEMORY_REGION: u64 = ioctl_expr(
        _IOC_WRITE,
        KVMIO,
        0x46,
        size_of::<kvm_userspace_memory_region>() as u32,
    );
    const fn read<T>(number: u32) -> u64 {
        ioctl_expr(_IOC_READ, KVMIO, number, size_of::<T>() as u32)
    }
    pub const GET_CLOCK: u64 = read::<kvm_clock_data>(0x7c);
    pub const GET_MP_STATE: u64 = read::<kvm_mp_state>(0x98);
    pub const GET_SREGS: u64 = read::<kvm_sregs>(0x83);
    pub const GET_XSAVE: u64 = read::<kvm_xsave>(0xa4);
    pub const GET_XCRS: u64 = read::<kvm_xcrs>(0xa6);
    pub const GET_DEBUGREGS: u64 = read::<kvm_debugregs>(0xa1);
    pub const GET_LAPIC: u64 = read::<kvm_lapic_state>(0x8e);
    pub const GET_VCPU_EVENTS: u64 = read::<kvm_vcpu_events>(0x9f);
    pub const GET_MSRS: u64 = ioctl_expr(
        _IOC_READ | _IOC_WRITE,
        KVMIO,
        0x88,
        size_of::<kvm_msrs>() as u32,
    );
    pub const SET_GSI_ROUTING: u64 =
        ioctl_expr(_IOC_WRITE, KVMIO, 0x6a, size_of::<kvm_irq_routing>() as u32);
}

const READ_WRITE: &[&[Test]] = &[&[Bits(2, libc::PROT_EXEC as u64, 0)]];
const ANONYMOUS: u64 = libc::MAP_ANONYMOUS as u64;
const SHARED: u64 = libc::MAP_SHARED as u64;
const FORMAT: u64 = libc::S_IFMT as u64;
/// The contents go, the file keeps its size.
const HOLE: u64 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64;
const NONBLOCK: u64 = libc::O_NONBLOCK as u64;

/// The list.
pub const CALLS: &[Call] = calls! {
    // What every thread does.
    "futex" SYS_futex ALL, ANY, "locks, and waits of threads for each other";
    "brk" SYS_brk ALL, ANY, "the allocator's first heap";
    "mmap" SYS_mmap ALL, &[&[Bits(2, libc::PROT_EXEC as u64, 0), Bits(3, ANONYMOUS, ANONYMOUS)]],
        "the allocator's other heaps and large blocks; never executable";
    "mprotect" SYS_mprotect ALL, READ_WRITE, "the allocator's heaps grow; never executable";
    "munmap" SYS_munmap ALL, ANY, "the allocator gives back; stacks of threads that end";
    "mremap" SYS_mremap ALL, ANY, "large blocks grow; lent pages become the pod's own (vmm)";
    "madvise" SYS_madvise ALL, ANY, "the allocator and ending threads give pages back";
    "write" SYS_write ALL, ANY, "log lines; eventfds: interrupts, kicks, bells; questions about lent pages";
    "close" SYS_close ALL, ANY, "descriptors that are not needed any more";
    "clock_gettime" SYS_clock_gettime ALL, ANY, "time, on hosts whose vDSO has no clock";
    "restart_syscall" SYS_restart_syscall ALL, ANY, "the process was stopped and goes on";
    "rt_sigreturn" SYS_rt_sigreturn &[Vcpu], ANY, "the vCPUs' kick is a signal";
    "rt_sigprocmask" SYS_rt_sigprocmask ALL, ANY, "a thread ends; abort(3)";
    "sigaltstack" SYS_sigaltstack ALL, ANY, "a thread ends: its stack for signals goes";
    "exit" SYS_exit ALL, ANY, "a thread ends";
    "exit_group" SYS_exit_group ALL, ANY, "the process ends, also at a bug or at a refused call";
    "getpid" SYS_getpid ALL, ANY, "abort(3)";
    "gettid" SYS_gettid ALL, ANY, "abort(3)";
    "tgkill" SYS_tgkill ALL, &[&[Is(2, libc::SIGABRT as u64)]], "abort(3): the allocator found its heap broken";
    "sendto" SYS_sendto ALL,
        &[&[Is(0, CONTROL_FD as u64), Is(3, (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as u64), Is(4, 0)]],
        "the last word to the shim: a call was refused";

    // The machine: the event loop, devices, vCPUs, networks.
    "ioctl" SYS_ioctl &[Vcpu], &[&[Is(1, kvm::RUN)], &[Is(1, kvm::SET_GSI_ROUTING)], &[Is(1, kvm::GET_REGS)]],
        "KVM_RUN; KVM_SET_GSI_ROUTING: the guest programs the IOAPIC; KVM_GET_REGS: where KVM gave up";
    "ioctl" SYS_ioctl &[Device, Net], &[&[Is(1, libc::TUNSETOFFLOAD)], &[Is(1, libc::TUNSETQUEUE)]],
        "TUNSETOFFLOAD, TUNSETQUEUE: the driver chooses offloads and pairs of queues";
    "ioctl" SYS_ioctl &[Vmm], &[&[Is(1, libc::TUNGETIFF)], &[Is(1, libc::TUNSETVNETHDRSZ)], &[Is(1, libc::TUNSETOFFLOAD)]],
        "TUNGETIFF, TUNSETVNETHDRSZ, TUNSETOFFLOAD: the shim plugs a tap, and what it can is found out";
    "ioctl" SYS_ioctl &[Vmm], &[&[Is(1, kvm::SET_USER_MEMORY_REGION)]],
        "KVM_SET_USER_MEMORY_REGION: the shim lets the guest have more memory than ever before";
    "ioctl" SYS_ioctl &[Template], &[
        &[Is(1, kvm::GET_CLOCK)], &[Is(1, kvm::GET_MP_STATE)], &[Is(1, kvm::GET_REGS)], &[Is(1, kvm::GET_SREGS)],
        &[Is(1, kvm::GET_XSAVE)], &[Is(1, kvm::GET_XCRS)], &[Is(1, kvm::GET_DEBUGREGS)], &[Is(1, kvm::GET_LAPIC)],
        &[Is(1, kvm::GET_MSRS)], &[Is(1, kvm::GET_VCPU_EVENTS)],
    ], "KVM_GET_*: what the machine's clock and its vCPUs are when it is saved";
    "lseek" SYS_lseek &[Template], ANY, "where guest memory has pages";
    "pwrite64" SYS_pwrite64 &[Template], ANY, "they go to the template";
    "epoll_wait" SYS_epoll_wait &[Vmm, Template, Net, FsQueue], ANY, "the event loops";
    "epoll_ctl" SYS_epoll_ctl &[Vmm, Template, Device, Net, FsQueue], ANY, "what the event loops watch";
    "recvmsg" SYS_recvmsg &[Vmm, Template, Device, FsControl, FsVhost], ANY,
        "the shim's requests; vsock streams; vhost-user messages";
    "sendmsg" SYS_sendmsg &[Vmm, Template, Device, FsControl, FsVhost], ANY,
        "answers to the shim; vsock streams; vhost-user messages";
    "read" SYS_read &[Vmm, Template, Device, FsControl, FsVhost, FsQueue], ANY,
        "eventfds; the list of mounts (fs-control); what the VMM says of pages that a template lends (fs-vhost, fs-queue)";
    "readv" SYS_readv &[Net], ANY, "frames from the tap";
    "writev" SYS_writev ALL, ANY, "frames to the tap; the C library's last word before abort(3)";
    "pread64" SYS_pread64 &[Vmm, Template, Vcpu], ANY, "KVM's counters";
    "recvfrom" SYS_recvfrom &[Vmm, Template, Device], ANY, "vsock streams; what is unread when the device is reset; questions for lent pages";
    "sendto" SYS_sendto &[Vmm, Template], &[&[Is(4, 0)]], "vsock streams and answers about lent pages, to no address";
    "shutdown" SYS_shutdown &[Vmm, Template, Device], ANY, "one direction of a vsock stream ends; all of it when the device is reset";
    "getsockopt" SYS_getsockopt &[Vmm, Template], ANY, "what the shim offers is a stream socket";
    "getsockname" SYS_getsockname &[Vmm, Template], ANY, "what the shim offers is a Unix socket";
    "fcntl" SYS_fcntl &[Vmm], &[
        &[Is(1, libc::F_GETFL as u64)],
        &[Is(1, libc::F_SETFL as u64), Bits(2, NONBLOCK, NONBLOCK)],
    ], "O_NONBLOCK on a tap that the shim plugs; taken from nothing that the fs process writes to";
    "fcntl" SYS_fcntl &[Device], &[&[Is(1, libc::F_DUPFD_CLOEXEC as u64)]], "queues that start get copies of their kicks";
    "getrandom" SYS_getrandom ALL, ANY, "the guest's entropy device; seeds of hash maps";
    "tgkill" SYS_tgkill &[Vmm, Template], &[&[Is(2, KICK)]], "the kick that makes KVM_RUN return";
    "fallocate" SYS_fallocate &[Vmm, Template], &[&[Is(1, HOLE)]], "what the guest gives back or unplugs becomes a hole in its memory";
    "timerfd_create" SYS_timerfd_create &[Device], ANY, "a rate-limited network device starts";
    "timerfd_settime" SYS_timerfd_settime &[Device, Net], ANY, "when the rate limit lets a frame pass";
    "clock_nanosleep" SYS_clock_nanosleep &[Device, Net], ANY, "the pace of changes to taps";

    // The fs process.
    "poll" SYS_poll &[FsControl], ANY, "the shim's requests and changes of the mounts";
    "mmap" SYS_mmap &[FsVhost], &[&[Bits(2, libc::PROT_EXEC as u64, 0), Bits(3, SHARED, SHARED)]],
        "guest memory; never executable";
    "fcntl" SYS_fcntl &[FsVhost, FsQueue], &[&[Is(1, libc::F_DUPFD_CLOEXEC as u64)]],
        "copies of eventfds; FLUSH closes a copy";
    "fcntl" SYS_fcntl &[FsVhost], &[&[Is(1, libc::F_GETFL as u64)]],
        "writes to the VMM's interrupts must not wait";
    "openat" SYS_openat &[FsControl, FsQueue], ANY, "an inode's own descriptor is opened again, by its number beneath /proc/self/fd";
    "openat2" SYS_openat2 &[FsQueue], ANY, "LOOKUP, CREATE: one name, RESOLVE_BENEATH";
    "statx" SYS_statx &[FsControl, FsQueue], ANY, "attributes, mount ids";
    "readlinkat" SYS_readlinkat &[FsControl, FsQueue], ANY, "READLINK; where a descriptor is";
    "lseek" SYS_lseek &[FsControl, FsQueue], ANY, "LSEEK, READDIR";
    "fstatfs" SYS_fstatfs &[FsQueue], ANY, "STATFS";
    "getdents64" SYS_getdents64 &[FsQueue], ANY, "READDIR, READDIRPLUS";
    "preadv" SYS_preadv &[FsQueue], ANY, "READ";
    "pwritev" SYS_pwritev &[FsQueue], ANY, "WRITE";
    "pwritev2" SYS_pwritev2 &[FsQueue], ANY, "WRITE to a file that is open for appending";
    "fallocate" SYS_fallocate &[FsQueue], ANY, "FALLOCATE";
    "copy_file_range" SYS_copy_file_range &[FsQueue], ANY, "COPY_FILE_RANGE";
    "ftruncate" SYS_ftruncate &[FsQueue], ANY, "SETATTR of an open file's size";
    "truncate" SYS_truncate &[FsQueue], ANY, "SETATTR of a file's size";
    "fsync" SYS_fsync &[FsQueue], ANY, "FSYNC, FSYNCDIR";
    "fdatasync" SYS_fdatasync &[FsQueue], ANY, "FSYNC of data";
    "syncfs" SYS_syncfs &[FsQueue], ANY, "SYNCFS";
    "mkdirat" SYS_mkdirat &[FsQueue], ANY, "MKDIR";
    "mknodat" SYS_mknodat &[FsQueue], &[
        &[Bits(2, FORMAT, 0)],
        &[Bits(2, FORMAT, libc::S_IFREG as u64)],
        &[Bits(2, FORMAT, libc::S_IFIFO as u64)],
        &[Bits(2, FORMAT, libc::S_IFSOCK as u64)],
        &[Bits(2, FORMAT, libc::S_IFCHR as u64), Is(3, 0)],
    ], "MKNOD of files, pipes, sockets and whiteouts; no device";
    "symlinkat" SYS_symlinkat &[FsQueue], ANY, "SYMLINK";
    "linkat" SYS_linkat &[FsQueue], ANY, "LINK";
    "unlinkat" SYS_unlinkat &[FsQueue], ANY, "UNLINK, RMDIR";
    "renameat2" SYS_renameat2 &[FsQueue], ANY, "RENAME, RENAME2";
    "fchmodat" SYS_fchmodat &[FsQueue], ANY, "SETATTR of a mode";
    "fchownat" SYS_fchownat &[FsQueue], ANY, "SETATTR of an owner";
    "utimensat" SYS_utimensat &[FsQueue], ANY, "SETATTR of times";
    "getxattr" SYS_getxattr &[FsQueue], ANY, "GETXATTR";
    "setxattr" SYS_setxattr &[FsQueue], ANY, "SETXATTR";
    "listxattr" SYS_listxattr &[FsQueue], ANY, "LISTXATTR";
    "removexattr" SYS_removexattr &[FsQueue], ANY, "REMOVEXATTR";
    "setresuid" SYS_setresuid &[FsQueue], ANY, "what is made belongs to the caller";
    "setresgid" SYS_setresgid &[FsQueue], ANY, "what is made belongs to the caller's group";
    "umask" SYS_umask &[FsQueue], ANY, "the caller's umask, where the directory has no default list";
    "prctl" SYS_prctl &[FsQueue], &[&[Is(0, libc::PR_SET_DUMPABLE as u64), Is(1, 0)]],
        "stays undumpable over changes of ids";
};

/// The first real-time signal that the C library leaves to programs: `SIGRTMIN()` of signal(7).
const KICK: u64 = 34;

/// The list for a reader: a line for each role and call, with the ways in which it may be made.
pub fn table() -> String {
    let mut text = String::new();
    for role in Role::ALL {
        for call in CALLS.iter().filter(|call| call.roles.contains(&role)) {
            let way = |way: &&[Test]| {
                let tests: Vec<String> = way.iter().map(Test::to_string).collect();
                tests.join(" and ")
            };
            let ways: Vec<String> = call.ways.iter().map(way).collect();
            let ways = match ways.is_empty() {
                true => "any".to_owned(),
                false => ways.join(", or "),
            };
            text += &format!("{role}\t{}\t{ways}\t{}\n", call.name, call.why);
        }
    }
    text
}

/// The calls of a role, in the form that the filter's compiler takes.
///
/// # Errors
/// A test names an argument that no call has.
pub fn rules(role: Role) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let listed = || CALLS.iter().filter(|call| call.roles.contains(&role));
    for call in listed() {
        let ways = rules.entry(call.number).or_default();
        for way in call.ways {
            let tests = way.iter().map(Test::condition);
            ways.push(SeccompRule::new(tests.collect::<Result<_, _>>()?)?);
        }
    }
    // To the compiler, no rule is no condition.
    for call in listed().filter(|call| call.ways.is_empty()) {
        rules.insert(call.number, Vec::new());
    }
    Ok(rules)
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Is(argument, value) => write!(f, "argument {argument} is {value:#x}"),
            Bits(argument, mask, value) => {
                write!(
                    f,
                    "argument {argument} has {value:#x} in the bits {mask:#x}"
                )
            }
        }
    }
}

impl Test {
    fn condition(&self) -> Result<SeccompCondition, BackendError> {
        let (argument, operator, value) = match *self {
            Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
            Bits(argument, mask, value) => (argument, SeccompCmpOp::MaskedEq(mask), value),
        };
        SeccompCondition::new(argument, Dword, operator, value)
    }
}
