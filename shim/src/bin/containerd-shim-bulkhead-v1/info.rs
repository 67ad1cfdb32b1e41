//! `-v` and `-info`: who this is, and what it can do.

use std::io::{self, Read, Write};

use anyhow::{Context, Result};
use bulkhead_shim::{containerd::bootstrap, oci};
use containerd_shim_protos::protobuf::{Message, well_known_types::any::Any};

/// For people.
pub fn version() -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    println!("containerd-shim-bulkhead-v1:\n  Version: {version}");
    Ok(())
}

/// For containerd: options in, a description out.
pub fn info() -> Result<()> {
    let mut bytes = Vec::new();
    io::stdin()
        .take(1 << 20)
        .read_to_end(&mut bytes)
        .context("cannot read the standard input")?;
    let options = Any::parse_from_bytes(&bytes).ok();
    let options = options.filter(|any| !any.type_url.is_empty());
    let features = serde_json::to_vec(&oci::features()).context("cannot encode the features")?;
    io::stdout()
        .write_all(&bootstrap::info(options, features))
        .context("cannot write the description")
}
