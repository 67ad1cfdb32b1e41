//! What of a container's files the host can show to who enters the mount namespace of its pid
//! (`podman cp`): the host's own, and nothing where the container has the guest's.

use std::{
    fs,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use oci_spec::runtime as spec;

use super::{Bundle, Error, HostRoot, RootFrom, host_root, options};

/// What is shown at a path of the container.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    /// A file or directory of the host.
    Host {
        /// Absolute.
        source: PathBuf,
        /// With what is mounted beneath it.
        recursive: bool,
        /// As the container has it.
        read_only: bool,
    },
    /// The processes of the pid namespace that belongs to the mount namespace.
    Processes,
    /// What is the guest's alone, or masked: nothing is read or written there.
    Nothing,
}

/// The container's root, and what covers it, in order.
///
/// # Errors
/// A configuration of which no container can be made either.
pub fn view(bundle: &Bundle) -> Result<(HostRoot, Vec<(PathBuf, Seen)>), Error> {
    let root = host_root(bundle, RootFrom::Bundle)?;
    let mut all = Vec::new();
    for mount in bundle.spec.mounts().iter().flatten() {
        if let Some(seen) = of_mount(bundle, mount)? {
            all.push((mount.destination().clone(), seen));
        }
    }
    let linux = bundle.spec.linux().as_ref();
    let masked = linux.and_then(|linux| linux.masked_paths().as_deref());
    for path in masked.unwrap_or_default() {
        all.push((path.into(), Seen::Nothing));
    }
    Ok((root, all))
}

/// `None`: it changes a mount that is there.
fn of_mount(bundle: &Bundle, mount: &spec::Mount) -> Result<Option<Seen>, Error> {
    let words = mount.options().as_deref().unwrap_or_default();
    let flags = options::parse("mounts", words)?.flags;
    let kind = mount.typ().as_deref().unwrap_or_default();
    if flags & libc::MS_BIND == 0 && kind != "bind" {
        return Ok(match kind {
            _ if flags & libc::MS_REMOUNT != 0 => None,
            "proc" => Some(Seen::Processes),
            _ => Some(Seen::Nothing),
        });
    }
    let source = mount.source().as_deref().unwrap_or(Path::new(""));
    let source = bundle.directory.join(source);
    // A node, to mask something: the guest's own.
    let is_node = fs::metadata(&source).is_ok_and(|found| {
        let kind = found.file_type();
        kind.is_char_device() || kind.is_block_device()
    });
    Ok(Some(match is_node {
        true => Seen::Nothing,
        false => Seen::Host {
            source,
            recursive: flags & libc::MS_REC != 0,
            read_only: flags & libc::MS_RDONLY != 0,
        },
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn files_of_the_host_are_shown_and_the_guests_are_not() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        let config = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs", "readonly": true},
            "process": {"args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "linux": {"namespaces": [{"type": "mount"}], "maskedPaths": ["/proc/kcore"]},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/v", "type": "bind", "source": "/a", "options": ["rbind", "ro"]},
                {"destination": "/w", "type": "none", "source": "b", "options": ["bind"]},
                {"destination": "/n", "type": "bind", "source": "/dev/null", "options": ["bind"]},
                {"destination": "/tmp", "type": "tmpfs", "source": "x", "options": ["remount"]},
            ],
        });
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let bundle = Bundle::load(dir.path()).unwrap();
        let host = |source: PathBuf, recursive| Seen::Host {
            source,
            recursive,
            read_only: recursive,
        };
        let (root, seen) = view(&bundle).unwrap();
        assert!(root.read_only && root.path.ends_with("rootfs"));
        let wanted = [
            ("/proc", Seen::Processes),
            ("/tmp", Seen::Nothing),
            ("/v", host("/a".into(), true)),
            ("/w", host(bundle.directory.join("b"), false)),
            ("/n", Seen::Nothing),
            ("/proc/kcore", Seen::Nothing),
        ];
        assert_eq!(seen, wanted.map(|(path, seen)| (path.into(), seen)));
    }
}
