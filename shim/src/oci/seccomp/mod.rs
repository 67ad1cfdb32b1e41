//! `linux.seccomp` → one BPF program, compiled by libseccomp for the guest's kernel.
//!
//! As runc does, and so differently from a literal reading:
//! - names that no system call has are skipped, so that one profile serves many kernels;
//! - a rule whose action is the default action says nothing and is skipped;
//! - two conditions on the same argument in one rule are alternatives, because libseccomp cannot conjoin them;
//! - a system call newer than every one that the profile names fails with `ENOSYS` rather than with the default action, so
//!   that a C library falls back to an older call instead of failing (see `unknown_calls.rs`).

mod unknown_calls;

#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io::{Read, Seek},
};

use bulkhead_agent_protocol::agent;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
    error::SeccompError,
};
use oci_spec::runtime::{
    self as spec, Arch, LinuxSeccompAction as Action, LinuxSeccompFilterFlag as Flag,
    LinuxSeccompOperator as Operator,
};

use super::{Error, invalid, unsupported};

/// `BPF_MAXINSNS` (linux/bpf_common.h).
const MAX_INSTRUCTIONS: usize = 4096;
/// `sizeof(struct sock_filter)`.
const INSTRUCTION: usize = 8;
/// libseccomp's name for "a kernel that has all actions and flags": the guest's is ours, whatever the host runs.
const API_LEVEL: u32 = 6;
const EPERM: u32 = libc::EPERM as u32;

/// The actions that a filter can have, made with an errno for those that return one.
pub(super) const ACTIONS: [(Action, fn(u16) -> ScmpAction); 8] = [
    (Action::ScmpActKill, |_| ScmpAction::KillThread),
    (Action::ScmpActKillProcess, |_| ScmpAction::KillProcess),
    (Action::ScmpActKillThread, |_| ScmpAction::KillThread),
    (Action::ScmpActTrap, |_| ScmpAction::Trap),
    (Action::ScmpActErrno, |errno| {
        ScmpAction::Errno(errno.into())
    }),
    (Action::ScmpActTrace, ScmpAction::Trace),
    (Action::ScmpActLog, |_| ScmpAction::Log),
    (Action::ScmpActAllow, |_| ScmpAction::Allow),
];

/// The architectures whose programs the guest's processor can run.
pub(super) const ARCHITECTURES: [(Arch, ScmpArch); 3] = [
    (Arch::ScmpArchX86_64, ScmpArch::X8664),
    (Arch::ScmpArchX86, ScmpArch::X86),
    (Arch::ScmpArchX32, ScmpArch::X32),
];

/// The operators, with libseccomp's words for one and the argument's two values.
pub(super) const OPERATORS: [(Operator, fn(u64, u64) -> (ScmpCompareOp, u64)); 7] = [
    (Operator::ScmpCmpNe, |value, _| {
        (ScmpCompareOp::NotEqual, value)
    }),
    (Operator::ScmpCmpLt, |value, _| (ScmpCompareOp::Less, value)),
    (Operator::ScmpCmpLe, |value, _| {
        (ScmpCompareOp::LessOrEqual, value)
    }),
    (Operator::ScmpCmpEq, |value, _| {
        (ScmpCompareOp::Equal, value)
    }),
    (Operator::ScmpCmpGe, |value, _| {
        (ScmpCompareOp::GreaterEqual, value)
    }),
    (Operator::ScmpCmpGt, |value, _| {
        (ScmpCompareOp::Greater, value)
    }),
    // OCI: value is the mask, valueTwo what the masked argument must equal.
    (Operator::ScmpCmpMaskedEq, |value, two| {
        (ScmpCompareOp::MaskedEqual(value), two)
    }),
];

/// The flags (`SECCOMP_FILTER_FLAG_*`, linux/seccomp.h). `None`: known, but it is for notifications.
pub(super) const FLAGS: [(Flag, Option<u64>); 4] = [
    (Flag::SeccompFilterFlagTsync, Some(1)),
    (Flag::SeccompFilterFlagLog, Some(1 << 1)),
    (Flag::SeccompFilterFlagSpecAllow, Some(1 << 2)),
    (Flag::SeccompFilterFlagWaitKillableRecv, None),
];

pub(super) fn compile(profile: &spec::LinuxSeccomp) -> Result<agent::Seccomp, Error> {
    if profile.listener_path().is_some() {
        return Err(unsupported(
            "linux.seccomp.listenerPath",
            "a notification's descriptor cannot leave the guest",
        ));
    }
    let program = build(profile)?;
    if program.len() > MAX_INSTRUCTIONS * INSTRUCTION {
        let count = program.len() / INSTRUCTION;
        return Err(Error::Seccomp(format!(
            "it becomes {count} instructions, {MAX_INSTRUCTIONS} are allowed"
        )));
    }
    Ok(agent::Seccomp {
        program,
        flags: flags(profile)?,
        ..agent::Seccomp::default()
    })
}

