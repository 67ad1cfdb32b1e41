//! A prologue: system calls above the highest number that the profile names fail with `ENOSYS`.
//!
//! A profile was written when the kernel had fewer calls. Its default action, `EPERM` for most, makes a C library believe
//! that a new call exists and is forbidden; `ENOSYS` makes it use the old one. runc does the same since 1.0-rc93.

use libseccomp::{ScmpAction, ScmpArch, ScmpSyscall};
use oci_spec::runtime as spec;

const LOAD_WORD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_EQUAL: u16 = 0x35;
const JUMP: u16 = 0x05;
const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const X32_BIT: u32 = 0x4000_0000;
const RETURN_ENOSYS: u32 = 0x0005_0000 | libc::ENOSYS as u32;

type Instruction = (u16, u8, u8, u32);

/// Puts the prologue in front of `program` where it changes something for the better.
pub(super) fn prepend(
    profile: &spec::LinuxSeccomp,
    default: ScmpAction,
    architectures: &[ScmpArch],
    program: Vec<u8>,
) -> Vec<u8> {
    // A default that lets calls through (a tracer answers for itself), or that is ENOSYS already, needs none.
    let lenient = matches!(
        default,
        ScmpAction::Allow
            | ScmpAction::Log
            | ScmpAction::Trace(_)
            | ScmpAction::Errno(libc::ENOSYS)
    );
    if lenient {
        return program;
    }
    let last = |architecture: ScmpArch| match architectures.contains(&architecture) {
        true => last_number(profile, architecture),
        false => None,
    };
    let prologue = prologue(
        last(ScmpArch::X8664),
        last(ScmpArch::X32),
        last(ScmpArch::X86),
    );
    let mut bytes = Vec::with_capacity(prologue.len() * 8 + program.len());
    for (code, if_true, if_false, value) in prologue {
        bytes.extend(code.to_ne_bytes());
        bytes.extend([if_true, if_false]);
        bytes.extend(value.to_ne_bytes());
    }
    bytes.extend(program);
    bytes
}

/// The highest number of a named call on an architecture.
fn last_number(profile: &spec::LinuxSeccomp, architecture: ScmpArch) -> Option<u32> {
    let names = profile
        .syscalls()
        .iter()
        .flatten()
        .flat_map(|rule| rule.names());
    names
        .filter_map(|name| ScmpSyscall::from_name_by_arch(name, architecture).ok())
        // Negative: a call that this architecture does not have.
        .filter_map(|call| u32::try_from(call.as_raw_syscall()).ok())
        .max()
}

/// Each part falls through to the end (the filter itself) unless the number is above the limit; an absent limit skips it.
fn prologue(last_64: Option<u32>, last_x32: Option<u32>, last_32: Option<u32>) -> Vec<Instruction> {
    // A number that nothing exceeds: no limit.
    let limit = |last: Option<u32>| last.unwrap_or(u32::MAX);
    vec![
        /*  0 */ (LOAD_WORD, 0, 0, ARCHITECTURE),
        /*  1 */ (JUMP_EQUAL, 0, 4, AUDIT_ARCH_X86_64),
        /*  2 */ (LOAD_WORD, 0, 0, NUMBER),
        /*  3 */ (JUMP_GREATER_EQUAL, 1, 0, X32_BIT),
        /*  4 */ (JUMP_GREATER, 4, 5, last_64.unwrap_or(X32_BIT)),
        /*  5 */ (JUMP_GREATER, 3, 4, limit(last_x32)),
        /*  6 */ (JUMP_EQUAL, 0, 3, AUDIT_ARCH_I386),
        /*  7 */ (LOAD_WORD, 0, 0, NUMBER),
        /*  8 */ (JUMP_GREATER, 0, 1, limit(last_32)),
        /*  9 */ (RETURN, 0, 0, RETURN_ENOSYS),
        /* 10 */ (JUMP, 0, 0, 0),
    ]
}
