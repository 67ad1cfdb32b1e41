//! What only the agent's namespaces can open: roots, bind sources and device nodes, as descriptors.
//!
//! A container with a user namespace may neither walk to its own root (directories of the share belong to the agent)
//! nor make device nodes nor translate owners. So the agent does all of that before, on detached mounts that are
//! attached later, by the container's own init stage in the container's namespaces.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use bulkhead_agent_protocol::agent::{Container, Mount};
use nix::errno::Errno;
use nix::fcntl::{self, OFlag, OpenHow, ResolveFlag};
use nix::libc::{MS_BIND, MS_REC, MS_REMOUNT};
use nix::sys::stat::{self, SFlag};
use nix::sys::statvfs::{self, FsFlags};

use super::{MountError, flags};
use crate::idmap;
use crate::machine::SHARE;
use crate::stage::mounts::devices;
use linux::mount::{Depth, MountAttr, attr, mount_setattr, open_tree};

/// The sources of a container's mounts. Drop closes them; nothing stays mounted.
#[derive(Debug)]
pub struct Sources {
    pub(super) root: OwnedFd,
    /// A read-only mount of the null device for each masked path, which may turn out to be a file.
    pub(super) nulls: Vec<OwnedFd>,
    /// One for each bind mount of the spec, in its order.
    pub(super) binds: Vec<OwnedFd>,
    /// Device nodes, when the container's init stage cannot make them.
    pub(super) devices: Option<OwnedFd>,
}

impl Sources {
    /// Opens the sources. Runs in the agent's user namespace and in a mount namespace that has the sources: in the
    /// agent itself, or in the init stage before it enters a user namespace and before `prepare`.
    pub fn open(spec: &Container) -> Result<Self, MountError> {
        let root = open_guest_path(&spec.root)
            .and_then(|fd| open_tree(fd.as_fd(), c"", Depth::Whole))
            .map_err(|errno| MountError::root(&spec.root, "open", errno))?;
        if is_of_the_share(&spec.root) {
            let change = flags::after(spec.root_attributes, MountAttr::default());
            mount_setattr(root.as_fd(), Depth::Top, change)
                .map_err(|errno| MountError::root(&spec.root, "change of mount flags", errno))?;
        }
        let null = null_device().map_err(|errno| MountError::path("/dev/null", "open", errno))?;
        let nulls = spec
            .masked_paths
            .iter()
            .map(|path| null_mount(&null).map_err(|e| MountError::path(path, "mask", e)))
            .collect::<Result<_, _>>()?;
        let binds = spec
            .mounts
            .iter()
            .filter(|mount| is_bind(mount))
            .map(open_bind)
            .collect::<Result<_, _>>()?;
        let devices = match uses_user_namespace(spec) {
            true => Some(devices::store(spec)?),
            false => None,
        };
        Ok(Self {
            root,
            nulls,
            binds,
            devices,
        })
    }

    /// The descriptors in a fixed order, to be passed to the process that calls `prepare`.
    pub fn into_fds(self) -> Vec<OwnedFd> {
        let mut fds = vec![self.root];
        fds.extend(self.nulls);
        fds.extend(self.binds);
        fds.extend(self.devices);
        fds
    }

    /// The other end of `into_fds`, with the same spec.
    pub fn from_fds(spec: &Container, fds: Vec<OwnedFd>) -> Result<Self, MountError> {
        let nulls = spec.masked_paths.len();
        let binds = spec.mounts.iter().filter(|mount| is_bind(mount)).count();
        let devices = usize::from(uses_user_namespace(spec));
        let (got, want) = (fds.len(), 1 + nulls + binds + devices);
        let mut fds = fds.into_iter();
        match fds.next() {
            Some(root) if got == want => Ok(Self {
                root,
                nulls: fds.by_ref().take(nulls).collect(),
                binds: fds.by_ref().take(binds).collect(),
                devices: fds.next(),
            }),
            _ => Err(MountError::Sources { got, want }),
        }
    }
}

/// Whether `mount` is a bind mount.
pub(crate) fn is_bind(mount: &Mount) -> bool {
    mount.fstype == "bind"
        || mount.flags & MS_BIND != 0
        || (mount.fstype.is_empty() && mount.flags & MS_REMOUNT == 0)
}

/// Whether a guest path leads to something of the host.
pub(crate) fn is_of_the_share(path: &str) -> bool {
    Path::new(path).starts_with(SHARE)
}

pub(super) fn uses_user_namespace(spec: &Container) -> bool {
    use bulkhead_agent_protocol::agent::namespaces::Kind;
    spec.namespaces.user.enum_value_or_default() != Kind::AGENT
}

