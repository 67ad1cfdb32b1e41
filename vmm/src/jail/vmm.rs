//! The jail of the process that runs a virtual machine: nothing of the host is left but open
//! descriptors.
#![cfg_attr(not(test), forbid(unsafe_code))] // the tests attack by raw system calls

use bulkhead_vmm_config::Layer;
use nix::mount::MsFlags;
use nix::sys::resource::Resource;

use super::user_namespace::UserNamespace;
use super::{JailError, steps};

/// Open files: vsock connections (1024), an eventfd a queue, two descriptors a vCPU.
const MAX_FILES: u64 = 4096;

/// No user gets capabilities by being 0 or by executing a file, and these rules are locked
/// (capabilities(7)).
const SECURE_BITS: u32 = 0x2f;

/// Any directory will do as the place to mount the root on; every Linux system has this one.
const PLACE: &str = "/proc";

/// Enters the jail as `uid` and `gid`, which are not 0. `file_limit` is the longest that a regular
/// file may become, `threads` how many threads and processes `uid` may have: no other process of
/// the host has it, so that these are ours. Returns what [`steps::landlock`] does.
///
/// # Errors
/// Any step's; the process is half jailed then and must end.
pub fn enter(
    (uid, gid): (u32, u32),
    file_limit: u64,
    threads: u64,
    accepted: &[Layer],
) -> Result<Option<u32>, JailError> {
    steps::be_isolated()?;
    steps::limit(&[
        (Resource::RLIMIT_NOFILE, MAX_FILES),
        steps::NO_CORE,
        (Resource::RLIMIT_FSIZE, file_limit),
    ])?;
    steps::propagate(MsFlags::MS_PRIVATE)?;
    let namespace = UserNamespace::prepare()?;
    steps::change_root(PLACE, 2, || Ok(()))?;
    namespace.enter(&format!("{uid} {uid} 1\n"), &format!("{gid} {gid} 1\n"))?;
    // Now: the namespace took a process more.
    steps::limit(&[(Resource::RLIMIT_NPROC, threads)])?;
    steps::limit_bounding_set(0)?;
    steps::add_secure_bits(SECURE_BITS)?;
    steps::become_user(uid, gid)?;
    // The change of user has dropped them; say it once more in the one call that cannot be misread.
    steps::keep_capabilities(0)?;
    steps::no_new_privileges()?;
    steps::forbid_attaching()?;
    steps::landlock(accepted, &[])
}

#[cfg(test)]
mod tests;
