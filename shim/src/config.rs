//! `/etc/bulkhead/config.toml`: what the operator decides. Every key has a default, an unknown key
//! is an error.

use std::{
    fs, io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_vmm_config::Layer;
use serde::Deserialize;

/// Read when no other file is named.
pub const DEFAULT_PATH: &str = "/etc/bulkhead/config.toml";

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Unknown key, wrong type, or no TOML.
    #[error("configuration {path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, key and reason.
        message: String,
    },
    /// A value that cannot work.
    #[error("configuration {path}: {key} {reason}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong, and what is allowed.
        reason: String,
    },
    /// The installed files are not where they should be.
    #[error(
        "cannot find the directory of this program, to look for ../libexec/bulkhead beside it; set libexec_dir in the configuration"
    )]
    OwnPath(#[source] io::Error),
}

/// All keys.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where `bulkhead-vmm`, `vmlinux` and `initramfs` are. Default: `../libexec/bulkhead` from
    /// this program.
    pub libexec_dir: Option<PathBuf>,
    /// Another guest kernel than `LIBEXEC/vmlinux`.
    pub kernel: Option<PathBuf>,
    /// Another initial RAM file system than `LIBEXEC/initramfs`.
    pub initramfs: Option<PathBuf>,
    /// Where ledgers and shares are; a file system that a reboot empties.
    pub state_dir: PathBuf,
    /// Where images are unpacked, and what their containers write.
    pub data_dir: PathBuf,
    /// The KVM device.
    pub kvm_device: PathBuf,
    /// Guest memory when nobody asks for another size, in MiB.
    pub memory_mib: u64,
    /// vCPUs when nobody asks for another number.
    pub vcpus: u32,
    /// Most vCPUs that a pod may ask for; 0: as many as the host has processors.
    pub max_vcpus: u32,
    /// Most memory of a machine that a pod may ask for, in MiB; 0: what the host has.
    pub max_memory_mib: u64,
    /// vCPUs that a machine may get beside while it runs, at most; they wait in it. Up to
    /// `max_vcpus`.
    pub spare_vcpus: u32,
    /// Memory that a machine may get beside while it runs, in MiB, at most; it is not there until
    /// then. Up to `max_memory_mib`.
    pub spare_memory_mib: u64,
    /// What a machine has of memory beside the limits of its containers, in MiB.
    pub overhead_mib: u64,
    /// What a pod may take of the host's memory beside its machine's, in MiB.
    pub host_overhead_mib: u64,
    /// Whether pods give memory that they do not use back to the host.
    pub return_memory: bool,
    /// How long a pod must have been idle until page cache of its containers is freed, in seconds;
    /// 0: never.
    pub reclaim_idle_secs: u64,
    /// How long a guest may take until its agent answers, in seconds.
    pub boot_timeout_secs: u64,
    /// First of the uids (and gids) that VMMs run as, one a pod.
    pub uid_base: u32,
    /// How many uids there are: the most pods on this host.
    pub uid_count: u32,
    /// Words appended to the guest kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// Whether pods may connect to sockets of the host's servers that they bind: a way out of their
    /// machines.
    pub host_sockets: bool,
    /// Layers of the jails without which pods start on a host whose kernel lacks them.
    pub accept_missing: Vec<Layer>,
    /// Whether pods go on from templates.
    pub template: Template,
    /// The file share.
    pub share: Share,
    /// Network interfaces.
    pub network: Network,
    /// The audit log.
    pub audit: Audit,
    /// Where it was read, where that is not the default.
    #[serde(skip)]
    pub named: Option<PathBuf>,
}

/// Whether pods go on from machines that were saved, in the place of booting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Template {
    /// Where there is one; the first pod of a kind has one made for the next ones.
    Auto,
    /// Where there is one, which somebody has made by `bulkhead template build`.
    #[default]
    Built,
    /// Never.
    Off,
    /// Always: a pod that cannot fails.
    Required,
}

/// Keys of the `[audit]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Audit {
    /// The file of all pods of this node; empty: none is kept.
    pub path: PathBuf,
    /// How long it may become before the next one is begun, in bytes.
    pub max_bytes: u64,
    /// How many older ones are kept beside it, as `PATH.1` (the newest) and so on.
    pub keep: u32,
}

