//! The steps, each written once. A role takes those that it needs, in its own order.
#![forbid(unsafe_code)]

use bulkhead_vmm_config::Layer;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use linux::capability::{self, Sets};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, chdir, getpid, pivot_root, setgroups, setresgid, setresuid};

use super::{JailError, step};

/// No core dump: what a guest has in memory is not for the host's disk. core(5): a limit of 0 does
/// not stop a dump that goes to a program; 1 stops both kinds.
pub const NO_CORE: (Resource, u64) = (Resource::RLIMIT_CORE, 1);

const NONE: Option<&str> = None;

/// What a root and what is mounted in it never needs.
pub const PLAIN: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// Goes on only as the shim starts a role: everywhere else the steps would change the host's own
/// mounts.
pub fn be_isolated() -> Result<(), JailError> {
    match getpid().as_raw() {
        1 => Ok(()),
        _ => Err(JailError::NotIsolated),
    }
}

/// Sets resource limits, soft and hard.
pub fn limit(limits: &[(Resource, u64)]) -> Result<(), JailError> {
    for &(resource, value) in limits {
        setrlimit(resource, value, value)
            .map_err(step(format!("set resource limit {resource:?}")))?;
    }
    Ok(())
}

/// Gives every mount this propagation: `MS_PRIVATE` cuts all ties, `MS_SLAVE` lets what the shim
/// mounts later still appear.
pub fn propagate(propagation: MsFlags) -> Result<(), JailError> {
    let flags = propagation | MsFlags::MS_REC;
    mount(NONE, "/", NONE, flags, NONE).map_err(step("change the propagation of mounts"))
}

/// Makes a tmpfs of at most `inodes` the root directory, read-only, and forgets every other mount.
/// `place` is a directory to mount it on; `fill` runs in it before the old root goes.
pub fn change_root(
    place: &str,
    inodes: u32,
    fill: impl FnOnce() -> Result<(), JailError>,
) -> Result<(), JailError> {
    let options = format!("mode=0555,size=4k,nr_inodes={inodes}");
    mount(Some("jail"), place, Some("tmpfs"), PLAIN, Some(&*options))
        .map_err(step("mount the root"))?;
    chdir(place).map_err(step("enter the root"))?;
    fill()?;
    // pivot_root(2), "pivot_root(".", ".")": the old root ends up on top of the new one, and goes.
    pivot_root(".", ".").map_err(step("change the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("detach the old root"))?;
    chdir("/").map_err(step("enter the new root"))?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | PLAIN;
    mount(NONE, "/", NONE, read_only, NONE).map_err(step("make the root read-only"))
}

/// Takes from the bounding set what `kept` does not have: no execve gives it back.
pub fn limit_bounding_set(kept: u64) -> Result<(), JailError> {
    capability::limit_bounding(kept).map_err(|(capability, errno)| {
        step(format!("drop capability {capability} for good"))(errno)
    })
}

/// Adds securebits (capabilities(7)) to those that are set.
pub fn add_secure_bits(bits: u32) -> Result<(), JailError> {
    capability::secure_bits()
        .and_then(|set| capability::set_secure_bits(set | bits))
        .map_err(step("set securebits"))
}

/// Changes user and group for good, and leaves every supplementary group.
pub fn become_user(uid: u32, gid: u32) -> Result<(), JailError> {
    setgroups(&[]).map_err(step("drop supplementary groups"))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid).map_err(step("change the group"))?;
    setresuid(uid, uid, uid).map_err(step("change the user"))
}

/// Keeps these capabilities, permitted and effective, and none inheritable.
pub fn keep_capabilities(kept: u64) -> Result<(), JailError> {
    let sets = Sets {
        effective: kept,
        permitted: kept,
        inheritable: 0,
    };
    capability::set(sets).map_err(step("drop capabilities"))
}

/// No execve gives privileges any more.
pub fn no_new_privileges() -> Result<(), JailError> {
    prctl::set_no_new_privs().map_err(step("set no_new_privs"))
}

/// The newest version of Landlock's interface of which we know what it restricts; a kernel with an
/// older one restricts less.
const LANDLOCK: ABI = ABI::V6;
/// The first version that can let files move between directories (Linux 5.19): one without it would
/// refuse that to every guest.
const OLDEST_LANDLOCK: u32 = 2;

/// All rights over files that Landlock may take.
pub fn every_right() -> BitFlags<AccessFs> {
    AccessFs::from_all(LANDLOCK)
}

/// Landlock: of all files those beneath `granted`, with these rights; whatever else a descriptor, a
/// mount or a handle leads to does not open. As far as the kernel has it no TCP, no abstract socket
/// and no signal to whoever is not restricted by the same call. Threads that are started later are;
/// before, there must be one. The version of the interface that the kernel has; none where it has
/// none, and `accepted` says that this will do.
pub fn landlock(
    accepted: &[Layer],
    granted: &[(&str, BitFlags<AccessFs>)],
) -> Result<Option<u32>, JailError> {
    let found = offered(linux::landlock::abi(), accepted)?;
    if found.is_some() {
        restrict(granted)?;
    }
    Ok(found)
}

fn restrict(granted: &[(&str, BitFlags<AccessFs>)]) -> Result<(), JailError> {
    const STEP: &str = "restrict by Landlock";
    let refused = |error: RulesetError| step(STEP)(std::io::Error::other(error));
    let mut ruleset = Ruleset::default()
        .handle_access(every_right())
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(LANDLOCK)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(LANDLOCK)))
        .and_then(Ruleset::create)
        .map_err(refused)?;
    for (path, rights) in granted {
        let place = PathFd::new(path)
            .map_err(|error| step(format!("open {path}"))(std::io::Error::other(error)))?;
        let rule = PathBeneath::new(place, *rights);
        ruleset = ruleset.add_rule(rule).map_err(refused)?;
    }
    match ruleset.restrict_self().map_err(refused)?.ruleset {
        // The crate takes a kernel that refuses the whole for one that has less.
        RulesetStatus::NotEnforced => Err(step(STEP)(Errno::EOPNOTSUPP)),
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
    }
}

/// What a kernel's answer means.
fn offered(answer: nix::Result<u32>, accepted: &[Layer]) -> Result<Option<u32>, JailError> {
    let found = match answer {
        Ok(abi) if abi >= OLDEST_LANDLOCK => return Ok(Some(abi)),
        _ if accepted.contains(&Layer::Landlock) => return Ok(None),
        Ok(abi) => format!("offers version {abi} only, {OLDEST_LANDLOCK} is needed"),
        Err(Errno::EOPNOTSUPP) => "was booted without it".to_owned(),
        Err(Errno::ENOSYS) => "is built without it".to_owned(),
        Err(errno) => format!("refuses it ({errno})"),
    };
    Err(JailError::NoLandlock(found))
}

/// No debugger of the same user attaches, and nothing is dumped. Each change of ids may undo it.
pub fn forbid_attaching() -> Result<(), JailError> {
    prctl::set_dumpable(false).map_err(step("forbid dumps and attaching"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_landlock_is_named_unless_it_is_accepted() {
        assert_eq!(offered(Ok(7), &[]).unwrap(), Some(7));
        assert_eq!(offered(Ok(2), &[]).unwrap(), Some(2));
        for (answer, word) in [
            (Ok(1), "version 1"),
            (Err(Errno::ENOSYS), "built without"),
            (Err(Errno::EOPNOTSUPP), "booted without"),
            (Err(Errno::EPERM), "EPERM"),
        ] {
            let error = offered(answer, &[]).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
            assert_eq!(offered(answer, &[Layer::Landlock]).unwrap(), None);
        }
    }
}
