//! `linux.namespaces` with mappings and time offsets.
//!
//! A namespace that is not listed is the guest's own: never the host's, which no container in a microVM can be given. A container alone in
//! its pod has a guest to itself. In a pod of several, the guest's processes and network are everybody's: there the absence of pid and
//! network is refused.

use bulkhead_agent_protocol::agent::{self, namespaces::Kind};
use oci_spec::runtime::{self as spec, LinuxNamespaceType as Type};

use super::{Error, invalid, pod_paths::PodPaths, unsupported};

pub(super) fn convert(
    spec: &spec::Spec,
    linux: &spec::Linux,
    pod: &PodPaths,
) -> Result<agent::Namespaces, Error> {
    let mut listed = Vec::new();
    let mut shared = Vec::new();
    for namespace in linux.namespaces().as_deref().unwrap_or_default() {
        let kind = namespace.typ();
        let word = name(kind);
        if let Some(path) = namespace
            .path()
            .as_ref()
            .filter(|p| !p.as_os_str().is_empty())
        {
            if pod.is_own(kind, path) && !listed.contains(&kind) {
                listed.push(kind);
                shared.push(kind);
                continue;
            }
            return Err(unsupported(
                format!("linux.namespaces: {word} with a path"),
                format!(
                    "{} is a namespace of the host or of another pod, which a guest cannot enter; leave the path out",
                    path.display()
                ),
            ));
        }
        if listed.contains(&kind) {
            return Err(invalid("linux.namespaces", format!("lists {word} twice")));
        }
        listed.push(kind);
    }
    // A user namespace does not own the pod's network, and could not mount its sysfs.
    if pod.alone && !listed.contains(&Type::User) {
        shared.push(Type::Network);
    }
    let kind = |kind: Type| match (listed.contains(&kind), shared.contains(&kind)) {
        (true, true) => Kind::SANDBOX.into(),
        (true, false) => Kind::NEW.into(),
        (false, _) => Kind::AGENT.into(),
    };
    let has = |kind: Type| listed.contains(&kind);
    required(&listed, pod.has_guest)?;
    if spec
        .hostname()
        .as_ref()
        .is_some_and(|name| !name.is_empty())
        && !has(Type::Uts)
    {
        return Err(invalid(
            "hostname",
            "needs a uts namespace in linux.namespaces",
        ));
    }
    if spec
        .domainname()
        .as_ref()
        .is_some_and(|name| !name.is_empty())
        && !has(Type::Uts)
    {
        return Err(invalid(
            "domainname",
            "needs a uts namespace in linux.namespaces",
        ));
    }
    let uid_mappings = mappings(linux.uid_mappings().as_deref().unwrap_or_default());
    let gid_mappings = mappings(linux.gid_mappings().as_deref().unwrap_or_default());
    if has(Type::User) && (uid_mappings.is_empty() || gid_mappings.is_empty()) {
        return Err(invalid(
            "linux.uidMappings",
            "and gidMappings are needed for a user namespace",
        ));
    }
    let is_mapped = !uid_mappings.is_empty() || !gid_mappings.is_empty();
    if is_mapped && !has(Type::User) {
        return Err(invalid(
            "linux.uidMappings",
            "and gidMappings need a user namespace in linux.namespaces",
        ));
    }
    let (monotonic, boottime) = time_offsets(linux, has(Type::Time))?;
    Ok(agent::Namespaces {
        pid: kind(Type::Pid),
        mount: kind(Type::Mount),
        uts: kind(Type::Uts),
        ipc: kind(Type::Ipc),
        network: kind(Type::Network),
        cgroup: kind(Type::Cgroup),
        user: kind(Type::User),
        time: kind(Type::Time),
        uid_mappings,
        gid_mappings,
        monotonic: monotonic.into(),
        boottime: boottime.into(),
        ..agent::Namespaces::default()
    })
}

fn required(listed: &[Type], has_guest: bool) -> Result<(), Error> {
    let reasons = [
        (
            Type::Mount,
            true,
            "a container without one would be the guest itself",
        ),
        (
            Type::Pid,
            !has_guest,
            "the host's processes cannot be shown to a guest",
        ),
        (
            Type::Network,
            !has_guest,
            "the host's network cannot be given to a guest",
        ),
    ];
    let missing = |(kind, needed, _): &&(Type, bool, &str)| *needed && !listed.contains(kind);
    match reasons.iter().find(missing) {
        Some((kind, _, reason)) => Err(unsupported(
            format!("linux.namespaces without {}", name(*kind)),
            format!("{reason}; add {{\"type\": \"{}\"}}", name(*kind)),
        )),
        None => Ok(()),
    }
}

/// All kinds, with the names that config.json has for them.
pub(super) const KINDS: [(Type, &str); 8] = [
    (Type::Cgroup, "cgroup"),
    (Type::Ipc, "ipc"),
    (Type::Mount, "mount"),
    (Type::Network, "network"),
    (Type::Pid, "pid"),
    (Type::Time, "time"),
    (Type::User, "user"),
    (Type::Uts, "uts"),
];

fn name(kind: Type) -> &'static str {
    let found = KINDS.iter().find(|(known, _)| *known == kind);
    found.expect("all kinds are listed").1
}

pub(super) fn mappings(list: &[spec::LinuxIdMapping]) -> Vec<agent::IdMapping> {
    let convert = |mapping: &spec::LinuxIdMapping| agent::IdMapping {
        container_id: mapping.container_id(),
        host_id: mapping.host_id(),
        size: mapping.size(),
        ..agent::IdMapping::default()
    };
    list.iter().map(convert).collect()
}

type Offsets = (Option<agent::TimeOffset>, Option<agent::TimeOffset>);

fn time_offsets(linux: &spec::Linux, has_time: bool) -> Result<Offsets, Error> {
    let Some(offsets) = linux.time_offsets().as_ref().filter(|map| !map.is_empty()) else {
        return Ok((None, None));
    };
    if !has_time {
        return Err(invalid(
            "linux.timeOffsets",
            "need a time namespace in linux.namespaces",
        ));
    }
    let mut found = (None, None);
    for (clock, offset) in offsets {
        let offset = Some(agent::TimeOffset {
            secs: offset.secs().unwrap_or(0),
            nanosecs: offset.nanosecs().unwrap_or(0),
            ..agent::TimeOffset::default()
        });
        match clock.as_str() {
            "monotonic" => found.0 = offset,
            "boottime" => found.1 = offset,
            other => {
                return Err(invalid(
                    "linux.timeOffsets",
                    format!("has the clock {other:?}"),
                ));
            }
        }
    }
    Ok(found)
}
