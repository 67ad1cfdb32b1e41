//! What a pod's own config.json says (CRI's sandbox container), and what paths of the host mean in those of its members.
//!
//! Engines tell the members of a pod what to share by paths of the host: `/proc/PID/ns/*` of the pod's pid, the network
//! namespace that CNI has set up, the tmpfs that is mounted for /dev/shm. In a guest these mean "the pod's".

use std::{collections::HashMap, path::Path};

use oci_spec::runtime::{self as spec, LinuxNamespaceType as Type};

use super::{
    Bundle, Error, hooks, invalid,
    pod_files::PodFiles,
    pod_paths::{PodPaths, path_of},
    unsupported,
};

/// The annotation by which whoever makes a container puts it into another one's machine.
pub const GROUP: &str = "io.containerd.runc.v2.group";

/// The annotations by which engines name the pod, the first that is there.
const SANDBOX_IDS: &[&str] = &[
    GROUP,
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
];
/// The annotations by which they tell the pod's own container from its members.
const CONTAINER_TYPES: &[&str] = &[
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];

/// The annotations by which a container becomes another pod's, or a pod itself.
pub(super) fn annotations() -> impl Iterator<Item = &'static str> {
    SANDBOX_IDS.iter().chain(CONTAINER_TYPES).copied()
}

/// What a container is to a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// Container and pod in one (`ctr`, nerdctl, Docker).
    Alone,
    /// The pod's own container, which holds the pod and runs nothing (CRI's pause container).
    Sandbox,
    /// A member of the pod with this id.
    Member(String),
}

/// Tells a container's role from its annotations.
pub fn role(annotations: &HashMap<String, String>, id: &str) -> Role {
    let first = |names: &[&str]| names.iter().find_map(|name| annotations.get(*name));
    match (
        first(CONTAINER_TYPES).map(String::as_str),
        first(SANDBOX_IDS),
    ) {
        (Some("sandbox"), _) => Role::Sandbox,
        (_, Some(sandbox)) if sandbox != id => Role::Member(sandbox.clone()),
        _ => Role::Alone,
    }
}

/// How many interfaces may come into a pod's network namespace when its machine runs.
pub const LATER_INTERFACES: usize = 4;

/// What a pod's own config.json asks for; nothing of it is run.
#[derive(Clone, Debug, Default)]
pub struct PodPlan {
    /// `hostname`.
    pub hostname: String,
    /// Paths that its members will name.
    pub paths: PodPaths,
    /// Size of the pod's /dev/shm in bytes; 0: none.
    pub shm_bytes: u64,
    /// For the namespaces that the members share.
    pub sysctls: HashMap<String, String>,
    /// What members show without being told; `None`: the engine tells them.
    pub files: Option<PodFiles>,
    /// It has createRuntime or prestart hooks.
    pub has_hooks: bool,
}

impl PodPlan {
    /// For how many interfaces its machine has to have room that may come when it runs: an engine fills a namespace that it does not
    /// name after Create, and hooks fill any.
    pub fn later_interfaces(&self) -> usize {
        match self.paths.alone && (self.has_hooks || self.paths.network.is_none()) {
            true => LATER_INTERFACES,
            false => 0,
        }
    }
}

/// Reads the pod's part of a sandbox container's or a lone container's configuration.
pub fn pod_plan(bundle: &Bundle) -> Result<PodPlan, Error> {
    let spec = &bundle.spec;
    let linux = spec
        .linux()
        .as_ref()
        .ok_or_else(|| invalid("linux", "is missing"))?;
    let network = path_of(linux, Type::Network);
    let shm = spec
        .mounts()
        .iter()
        .flatten()
        .find(|mount| mount.destination() == Path::new("/dev/shm"))
        .filter(|mount| mount.typ().as_deref() == Some("bind"))
        .and_then(|mount| mount.source().clone());
    let shm_bytes = match &shm {
        None => 0,
        Some(path) => {
            let found = nix::sys::statvfs::statvfs(path).map_err(|errno| Error::Read {
                path: path.clone(),
                source: errno.into(),
            })?;
            found.blocks().saturating_mul(found.fragment_size())
        }
    };
    Ok(PodPlan {
        hostname: spec.hostname().clone().unwrap_or_default(),
        paths: PodPaths {
            pid: None,
            network,
            shm,
            alone: false,
            has_guest: false,
        },
        shm_bytes,
        sysctls: super::sysctls(linux)?,
        files: None,
        has_hooks: spec.hooks().as_ref().is_some_and(hooks::may_add_interfaces),
    })
}

/// What a pod cannot have of the host: Kubernetes' name, and why.
pub(crate) const HOST_NAMESPACES: [(Type, &str, &str); 3] = [
    (
        Type::Network,
        "hostNetwork",
        "the host's network cannot be given to a guest",
    ),
    (
        Type::Pid,
        "hostPID",
        "the host's processes cannot be shown to a guest",
    ),
    (
        Type::Ipc,
        "hostIPC",
        "the host's shared memory cannot be given to a guest",
    ),
];

/// Refuses a pod that asks for namespaces of the host, by the words of Kubernetes.
pub fn check_sandbox(bundle: &Bundle) -> Result<(), Error> {
    let empty = Vec::new();
    let linux = bundle.spec.linux().as_ref();
    let listed = linux
        .and_then(|linux| linux.namespaces().as_ref())
        .unwrap_or(&empty);
    let has = |kind: Type| {
        listed
            .iter()
            .any(|namespace: &spec::LinuxNamespace| namespace.typ() == kind)
    };
    match HOST_NAMESPACES.iter().find(|(kind, _, _)| !has(*kind)) {
        Some((_, field, reason)) => Err(unsupported(
            *field,
            format!("{reason}; run this pod with another runtime class"),
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotated(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect()
    }

    #[test]
    fn roles_follow_the_annotations_of_each_engine() {
        let cri = |kind, sandbox| {
            annotated(&[
                ("io.kubernetes.cri.container-type", kind),
                ("io.kubernetes.cri.sandbox-id", sandbox),
            ])
        };
        assert_eq!(role(&annotated(&[]), "a"), Role::Alone);
        assert_eq!(role(&cri("sandbox", "a"), "a"), Role::Sandbox);
        assert_eq!(role(&cri("container", "p"), "a"), Role::Member("p".into()));
        let crio = annotated(&[
            ("io.kubernetes.cri-o.ContainerType", "container"),
            ("io.kubernetes.cri-o.SandboxID", "p"),
        ]);
        assert_eq!(role(&crio, "a"), Role::Member("p".into()));
        let group = annotated(&[("io.containerd.runc.v2.group", "a")]);
        assert_eq!(role(&group, "a"), Role::Alone);
        assert_eq!(role(&group, "b"), Role::Member("a".into()));
    }
}
