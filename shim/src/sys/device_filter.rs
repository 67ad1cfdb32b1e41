//! What device nodes the processes of a cgroup may open: a program of the kernel's (bpf(2), BPF_PROG_TYPE_CGROUP_DEVICE), as
//! engines have one for a container.
//!
//! A pod's processes are handed their devices as open descriptors, and need none but `/dev/null` by name. So nothing that appears
//! in their mounts, however it got there and whatever its mount allows, is a way to a device of the host.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const CGROUP_DEVICE_PROGRAM: u32 = 15;
const CGROUP_DEVICE_HOOK: u32 = 6;
/// Beside those of the cgroups above: all of them have to agree.
const ALLOW_MULTI: u32 = 2;

/// `struct bpf_insn` of linux/bpf.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// The part of `union bpf_attr` that BPF_PROG_LOAD reads.
#[repr(C)]
#[derive(Default)]
struct Load {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The part that BPF_PROG_ATTACH reads.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    hook: u32,
    flags: u32,
}

/// `if` the program goes on at all, the device is the character device 1:3 and is not made but opened.
fn only_null() -> [Instruction; 11] {
    const CONTEXT: u8 = 1;
    const VALUE: u8 = 2;
    /// 32 bits of the context (`struct bpf_cgroup_dev_ctx`) into VALUE.
    const LOAD: u8 = 0x61;
    const AND: u8 = 0x57;
    const UNLESS_EQUAL: u8 = 0x55;
    const MOVE: u8 = 0xb7;
    const EXIT: u8 = 0x95;
    let one = |code, registers, offset, immediate| Instruction {
        code,
        registers,
        offset,
        immediate,
    };
    let load = |offset| one(LOAD, VALUE | CONTEXT << 4, offset, 0);
    let unless = |immediate, skip| one(UNLESS_EQUAL, VALUE, skip, immediate);
    [
        // Access in the high half (1 is to make it), kind in the low one (2 is a character device).
        load(0),
        one(AND, VALUE, 0, 0x1_ffff),
        unless(2, 6),
        load(4),
        unless(1, 4),
        load(8),
        unless(3, 2),
        one(MOVE, 0, 0, 1),
        one(EXIT, 0, 0, 0),
        one(MOVE, 0, 0, 0),
        one(EXIT, 0, 0, 0),
    ]
}

/// Lets the processes of a cgroup, an open directory, open `/dev/null` and no other device node. It stays as long as the cgroup.
pub fn allow_only_null(cgroup: BorrowedFd<'_>) -> io::Result<()> {
    let program = only_null();
    let license = c"";
    let load = Load {
        program_type: CGROUP_DEVICE_PROGRAM,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..Load::default()
    };
    let program = bpf(PROG_LOAD, &load)?;
    // SAFETY: the kernel has just made this descriptor and nobody else owns it.
    let program = unsafe { OwnedFd::from_raw_fd(program) };
    let attach = Attach {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        hook: CGROUP_DEVICE_HOOK,
        flags: ALLOW_MULTI,
    };
    bpf(PROG_ATTACH, &attach).map(drop)
}

/// `attributes` is the beginning of a `union bpf_attr`; what it points to outlives the call.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    // SAFETY: the structure is as long as is said, and the callers keep what its fields point to.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>() as u32) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as i32)
}
