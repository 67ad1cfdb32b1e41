//! Images, as `docker save` writes them, by tar(1).

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{must, sha256};

/// Writes an archive with an image of one layer, which has all of `root`; `config` is what its maker wants run.
pub fn save_image(to: &Path, name: &str, root: &Path, config: &Value) {
    let dir = TempDir::with_prefix("image-").expect("a temporary directory");
    let path = |name: &str| dir.path().join(name);
    pack(&path("layer.tar"), root, &["."]);
    let layer = sha256(&fs::read(path("layer.tar")).expect("the layer"));
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer}")]},
    });
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    fs::write(path("config.json"), config.to_string()).expect("writable");
    fs::write(path("manifest.json"), manifest.to_string()).expect("writable");
    pack(
        to,
        dir.path(),
        &["manifest.json", "config.json", "layer.tar"],
    );
}

fn pack(archive: &Path, directory: &Path, names: &[&str]) {
    must(
        Command::new("tar")
            .args(["--create", "--numeric-owner", "--file"])
            .arg(archive)
            .arg("--directory")
            .arg(directory)
            .args(names),
    );
}
