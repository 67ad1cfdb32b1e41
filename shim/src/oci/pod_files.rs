//! What the containers of a pod show of it without having been told: where no pause container's preparations are (containerd's
//! `sandboxer = "shim"`), config.json names neither the pod's files in /etc nor its shared memory.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{self as spec, LinuxNamespaceType as Type};

use super::pod_paths::{PodPaths, path_of};

/// Files that the containers of a pod have in common, on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFiles(PathBuf);

impl PodFiles {
    /// Those beneath a directory that lives as long as the pod.
    pub fn beneath(directory: &Path) -> PodFiles {
        PodFiles(directory.into())
    }

    /// Where `hostname`, `hosts` and `resolv.conf` are.
    pub fn etc(&self) -> PathBuf {
        self.0.join("etc")
    }

    /// A directory that stands for the pod's shared memory; nothing is ever in it.
    pub fn shm(&self) -> PathBuf {
        self.0.join("shm")
    }

    /// Adds to a member's configuration what it does not mount itself: the files of /etc, and the pod's shared memory where the member
    /// is in the pod's ipc namespace, whose paths are `pod`.
    pub fn add_to(&self, spec: &mut spec::Spec, pod: &PodPaths) {
        let root = spec.root().as_ref();
        let mode = match root.is_some_and(|root| root.readonly().unwrap_or(false)) {
            true => "ro",
            false => "rw",
        };
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        let linux = spec.linux().as_ref();
        let ipc = linux.and_then(|linux| path_of(linux, Type::Ipc));
        let shares_memory = ipc.is_some_and(|path| pod.is_own(Type::Ipc, &path));
        let shm = Path::new("/dev/shm");
        if shares_memory {
            // The default of every container, of its own: the pod's takes its place. A volume does not give way.
            mounts.retain(|mount| {
                mount.destination() != shm || mount.typ().as_deref() != Some("tmpfs")
            });
        }
        let names = ["hostname", "hosts", "resolv.conf"];
        let mut wanted: Vec<_> = names
            .map(|name| (Path::new("/etc").join(name), self.etc().join(name), mode))
            .into();
        if shares_memory {
            wanted.push((shm.into(), self.shm(), "rw"));
        }
        for (destination, source, mode) in wanted {
            if mounts
                .iter()
                .all(|mount| *mount.destination() != destination)
            {
                mounts.push(bind(destination, source, mode));
            }
        }
        spec.set_mounts(Some(mounts));
    }
}

fn bind(destination: PathBuf, source: PathBuf, mode: &str) -> spec::Mount {
    let mut mount = spec::Mount::default();
    mount
        .set_destination(destination)
        .set_typ(Some("bind".into()))
        .set_source(Some(source))
        .set_options(Some(["rbind", "rprivate", mode].map(String::from).into()));
    mount
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Destinations and sources of a member with this ipc namespace.
    fn sources_in(mounts: serde_json::Value, ipc: serde_json::Value) -> Vec<(String, String)> {
        let config = json!({
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs", "readonly": true},
            "mounts": mounts,
            "linux": {"namespaces": ipc},
        });
        let mut spec: spec::Spec = serde_json::from_value(config).unwrap();
        let pod = PodPaths {
            pid: Some(42),
            ..PodPaths::default()
        };
        PodFiles::beneath(Path::new("/b")).add_to(&mut spec, &pod);
        let mounts = spec.mounts().as_ref().unwrap();
        let pair = |mount: &spec::Mount| {
            let source = mount.source().as_ref().unwrap();
            let text = |path: &Path| path.to_str().unwrap().to_owned();
            (text(mount.destination()), text(source))
        };
        mounts.iter().map(pair).collect()
    }

    fn sources(mounts: serde_json::Value) -> Vec<(String, String)> {
        sources_in(mounts, json!([{"type": "ipc", "path": "/proc/42/ns/ipc"}]))
    }

    fn pair(destination: &str, source: &str) -> (String, String) {
        (destination.into(), source.into())
    }

    #[test]
    fn a_container_without_them_gets_all() {
        let tmpfs = json!([{"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}]);
        assert_eq!(
            sources(tmpfs),
            [
                pair("/etc/hostname", "/b/etc/hostname"),
                pair("/etc/hosts", "/b/etc/hosts"),
                pair("/etc/resolv.conf", "/b/etc/resolv.conf"),
                pair("/dev/shm", "/b/shm"),
            ]
        );
    }

    #[test]
    fn a_member_that_does_not_share_ipc_keeps_its_memory_to_itself() {
        let tmpfs = json!([{"destination": "/dev/shm", "type": "tmpfs", "source": "own"}]);
        for ipc in [
            json!([]),
            json!([{"type": "ipc"}]),
            json!([{"type": "ipc", "path": ""}]),
            json!([{"type": "ipc", "path": "/proc/43/ns/ipc"}]),
        ] {
            let found = sources_in(tmpfs.clone(), ipc.clone());
            assert_eq!(found.len(), 4, "{ipc}");
            assert_eq!(found[0], pair("/dev/shm", "own"), "{ipc}");
            let without = sources_in(json!([]), ipc.clone());
            assert!(without.iter().all(|(name, _)| name != "/dev/shm"), "{ipc}");
        }
    }

    #[test]
    fn a_containers_own_mounts_stay() {
        let own = json!([
            {"destination": "/dev/shm", "type": "bind", "source": "/volume"},
            {"destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts"},
        ]);
        let found = sources(own);
        assert_eq!(found.len(), 4);
        assert_eq!(found[0], pair("/dev/shm", "/volume"));
        assert_eq!(found[1], pair("/etc/hosts", "/kubelet/hosts"));
    }
}