/// A guest path that the shim wrote. Links are refused: in a volume they are the tenant's, and would be followed with
/// the agent's rights.
pub(crate) fn open_guest_path(path: &str) -> Result<OwnedFd, Errno> {
    let open = |kind| {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | kind)
            .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        fcntl::openat2(fcntl::AT_FDCWD, Path::new(path), how)
    };
    // O_PATH alone does not mount what mounts itself when gone to, as the directories of the share do (follow_automount() of
    // the kernel's fs/namei.c): each container would go there later and get a file system of its own.
    match open(OFlag::O_DIRECTORY) {
        Err(Errno::ENOTDIR) => open(OFlag::empty()),
        other => other,
    }
}

/// A device node is named by its number: whoever could exchange /dev/null must not have a file of his bound over a
/// masked path.
fn null_device() -> Result<OwnedFd, Errno> {
    let fd = open_guest_path("/dev/null")?;
    let status = stat::fstat(&fd)?;
    let is_null = status.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFCHR.bits()
        && status.st_rdev == stat::makedev(1, 3);
    if is_null { Ok(fd) } else { Err(Errno::ENODEV) }
}

fn null_mount(null: &OwnedFd) -> Result<OwnedFd, Errno> {
    let mount = open_tree(null.as_fd(), c"", Depth::Top)?;
    // Read-only: the container's root could otherwise change the mode of the agent's own /dev/null.
    let change = MountAttr {
        set: attr::RDONLY | attr::NOSUID | attr::NOEXEC,
        ..MountAttr::default()
    };
    mount_setattr(mount.as_fd(), Depth::Top, change)?;
    Ok(mount)
}

fn open_bind(mount: &Mount) -> Result<OwnedFd, MountError> {
    let fail = |action: &str, errno: Errno| {
        let detail = match errno {
            Errno::ELOOP => " (a bind source must not lead through a symbolic link)",
            _ => "",
        };
        MountError::Mount {
            destination: mount.destination.clone(),
            what: format!("bind of {}", mount.source),
            action: action.to_owned(),
            errno,
            detail: detail.to_owned(),
        }
    };
    let source = open_guest_path(&mount.source).map_err(|e| fail("open of the source", e))?;
    let recursive = mount.flags & MS_REC != 0;
    let tree = open_tree(source.as_fd(), c"", Depth::of(recursive))
        .map_err(|e| fail("copy of the source's mount", e))?;
    let change = match is_of_the_share(&mount.source) {
        // The guest's own mount of it has no flags: those of the host's count.
        true => {
            let inherited = flags::inherited(mount.source_attributes, mount.flags);
            let now = inherited & attr::ATIME;
            let change = flags::attributes(mount.flags, mount.clear_flags, now);
            flags::after(inherited, change)
        }
        false => {
            let now = access_time_mode(&tree).map_err(|e| fail("fstatvfs", e))?;
            flags::attributes(mount.flags, mount.clear_flags, now)
        }
    };
    mount_setattr(tree.as_fd(), Depth::Top, change)
        .map_err(|e| fail("change of mount flags", e))?;
    recursive_attributes(mount, &tree).map_err(|e| fail("change of recursive mount flags", e))?;
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        let userns =
            idmap::user_namespace(&mount.uid_mappings, &mount.gid_mappings).map_err(|source| {
                MountError::IdMap {
                    destination: mount.destination.clone(),
                    source,
                }
            })?;
        translate_owners(&tree, &userns, mount.idmap_recursive)
            .map_err(|e| fail("id mapping of the mount", e))?;
    }
    Ok(tree)
}

/// Applies the recursive attributes of `mount` to the tree at `fd`.
pub(super) fn recursive_attributes(mount: &Mount, fd: &OwnedFd) -> Result<(), Errno> {
    let (set, mut clear) = (mount.recursive_attr_set, mount.recursive_attr_clear);
    if set == 0 && clear == 0 {
        return Ok(());
    }
    if set & attr::IDMAP != 0 {
        return Err(Errno::EINVAL);
    }
    if set & attr::ATIME != 0 {
        clear |= attr::ATIME;
    }
    let change = MountAttr {
        set,
        clear,
        ..MountAttr::default()
    };
    mount_setattr(fd.as_fd(), Depth::Whole, change)
}

fn translate_owners(tree: &OwnedFd, userns: &OwnedFd, recursive: bool) -> Result<(), Errno> {
    use std::os::fd::AsRawFd;
    let change = MountAttr {
        set: attr::IDMAP,
        userns_fd: u64::try_from(userns.as_raw_fd()).map_err(|_| Errno::EBADF)?,
        ..MountAttr::default()
    };
    mount_setattr(tree.as_fd(), Depth::of(recursive), change)
}

/// The access time mode of the mount that `fd` is on, as `attr` has it.
pub(super) fn access_time_mode(fd: &OwnedFd) -> Result<u64, Errno> {
    let flags = statvfs::fstatvfs(fd)?.flags();
    Ok(if flags.contains(FsFlags::ST_NOATIME) {
        attr::NOATIME
    } else if flags.contains(FsFlags::ST_RELATIME) {
        attr::RELATIME
    } else {
        attr::STRICTATIME
    })
}
