//! Writes the guest image: manifest -> stage -> newc archive.
//!
//! The result is the initramfs that the VMM loads beside the kernel. It is not compressed (decompression is guest time on
//! every boot, and the file is read once a node), and the same inputs give the same bytes on any host.

mod elf;
mod manifest;
mod newc;
mod stage;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

use crate::manifest::Manifest;

/// Writes the guest's initramfs from a manifest
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The list of what the image holds
    #[arg(long, value_name = "FILE")]
    manifest: PathBuf,
    /// The static binary that entries with `source = "agent"` become
    #[arg(long, value_name = "FILE")]
    agent: PathBuf,
    /// Where the image goes; replaced atomically
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-rootfs-builder: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let manifest = Manifest::read(&arguments.manifest)?;
    let entries = stage::stage(&manifest, &arguments.agent)?;
    let image = newc::archive(&entries)?;
    replace(&arguments.output, &image)?;
    eprintln!(
        "{}: {} entries, {} bytes",
        arguments.output.display(),
        entries.len(),
        image.len()
    );
    Ok(())
}

/// Writes beside the target and renames, so that a reader sees the old image or the new one.
fn replace(output: &Path, image: &[u8]) -> anyhow::Result<()> {
    let mut partial = output.as_os_str().to_owned();
    partial.push(format!(".partial-{}", std::process::id()));
    let partial = PathBuf::from(partial);
    let written = fs::write(&partial, image).and_then(|()| fs::rename(&partial, output));
    if written.is_err() {
        // The error that matters is the first one; what is left behind is only our own partial file.
        let _ = fs::remove_file(&partial);
    }
    written.with_context(|| format!("cannot write {}", output.display()))
}

#[cfg(test)]
mod tests;
