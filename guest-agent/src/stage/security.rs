//! Who a process is: its session, ids, capabilities and seccomp filter, in the order that the kernel's rules dictate.
//!
//! Nothing here reads /proc: an exec process sees the /proc of a container, which may be shadowed.

use std::io;

use bulkhead_agent_protocol::agent;

use super::message::Failure;
use super::step::Step;
use crate::sys::{self, CapabilitySets};

/// Highest capability number that a 64-bit set can hold.
const LAST_CAPABILITY: u64 = 63;

/// Makes the stage untouchable for processes of the container that could see it: no ptrace, no /proc/PID/exe or fd.
pub fn hide() -> Result<(), Failure> {
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).step(|| "cannot hide the stage from the container")?;
    Ok(())
}

/// Makes the process the leader of a session of its own, so that it never shares the agent's.
pub fn new_session() -> Result<(), Failure> {
    nix::unistd::setsid()
        .map_err(io::Error::from)
        .step(|| "cannot make a session")?;
    Ok(())
}

/// Restricts the bounding set, then changes groups and ids. Permitted capabilities survive until [`finish`].
pub fn become_user(process: &agent::Process) -> Result<(), Failure> {
    let bounding = process.capabilities.bounding;
    for capability in 0..=LAST_CAPABILITY {
        match sys::prctl(libc::PR_CAPBSET_READ, capability, 0) {
            Ok(1) if bounding & (1 << capability) == 0 => {
                sys::prctl(libc::PR_CAPBSET_DROP, capability, 0).step(|| {
                    format!("cannot drop capability {capability} from the bounding set")
                })?;
            }
            Ok(_) => {}
            // EINVAL: the kernel knows no capability of this number, nor of a higher one.
            Err(_) => break,
        }
    }
    sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0)
        .step(|| "cannot keep capabilities over the change of user")?;
    sys::setgroups(&process.additional_gids).step(|| {
        format!(
            "cannot set the additional groups {:?}",
            process.additional_gids
        )
    })?;
    sys::set_ids(process.uid, process.gid).step(|| {
        format!(
            "cannot become user {} and group {}: are they mapped?",
            process.uid, process.gid
        )
    })?;
    sys::prctl(libc::PR_SET_KEEPCAPS, 0, 0).step(|| "cannot reset the keep-capabilities flag")?;
    Ok(())
}

/// Takes the last privileges away: capabilities, no_new_privs and the seccomp filter.
///
/// Without no_new_privs, loading a filter needs CAP_SYS_ADMIN and comes first; with it, the filter comes last, so that it has to allow
/// nothing but execve.
pub fn finish(process: &agent::Process) -> Result<(), Failure> {
    if process.no_new_privileges {
        set_capabilities(&process.capabilities)?;
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).step(|| "cannot set no_new_privs")?;
        load_filter(process)
    } else {
        let current = sys::capget().step(|| "cannot read the capabilities")?;
        let raised = CapabilitySets {
            effective: current.permitted,
            ..current
        };
        sys::capset(raised).step(|| "cannot raise the capabilities to load the seccomp filter")?;
        load_filter(process)?;
        set_capabilities(&process.capabilities)
    }
}

/// Sets the four sets besides the bounding one.
fn set_capabilities(wanted: &agent::Capabilities) -> Result<(), Failure> {
    let current = sys::capget().step(|| "cannot read the capabilities")?;
    // capset(2) refuses to add to the permitted set; asking for what the process never had (a bit that this kernel
    // does not know, or one that the agent itself lacks) gives what there is, as execve would.
    let permitted = wanted.permitted & current.permitted;
    let sets = CapabilitySets {
        effective: wanted.effective & permitted,
        permitted,
        inheritable: wanted.inheritable,
    };
    sys::prctl(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_CLEAR_ALL as u64,
        0,
    )
    .step(|| "cannot clear the ambient set")?;
    sys::capset(sets).step(|| format!("cannot set the capabilities {sets:x?}"))?;
    // capabilities(7): the ambient set never exceeds the permitted and inheritable ones.
    let ambient = wanted.ambient & permitted & wanted.inheritable;
    for capability in (0..=LAST_CAPABILITY).filter(|c| ambient & (1 << c) != 0) {
        sys::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_RAISE as u64,
            capability,
        )
        .step(|| format!("cannot raise capability {capability} in the ambient set"))?;
    }
    Ok(())
}

fn load_filter(process: &agent::Process) -> Result<(), Failure> {
    let Some(seccomp) = process.seccomp.as_ref() else {
        return Ok(());
    };
    sys::seccomp_set_filter(&seccomp.program, seccomp.flags).step(|| {
        format!(
            "cannot load the seccomp filter of {} bytes with flags {:#x}",
            seccomp.program.len(),
            seccomp.flags
        )
    })
}
