//! Programs and maps of bpf(2), as far as the agent needs them (include/uapi/linux/bpf.h).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

mod ring;

pub(crate) use ring::Ring;

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;
const BPF_F_REPLACE: u32 = 1 << 2;

/// Instruction codes of Documentation/bpf/standardization/instruction-set.rst. The two that are 16 bytes long are made by
/// [`wide`].
pub(crate) mod code {
    /// dst = *(u32 *)(src + offset)
    pub(crate) const LOAD_WORD: u8 = 0x61;
    /// *(u64 *)(dst + offset) = src
    pub(crate) const STORE_DOUBLE: u8 = 0x7b;
    /// dst = src, 64 bits
    pub(crate) const MOVE: u8 = 0xbf;
    /// dst += immediate, 64 bits
    pub(crate) const ADD_IMMEDIATE: u8 = 0x07;
    /// dst = immediate, 32 bits
    pub(crate) const MOVE_IMMEDIATE: u8 = 0xb4;
    /// dst &= immediate, 32 bits
    pub(crate) const AND_IMMEDIATE: u8 = 0x54;
    /// dst |= immediate, 32 bits
    pub(crate) const OR_IMMEDIATE: u8 = 0x44;
    /// pc += offset
    pub(crate) const JUMP: u8 = 0x05;
    /// pc += offset when (u32)dst == immediate
    pub(crate) const JUMP_IF_EQUAL: u8 = 0x16;
    /// pc += offset when (u32)dst != immediate
    pub(crate) const JUMP_IF_NOT_EQUAL: u8 = 0x56;
    /// pc += offset when dst != src, 64 bits
    pub(crate) const JUMP_IF_DIFFERENT: u8 = 0x5d;
    /// R0 = helper number `immediate` of R1 to R5
    pub(crate) const CALL: u8 = 0x85;
    /// return R0
    pub(crate) const EXIT: u8 = 0x95;
}

/// One instruction of 8 bytes, in the machine's byte order (little endian here).
pub(crate) fn instruction(
    code: u8,
    destination: u8,
    source: u8,
    offset: i16,
    immediate: u32,
) -> u64 {
    u64::from(code)
        | u64::from(destination) << 8
        | u64::from(source) << 12
        | u64::from(offset as u16) << 16
        | u64::from(immediate) << 32
}

/// What an instruction of 16 bytes loads.
pub(crate) enum Wide {
    /// A number.
    Number(u64),
    /// The map behind a descriptor (BPF_PSEUDO_MAP_FD).
    Map(u32),
}

/// destination = value, 64 bits.
pub(crate) fn wide(destination: u8, value: Wide) -> [u64; 2] {
    const LOAD: u8 = 0x18;
    let (source, value) = match value {
        Wide::Number(number) => (0, number),
        Wide::Map(fd) => (1, u64::from(fd)),
    };
    [
        instruction(LOAD, destination, source, 0, value as u32),
        instruction(0, 0, 0, 0, (value >> 32) as u32),
    ]
}

/// What a program is for, which is also where it can be attached.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    /// Decides about accesses to devices (BPF_PROG_TYPE_CGROUP_DEVICE, BPF_CGROUP_DEVICE).
    Devices,
    /// Is told of what TCP sockets do (BPF_PROG_TYPE_SOCK_OPS, BPF_CGROUP_SOCK_OPS).
    Sockets,
}

impl Purpose {
    const fn program(self) -> u32 {
        match self {
            Self::Devices => 15,
            Self::Sockets => 13,
        }
    }

    const fn attachment(self) -> u32 {
        match self {
            Self::Devices => 6,
            Self::Sockets => 3,
        }
    }

    const fn name(self) -> &'static [u8; 15] {
        match self {
            Self::Devices => b"bulkhead_device",
            Self::Sockets => b"bulkhead_socket",
        }
    }
}

/// The part of `union bpf_attr` for BPF_PROG_LOAD that is used; the kernel takes the rest as zero.
#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

/// The part of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

/// The part of `union bpf_attr` for BPF_LINK_CREATE.
#[repr(C)]
struct LinkAttr {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// bpf(2).
///
/// # Safety
///
/// `attr` is a prefix of `union bpf_attr` for `command`, and its pointers are valid for what the command does with them.
unsafe fn bpf<T>(command: libc::c_int, attr: &T) -> Result<libc::c_long, Errno> {
    // SAFETY: `attr` is live and of the size passed; the rest is the caller's promise.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attr),
            size_of::<T>(),
        )
    })
}

/// Takes the descriptor that a command has answered with.
///
/// # Safety
///
/// `fd` is a descriptor that nobody else owns.
unsafe fn take(fd: libc::c_long) -> Result<OwnedFd, Errno> {
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the caller's promise.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd) -> Result<u32, Errno> {
    u32::try_from(fd.as_raw_fd()).map_err(|_| Errno::EBADF)
}

/// Loads a program of `program.len()` 8-byte instructions.
pub(crate) fn load(purpose: Purpose, program: &[u64]) -> Result<OwnedFd, Errno> {
    let mut name = [0; 16];
    name[..15].copy_from_slice(purpose.name());
    let attr = LoadAttr {
        prog_type: purpose.program(),
        insn_cnt: u32::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        insns: program.as_ptr() as u64,
        // No helper is called that asks for another licence.
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: name,
    };
    // SAFETY: the pointers refer to `program`, of the length given, and to a static string. The kernel only reads them;
    // the answer is a descriptor of ours alone.
    unsafe { take(bpf(BPF_PROG_LOAD, &attr)?) }
}

/// Attaches `program` to `cgroup` for as long as that exists, in the place of `old` when there is one: at no moment is
/// neither attached.
pub(crate) fn attach(
    cgroup: BorrowedFd,
    purpose: Purpose,
    program: BorrowedFd,
    old: Option<BorrowedFd>,
) -> Result<(), Errno> {
    let attr = AttachAttr {
        target_fd: number(cgroup)?,
        attach_bpf_fd: number(program)?,
        attach_type: purpose.attachment(),
        // MULTI: a program of an ancestor goes on to apply, whatever this one allows.
        attach_flags: BPF_F_ALLOW_MULTI | old.map_or(0, |_| BPF_F_REPLACE),
        replace_bpf_fd: old.map(number).transpose()?.unwrap_or(0),
    };
    // SAFETY: `attr` has no pointers.
    unsafe { bpf(BPF_PROG_ATTACH, &attr) }?;
    Ok(())
}

/// Attaches `program` to `cgroup` beside others for as long as the answer is open.
pub(crate) fn link(
    cgroup: BorrowedFd,
    purpose: Purpose,
    program: BorrowedFd,
) -> Result<OwnedFd, Errno> {
    let attr = LinkAttr {
        prog_fd: number(program)?,
        target_fd: number(cgroup)?,
        attach_type: purpose.attachment(),
        flags: 0,
    };
    // SAFETY: `attr` has no pointers; the answer is a descriptor of ours alone.
    unsafe { take(bpf(BPF_LINK_CREATE, &attr)?) }
}
