//! Who a process is: its session, ids, capabilities and seccomp filter, in the order that the kernel's rules dictate.
//!
//! Nothing here reads /proc: an exec process sees the /proc of a container, which may be shadowed.
#![forbid(unsafe_code)]

use std::io;

use bulkhead_agent_protocol::agent;
use linux::process::set_seccomp_filter;
use linux::{capability, thread};
use nix::sys::prctl;

use super::message::Failure;
use super::step::Step;

/// Makes the stage untouchable for processes of the container that could see it: no ptrace, no /proc/PID/exe or fd.
pub fn hide() -> Result<(), Failure> {
    prctl::set_dumpable(false).step(|| "cannot hide the stage from the container")
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
    if let Err((capability, errno)) = capability::limit_bounding(process.capabilities.bounding) {
        return Err(errno)
            .step(|| format!("cannot drop capability {capability} from the bounding set"));
    }
    prctl::set_keepcaps(true).step(|| "cannot keep capabilities over the change of user")?;
    thread::set_groups(&process.additional_gids).step(|| {
        format!(
            "cannot set the additional groups {:?}",
            process.additional_gids
        )
    })?;
    set_ids(process.uid, process.gid).step(|| {
        format!(
            "cannot become user {} and group {}: are they mapped?",
            process.uid, process.gid
        )
    })?;
    prctl::set_keepcaps(false).step(|| "cannot reset the keep-capabilities flag")
}

/// Group and user of the calling thread, of which a stage has only one.
pub fn set_ids(uid: u32, gid: u32) -> nix::Result<()> {
    thread::set_gids(Some(gid), Some(gid), Some(gid))?;
    thread::set_uids(Some(uid), Some(uid), Some(uid))
}

/// Takes the last privileges away: capabilities, no_new_privs and the seccomp filter.
///
/// Without no_new_privs, loading a filter needs CAP_SYS_ADMIN and comes first; with it, the filter comes last, so that it has to allow
/// nothing but execve.
pub fn finish(process: &agent::Process) -> Result<(), Failure> {
    if process.no_new_privileges {
        set_capabilities(&process.capabilities)?;
        prctl::set_no_new_privs().step(|| "cannot set no_new_privs")?;
        load_filter(process)
    } else {
        let current = capability::get().step(|| "cannot read the capabilities")?;
        let raised = capability::Sets {
            effective: current.permitted,
            ..current
        };
        capability::set(raised)
            .step(|| "cannot raise the capabilities to load the seccomp filter")?;
        load_filter(process)?;
        set_capabilities(&process.capabilities)
    }
}

/// Sets the four sets besides the bounding one.
fn set_capabilities(wanted: &agent::Capabilities) -> Result<(), Failure> {
    let current = capability::get().step(|| "cannot read the capabilities")?;
    // capset(2) refuses to add to the permitted set; asking for what the process never had (a bit that this kernel
    // does not know, or one that the agent itself lacks) gives what there is, as execve would.
    let permitted = wanted.permitted & current.permitted;
    let sets = capability::Sets {
        effective: wanted.effective & permitted,
        permitted,
        inheritable: wanted.inheritable,
    };
    capability::clear_ambient().step(|| "cannot clear the ambient set")?;
    capability::set(sets).step(|| format!("cannot set the capabilities {sets:x?}"))?;
    // capabilities(7): the ambient set never exceeds the permitted and inheritable ones.
    let ambient = wanted.ambient & permitted & wanted.inheritable;
    for capability in (0..=capability::LAST).filter(|c| ambient & (1 << c) != 0) {
        capability::raise_ambient(capability)
            .step(|| format!("cannot raise capability {capability} in the ambient set"))?;
    }
    Ok(())
}

fn load_filter(process: &agent::Process) -> Result<(), Failure> {
    let Some(seccomp) = process.seccomp.as_ref() else {
        return Ok(());
    };
    set_seccomp_filter(&seccomp.program, seccomp.flags).step(|| {
        format!(
            "cannot load the seccomp filter of {} bytes with flags {:#x}",
            seccomp.program.len(),
            seccomp.flags
        )
    })
}
