//! `bulkhead --version`: all parts, each with the sha256 of its file as its build id.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    process::{Command, Stdio},
};

use bulkhead_shim::config::Config;
use sha2::{Digest, Sha256};

use crate::failure::Failure;

/// One part of an installation.
pub struct Part {
    /// Its name.
    pub name: &'static str,
    /// Its version, when it tells.
    pub version: Option<String>,
    /// sha256 of its file, or why there is none.
    pub build: Result<String, io::Error>,
}

pub fn print(config: &Config) -> Result<u8, Failure> {
    for part in parts(config)? {
        let version = part.version.as_deref().unwrap_or("-");
        match part.build {
            Ok(digest) => println!("{:<14}{version:<28}sha256:{digest}", part.name),
            Err(error) => println!("{:<14}{version:<28}not usable: {error}", part.name),
        }
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
            build: digest(&own),
        },
        Part {
            name: "bulkhead-vmm",
            version: told_version(&installed.vmm),
            build: digest(&installed.vmm),
        },
        Part {
            name: "vmlinux",
            version: kernel_version(&installed.kernel),
            build: digest(&installed.kernel),
        },
        Part {
            name: "initramfs",
            version: None,
            build: digest(&installed.initramfs),
        },
    ])
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
