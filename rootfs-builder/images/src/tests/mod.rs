//! Makers of images, as strangers make them.

mod images;
mod layers;

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};
use tempfile::TempDir;

use super::{
    Error, Image, Reference, Store,
    layer::Root,
    source::{hex, unpacked},
    tree,
};

/// An entry of a layer: kind, path, contents or target, mode.
type Line<'a> = (EntryType, &'a str, &'a str, u32);

const FILE: EntryType = EntryType::Regular;
const DIRECTORY: EntryType = EntryType::Directory;
const LINK: EntryType = EntryType::Symlink;
const HARD: EntryType = EntryType::Link;

/// A layer of these, paths as they are written: a maker of images may write any.
fn layer(lines: &[Line<'_>]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (kind, path, text, mode) in lines {
        let mut header = Header::new_ustar();
        header.set_entry_type(*kind);
        header.set_mode(*mode);
        header.set_mtime(1_000_000_000);
        header.set_uid(nix::unistd::geteuid().as_raw().into());
        header.set_gid(nix::unistd::getegid().as_raw().into());
        let name = &mut header.as_old_mut().name;
        name[..path.len()].copy_from_slice(path.as_bytes());
        let contents = match kind {
            EntryType::Symlink | EntryType::Link => {
                header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
                ""
            }
            _ => text,
        };
        header.set_size(contents.len() as u64);
        header.set_cksum();
        archive.append(&header, contents.as_bytes()).unwrap();
    }
    archive.into_inner().unwrap()
}

fn sum(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    to.write_all(bytes).unwrap();
    to.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    ruzstd::encoding::compress_to_vec(bytes, level)
}

/// A place for images, and a store.
struct World {
    dir: TempDir,
    store: Store,
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(&dir.path().join("data"));
        World { dir, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self, name: &str) -> Result<Image, Error> {
        self.store.image(self.path(name).to_str().unwrap(), &|_| {})
    }

    fn kept(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("data/images")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }
}

/// Parts of an image with these layers: names and contents.
struct Parts(Vec<(String, Vec<u8>)>);

impl Parts {
    /// As an OCI layout; `change` has manifest and configuration before they are written.
    fn of(layers: &[Vec<u8>], change: impl FnOnce(&mut Value, &mut Value)) -> Parts {
        let mut parts = Parts(vec![(
            "oci-layout".into(),
            br#"{"imageLayoutVersion": "1.0.0"}"#.to_vec(),
        )]);
        let plain = |layer: &Vec<u8>| {
            let mut bytes = Vec::new();
            unpacked(layer.as_slice())
                .unwrap()
                .read_to_end(&mut bytes)
                .unwrap();
            format!("sha256:{}", sum(&bytes))
        };
        let mut config = json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": layers.iter().map(plain).collect::<Vec<_>>()},
        });
        let blobs = layers.iter().map(|layer| {
            json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                   "digest": parts.blob(layer.clone()), "size": layer.len()})
        });
        let blobs: Vec<Value> = blobs.collect();
        let mut manifest = json!({"schemaVersion": 2, "layers": blobs});
        change(&mut manifest, &mut config);
        let config = serde_json::to_vec(&config).unwrap();
        manifest["config"] = json!({"mediaType": "application/vnd.oci.image.config.v1+json",
            "size": config.len(), "digest": parts.blob(config)});
        let manifest = serde_json::to_vec(&manifest).unwrap();
        let entry = json!({"mediaType": "application/vnd.oci.image.manifest.v1+json",
            "size": manifest.len(), "digest": parts.blob(manifest)});
        let index = json!({"schemaVersion": 2, "manifests": [entry]});
        parts
            .0
            .push(("index.json".into(), serde_json::to_vec(&index).unwrap()));
        parts
    }

    fn plain(layers: &[Vec<u8>]) -> Parts {
        Parts::of(layers, |_, _| {})
    }

    fn blob(&mut self, bytes: Vec<u8>) -> String {
        let sum = sum(&bytes);
        self.0.push((format!("blobs/sha256/{sum}"), bytes));
        format!("sha256:{sum}")
    }

    fn part(&mut self, name: &str) -> &mut Vec<u8> {
        let found = self.0.iter_mut().find(|(known, _)| known == name);
        &mut found.unwrap().1
    }

    fn into_directory(self, path: &Path) {
        for (name, bytes) in self.0 {
            let path = path.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }

    fn archive(self) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, bytes) in self.0 {
            let mut header = Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            archive
                .append_data(&mut header, name, bytes.as_slice())
                .unwrap();
        }
        archive.into_inner().unwrap()
    }
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap()
}
