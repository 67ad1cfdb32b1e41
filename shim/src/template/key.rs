//! What a template was made from: two machines of which all of it is equal are one until their
//! agents are told something.

use std::{
    fmt,
    fs::{File, Metadata},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Counts what a template consists of and how it is kept; the VMM's own format is its file's.
const FORMAT: u32 = 1;
/// Bytes of a digest that make a name.
const NAME: usize = 16;
/// Where the first processor has been described, in bytes of /proc/cpuinfo.
const PROCESSOR: u64 = 4 << 10;

/// All that must be equal. Nothing of it costs more than a few system calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Basis {
    format: u32,
    /// The VMM's program.
    pub vmm: Identity,
    /// vmlinux.
    pub kernel: Identity,
    /// The guest's image.
    pub initrd: Identity,
    /// Where it was made.
    pub host: Host,
    /// The machine.
    pub shape: Shape,
}

/// A file as it was when it was looked at: another one in its place, or other bytes in it, have
/// another of these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    mtime_ns: i64,
    ctime_ns: i64,
}

/// What a saved machine depends on beside what it is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Release and version.
    pub kernel: String,
    /// Vendor, family, model, stepping and microcode.
    pub processor: String,
    /// Its boot: what the kernel was told then may hide features of the processor, and clocks were
    /// measured anew.
    pub boot: String,
}

/// What the guest has seen of its machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// From the start.
    pub vcpus: u32,
    /// That wait.
    pub spare_vcpus: u32,
    /// MiB.
    pub memory_mib: u64,
    /// MiB that may be plugged.
    pub spare_memory_mib: u64,
    /// Words of the operator's on the command line.
    pub kernel_arguments: Vec<String>,
    /// Of the share.
    pub share_tag: String,
    /// Of the share.
    pub share_queues: u32,
    /// Places for network devices; they come later, all of them.
    pub net_slots: u32,
    /// Whether it can give memory back.
    pub balloon: bool,
}

/// The name of a template.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Key(String);

impl Basis {
    /// Of a machine that is made now.
    pub fn new([vmm, kernel, initrd]: [Identity; 3], host: Host, shape: Shape) -> Basis {
        let format = FORMAT;
        Basis {
            format,
            vmm,
            kernel,
            initrd,
            host,
            shape,
        }
    }

    /// The name of its template.
    pub fn key(&self) -> Key {
        let text = serde_json::to_vec(self).expect("made of strings and numbers");
        let digest = Sha256::digest(text);
        let digits = digest.iter().take(NAME).map(|byte| format!("{byte:02x}"));
        Key(digits.collect())
    }

    /// Why no pod will ever have this basis again, if that can be told.
    pub fn outdated(&self, host: &Host) -> Option<String> {
        if self.format != FORMAT {
            return Some("another version of bulkhead has made it".into());
        }
        if self.host != *host {
            return Some("it was made under another kernel, or on another processor".into());
        }
        let mut files = [&self.vmm, &self.kernel, &self.initrd].into_iter();
        let changed = files.find(|file| !file.is_there())?;
        Some(format!("{} has changed since", changed.path.display()))
    }
}

impl Identity {
    /// Of an open file, which was found at `path`.
    pub fn of(path: &Path, file: &Metadata) -> Identity {
        Identity {
            path: path.into(),
            device: file.dev(),
            inode: file.ino(),
            size: file.size(),
            mtime_ns: ns(file.mtime(), file.mtime_nsec()),
            ctime_ns: ns(file.ctime(), file.ctime_nsec()),
        }
    }

    fn is_there(&self) -> bool {
        let found = self.path.metadata();
        found.is_ok_and(|found| Identity::of(&self.path, &found) == *self)
    }
}

/// A time of a file, in ns.
pub(super) fn ns(seconds: i64, ns: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(ns)
}

impl Host {
    /// This one.
    ///
    /// # Errors
    /// There is no /proc.
    pub fn here() -> io::Result<Host> {
        let name = nix::sys::utsname::uname()?;
        let [release, version] =
            [name.release(), name.version()].map(|text| text.to_string_lossy());
        let mut text = Vec::new();
        let file = File::open("/proc/cpuinfo")?;
        file.take(PROCESSOR).read_to_end(&mut text)?;
        Ok(Host {
            kernel: format!("{release} {version}"),
            processor: processor(&String::from_utf8_lossy(&text)),
            boot: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
                .trim()
                .into(),
        })
    }
}

/// The first processor's; a virtual one may have no microcode.
fn processor(cpuinfo: &str) -> String {
    const NAMES: [&str; 5] = ["vendor_id", "cpu family", "model", "stepping", "microcode"];
    let lines = || cpuinfo.lines().filter_map(|line| line.split_once(':'));
    let value = |name| lines().find(|(found, _)| found.trim() == name);
    let values = NAMES.map(|name| value(name).map_or("-", |(_, value)| value.trim()));
    values.join(" ")
}

impl Key {
    /// From a name as `bulkhead template ls` prints it.
    pub fn parse(name: &str) -> Option<Key> {
        let digit = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
        let is_key = name.len() == 2 * NAME && name.bytes().all(digit);
        is_key.then(|| Key(name.into()))
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
