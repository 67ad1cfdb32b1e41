//! A pod in Kubernetes' words: the `runtime.v1.PodSandboxConfig` that containerd hands to its sandbox service. What a machine
//! cannot give is refused by the name that the pod's author wrote; the rest becomes a plan.
//!
//! With such a pod containerd leaves to the shim what it prepares itself for a pause container: the files that every container
//! shows in /etc, and the memory that they share.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use containerd_shim_protos::protobuf::{self, Message, well_known_types::any::Any};

use crate::{
    ids,
    oci::{
        self, HOST_NAMESPACES, PodFiles, PodPaths, PodPlan,
        limits::{self, Limits, Source, Wrong},
    },
};

#[allow(
    missing_docs,
    clippy::all,
    rustdoc::all,
    non_camel_case_types,
    non_upper_case_globals,
    unused
)] // generated code
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::pod::PodSandboxConfig;
use generated::pod::{DNSConfig, NamespaceMode, NamespaceOption};

/// Size of a pod's /dev/shm, in bytes: what containerd gives a pod with a pause container.
const SHM_BYTES: u64 = 64 << 20;
/// Files of the host that a pod's own are copied from.
const HOSTS: &str = "/etc/hosts";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Why a pod cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Options of an unknown kind.
    #[error(
        "the sandbox's options are a {0:?}, which means nothing here: runtime.v1.PodSandboxConfig does"
    )]
    Kind(String),
    /// No protobuf.
    #[error("the sandbox's options cannot be read")]
    Parse(#[source] protobuf::Error),
    /// Something that a machine cannot give.
    #[error("the pod asks for {field}, which is not supported: {reason}")]
    Unsupported {
        /// Its name in Kubernetes.
        field: &'static str,
        /// Why, and what to do instead.
        reason: String,
    },
    /// A name that is none.
    #[error("the pod has the sysctl {0:?}, which cannot be a name")]
    Sysctl(String),
    /// A limit that cannot be meant.
    #[error("the pod's {} {}", .0.field, .0.reason)]
    Limit(Wrong),
    /// A file for its containers.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Reads a sandbox's options. None: a pod that asks for nothing.
///
/// # Errors
/// Options of another kind, and bytes that are no such message.
pub fn parse(options: Option<&Any>) -> Result<PodSandboxConfig, Error> {
    let Some(options) = options.filter(|options| !options.type_url.is_empty()) else {
        return Ok(PodSandboxConfig::default());
    };
    let kind = options.type_url.rsplit('/').next().unwrap_or_default();
    if kind != "runtime.v1.PodSandboxConfig" {
        return Err(Error::Kind(options.type_url.clone()));
    }
    PodSandboxConfig::parse_from_bytes(&options.value).map_err(Error::Parse)
}

/// Refuses what a machine cannot give.
pub fn check(config: &PodSandboxConfig) -> Result<(), Error> {
    let asked = &config.linux.security_context.namespace_options;
    let of_host = |mode: protobuf::EnumOrUnknown<NamespaceMode>| mode == NamespaceMode::NODE.into();
    let modes = [asked.network, asked.pid, asked.ipc].map(of_host);
    let mut table = HOST_NAMESPACES.iter().zip(modes);
    if let Some(((_, field, reason), _)) = table.find(|(_, of_host)| *of_host) {
        let reason = format!("{reason}; run this pod with another runtime class");
        return Err(Error::Unsupported { field, reason });
    }
    if has_user_namespace(asked) {
        return Err(Error::Unsupported {
            field: "hostUsers: false",
            reason: "its containers cannot share a user namespace; a machine keeps the host's users apart already, leave it out"
                .into(),
        });
    }
    for name in config.linux.sysctls.keys() {
        if !oci::is_sysctl(name) {
            return Err(Error::Sysctl(name.clone()));
        }
    }
    Ok(())
}

fn has_user_namespace(asked: &NamespaceOption) -> bool {
    let users = asked.userns_options.as_ref();
    users.is_some_and(|users| users.mode != NamespaceMode::NODE.into())
}

/// What a pod asks for, when nothing of it is refused.
pub fn plan(config: &PodSandboxConfig, id: &str, network: &str, files: PodFiles) -> PodPlan {
    let hostname = match config.hostname.as_str() {
        "" => ids::hostname(id),
        name => name,
    };
    PodPlan {
        hostname: hostname.into(),
        paths: PodPaths {
            pid: None,
            network: (!network.is_empty()).then(|| network.into()),
            shm: Some(files.shm()),
            alone: false,
            has_guest: false,
        },
        shm_bytes: SHM_BYTES,
        sysctls: sysctls(config),
        files: Some(files),
        has_hooks: false,
    }
}

/// The pod's own, over those that containerd 2 gives every pod with a pause container unless it is told otherwise
/// (`enable_unprivileged_ports`, `enable_unprivileged_icmp`): the network is the pod's alone.
fn sysctls(config: &PodSandboxConfig) -> HashMap<String, String> {
    let mut sysctls = HashMap::from([
        ("net.ipv4.ip_unprivileged_port_start".into(), "0".into()),
        ("net.ipv4.ping_group_range".into(), "0 2147483647".into()),
    ]);
    sysctls.extend(config.linux.sysctls.clone());
    sysctls
}

/// What its containers may use together.
///
/// # Errors
/// A number that cannot be meant.
pub fn limits(config: &PodSandboxConfig) -> Result<Limits, Error> {
    let asked = &config.linux.resources;
    let raw = limits::Raw {
        quota: asked.cpu_quota,
        period: asked.cpu_period,
        shares: asked.cpu_shares,
        cpus: asked.cpuset_cpus.clone(),
        memory: asked.memory_limit_in_bytes,
    };
    Ok(Limits {
        overhead: limits::reserved(config.linux.overhead.memory_limit_in_bytes),
        ..raw.read(Source::SandboxApi).map_err(Error::Limit)?
    })
}

/// Its cgroup as config.json names one: beneath the parent, or in the slice when systemd keeps them.
pub fn cgroups_path(config: &PodSandboxConfig, id: &str) -> Option<PathBuf> {
    let parent = Path::new(&config.linux.cgroup_parent);
    let name = parent.file_name()?.to_str()?;
    Some(match name.ends_with(".slice") {
        true => format!("{name}:cri-containerd:{id}").into(),
        false => parent.join(id),
    })
}

/// Writes the files that the pod's containers show in /etc.
pub fn write_files(
    config: &PodSandboxConfig,
    hostname: &str,
    files: &PodFiles,
) -> Result<(), Error> {
    let failed = |path: PathBuf| |source| Error::Write { path, source };
    for directory in [files.etc(), files.shm()] {
        fs::create_dir_all(&directory).map_err(failed(directory))?;
    }
    let resolv_conf = match config.dns_config.as_ref() {
        Some(dns) => resolver(dns),
        None => fs::read_to_string(RESOLV_CONF).unwrap_or_default(),
    };
    // Kubernetes mounts a file of its own over this one.
    let hosts = fs::read_to_string(HOSTS).unwrap_or("127.0.0.1 localhost\n".into());
    let texts = [
        ("hostname", format!("{hostname}\n")),
        ("hosts", hosts),
        ("resolv.conf", resolv_conf),
    ];
    for (name, text) in texts {
        let path = files.etc().join(name);
        fs::write(&path, text).map_err(failed(path))?;
    }
    Ok(())
}

/// resolv.conf(5).
fn resolver(dns: &DNSConfig) -> String {
    let mut text = String::new();
    let mut line = |word: &str, values: &[String]| {
        if !values.is_empty() {
            text.push_str(&format!("{word} {}\n", values.join(" ")));
        }
    };
    line("search", &dns.searches);
    for server in &dns.servers {
        line("nameserver", std::slice::from_ref(server));
    }
    line("options", &dns.options);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(config: &PodSandboxConfig) -> Any {
        Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: config.write_to_bytes().unwrap(),
            ..Any::default()
        }
    }

    #[test]
    fn options_are_read_and_others_are_refused() {
        assert_eq!(parse(None).unwrap(), PodSandboxConfig::default());
        let config = PodSandboxConfig {
            hostname: "h".into(),
            ..Default::default()
        };
        assert_eq!(parse(Some(&any(&config))).unwrap(), config);
        let prefixed = Any {
            type_url: "type.googleapis.com/runtime.v1.PodSandboxConfig".into(),
            ..any(&config)
        };
        assert_eq!(parse(Some(&prefixed)).unwrap(), config);
        let other = Any {
            type_url: "kuasar.PodConfig".into(),
            ..any(&config)
        };
        assert!(
            parse(Some(&other))
                .unwrap_err()
                .to_string()
                .contains("kuasar")
        );
        let broken = Any {
            value: b"\xff\xff".into(),
            ..any(&config)
        };
        parse(Some(&broken)).unwrap_err();
    }

    #[test]
    fn what_is_the_hosts_is_refused_by_its_name() {
        check(&PodSandboxConfig::default()).unwrap();
        type Ask = fn(&mut NamespaceOption);
        let cases: [(Ask, &str); 4] = [
            (|o| o.network = NamespaceMode::NODE.into(), "hostNetwork"),
            (|o| o.pid = NamespaceMode::NODE.into(), "hostPID"),
            (|o| o.ipc = NamespaceMode::NODE.into(), "hostIPC"),
            (
                |o| o.userns_options = Some(Default::default()).into(),
                "hostUsers",
            ),
        ];
        for (ask, field) in cases {
            let mut config = PodSandboxConfig::default();
            let linux = config.linux.mut_or_insert_default();
            let context = linux.security_context.mut_or_insert_default();
            ask(context.namespace_options.mut_or_insert_default());
            let error = check(&config).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
        let mut config = PodSandboxConfig::default();
        let linux = config.linux.mut_or_insert_default();
        linux.sysctls.insert("net/../kernel".into(), "1".into());
        check(&config).unwrap_err();
    }

    #[test]
    fn the_cgroup_is_where_containerd_puts_a_pods() {
        let mut config = PodSandboxConfig::default();
        assert_eq!(cgroups_path(&config, "p"), None);
        let parents = [
            ("/kubepods/pod1", "/kubepods/pod1/p"),
            (
                "/kubepods.slice/kubepods-pod1.slice",
                "kubepods-pod1.slice:cri-containerd:p",
            ),
        ];
        for (parent, path) in parents {
            config.linux.mut_or_insert_default().cgroup_parent = parent.into();
            assert_eq!(cgroups_path(&config, "p").unwrap(), Path::new(path));
        }
    }

    #[test]
    fn the_pods_files_say_what_it_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let files = PodFiles::beneath(dir.path());
        let mut config = PodSandboxConfig::default();
        let dns = config.dns_config.mut_or_insert_default();
        dns.servers = vec!["10.0.0.1".into(), "10.0.0.2".into()];
        dns.searches = vec!["a.b".into(), "c".into()];
        dns.options = vec!["ndots:5".into()];
        write_files(&config, "name", &files).unwrap();
        let text = |name| fs::read_to_string(files.etc().join(name)).unwrap();
        assert_eq!(text("hostname"), "name\n");
        assert_eq!(
            text("resolv.conf"),
            "search a.b c\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
        assert!(!text("hosts").is_empty());
        let plan = plan(&config, "id", "/run/netns/n", files);
        assert_eq!(plan.hostname, "id");
        assert_eq!(
            plan.paths.network.as_deref(),
            Some(Path::new("/run/netns/n"))
        );
    }
}
