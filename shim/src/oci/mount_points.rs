//! What a container's making needs to find in its root, in the order in which the agent looks for it.

use std::path::Path;

use bulkhead_agent_protocol::agent;

use super::{GUEST_SHM, HostBind};

/// A name that has to be in a container's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPoint {
    /// Absolute, in the container.
    pub path: String,
    /// What is made there when nothing is.
    pub kind: PointKind,
    /// Whether a mount covers it: what lies beneath is not in the root then.
    pub covered: bool,
}

/// What is made where a name is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PointKind {
    /// A directory.
    Directory,
    /// An empty file.
    File,
    /// An empty file, in the place of a symbolic link too: a device node is bound over the name itself.
    Node,
    /// A symbolic link to this; `true`: in the place of whatever else is there.
    Link(&'static str, bool),
}

/// The nodes and links that the agent makes in every container (OCI config-linux.md#default-devices; guest-agent's devices.rs).
const DEFAULT_DEVICES: [(&str, PointKind); 11] = [
    ("/dev/null", PointKind::Node),
    ("/dev/zero", PointKind::Node),
    ("/dev/full", PointKind::Node),
    ("/dev/random", PointKind::Node),
    ("/dev/urandom", PointKind::Node),
    ("/dev/tty", PointKind::Node),
    ("/dev/ptmx", PointKind::Link("pts/ptmx", true)),
    ("/dev/fd", PointKind::Link("/proc/self/fd", false)),
    ("/dev/stdin", PointKind::Link("/proc/self/fd/0", false)),
    ("/dev/stdout", PointKind::Link("/proc/self/fd/1", false)),
    ("/dev/stderr", PointKind::Link("/proc/self/fd/2", false)),
];

/// The names that `container` needs.
pub(super) fn of(container: &agent::Container, binds: &[HostBind]) -> Vec<MountPoint> {
    let mut points = Vec::new();
    let mut add = |path: &str, kind, covered| {
        points.push(MountPoint {
            path: path.into(),
            kind,
            covered,
        });
    };
    let mut dev_is_bound = false;
    for (index, mount) in container.mounts.iter().enumerate() {
        let is_bind = mount.flags & libc::MS_BIND != 0;
        if !is_bind && mount.flags & libc::MS_REMOUNT != 0 {
            continue;
        }
        let bound = binds.iter().find(|bind| bind.mount == index);
        let directory = match (is_bind, bound) {
            (false, _) => true,
            (true, Some(bind)) => bind.directory,
            // Of the guest's own: the pod's shared memory, or a device.
            (true, None) => mount.source == GUEST_SHM,
        };
        let kind = match directory {
            true => PointKind::Directory,
            false => PointKind::File,
        };
        add(&mount.destination, kind, true);
        dev_is_bound |= is_bind && Path::new(&mount.destination) == Path::new("/dev");
    }
    // Who binds a directory to /dev fills it.
    if !dev_is_bound {
        for (path, kind) in DEFAULT_DEVICES {
            add(path, kind, false);
        }
        for device in &container.devices {
            add(&device.path, PointKind::Node, false);
        }
    }
    if container.process.terminal {
        add("/dev/console", PointKind::File, false);
    }
    add(&container.process.cwd, PointKind::Directory, false);
    points
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::HostPropagation;

    fn mount(destination: &str, flags: u64, source: &str) -> agent::Mount {
        agent::Mount {
            destination: destination.into(),
            flags,
            source: source.into(),
            ..agent::Mount::default()
        }
    }

    fn host_bind(mount: usize, directory: bool) -> HostBind {
        HostBind {
            mount,
            source: "/volume".into(),
            directory,
            recursive: true,
            read_only: false,
            read_only_whole: false,
            propagation: HostPropagation::Private,
        }
    }

    fn container(mounts: Vec<agent::Mount>) -> agent::Container {
        agent::Container {
            mounts,
            process: Some(agent::Process {
                cwd: "/srv".into(),
                ..agent::Process::default()
            })
            .into(),
            ..agent::Container::default()
        }
    }

    #[test]
    fn each_mount_has_a_point_of_its_sources_kind() {
        let container = container(vec![
            mount("/proc", 0, "proc"),
            mount("/etc/hosts", libc::MS_BIND, ""),
            mount("/data", libc::MS_BIND | libc::MS_REC, ""),
            mount("/proc", libc::MS_REMOUNT | libc::MS_RDONLY, ""),
            mount("/dev/shm", libc::MS_BIND, GUEST_SHM),
            mount("/etc/masked", libc::MS_BIND, "/dev/null"),
        ]);
        let points = of(&container, &[host_bind(1, false), host_bind(2, true)]);
        let mounts: Vec<(&str, PointKind)> = points
            .iter()
            .filter(|point| point.covered)
            .map(|point| (point.path.as_str(), point.kind))
            .collect();
        assert_eq!(
            mounts,
            [
                ("/proc", PointKind::Directory),
                ("/etc/hosts", PointKind::File),
                ("/data", PointKind::Directory),
                ("/dev/shm", PointKind::Directory),
                ("/etc/masked", PointKind::File),
            ]
        );
        let has = |path: &str| points.iter().any(|point| point.path == path);
        assert!(has("/dev/null") && has("/dev/ptmx") && !has("/dev/console"));
    }

    #[test]
    fn a_directory_bound_to_dev_is_its_owners_to_fill() {
        let mut container = container(vec![mount("/dev/", libc::MS_BIND, "")]);
        container.process.as_mut().unwrap().terminal = true;
        let points = of(&container, &[host_bind(0, true)]);
        let paths: Vec<&str> = points.iter().map(|point| point.path.as_str()).collect();
        assert_eq!(paths, ["/dev/", "/dev/console", "/srv"]);
    }
}
