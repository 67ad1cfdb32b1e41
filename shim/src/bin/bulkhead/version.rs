//! `bulkhead version`, `bulkhead --version`: all parts, each with the sha256 of its file as its build id.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    process::{Command, Stdio},
};

use bulkhead_shim::config::Config;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::failure::Failure;

#[derive(clap::Args)]
pub struct Arguments {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// One part of an installation.
#[derive(Serialize)]
struct Part {
    name: &'static str,
    /// When it tells.
    version: Option<String>,
    #[serde(flatten)]
    build: Build,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Build {
    Sha256(String),
    Error(String),
}

#[derive(Serialize)]
struct Versions {
    version: &'static str,
    spec: &'static str,
    parts: Vec<Part>,
}

/// The first line is as runc's, because engines read it; it comes even when the configuration is broken.
pub fn print(arguments: &Arguments, config: Option<&Path>) -> Result<u8, Failure> {
    let (version, spec) = (env!("CARGO_PKG_VERSION"), bulkhead_shim::oci::NEWEST_SPEC);
    let parts = || parts(&Config::load(config)?);
    if arguments.json {
        let versions = Versions {
            version,
            spec,
            parts: parts()?,
        };
        println!("{}", serde_json::to_string_pretty(&versions)?);
        return Ok(0);
    }
    println!("bulkhead version {version}\nspec: {spec}");
    for part in parts()? {
        let version = part.version.as_deref().unwrap_or("-");
        let build = match part.build {
            Build::Sha256(digest) => format!("sha256:{digest}"),
            Build::Error(error) => format!("not usable: {error}"),
        };
        println!("{:<14}{version:<28}{build}", part.name);
    }
    Ok(0)
}

fn parts(config: &Config) -> Result<Vec<Part>, Failure> {
    let installed = config.installed()?;
    let own = std::env::current_exe()?;
    Ok(vec![
        Part {
            name: "bulkhead",
            version: Some(env!("CARGO_PKG_VERSION").into()),
            build: build(&own),
        },
        Part {
            name: "bulkhead-vmm",
            version: told_version(&installed.vmm),
            build: build(&installed.vmm),
        },
        Part {
            name: "vmlinux",
            version: kernel_version(&installed.kernel),
            build: build(&installed.kernel),
        },
        Part {
            name: "initramfs",
            version: None,
            build: build(&installed.initramfs),
        },
    ])
}

fn build(path: &Path) -> Build {
    match digest(path) {
        Ok(digest) => Build::Sha256(digest),
        Err(error) => Build::Error(error.to_string()),
    }
}

fn digest(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hash.update(&buffer[..count]),
        }
    }
    Ok(hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// The second word of `bulkhead-vmm --version`.
fn told_version(vmm: &Path) -> Option<String> {
    let output = Command::new(vmm)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.split_ascii_whitespace().nth(1).map(String::from)
}

/// The banner that every kernel image carries ("Linux version 6.12.48 (...").
fn kernel_version(kernel: &Path) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let image = std::fs::read(kernel).ok()?;
    let mut windows = image.windows(BANNER.len()).enumerate();
    windows.find_map(|(index, window)| {
        if window != BANNER {
            return None;
        }
        // The format string of the same banner has a % here.
        let rest = &image[index + BANNER.len()..];
        let word = rest
            .iter()
            .take(64)
            .take_while(|byte| byte.is_ascii_graphic());
        let word: Vec<u8> = word.copied().collect();
        let version = word.first().is_some_and(u8::is_ascii_digit);
        version.then(|| String::from_utf8_lossy(&word).into_owned())
    })
}
