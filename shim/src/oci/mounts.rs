//! `mounts`: what is made in the guest, and what the host must put into the share for it.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::agent;
use oci_spec::runtime as spec;

use super::{
    Bundle, Error, GUEST_SHM, devices, host_interfaces, invalid,
    kubelet_path::is_kubelet_volume,
    options::{self, Idmap},
    pod_paths::PodPaths,
    unsupported,
};

/// A host file or directory that one of the container's mounts shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostBind {
    /// Index of that mount in the container's list; its source is set when the share has a place for it.
    pub mount: usize,
    /// Absolute host path; symbolic links are followed.
    pub source: PathBuf,
    /// Whether it is a directory (else a file or a socket).
    pub directory: bool,
    /// "rbind": with what is mounted beneath it.
    pub recursive: bool,
    /// "ro": the top mount is read-only on the host too.
    pub read_only: bool,
    /// "rro": the whole tree is.
    pub read_only_whole: bool,
    /// Whether later mounts of the host beneath the source appear.
    pub propagation: HostPropagation,
}

impl HostBind {
    /// Whether it is one of kubelet's that the guest keeps in its own memory, and not in the share.
    pub fn is_kubelet_volume(&self) -> bool {
        self.directory && is_kubelet_volume(&self.source)
    }
}

/// What a mount that the host makes beneath a bind source later does to the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostPropagation {
    /// Nothing.
    Private,
    /// It appears.
    Slave,
}

/// File systems that the guest's kernel makes by itself.
const GUEST_FILE_SYSTEMS: &[&str] = &[
    "proc",
    "sysfs",
    "tmpfs",
    "ramfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "hugetlbfs",
    "bpf",
    "binfmt_misc",
    "fusectl",
];

/// Converts all mounts. Those of host files have no source yet.
pub(super) fn convert(
    bundle: &Bundle,
    namespaces: &agent::Namespaces,
    pod: &PodPaths,
) -> Result<(Vec<agent::Mount>, Vec<HostBind>), Error> {
    let mut mounts = Vec::new();
    let mut binds = Vec::new();
    let listed = bundle.spec.mounts().as_deref().unwrap_or_default();
    for (index, mount) in listed.iter().enumerate() {
        let field = format!("mounts[{index}] ({})", mount.destination().display());
        let (mut converted, bind) = convert_one(bundle, namespaces, &field, mount, index)?;
        let is_shm = pod.shm.is_some() && *mount.source() == pod.shm;
        if is_shm && mount.destination() == Path::new("/dev/shm") {
            // The guest's own memory, which the containers of the pod map together.
            converted.source = GUEST_SHM.into();
        } else {
            binds.extend(bind);
        }
        mounts.push(converted);
    }
    Ok((mounts, binds))
}

fn convert_one(
    bundle: &Bundle,
    namespaces: &agent::Namespaces,
    field: &str,
    mount: &spec::Mount,
    index: usize,
) -> Result<(agent::Mount, Option<HostBind>), Error> {
    let words = mount.options().clone().unwrap_or_default();
    let mut options = options::parse(field, &words)?;
    let kind = mount.typ().as_deref().unwrap_or_default();
    let is_bind = options.flags & libc::MS_BIND != 0 || kind == "bind";
    if is_bind && !makes_mounts(&bundle.spec) {
        options.share_as_slave();
    }
    let mut converted = agent::Mount {
        destination: destination(mount.destination())?,
        flags: options.flags,
        clear_flags: options.clear_flags,
        propagation: options.propagation.clone(),
        recursive_attr_set: options.recursive_set,
        recursive_attr_clear: options.recursive_clear,
        data: options.data.join(","),
        copy_up: options.copy_up,
        ..agent::Mount::default()
    };
    idmap(field, mount, namespaces, &options, &mut converted)?;
    if is_bind {
        converted.flags |= libc::MS_BIND;
        if !options.data.is_empty() {
            let reason = format!("{:?} mean nothing for a bind mount", options.data);
            return Err(invalid(field, reason));
        }
        let bind = bind_source(bundle, field, mount, &options, index, &mut converted)?;
        return Ok((converted, bind));
    }
    if options.flags & libc::MS_REMOUNT == 0 && !GUEST_FILE_SYSTEMS.contains(&kind) {
        let reason = format!(
            "the guest has no file system {kind:?} to mount, or it would need a device of the host; mount it on the host and bind it"
        );
        return Err(unsupported(format!("{field}: type"), reason));
    }
    if options.copy_up && kind != "tmpfs" {
        return Err(invalid(field, "has tmpcopyup, which is for a tmpfs"));
    }
    converted.fstype = kind.to_string();
    let source = mount.source().as_deref().unwrap_or(Path::new(kind));
    converted.source = text(field, source)?;
    Ok((converted, None))
}

