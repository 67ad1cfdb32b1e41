//! Which directories of the host are volumes that kubelet writes by its atomic writer.

use std::path::{Component, Path};

/// kubelet's plugins that write by its atomic writer, as they are named in paths.
const PLUGINS: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// Whether the directory at this path is a configMap, secret, projected or downwardAPI volume: `ROOT/pods/UID/volumes/PLUGIN/NAME`, whatever kubelet's root is. What lies
/// beneath one (a single file) or beside it (`volume-subpaths`, kubelet's snapshots for `subPath`) is not.
pub(super) fn is_kubelet_volume(path: &Path) -> bool {
    let mut names = Vec::new();
    for part in path.components() {
        match part {
            Component::RootDir => {}
            Component::Normal(name) => names.push(name.to_str().unwrap_or_default()),
            _ => return false,
        }
    }
    match names.as_slice() {
        [.., "pods", uid, "volumes", plugin, name] => {
            let is_uid = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            path.is_absolute()
                && uid.chars().all(is_uid)
                && PLUGINS.contains(plugin)
                && !name.is_empty()
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_known_by_their_place() {
        let known = [
            "/var/lib/kubelet/pods/0f3a-1/volumes/kubernetes.io~configmap/config",
            "/var/lib/kubelet/pods/0f3a-1/volumes/kubernetes.io~secret/tls",
            "/data/k/pods/u/volumes/kubernetes.io~projected/kube-api-access-x",
            "/pods/u/volumes/kubernetes.io~downward-api/info",
        ];
        for path in known {
            assert!(is_kubelet_volume(Path::new(path)), "{path}");
        }
        let others = [
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/cache",
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/disk/mount",
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~configmap",
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~configmap/config/key",
            "/var/lib/kubelet/pods/u/volume-subpaths/config/container/0",
            "/var/lib/kubelet/pods/u/../u/volumes/kubernetes.io~secret/tls",
            "pods/u/volumes/kubernetes.io~secret/tls",
            "/pods/a b/volumes/kubernetes.io~secret/tls",
            "/",
            "",
        ];
        for path in others {
            assert!(!is_kubelet_volume(Path::new(path)), "{path}");
        }
    }
}