fn flags(profile: &spec::LinuxSeccomp) -> Result<u64, Error> {
    profile.flags().iter().flatten().try_fold(0, |bits, flag| {
        match FLAGS.iter().find(|(known, _)| known == flag) {
            Some((_, Some(bit))) => Ok(bits | bit),
            _ => Err(unsupported(
                format!("linux.seccomp.flags: {flag}"),
                "it is for notifications",
            )),
        }
    })
}

fn build(profile: &spec::LinuxSeccomp) -> Result<Vec<u8>, Error> {
    let failed = |error: SeccompError| Error::Seccomp(error.to_string());
    libseccomp::set_api(API_LEVEL).map_err(failed)?;
    let default = action(
        "linux.seccomp.defaultAction",
        profile.default_action(),
        profile.default_errno_ret(),
    )?;
    let mut filter = ScmpFilterContext::new(default).map_err(failed)?;
    let architectures = architectures(profile);
    for architecture in &architectures {
        filter.add_arch(*architecture).map_err(failed)?;
    }
    // A balanced tree instead of a list: Docker's profile has 400 calls. Level 2 is libseccomp's name for it.
    filter.set_ctl_optimize(2).map_err(failed)?;
    for (index, rules) in profile.syscalls().iter().flatten().enumerate() {
        let field = format!("linux.seccomp.syscalls[{index}]");
        let action = action(&field, rules.action(), rules.errno_ret())?;
        if action == default {
            continue;
        }
        let alternatives = conditions(&field, rules.args().as_deref().unwrap_or_default())?;
        for name in rules.names() {
            let Ok(call) = ScmpSyscall::from_name(name) else {
                continue;
            };
            for conditions in &alternatives {
                filter
                    .add_rule_conditional(action, call, conditions)
                    .map_err(|error| {
                        Error::Seccomp(format!("{name} of syscalls[{index}]: {error}"))
                    })?;
            }
        }
    }
    let program = export(&filter)?;
    Ok(unknown_calls::prepend(
        profile,
        default,
        &architectures,
        program,
    ))
}

/// By way of a memfd: libseccomp 2.5 cannot export to memory.
fn export(filter: &ScmpFilterContext) -> Result<Vec<u8>, Error> {
    let failed = |error: &dyn std::fmt::Display| Error::Seccomp(error.to_string());
    let fd = nix::sys::memfd::memfd_create(c"seccomp", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .map_err(|error| failed(&error))?;
    let mut file = File::from(fd);
    filter.export_bpf(&file).map_err(|error| failed(&error))?;
    let mut program = Vec::new();
    file.rewind()
        .and_then(|()| file.read_to_end(&mut program))
        .map_err(|error| failed(&error))?;
    Ok(program)
}

/// Those that the guest's processor can run; a program for another one never starts there. The native one is always in.
fn architectures(profile: &spec::LinuxSeccomp) -> Vec<ScmpArch> {
    let mut found = vec![ScmpArch::X8664];
    for architecture in profile.architectures().iter().flatten() {
        let known = ARCHITECTURES.iter().find(|(oci, _)| oci == architecture);
        if let Some((_, known)) = known
            && !found.contains(known)
        {
            found.push(*known);
        }
    }
    found
}

fn action(field: &str, action: Action, errno: Option<u32>) -> Result<ScmpAction, Error> {
    if errno.is_some() && !matches!(action, Action::ScmpActErrno | Action::ScmpActTrace) {
        return Err(invalid(
            field,
            format!("has an errnoRet, which {action} has no use for"),
        ));
    }
    // Absent: EPERM (OCI config-linux.md#seccomp). The kernel caps it at MAX_ERRNO.
    let errno = errno.unwrap_or(EPERM);
    let too_large = || {
        invalid(
            field,
            format!("has the errnoRet {errno}; at most 65535 is allowed"),
        )
    };
    let small = u16::try_from(errno).map_err(|_| too_large())?;
    match ACTIONS.iter().find(|(known, _)| *known == action) {
        Some((_, make)) => Ok(make(small)),
        None => Err(unsupported(
            format!("{field}: {action}"),
            "a notification's descriptor cannot leave the guest",
        )),
    }
}

/// The rule's conditions as a list of alternatives, each a conjunction.
fn conditions(
    field: &str,
    args: &[spec::LinuxSeccompArg],
) -> Result<Vec<Vec<ScmpArgCompare>>, Error> {
    let mut list = Vec::new();
    let mut seen = [0u32; 6];
    for arg in args {
        let count = seen.get_mut(arg.index()).ok_or_else(|| {
            invalid(
                field,
                format!("compares argument {}; 0 to 5 exist", arg.index()),
            )
        })?;
        *count += 1;
        list.push(compare(arg));
    }
    if seen.iter().any(|count| *count > 1) {
        return Ok(list.into_iter().map(|condition| vec![condition]).collect());
    }
    Ok(vec![list])
}

fn compare(arg: &spec::LinuxSeccompArg) -> ScmpArgCompare {
    let found = OPERATORS.iter().find(|(known, _)| *known == arg.op());
    let (_, make) = found.expect("all operators are listed");
    let (operator, value) = make(arg.value(), arg.value_two().unwrap_or(0));
    ScmpArgCompare::new(arg.index() as u32, operator, value)
}