/// OCI: absolute; runc takes a relative one as from the root, and so do we.
fn destination(path: &Path) -> Result<String, Error> {
    let text = text("mounts[].destination", path)?;
    if text.is_empty() {
        return Err(invalid("mounts[].destination", "is empty"));
    }
    Ok(match text.starts_with('/') {
        true => text,
        false => format!("/{text}"),
    })
}

fn text(field: &str, path: &Path) -> Result<String, Error> {
    let text = path.to_str().filter(|text| !text.contains('\0'));
    text.map(String::from)
        .ok_or_else(|| invalid(field, "has a path that is not text"))
}

fn bind_source(
    bundle: &Bundle,
    field: &str,
    mount: &spec::Mount,
    options: &options::Options,
    index: usize,
    converted: &mut agent::Mount,
) -> Result<Option<HostBind>, Error> {
    let named = mount
        .source()
        .as_ref()
        .filter(|source| !source.as_os_str().is_empty())
        .ok_or_else(|| invalid(field, "is a bind mount without a source"))?;
    let source = bundle.directory.join(named);
    let read_error = |source_error| Error::Read {
        path: source.clone(),
        source: source_error,
    };
    // For a clear word now. What is opened later may be something else by then: the share looks again, at that.
    let found = fs::metadata(&source).map_err(read_error)?;
    if found.file_type().is_char_device() || found.file_type().is_block_device() {
        // /dev/null over a file is the usual way of masking it: the guest's own will do.
        let device = (
            nix::sys::stat::major(found.rdev()),
            nix::sys::stat::minor(found.rdev()),
        );
        let known = devices::guest_device(found.file_type().is_char_device(), device.0, device.1);
        converted.source = known
            .ok_or_else(|| unsupported(format!("{field}: source"), devices::HOST_DEVICE))?
            .to_string();
        return Ok(None);
    }
    let kind = host_interfaces::of_path(&source).map_err(read_error)?;
    if let Some(name) = kind {
        let reason = format!(
            "it is in the host's {name}, which would show the host; mount a {name} of the guest instead"
        );
        return Err(unsupported(
            format!("{field}: source {}", named.display()),
            reason,
        ));
    }
    Ok(Some(HostBind {
        mount: index,
        source,
        directory: found.is_dir(),
        recursive: options.flags & libc::MS_REC != 0,
        read_only: options.flags & libc::MS_RDONLY != 0,
        read_only_whole: options.recursive_set & 1 != 0,
        propagation: propagation(field, &options.propagation)?,
    }))
}

/// Whether the container may mount. One that may not, as a build's, has nothing to show to the host
/// through a shared mount; a mount namespace that it makes in a user namespace of its own has slaves.
fn makes_mounts(spec: &spec::Spec) -> bool {
    let process = spec.process().as_ref();
    let sets = process.and_then(|process| process.capabilities().as_ref());
    let bounding = sets.and_then(|sets| sets.bounding().as_ref());
    bounding.is_none_or(|set| set.contains(&spec::Capability::SysAdmin))
}

fn propagation(field: &str, asked: &[u64]) -> Result<HostPropagation, Error> {
    match asked.last().map(|flags| flags & !libc::MS_REC) {
        Some(libc::MS_SHARED) => Err(unsupported(
            format!("{field}: shared propagation"),
            "a mount made in the guest cannot appear on the host; use rslave or rprivate",
        )),
        Some(libc::MS_SLAVE) => Ok(HostPropagation::Slave),
        _ => Ok(HostPropagation::Private),
    }
}

/// "idmap" without mappings means those of the container's user namespace (OCI config.md#posix-platform-mounts).
fn idmap(
    field: &str,
    mount: &spec::Mount,
    namespaces: &agent::Namespaces,
    options: &options::Options,
    converted: &mut agent::Mount,
) -> Result<(), Error> {
    let listed = |list: &Option<Vec<spec::LinuxIdMapping>>| {
        super::namespaces::mappings(list.as_deref().unwrap_or_default())
    };
    let (uids, gids) = (listed(mount.uid_mappings()), listed(mount.gid_mappings()));
    if options.idmap.is_none() && uids.is_empty() && gids.is_empty() {
        return Ok(());
    }
    if uids.is_empty() != gids.is_empty() {
        return Err(invalid(
            field,
            "has only one of uidMappings and gidMappings",
        ));
    }
    (converted.uid_mappings, converted.gid_mappings) = match uids.is_empty() {
        true => (
            namespaces.uid_mappings.clone(),
            namespaces.gid_mappings.clone(),
        ),
        false => (uids, gids),
    };
    if converted.uid_mappings.is_empty() {
        return Err(invalid(
            field,
            "has idmap, but neither mappings nor a user namespace",
        ));
    }
    converted.idmap_recursive = options.idmap == Some(Idmap::Whole);
    Ok(())
}
