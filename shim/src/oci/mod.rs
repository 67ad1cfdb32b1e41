//! config.json → what the agent is told. Everything that cannot be honoured is refused here, by its name in config.json.
//!
//! Unknown fields are tolerated (OCI spec.md, "Extensibility"). Paths of the host never reach the agent: the root and the
//! sources of bind mounts are placed in the share (`rootfs.rs`), and the agent is told where in the guest they are.
#![forbid(unsafe_code)]

pub mod asked;
pub mod cri;
mod devices;
mod features;
#[cfg(test)]
mod fuzz;
mod hooks;
pub mod host_interfaces;
pub mod host_limits;
mod kubelet_path;
pub mod limits;
mod mount_points;
mod mounts;
mod namespaces;
mod numbers;
mod options;
mod pod;
mod pod_files;
mod pod_paths;
#[cfg(test)]
mod pod_tests;
mod podman;
mod process;
mod resources;
mod seccomp;
#[cfg(test)]
mod tests;
mod view;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::agent;
use oci_spec::runtime as spec;

use self::resources::Moment;
use crate::audit::Event;

pub use features::features;
pub use hooks::{HostHook, HostHooks};
pub use mount_points::{MountPoint, PointKind};
pub use mounts::{HostBind, HostPropagation};
pub(crate) use pod::HOST_NAMESPACES;
pub use pod::{GROUP, LATER_INTERFACES, PodPlan, Role, check_sandbox, pod_plan, role};
pub use pod_files::PodFiles;
pub use pod_paths::PodPaths;
pub use podman::is_podmans;
pub use view::{Seen, view};

/// The newest OCI runtime-spec whose configuration is converted or refused by name.
pub const NEWEST_SPEC: &str = "1.3.0";

/// Where the agent mounts the share.
pub const GUEST_SHARE: &str = "/run/bulkhead/share";

/// Where the agent mounts the memory that the containers of a pod share.
pub const GUEST_SHM: &str = "/run/bulkhead/shm";

/// Where the agent mounts volumes of its own memory.
pub const GUEST_VOLUMES: &str = "/run/bulkhead/volumes";

/// Largest config.json, in bytes: a typical one has 10 to 100 KiB, and the agent takes messages of 4 MiB.
const MAX_CONFIG: u64 = 4 << 20;

/// Why a bundle cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the bundle cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not JSON, or not of the OCI shape.
    #[error("{path} is not a valid OCI configuration: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A value that OCI forbids, or that contradicts another one.
    #[error("config.json: {field} {reason}")]
    Invalid {
        /// Its name in config.json.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// Something that we cannot do for a container in a microVM.
    #[error("config.json: {field} is not supported: {reason}")]
    Unsupported {
        /// Its name in config.json.
        field: String,
        /// Why, and what to do instead.
        reason: String,
    },
    /// The same, by the flag of the engine that has asked for it.
    #[error("{name} is not supported: {reason}")]
    Flag {
        /// Its name.
        name: &'static str,
        /// Why, and what to do instead.
        reason: String,
    },
    /// The seccomp profile could not be compiled.
    #[error("config.json: linux.seccomp cannot be compiled: {0}")]
    Seccomp(String),
}

impl Error {
    /// What the audit log has of it, if it refuses what a container in a machine is not given.
    pub fn refusal(&self) -> Option<Event> {
        let (field, reason) = match self {
            Error::Unsupported { field, reason } => (field.as_str(), reason),
            Error::Flag { name, reason } => (*name, reason),
            _ => return None,
        };
        Some(Event::Refused {
            field: Some(field.into()),
            reason: reason.clone(),
        })
    }
}

fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Invalid {
        field: field.into(),
        reason: reason.into(),
    }
}

fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Unsupported {
        field: field.into(),
        reason: reason.into(),
    }
}

/// A bundle's directory and its parsed config.json, read once: later edits have no effect (OCI runtime.md#create).
#[derive(Debug)]
pub struct Bundle {
    /// Absolute.
    pub directory: PathBuf,
    /// The configuration.
    pub spec: spec::Spec,
}