/// Keys of the `[share]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Share {
    /// How long the guest may trust a looked-up name, in milliseconds.
    pub entry_ms: u64,
    /// How long the guest may trust attributes, in milliseconds.
    pub attr_ms: u64,
    /// Whether the guest keeps a file's data over an open while its size and mtime have not
    /// changed.
    pub keep_data: bool,
    /// Request queues.
    pub queues: u32,
    /// Most inodes that a guest may hold at once.
    pub max_inodes: u64,
    /// Most files that a guest may hold open at once.
    pub max_handles: u64,
}

/// Keys of the `[network]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// Pairs of queues of each interface, at most one for each vCPU; 0: as many as vCPUs.
    pub queues: u32,
    /// What a pod may receive on each interface.
    pub receive: RateLimit,
    /// What a pod may send on each interface.
    pub transmit: RateLimit,
}

/// Keys of the tables `[network.receive]` and `[network.transmit]`; 0: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimit {
    /// Bytes a second.
    pub bytes: u64,
    /// Packets a second.
    pub packets: u64,
    /// Milliseconds of the rate that may come at once after silence; 0: 100.
    pub burst_ms: u32,
}

impl Network {
    /// Pairs of queues for an interface of a machine with this many vCPUs.
    pub fn pairs(&self, vcpus: u32) -> u32 {
        match self.queues {
            0 => vcpus,
            most => vcpus.min(most),
        }
    }
}

impl From<RateLimit> for bulkhead_vmm_config::RateLimit {
    fn from(limit: RateLimit) -> Self {
        bulkhead_vmm_config::RateLimit {
            bytes: limit.bytes,
            packets: limit.packets,
            burst_ms: limit.burst_ms,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            libexec_dir: None,
            kernel: None,
            initramfs: None,
            state_dir: "/run/bulkhead".into(),
            data_dir: "/var/lib/bulkhead".into(),
            kvm_device: "/dev/kvm".into(),
            memory_mib: 512,
            vcpus: 1,
            max_vcpus: 0,
            max_memory_mib: 0,
            spare_vcpus: 1,
            spare_memory_mib: 64 << 10,
            overhead_mib: 64,
            host_overhead_mib: 64,
            return_memory: true,
            reclaim_idle_secs: 60,
            boot_timeout_secs: 60,
            // Above the ranges that login.defs (to 600,100,000), systemd (to 1,879,048,191) and
            // SSSD for the accounts of a directory (to 2,000,200,000) hand out, and below 2^31,
            // from which on some programs take a uid for negative.
            uid_base: 2_130_000_000,
            uid_count: 65_536,
            kernel_arguments: Vec::new(),
            host_sockets: false,
            accept_missing: Vec::new(),
            template: Template::default(),
            share: Share::default(),
            network: Network::default(),
            audit: Audit::default(),
            named: None,
        }
    }
}

impl Default for Audit {
    fn default() -> Self {
        Audit {
            path: "/var/log/bulkhead/audit.jsonl".into(),
            max_bytes: 16 << 20,
            keep: 4,
        }
    }
}

impl Default for Share {
    fn default() -> Self {
        // The pod's own share: the host changes it only through this shim, so a second of trust
        // hides nothing for long.
        Share {
            entry_ms: 1000,
            attr_ms: 1000,
            keep_data: true,
            queues: 1,
            max_inodes: 1 << 20,
            max_handles: 1 << 18,
        }
    }
}

