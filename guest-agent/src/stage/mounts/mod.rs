//! The file system that a container sees.
//!
//! ```text
//!  agent, or init stage before a user namespace     Sources::open      roots, bind sources, devices as descriptors
//!  init stage, in all of the container's namespaces
//!      prepare(spec, sources)     -> Prepared        root attached, mounts, devices, links
//!      Prepared::enter_root()     -> Entered         pivot_root; the agent's root is gone; cwd is /
//!      Entered::bind_console(pty)                    the terminal at /dev/console
//!      (sysctls are written here: /proc/sys is still writable)
//!      Entered::seal(spec)                           read-only mounts and root, masked and read-only paths
//! ```
//!
//! The init stage must be single-threaded, in a mount namespace of its own, with CAP_SYS_ADMIN in the user namespace
//! that owns it, with the agent's /proc still mounted. A failure leaves nothing behind but that namespace.
//! Everything inside the root is reached by descriptors (see `paths`), because the image controls the names.
#![cfg_attr(not(test), forbid(unsafe_code))] // the tests fork

mod attach;
mod copy_up;
pub(super) mod devices;
mod error;
pub(crate) mod filesystem;
mod flags;
mod seal;
mod sources;
mod submounts;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use bulkhead_agent_protocol::agent::Container;
use nix::errno::Errno;
use nix::libc::{MS_PRIVATE, MS_SHARED};
use nix::mount::{MntFlags, umount2};
use nix::unistd;

pub use error::MountError;
pub use sources::Sources;
pub(crate) use sources::{is_bind, is_of_the_share, open_guest_path};
pub(crate) use submounts::enter as enter_submount;

use super::paths::{Missing, RootDir};
use linux::mount::{Depth, MountAttr, mount_setattr, move_mount, open_tree};

/// Where the container's root is attached until pivot_root: a directory that every guest and host has, and that any
/// user namespace can walk to. Mounting there hides it from the container's mount namespace only.
const STAGING: &str = "/run";

/// A mount of the spec in its place.
#[derive(Debug)]
struct Attached {
    destination: String,
    mount: OwnedFd,
    propagation: Vec<u64>,
    /// Made writable first, because mount points or contents had to be made in it.
    readonly_later: bool,
}

/// A complete root that is not yet "/".
#[derive(Debug)]
pub struct Prepared {
    name: String,
    root: RootDir,
    attached: Vec<Attached>,
    nulls: Vec<OwnedFd>,
    root_propagation: u64,
}

/// The container's root is "/", and still writable.
#[derive(Debug)]
pub struct Entered(Prepared);

/// Builds the container's file system in the calling process' mount namespace.
pub fn prepare(spec: &Container, sources: Sources) -> Result<Prepared, MountError> {
    let fail = |action, errno| MountError::root(&spec.root, action, errno);
    let staging = RootDir::open(Path::new(STAGING)).map_err(|e| fail("open of /run", e))?;
    isolate().map_err(|e| fail("making the mount namespace private", e))?;
    move_mount(sources.root.as_fd(), staging.as_fd()).map_err(|e| fail("attaching", e))?;
    set_propagation(sources.root.as_fd(), MS_PRIVATE, true)
        .map_err(|e| fail("making the root private", e))?;
    let root = RootDir::from_fd(sources.root);
    let mut binds = sources.binds.into_iter();
    let mut attached = Vec::with_capacity(spec.mounts.len());
    for mount in &spec.mounts {
        let bind = match sources::is_bind(mount) {
            true => binds.next(),
            false => None,
        };
        attached.extend(attach::attach(&root, mount, bind, spec.root_propagation)?);
    }
    if devices::wanted(spec) {
        devices::make(&root, spec, sources.devices)?;
    }
    Ok(Prepared {
        name: spec.root.clone(),
        root,
        attached,
        nulls: sources.nulls,
        root_propagation: spec.root_propagation,
    })
}

impl Prepared {
    /// Makes the container's root "/" and detaches the agent's, with everything mounted in it.
    pub fn enter_root(self) -> Result<Entered, MountError> {
        let fail = |action, errno| MountError::root(&self.name, action, errno);
        unistd::fchdir(&self.root).map_err(|e| fail("chdir", e))?;
        // pivot_root(2), "pivot_root(".", ".")": the old root ends up on top of the new one, and is detached there.
        // Nothing in the image is needed or touched.
        unistd::pivot_root(".", ".").map_err(|e| fail("pivot_root", e))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(|e| fail("detaching the agent's root", e))?;
        unistd::chdir("/").map_err(|e| fail("chdir to /", e))?;
        self.apply_root_propagation()?;
        Ok(Entered(self))
    }

    /// pivot_root wants a private root, so the asked-for propagation comes after it. When it is recursive, it also
    /// changes the spec's mounts: those with a wish of their own get theirs again.
    fn apply_root_propagation(&self) -> Result<(), MountError> {
        let Some((kind, recursive)) = flags::propagation(self.root_propagation) else {
            return match self.root_propagation & flags::PROPAGATION {
                0 => Ok(()),
                _ => Err(MountError::root(
                    &self.name,
                    "setting more than one root propagation",
                    Errno::EINVAL,
                )),
            };
        };
        if kind == MS_PRIVATE {
            return Ok(());
        }
        set_propagation(self.root.as_fd(), kind, recursive)
            .map_err(|e| MountError::root(&self.name, "setting the root propagation", e))?;
        if recursive {
            for mount in &self.attached {
                attach::propagate(&mount.destination, &mount.mount, &mount.propagation)?;
            }
        }
        Ok(())
    }
}

impl Entered {
    /// Binds the terminal `pty` (a pseudo-terminal's slave in the container's devpts) to /dev/console.
    pub fn bind_console(&self, pty: BorrowedFd) -> Result<(), MountError> {
        const CONSOLE: &str = "/dev/console";
        let fail = |action| move |errno| MountError::path(CONSOLE, action, errno);
        let target = self
            .0
            .root
            .resolve_or_create(Path::new(CONSOLE), Missing::File)
            .map_err(fail("creation of the mount point"))?;
        let mount =
            open_tree(pty, c"", Depth::Top).map_err(fail("copy of the terminal's mount"))?;
        move_mount(mount.as_fd(), target.as_fd()).map_err(fail("bind of the terminal"))
    }

    /// The container's root directory.
    pub fn root(&self) -> &RootDir {
        &self.0.root
    }

    /// Makes read-only what the spec wants read-only and hides the masked paths. The last step.
    pub fn seal(self, spec: &Container) -> Result<(), MountError> {
        seal::seal(self.0, spec)
    }
}

/// Nothing that happens in this mount namespace reaches another one.
fn isolate() -> Result<(), Errno> {
    use nix::mount::{MsFlags, mount};
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
}

fn set_propagation(mount: BorrowedFd, kind: u64, recursive: bool) -> Result<(), Errno> {
    let change = MountAttr {
        propagation: kind,
        ..MountAttr::default()
    };
    mount_setattr(mount, Depth::of(recursive), change)
}

/// Whether a root with this propagation passes mount events on to the mounts' sources.
fn is_shared(root_propagation: u64) -> bool {
    root_propagation & MS_SHARED != 0
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