impl Bundle {
    /// Reads `DIR/config.json`.
    pub fn load(directory: &Path) -> Result<Bundle, Error> {
        let directory = directory.canonicalize().map_err(|source| Error::Read {
            path: directory.into(),
            source,
        })?;
        let path = directory.join("config.json");
        let read = |path: &Path| -> io::Result<Vec<u8>> {
            let size = fs::metadata(path)?.len();
            if size > MAX_CONFIG {
                let text = format!("it has {size} bytes, {MAX_CONFIG} are allowed");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            fs::read(path)
        };
        let bytes = read(&path).map_err(|source| Error::Read {
            path: path.clone(),
            source,
        })?;
        let spec = parse(&bytes).map_err(|source| Error::Parse { path, source })?;
        Ok(Bundle { directory, spec })
    }
}

/// Two words that OCI has and the crate oci-spec 0.10 misspells: (OCI's, the crate's).
const MISSPELT: &[(&str, &str)] = &[
    ("SCHED_FLAG_RESET_ON_FORK", "SCHED_RESET_ON_FORK"),
    ("SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_D_L_OVERRUN"),
];

fn parse(bytes: &[u8]) -> Result<spec::Spec, serde_json::Error> {
    serde_json::from_slice(bytes).or_else(|error| {
        let mut value: serde_json::Value = serde_json::from_slice(bytes)?;
        let flags = value.pointer_mut("/process/scheduler/flags");
        for flag in flags
            .and_then(|flags| flags.as_array_mut())
            .into_iter()
            .flatten()
        {
            if let Some((_, word)) = MISSPELT.iter().find(|(oci, _)| flag == oci) {
                *flag = (*word).into();
            }
        }
        // The first error has the line and the column.
        serde_json::from_value(value).map_err(|_| error)
    })
}

/// Everything that running a container takes, on both sides.
#[derive(Debug)]
pub struct Plan {
    /// For the agent; the root and the sources of bind mounts are set when they have their places in the share.
    pub container: agent::Container,
    /// The root file system on the host.
    pub root: HostRoot,
    /// Bind sources on the host, in the order of the mounts.
    pub binds: Vec<HostBind>,
    /// Hooks that run on the host.
    pub hooks: HostHooks,
    /// `linux.cgroupsPath`.
    pub cgroups_path: Option<PathBuf>,
    /// Control files of the pod's cgroup on the host (block I/O reaches the host's disks through the fs process).
    pub host_limits: Vec<(String, String)>,
    /// `annotations`, for the hooks' state.
    pub annotations: HashMap<String, String>,
    /// `ociVersion`.
    pub oci_version: String,
}

impl Plan {
    /// What the container needs to find in its root.
    pub fn mount_points(&self) -> Vec<MountPoint> {
        mount_points::of(&self.container, &self.binds)
    }

    /// Uid and gid of the container's root user outside of the container's user namespace.
    pub fn owner(&self) -> (u32, u32) {
        let namespaces = self.container.namespaces.get_or_default();
        let outside = |mappings: &[agent::IdMapping]| {
            let mapping = mappings.iter().find(|mapping| mapping.container_id == 0);
            mapping.map_or(0, |mapping| mapping.host_id)
        };
        (
            outside(&namespaces.uid_mappings),
            outside(&namespaces.gid_mappings),
        )
    }
}

/// Where a container's root comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootFrom {
    /// The directory that config.json names.
    Bundle,
    /// A list of mounts beside config.json: what `root.path` names need not exist.
    Mounts,
}

/// The directory that becomes the container's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRoot {
    /// Absolute.
    pub path: PathBuf,
    /// `root.readonly`: enforced on the host's mount too.
    pub read_only: bool,
}

/// Checks the whole configuration of a container without an engine and converts it.
pub fn plan(bundle: &Bundle, container_id: &str) -> Result<Plan, Error> {
    refuse_labels(bundle.spec.process().as_ref(), &[])?;
    let pod = PodPaths {
        network: network(bundle),
        alone: true,
        has_guest: true,
        ..PodPaths::default()
    };
    convert(bundle, container_id, &pod, RootFrom::Bundle)
}

/// The network namespace that a configuration names.
pub fn network(bundle: &Bundle) -> Option<PathBuf> {
    let linux = bundle.spec.linux().as_ref()?;
    pod_paths::path_of(linux, spec::LinuxNamespaceType::Network)
}

/// The same for a container of an engine, in a pod whose paths of the host are `pod`.
pub fn plan_in_pod(
    bundle: &Bundle,
    container_id: &str,
    pod: &PodPaths,
    root: RootFrom,
) -> Result<Plan, Error> {
    refuse_labels(bundle.spec.process().as_ref(), DEFAULT_PROFILES)?;
    podman::refuse(&bundle.spec)?;
    convert(bundle, container_id, pod, root)
}

