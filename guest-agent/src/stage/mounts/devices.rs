//! Device nodes and the usual links of /dev.
//!
//! The init stage makes the nodes where it may. In a user namespace nobody may, so there the agent makes them
//! beforehand in a tmpfs of their own, with owners translated, and each is bound to its place.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use bulkhead_agent_protocol::agent::device::Kind;
use bulkhead_agent_protocol::agent::{Container, Device, Mount};
use linux::mount::{Depth, move_mount, open_tree};
use nix::errno::Errno;
use nix::fcntl::{self, AtFlags, OFlag};
use nix::libc::{MS_NOEXEC, MS_NOSUID};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{self, FchmodatFlags, FileStat, Mode, SFlag};
use nix::unistd::{self, Gid, Uid, UnlinkatFlags};

use super::{MountError, filesystem, is_bind};
use crate::idmap;
use crate::stage::paths;
use crate::stage::paths::RootDir;

/// OCI config-linux.md#default-devices, without those that are links (ptmx) or the terminal (console).
const DEFAULT_NODES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Links, and whether one replaces what the image has there: a ptmx node of the image would open the terminals of the
/// kernel's initial devpts instance.
const LINKS: [(&str, &str, bool); 6] = [
    ("/dev/ptmx", "pts/ptmx", true),
    ("/dev/fd", "/proc/self/fd", false),
    ("/dev/stdin", "/proc/self/fd/0", false),
    ("/dev/stdout", "/proc/self/fd/1", false),
    ("/dev/stderr", "/proc/self/fd/2", false),
    ("/dev/core", "/proc/kcore", false),
];

/// Whether the agent fills /dev. When the spec binds a directory there, that directory is the user's to fill.
pub(crate) fn wanted(spec: &Container) -> bool {
    !spec.mounts.iter().any(|mount| {
        let parts: Vec<&str> = mount
            .destination
            .split('/')
            .filter(|part| !part.is_empty() && *part != ".")
            .collect();
        parts == ["dev"] && is_bind(mount)
    })
}

/// The spec's devices, and the default ones it does not list itself.
fn nodes(spec: &Container) -> Vec<Device> {
    let mut nodes: Vec<Device> = DEFAULT_NODES
        .iter()
        .filter(|(path, ..)| spec.devices.iter().all(|device| device.path != *path))
        .map(|&(path, major, minor)| Device {
            path: path.to_owned(),
            kind: Kind::CHAR.into(),
            major,
            minor,
            mode: 0o666,
            ..Device::default()
        })
        .collect();
    nodes.extend(spec.devices.iter().cloned());
    nodes
}

fn node_type(device: &Device) -> Result<SFlag, Errno> {
    match device.kind.enum_value() {
        Ok(Kind::CHAR) => Ok(SFlag::S_IFCHR),
        Ok(Kind::BLOCK) => Ok(SFlag::S_IFBLK),
        Ok(Kind::FIFO) => Ok(SFlag::S_IFIFO),
        Err(_) => Err(Errno::EINVAL),
    }
}

fn number(device: &Device, kind: SFlag) -> u64 {
    match kind {
        SFlag::S_IFIFO => 0,
        _ => stat::makedev(device.major.into(), device.minor.into()),
    }
}

/// A detached tmpfs with a node for each device, named by its place in the list. Made by the agent, who may.
pub(crate) fn store(spec: &Container) -> Result<OwnedFd, MountError> {
    let tmpfs = Mount {
        fstype: "tmpfs".to_owned(),
        source: "devices".to_owned(),
        flags: MS_NOSUID | MS_NOEXEC,
        ..Mount::default()
    };
    let store = filesystem::create(&tmpfs, Some(0o755), true)
        .map_err(|e| MountError::path("/dev", "creation of a tmpfs for device nodes", e.errno))?;
    for (index, device) in nodes(spec).iter().enumerate() {
        let mut device = device.clone();
        let namespaces = spec.namespaces.get_or_default();
        // Without a user namespace there are no mappings, and ids are what they are.
        let mapped = !namespaces.uid_mappings.is_empty();
        let translate = |mappings, id, what| match mapped {
            false => Ok(id),
            true => idmap::outside(mappings, id)
                .ok_or_else(|| MountError::path(&device.path, what, Errno::EINVAL)),
        };
        let uid = translate(&namespaces.uid_mappings, device.uid, "mapping its uid")?;
        let gid = translate(&namespaces.gid_mappings, device.gid, "mapping its gid")?;
        (device.uid, device.gid) = (uid, gid);
        make_node(&store, OsStr::new(&index.to_string()), &device)
            .map_err(|errno| MountError::path(&device.path, "mknod", errno))?;
    }
    Ok(store)
}

/// Makes the nodes and links of /dev in `root`; `store` has them when the caller may not make any.
pub(crate) fn make(
    root: &RootDir,
    spec: &Container,
    store: Option<OwnedFd>,
) -> Result<(), MountError> {
    let nodes = nodes(spec);
    match store {
        Some(store) => bind_nodes(root, &nodes, &store)?,
        None => make_nodes(root, spec, &nodes)?,
    }
    LINKS
        .iter()
        .try_for_each(|&(path, target, replace)| make_link(root, path, target, replace))
}

