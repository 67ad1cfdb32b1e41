//! A volume as kubelet writes it.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A configMap, secret, projected or downwardAPI volume of a pod.
pub struct KubeletVolume {
    root: TempDir,
    path: PathBuf,
    version: u32,
    group: Option<u32>,
}

/// A key, its bytes and its mode.
pub type Key<'a> = (&'a str, &'a [u8], u32);

impl KubeletVolume {
    /// Makes one of this plugin of kubelet's, with its first version.
    pub fn new(plugin: &str, keys: &[Key]) -> KubeletVolume {
        KubeletVolume::with_group(plugin, None, keys)
    }

    /// The same for a pod with `fsGroup`.
    pub fn with_group(plugin: &str, group: Option<u32>, keys: &[Key]) -> KubeletVolume {
        let root = TempDir::with_prefix("kubelet-").expect("a directory");
        let path = root
            .path()
            .join("pods/5f0e-1/volumes")
            .join(plugin)
            .join("config");
        fs::create_dir_all(&path).expect("a directory");
        if let Some(group) = group {
            chown(&path, None, Some(group)).expect("root");
            fs::set_permissions(&path, Permissions::from_mode(0o2775)).expect("ours");
        }
        let mut volume = KubeletVolume {
            root,
            path,
            version: 0,
            group,
        };
        volume.write(keys);
        volume
    }

    /// kubelet's root.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// What kubelet mounts.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name of the version that counts.
    pub fn version(&self) -> String {
        format!("..2026_11_22_10_00_00.{}", self.version)
    }

    /// Writes a new version in the order of kubelet's atomic writer, and removes the one before.
    pub fn write(&mut self, keys: &[Key]) {
        let old = self.path.join(self.version());
        self.version += 1;
        let new = self.path.join(self.version());
        let make = |path: &Path| fs::create_dir(path).expect("a directory");
        let set = |path: &Path, mode: u32| {
            fs::set_permissions(path, Permissions::from_mode(mode)).expect("ours");
        };
        make(&new);
        set(&new, 0o755);
        for (name, bytes, mode) in keys {
            let file = new.join(name);
            fs::create_dir_all(file.parent().expect("in the version")).expect("a directory");
            fs::write(&file, bytes).expect("writable");
            set(&file, *mode);
            if let Some(group) = self.group {
                chown(&file, None, Some(group)).expect("root");
                set(&file, mode | 0o440);
            }
        }
        if let Some(group) = self.group {
            chown(&new, None, Some(group)).expect("root");
            set(&new, 0o2775);
        }
        let temporary = self.path.join("..data_tmp");
        symlink(self.version(), &temporary).expect("a link");
        fs::rename(&temporary, self.path.join("..data")).expect("a rename");
        let names: BTreeSet<&str> = keys
            .iter()
            .filter_map(|(name, ..)| name.split('/').next())
            .collect();
        for name in &names {
            let visible = self.path.join(name);
            if visible.symlink_metadata().is_err() {
                symlink(Path::new("..data").join(name), visible).expect("a link");
            }
        }
        for entry in fs::read_dir(&self.path).expect("a directory") {
            let entry = entry.expect("an entry");
            let name = entry.file_name().into_string().expect("text");
            let is_link = entry.file_type().expect("a type").is_symlink();
            if is_link && !name.starts_with("..") && !names.contains(name.as_str()) {
                fs::remove_file(entry.path()).expect("ours");
            }
        }
        if old.exists() {
            fs::remove_dir_all(old).expect("ours");
        }
    }
}