fn convert(
    bundle: &Bundle,
    container_id: &str,
    pod: &PodPaths,
    root: RootFrom,
) -> Result<Plan, Error> {
    let spec = &bundle.spec;
    refuse(spec)?;
    let root = host_root(bundle, root)?;
    let linux = spec
        .linux()
        .as_ref()
        .ok_or_else(|| invalid("linux", "is missing"))?;
    let namespaces = namespaces::convert(spec, linux, pod)?;
    let (mounts, binds) = mounts::convert(bundle, &namespaces, pod)?;
    let (resources, host_limits) = resources::convert(linux.resources().as_ref(), Moment::Create)?;
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| invalid("process", "is missing"))?;
    let mut process = process::convert(process)?;
    process.personality = process::personality(linux)?;
    process.seccomp = match linux.seccomp() {
        Some(profile) => Some(seccomp::compile(profile)?).into(),
        None => None.into(),
    };
    let hooks = spec.hooks().clone().unwrap_or_default();
    let (hooks, start_container_hooks) = hooks::convert(&hooks)?;
    let container = agent::Container {
        root_readonly: root.read_only,
        root_propagation: root_propagation(linux)?,
        hostname: spec.hostname().clone().unwrap_or_default(),
        domainname: spec.domainname().clone().unwrap_or_default(),
        namespaces: Some(namespaces).into(),
        mounts,
        devices: devices::convert(linux.devices().as_deref().unwrap_or_default())?,
        masked_paths: paths("linux.maskedPaths", linux.masked_paths())?,
        readonly_paths: paths("linux.readonlyPaths", linux.readonly_paths())?,
        sysctls: sysctls(linux)?,
        cgroup: format!("pod/{container_id}"),
        resources: Some(resources).into(),
        process: Some(process).into(),
        start_container_hooks,
        ..agent::Container::default()
    };
    Ok(Plan {
        container,
        root,
        binds,
        hooks,
        cgroups_path: linux.cgroups_path().clone(),
        host_limits,
        annotations: spec.annotations().clone().unwrap_or_default(),
        oci_version: spec.version().clone(),
    })
}

/// Converts the process that an engine wants to add to a running container. Filter and personality are those of the container.
pub fn exec_process(json: &[u8], of: &agent::Process) -> Result<agent::Process, Error> {
    let parsed: spec::Process = serde_json::from_slice(json).map_err(|source| Error::Parse {
        path: "the process of exec".into(),
        source,
    })?;
    refuse_labels(Some(&parsed), DEFAULT_PROFILES)?;
    let mut process = process::convert(&parsed)?;
    process.seccomp = of.seccomp.clone();
    process.personality = of.personality;
    Ok(process)
}

/// Converts new limits: `LinuxResources` as JSON. Device rules stay as they are.
pub fn new_limits(json: &[u8]) -> Result<(agent::Resources, Vec<(String, String)>), Error> {
    let parsed = parse_resources(json)?;
    let (mut resources, host) = resources::convert(Some(&parsed), Moment::Update)?;
    resources.devices.clear();
    resources.set_devices = false;
    Ok((resources, host))
}

fn parse_resources(json: &[u8]) -> Result<spec::LinuxResources, Error> {
    serde_json::from_slice(json).map_err(|source| Error::Parse {
        path: "the resources of update".into(),
        source,
    })
}

/// Profiles that engines set by themselves on every container of a host with AppArmor. Nobody asked for them, and what they
/// protect, the host's kernel, is out of a guest's reach.
const DEFAULT_PROFILES: &[&str] = &[
    "unconfined",
    "cri-containerd.apparmor.d",
    "crio-default",
    "docker-default",
    "nerdctl-default",
];

fn refuse_labels(process: Option<&spec::Process>, ignored: &[&str]) -> Result<(), Error> {
    let named = |text: Option<&String>| text.is_some_and(|text| !text.is_empty());
    let profile = process.and_then(|p| p.apparmor_profile().as_ref());
    if named(profile) && !profile.is_some_and(|name| ignored.contains(&name.as_str())) {
        return Err(unsupported(
            "process.apparmorProfile",
            "the guest's kernel has no AppArmor; the virtual machine is the boundary",
        ));
    }
    if named(process.and_then(|p| p.selinux_label().as_ref())) {
        return Err(unsupported(
            "process.selinuxLabel",
            "the guest's kernel has no SELinux; the virtual machine is the boundary",
        ));
    }
    Ok(())
}

