//! A config.json to begin with.

use std::{fs, path::PathBuf};

use crate::failure::Failure;

#[derive(clap::Args)]
pub struct Spec {
    /// Directory of the bundle
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
}

/// Writes a config.json that runs a shell, if there is none.
pub fn write(words: &Spec) -> Result<u8, Failure> {
    let path = words.bundle.join("config.json");
    let failed = |error: std::io::Error| {
        let path = path.display();
        Failure::new(format!("cannot write {path}: {error}"))
    };
    let spec = oci_spec::runtime::Spec::default();
    let text = serde_json::to_vec_pretty(&spec)?;
    let file = fs::File::create_new(&path).map_err(failed)?;
    std::io::Write::write_all(&mut &file, &text).map_err(failed)?;
    Ok(0)
}