impl Config {
    /// Reads a file. With `None` the default file is read, and its absence means the defaults.
    pub fn load(path: Option<&Path>) -> Result<Config, Error> {
        let (path, must_exist) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => String::new(),
            Err(source) => {
                return Err(Error::Read {
                    path: path.into(),
                    source,
                });
            }
        };
        Ok(Config {
            named: must_exist.then(|| path.into()),
            ..Config::parse(path, &text)?
        })
    }

    fn parse(path: &Path, text: &str) -> Result<Config, Error> {
        let config: Config = toml::from_str(text).map_err(|error| Error::Parse {
            path: path.into(),
            message: describe(text, &error),
        })?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), Error> {
        let wrong = |key, reason: String| {
            Err(Error::Value {
                path: path.into(),
                key,
                reason,
            })
        };
        let absolute = [
            ("libexec_dir", self.libexec_dir.as_deref()),
            ("kernel", self.kernel.as_deref()),
            ("initramfs", self.initramfs.as_deref()),
            ("state_dir", Some(self.state_dir.as_path())),
            ("data_dir", Some(self.data_dir.as_path())),
            ("kvm_device", Some(self.kvm_device.as_path())),
            // An empty one is none.
            (
                "audit.path",
                Some(self.audit.path.as_path()).filter(|path| !path.as_os_str().is_empty()),
            ),
        ];
        for (key, value) in absolute {
            if value.is_some_and(|value| !value.is_absolute()) {
                return wrong(key, "must be an absolute path".into());
            }
        }
        // An overlay's options have them between words.
        if self.data_dir.to_string_lossy().contains([':', ',', '\\']) {
            return wrong("data_dir", "must have no colon, comma or backslash".into());
        }
        if let Some((key, reason)) = self.wrong_size() {
            return wrong(key, reason);
        }
        if self.boot_timeout_secs == 0 {
            return wrong("boot_timeout_secs", "must be at least 1".into());
        }
        let last = self.uid_base.checked_add(self.uid_count);
        if self.uid_base == 0 || self.uid_count == 0 || last.is_none() {
            return wrong(
                "uid_base",
                "and uid_count must name a range of uids without 0".into(),
            );
        }
        if self.share.queues == 0 {
            return wrong("share.queues", "must be at least 1".into());
        }
        if self.audit.max_bytes < MIN_AUDIT_BYTES {
            return wrong(
                "audit.max_bytes",
                format!("must be at least {MIN_AUDIT_BYTES}"),
            );
        }
        if !(1..=MAX_AUDIT_FILES).contains(&self.audit.keep) {
            return wrong("audit.keep", format!("must be 1 to {MAX_AUDIT_FILES}"));
        }
        Ok(())
    }

    /// The first key about sizes that cannot work, and why.
    fn wrong_size(&self) -> Option<(&'static str, String)> {
        let machine = MIN_MEMORY_MIB..=MAX_MEMORY_MIB;
        let (vcpus, most_vcpus) = (u64::from(self.vcpus), u64::from(self.most_vcpus()));
        // Key, value, whether 0 stands for the most, what works.
        let table = [
            ("max_memory_mib", self.max_memory_mib, true, machine),
            (
                "memory_mib",
                self.memory_mib,
                false,
                MIN_MEMORY_MIB..=self.most_memory_mib(),
            ),
            (
                "max_vcpus",
                self.max_vcpus.into(),
                true,
                1..=MAX_VCPUS.into(),
            ),
            ("vcpus", vcpus, false, 1..=most_vcpus),
            (
                "spare_vcpus",
                self.spare_vcpus.into(),
                true,
                1..=MAX_VCPUS.into(),
            ),
            (
                "spare_memory_mib",
                self.spare_memory_mib,
                true,
                1..=MAX_MEMORY_MIB,
            ),
            (
                "overhead_mib",
                self.overhead_mib,
                false,
                0..=MAX_OVERHEAD_MIB,
            ),
            (
                "host_overhead_mib",
                self.host_overhead_mib,
                false,
                MIN_HOST_OVERHEAD_MIB..=MAX_OVERHEAD_MIB,
            ),
        ];
        let works = |value, or_none: bool, range: &RangeInclusive<u64>| {
            range.contains(&value) || or_none && value == 0
        };
        let mut rows = table.into_iter();
        let (key, _, or_none, range) =
            rows.find(|(_, value, or_none, range)| !works(*value, *or_none, range))?;
        let or = if or_none { "0, or " } else { "" };
        Some((
            key,
            format!("must be {or}{} to {}", range.start(), range.end()),
        ))
    }

    /// Most MiB of a machine.
    pub fn most_memory_mib(&self) -> u64 {
        match self.max_memory_mib {
            0 => MAX_MEMORY_MIB,
            most => most,
        }
    }

    /// Most vCPUs of a machine, whatever the host has.
    pub fn most_vcpus(&self) -> u32 {
        match self.max_vcpus {
            0 => MAX_VCPUS,
            most => most,
        }
    }

    /// What the operator has chosen that changes how pods are contained, and by what: key and
    /// value.
    pub fn switches(&self) -> Vec<(&'static str, String)> {
        let default = Config::default();
        let path = |path: &PathBuf| path.display().to_string();
        let paths = [
            ("configuration", &self.named),
            ("libexec_dir", &self.libexec_dir),
            ("kernel", &self.kernel),
            ("initramfs", &self.initramfs),
        ];
        let mut chosen: Vec<_> = paths
            .into_iter()
            .filter_map(|(key, value)| Some((key, path(value.as_ref()?))))
            .collect();
        if self.kvm_device != default.kvm_device {
            chosen.push(("kvm_device", path(&self.kvm_device)));
        }
        if !self.kernel_arguments.is_empty() {
            chosen.push(("kernel_arguments", self.kernel_arguments.join(" ")));
        }
        if self.host_sockets {
            chosen.push(("host_sockets", "true".into()));
        }
        if !self.accept_missing.is_empty() {
            let layers = serde_json::to_string(&self.accept_missing);
            chosen.push(("accept_missing", layers.expect("made of words")));
        }
        chosen
    }

    /// [`Config::boot_timeout_secs`] as a duration.
    pub fn boot_timeout(&self) -> Duration {
        Duration::from_secs(self.boot_timeout_secs)
    }

    /// Where the other parts are installed.
    pub fn installed(&self) -> Result<Installed, Error> {
        let libexec = match &self.libexec_dir {
            Some(directory) => directory.clone(),
            None => {
                let own = std::env::current_exe().map_err(Error::OwnPath)?;
                let bin = own.parent().unwrap_or(Path::new("/"));
                bin.parent().unwrap_or(bin).join("libexec/bulkhead")
            }
        };
        Ok(Installed {
            vmm: libexec.join("bulkhead-vmm"),
            kernel: self
                .kernel
                .clone()
                .unwrap_or_else(|| libexec.join("vmlinux")),
            initramfs: self
                .initramfs
                .clone()
                .unwrap_or_else(|| libexec.join("initramfs")),
        })
    }
}