/// Whole sections that a microVM's container cannot honour, by their names.
fn refuse(spec: &spec::Spec) -> Result<(), Error> {
    let version = spec.version();
    if version.split('.').next() != Some("1") {
        let reason = format!("{version:?} is not a version 1 of the OCI runtime specification");
        return Err(invalid("ociVersion", reason));
    }
    let (process, linux) = (spec.process().as_ref(), spec.linux().as_ref());
    let named = |text: Option<&String>| text.is_some_and(|text| !text.is_empty());
    let table = [
        (
            "windows",
            spec.windows().is_some(),
            "the guest is a Linux machine",
        ),
        (
            "solaris",
            spec.solaris().is_some(),
            "the guest is a Linux machine",
        ),
        ("zos", spec.zos().is_some(), "the guest is a Linux machine"),
        (
            "vm",
            spec.vm().is_some(),
            "the operator chooses the machine, in the configuration of bulkhead",
        ),
        (
            "process.user.username",
            named(process.and_then(|p| p.user().username().as_ref())),
            "it is for Windows; use uid and gid",
        ),
        (
            "linux.mountLabel",
            named(linux.and_then(|l| l.mount_label().as_ref())),
            "the guest's kernel has no SELinux",
        ),
        (
            "linux.intelRdt",
            linux.is_some_and(|l| l.intel_rdt().is_some()),
            "cache and bandwidth classes are the host's and not yet given to pods",
        ),
        (
            "linux.memoryPolicy",
            linux.is_some_and(|l| l.memory_policy().is_some()),
            "a guest has one memory node",
        ),
        (
            "linux.netDevices",
            linux.is_some_and(|l| l.net_devices().as_ref().is_some_and(|d| !d.is_empty())),
            "network devices of the host cannot be moved into a guest yet",
        ),
    ];
    match table.iter().find(|(_, present, _)| *present) {
        Some((field, _, reason)) => Err(unsupported(*field, *reason)),
        None => Ok(()),
    }
}

fn host_root(bundle: &Bundle, from: RootFrom) -> Result<HostRoot, Error> {
    let root = bundle
        .spec
        .root()
        .as_ref()
        .ok_or_else(|| invalid("root", "is missing"))?;
    // join leaves an absolute path as it is.
    let path = bundle.directory.join(root.path());
    if from == RootFrom::Bundle {
        let found = fs::metadata(&path).map_err(|source| Error::Read {
            path: path.clone(),
            source,
        })?;
        if !found.is_dir() {
            let reason = format!("{} is not a directory", path.display());
            return Err(invalid("root.path", reason));
        }
    }
    Ok(HostRoot {
        path,
        read_only: root.readonly().unwrap_or(false),
    })
}

fn root_propagation(linux: &spec::Linux) -> Result<u64, Error> {
    let Some(word) = linux
        .rootfs_propagation()
        .as_deref()
        .filter(|w| !w.is_empty())
    else {
        return Ok(0);
    };
    options::propagation(word).ok_or_else(|| {
        let reason = format!(
            "{word:?} is none of shared, slave, private, unbindable, or r and one of these"
        );
        invalid("linux.rootfsPropagation", reason)
    })
}

fn paths(field: &str, list: &Option<Vec<String>>) -> Result<Vec<String>, Error> {
    let list = list.clone().unwrap_or_default();
    match list.iter().find(|path| !path.starts_with('/')) {
        Some(path) => Err(invalid(
            field,
            format!("has {path:?}, which is not absolute"),
        )),
        None => Ok(list),
    }
}

fn sysctls(linux: &spec::Linux) -> Result<HashMap<String, String>, Error> {
    let sysctls = linux.sysctl().clone().unwrap_or_default();
    match sysctls.keys().find(|name| !is_sysctl(name)) {
        Some(name) => Err(invalid("linux.sysctl", format!("has the name {name:?}"))),
        None => Ok(sysctls),
    }
}

/// Whether a sysctl can have this name, which becomes a path beneath /proc/sys.
pub(crate) fn is_sysctl(name: &str) -> bool {
    !name.split(['/', '.']).any(str::is_empty) && !name.contains('\0')
}