fn make_nodes(root: &RootDir, spec: &Container, nodes: &[Device]) -> Result<(), MountError> {
    for device in nodes {
        let (parent, name) = root
            .parent(Path::new(&device.path))
            .map_err(|e| MountError::path(&device.path, "creation of its directory", e))?;
        match make_node(&parent, &name, device) {
            Ok(()) => {}
            // The root's file system takes no device nodes (a share served without CAP_MKNOD), or it is read-only on the host and has
            // files to mount them on: bind them all.
            Err(Errno::EPERM | Errno::EROFS) => return bind_nodes(root, nodes, &store(spec)?),
            Err(errno) => return Err(MountError::path(&device.path, "mknod", errno)),
        }
    }
    Ok(())
}

fn make_node(parent: &OwnedFd, name: &OsStr, device: &Device) -> Result<(), Errno> {
    let kind = node_type(device)?;
    let mode = Mode::from_bits_truncate(device.mode & 0o7777);
    let is_it = |status: &FileStat| {
        status.st_mode & SFlag::S_IFMT.bits() == kind.bits()
            && (kind == SFlag::S_IFIFO || status.st_rdev == number(device, kind))
    };
    match stat::mknodat(parent, name, kind, mode, number(device, kind)) {
        Ok(()) => {}
        Err(Errno::EEXIST) => {
            let status = stat::fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            if !is_it(&status) {
                // Whatever else the image has there must not pass for the device.
                unistd::unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)?;
                stat::mknodat(parent, name, kind, mode, number(device, kind))?;
            }
        }
        Err(errno) => return Err(errno),
    }
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let node = fcntl::openat(parent, name, flags, Mode::empty())?;
    let status = stat::fstat(&node)?;
    if !is_it(&status) {
        return Err(Errno::EEXIST);
    }
    let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    if (status.st_uid, status.st_gid) != (device.uid, device.gid) {
        unistd::fchownat(&node, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?;
    }
    // mknod's mode passed the umask.
    if status.st_mode & 0o7777 != mode.bits() {
        let path = paths::proc_path(&node);
        stat::fchmodat(fcntl::AT_FDCWD, &path, mode, FchmodatFlags::FollowSymlink)?;
    }
    Ok(())
}

fn bind_nodes(root: &RootDir, nodes: &[Device], store: &OwnedFd) -> Result<(), MountError> {
    let fail = |action| move |errno| MountError::path("/dev", action, errno);
    // A mount can be copied only while it is attached somewhere in this namespace: over the root for a moment.
    move_mount(store.as_fd(), root.as_fd()).map_err(fail("attaching device nodes"))?;
    let copies: Result<Vec<OwnedFd>, Errno> = (0..nodes.len())
        .map(|index| {
            let name = CString::new(index.to_string()).map_err(|_| Errno::EINVAL)?;
            open_tree(store.as_fd(), &name, Depth::Top)
        })
        .collect();
    umount2(&paths::proc_path(store), MntFlags::MNT_DETACH)
        .map_err(fail("detaching device nodes"))?;
    let copies = copies.map_err(fail("copying device nodes"))?;
    for (device, copy) in nodes.iter().zip(copies) {
        let fail = |action| move |errno| MountError::path(&device.path, action, errno);
        let (parent, name) = root
            .parent(Path::new(&device.path))
            .map_err(fail("creation of its directory"))?;
        let target = mount_point(&parent, &name).map_err(fail("creation of its mount point"))?;
        move_mount(copy.as_fd(), target.as_fd()).map_err(fail("bind"))?;
    }
    Ok(())
}

/// A file at `name` itself to mount a node on: a link that the image has there is not followed.
fn mount_point(parent: &OwnedFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    match stat::mknodat(
        parent,
        name,
        SFlag::S_IFREG,
        Mode::from_bits_truncate(0o644),
        0,
    ) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(errno),
    }
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let open = || fcntl::openat(parent, name, flags, Mode::empty());
    let found = open()?;
    match paths::kind(&found)? {
        SFlag::S_IFDIR => Err(Errno::EISDIR),
        SFlag::S_IFLNK => {
            unistd::unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)?;
            stat::mknodat(
                parent,
                name,
                SFlag::S_IFREG,
                Mode::from_bits_truncate(0o644),
                0,
            )?;
            open()
        }
        _ => Ok(found),
    }
}

fn make_link(root: &RootDir, path: &str, target: &str, replace: bool) -> Result<(), MountError> {
    let fail = |action| move |errno| MountError::path(path, action, errno);
    if path == "/dev/core" && root.resolve(Path::new(target)).is_err() {
        return Ok(());
    }
    let (parent, name) = root
        .parent(Path::new(path))
        .map_err(fail("creation of its directory"))?;
    match unistd::symlinkat(target, &parent, name.as_os_str()) {
        Ok(()) => return Ok(()),
        Err(Errno::EEXIST) if !replace => return Ok(()),
        Err(Errno::EEXIST) => {}
        Err(errno) => return Err(fail("symlink")(errno)),
    }
    let found = fcntl::readlinkat(&parent, name.as_os_str());
    if found.is_ok_and(|found| found == target) {
        return Ok(());
    }
    unistd::unlinkat(&parent, name.as_os_str(), UnlinkatFlags::NoRemoveDir)
        .map_err(fail("removal of the image's own"))?;
    unistd::symlinkat(target, &parent, name.as_os_str()).map_err(fail("symlink"))
}

#[cfg(test)]
mod tests;
