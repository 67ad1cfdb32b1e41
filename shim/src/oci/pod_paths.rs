//! What paths of the host stand for in the configuration of a pod's member.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{self as spec, LinuxNamespaceType as Type};

/// What the host's paths in a member's config.json stand for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodPaths {
    /// The pid whose `/proc/PID/ns/*` are the pod's.
    pub pid: Option<i32>,
    /// The network namespace that the engine has made for the pod.
    pub network: Option<PathBuf>,
    /// The tmpfs that the engine has made for the pod's /dev/shm.
    pub shm: Option<PathBuf>,
    /// There is one container: a network namespace that it does not name is the pod's, whose
    /// interfaces may come later.
    pub alone: bool,
    /// The container has the guest to itself: a pid or network namespace that it does not list is
    /// the guest's own.
    pub has_guest: bool,
}

impl PodPaths {
    /// Whether `path` names the pod's namespace of this type.
    pub(super) fn is_own(&self, kind: Type, path: &Path) -> bool {
        if kind == Type::Network && self.network.as_deref() == Some(path) {
            return true;
        }
        let name = match kind {
            Type::Pid => "pid",
            Type::Ipc => "ipc",
            Type::Uts => "uts",
            Type::Network => "net",
            _ => return false,
        };
        self.pid
            .is_some_and(|pid| path == Path::new(&format!("/proc/{pid}/ns/{name}")))
    }
}

/// The path that `linux.namespaces` has for this type.
pub(super) fn path_of(linux: &spec::Linux, kind: Type) -> Option<PathBuf> {
    let listed = linux.namespaces().iter().flatten();
    let mut paths = listed
        .filter(|namespace| namespace.typ() == kind)
        .filter_map(|namespace| namespace.path().clone());
    paths.find(|path| !path.as_os_str().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_the_pod_are_known_and_no_others() {
        let paths = PodPaths {
            pid: Some(42),
            network: Some("/run/netns/x".into()),
            ..PodPaths::default()
        };
        assert!(paths.is_own(Type::Ipc, Path::new("/proc/42/ns/ipc")));
        assert!(paths.is_own(Type::Network, Path::new("/run/netns/x")));
        assert!(paths.is_own(Type::Network, Path::new("/proc/42/ns/net")));
        assert!(!paths.is_own(Type::Network, Path::new("/run/netns/y")));
        assert!(!paths.is_own(Type::Pid, Path::new("/proc/42/ns/ipc")));
        assert!(!paths.is_own(Type::Pid, Path::new("/proc/43/ns/pid")));
        assert!(!paths.is_own(Type::User, Path::new("/proc/42/ns/user")));
    }
}