/// Smallest guest, in MiB (vmm-config).
pub const MIN_MEMORY_MIB: u64 = 48;
/// Largest guest, in MiB (vmm-config).
pub const MAX_MEMORY_MIB: u64 = 256 << 10;
/// Most vCPUs (vmm-config).
pub const MAX_VCPUS: u32 = 32;
/// Most overhead that makes sense, in MiB.
const MAX_OVERHEAD_MIB: u64 = 64 << 10;
/// What an idle pod takes of the host outside of its machine, and some, in MiB.
const MIN_HOST_OVERHEAD_MIB: u64 = 16;

/// Smallest file of the audit log, in bytes: several of the longest lines.
const MIN_AUDIT_BYTES: u64 = 64 << 10;
/// Most older files of it: each rotation looks at all of them.
const MAX_AUDIT_FILES: u32 = 100;

/// The files beside this program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// The VMM's executable, in both roles.
    pub vmm: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The guest's initial RAM file system.
    pub initramfs: PathBuf,
}

/// `line 3: unknown field `x`, expected one of ...` without the picture that the toml crate draws.
fn describe(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().replace('\n', " ");
    match error.span() {
        Some(span) => {
            let line = text[..span.start.min(text.len())].matches('\n').count() + 1;
            format!("line {line}: {message}")
        }
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("c.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn nothing_means_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
        let error = Config::load(Some(Path::new("/nonexistent/c.toml"))).unwrap_err();
        assert!(matches!(error, Error::Read { .. }));
    }

    #[test]
    fn the_example_of_the_documentation_has_every_key_with_its_default() {
        let page = include_str!("../../docs/operations.md");
        let example = page.split("```toml\n").nth(1).unwrap();
        let example = example.split("```").next().unwrap();
        assert_eq!(parse(example).unwrap(), Config::default());
        let table: toml::Table = toml::from_str(example).unwrap();
        let keys = |name: &str| table[name].as_table().unwrap().len();
        assert_eq!((keys("share"), keys("network"), keys("audit")), (6, 3, 3));
        for key in ["libexec_dir", "kernel", "initramfs"] {
            assert!(example.contains(&format!("# {key} = \"/")), "{key}");
        }
    }

    #[test]
    fn keys_are_read() {
        let config = parse("memory_mib = 256\nkernel = \"/k\"\n[share]\nqueues = 2\n").unwrap();
        assert_eq!(config.memory_mib, 256);
        assert_eq!(config.share.queues, 2);
        for (text, template) in [
            ("", Template::Built),
            ("template = \"built\"", Template::Built),
            ("template = \"auto\"", Template::Auto),
            ("template = \"off\"", Template::Off),
            ("template = \"required\"", Template::Required),
        ] {
            assert_eq!(parse(text).unwrap().template, template);
        }
        assert!(
            !config.host_sockets,
            "a way out of the machine is opened by hand"
        );
        assert!(parse("host_sockets = true").unwrap().host_sockets);
        let accepting = parse("accept_missing = [\"landlock\"]").unwrap();
        assert_eq!(accepting.accept_missing, [Layer::Landlock]);
        assert_eq!(config.installed().unwrap().kernel, Path::new("/k"));
        let silent = parse("[audit]\npath = \"\"\n").unwrap();
        assert_eq!(silent.audit.path, Path::new(""));
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let error = parse("vcpus = 2\nmemroy_mib = 256\n").unwrap_err();
        assert!(
            error.contains("line 2") && error.contains("`memroy_mib`"),
            "{error}"
        );
        let error = parse("accept_missing = [\"landlok\"]").unwrap_err();
        assert!(
            error.contains("line 1") && error.contains("`landlok`"),
            "{error}"
        );
        let error = parse("template = true").unwrap_err();
        assert!(error.contains("line 1"), "{error}");
        let error = parse("template = \"on\"").unwrap_err();
        assert!(
            error.contains("`on`") && error.contains("`required`"),
            "{error}"
        );
        let error = parse("[share]\nqueue = 2\n").unwrap_err();
        assert!(
            error.contains("line 2") && error.contains("`queue`"),
            "{error}"
        );
    }

    #[test]
    fn values_that_cannot_work_are_refused() {
        for (text, key) in [
            ("memory_mib = 47", "memory_mib"),
            ("memory_mib = 262145", "memory_mib"),
            (
                "memory_mib = 300\nmax_memory_mib = 299",
                "memory_mib must be 48 to 299",
            ),
            ("max_memory_mib = 47", "max_memory_mib must be 0, or 48"),
            ("max_vcpus = 33", "max_vcpus must be 0, or 1 to 32"),
            ("vcpus = 3\nmax_vcpus = 2", "vcpus must be 1 to 2"),
            ("overhead_mib = 65537", "overhead_mib"),
            ("host_overhead_mib = 15", "host_overhead_mib must be 16"),
            ("vcpus = 33", "vcpus"),
            ("vcpus = 0", "vcpus"),
            ("boot_timeout_secs = 0", "boot_timeout_secs"),
            ("uid_base = 0", "uid_base"),
            ("uid_base = 4294967295", "uid_base"),
            ("state_dir = \"run\"", "state_dir"),
            ("data_dir = \"run\"", "data_dir"),
            ("data_dir = \"/a:b\"", "data_dir"),
            ("vcpus = \"two\"", "line 1"),
            ("memory_mib = -1", "line 1"),
            ("[audit]\npath = \"audit\"", "audit.path"),
            ("[audit]\nmax_bytes = 1000", "audit.max_bytes"),
            ("[audit]\nkeep = 0", "audit.keep"),
            ("[audit]\nkeep = 101", "audit.keep"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(key), "{text}: {error}");
        }
    }
}
