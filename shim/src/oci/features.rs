//! The features document of the OCI runtime specification (features.md): engines decide by it what they may ask for. Each list is made
//! from the table by which config.json is converted, so that it names what is done and nothing else.

use oci_spec::runtime::{
    Apparmor, Cgroup, Features, IDMap, IntelRdt, LinuxFeature, MemoryPolicy, MountExtensions,
    NetDevices, Seccomp, Selinux,
};

use super::{hooks, namespaces, numbers, options, pod, seccomp};

/// The first and the last version of the specification whose configurations are understood.
const VERSIONS: [&str; 2] = ["1.0.0", "1.3.0"];
/// Annotation with this program's version.
const VERSION: &str = "io.containerd.bulkhead.version";

/// What is done for a configuration.
pub fn features() -> Features {
    let [first, last] = VERSIONS.map(String::from);
    let version = (VERSION.into(), env!("CARGO_PKG_VERSION").into());
    let mut features = Features::default();
    features
        .set_oci_version_min(first)
        .set_oci_version_max(last)
        .set_hooks(Some(words(hooks::NAMES.iter().copied())))
        .set_mount_options(Some(words(options::known())))
        .set_linux(Some(linux()))
        .set_annotations(Some([version].into()))
        // Who can set them joins another pod's machine.
        .set_potentially_unsafe_config_annotations(Some(words(pod::annotations())));
    features
}

fn linux() -> LinuxFeature {
    let mut cgroup = Cgroup::default();
    cgroup
        .set_v1(Some(false))
        .set_v2(Some(true))
        .set_systemd(Some(false))
        .set_systemd_user(Some(false))
        .set_rdma(Some(false));
    let (mut apparmor, mut selinux) = (Apparmor::default(), Selinux::default());
    apparmor.set_enabled(Some(false));
    selinux.set_enabled(Some(false));
    let (mut rdt, mut devices) = (IntelRdt::default(), NetDevices::default());
    rdt.set_enabled(Some(false));
    devices.set_enabled(Some(false));
    let mut memory_policy = MemoryPolicy::default();
    memory_policy
        .set_modes(Some(Vec::new()))
        .set_flags(Some(Vec::new()));
    let (mut idmap, mut mounts) = (IDMap::default(), MountExtensions::default());
    idmap.set_enabled(Some(true));
    mounts.set_idmap(Some(idmap));
    let kinds = namespaces::KINDS.iter().map(|(kind, _)| *kind);
    let mut linux = LinuxFeature::default();
    linux
        .set_namespaces(Some(kinds.collect()))
        .set_capabilities(Some(numbers::capabilities()))
        .set_cgroup(Some(cgroup))
        .set_seccomp(Some(filters()))
        .set_apparmor(Some(apparmor))
        .set_selinux(Some(selinux))
        .set_intel_rdt(Some(rdt))
        .set_memory_policy(Some(memory_policy))
        .set_mount_extensions(Some(mounts))
        .set_net_devices(Some(devices));
    linux
}

fn filters() -> Seccomp {
    let flags = || seccomp::FLAGS.iter();
    let supported = flags().filter(|(_, bits)| bits.is_some());
    let mut seccomp = Seccomp::default();
    seccomp
        .set_enabled(Some(true))
        .set_actions(Some(seccomp::ACTIONS.iter().map(|(a, _)| *a).collect()))
        .set_operators(Some(words(seccomp::OPERATORS.iter().map(|(o, _)| o))))
        .set_archs(Some(
            seccomp::ARCHITECTURES.iter().map(|(a, _)| *a).collect(),
        ))
        .set_known_flags(Some(words(flags().map(|(flag, _)| flag))))
        .set_supported_flags(Some(words(supported.map(|(flag, _)| flag))));
    seccomp
}

fn words(list: impl Iterator<Item = impl ToString>) -> Vec<String> {
    list.map(|word| word.to_string()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use serde_json::{Value, json};

    use super::*;

    fn document() -> Value {
        serde_json::to_value(features()).unwrap()
    }

    fn list(document: &Value, pointer: &str) -> Vec<String> {
        let found = document.pointer(pointer).expect(pointer);
        let words: Vec<String> = serde_json::from_value(found.clone()).expect(pointer);
        let once: HashSet<&String> = words.iter().collect();
        assert_eq!(once.len(), words.len(), "{pointer} lists a word twice");
        words
    }

    #[test]
    fn engines_find_what_they_look_for() {
        let document = document();
        let has = |pointer, words: &[&str]| {
            let listed = list(&document, pointer);
            for word in words {
                assert!(listed.iter().any(|l| l == word), "{pointer} lacks {word}");
            }
            listed.len()
        };
        // containerd looks for "rro" before it asks for recursively read-only mounts.
        has(
            "/mountOptions",
            &[
                "rro",
                "ro",
                "rbind",
                "idmap",
                "ridmap",
                "rshared",
                "tmpcopyup",
            ],
        );
        let hooks = [
            "prestart",
            "createRuntime",
            "startContainer",
            "poststart",
            "poststop",
        ];
        assert_eq!(has("/hooks", &hooks), hooks.len());
        let kinds = [
            "cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts",
        ];
        assert_eq!(has("/linux/namespaces", &kinds), kinds.len());
        assert_eq!(
            has(
                "/linux/capabilities",
                &["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_BPF"]
            ),
            41
        );
        has(
            "/linux/seccomp/actions",
            &["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"],
        );
        let operators = ["SCMP_CMP_NE", "SCMP_CMP_EQ", "SCMP_CMP_MASKED_EQ"];
        assert_eq!(has("/linux/seccomp/operators", &operators), 7);
        has(
            "/linux/seccomp/archs",
            &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        );
        assert_eq!(
            has("/linux/seccomp/knownFlags", &["SECCOMP_FILTER_FLAG_TSYNC"]),
            4
        );
        assert_eq!(
            has(
                "/linux/seccomp/supportedFlags",
                &["SECCOMP_FILTER_FLAG_LOG"]
            ),
            3
        );
        has(
            "/potentiallyUnsafeConfigAnnotations",
            &["io.kubernetes.cri.sandbox-id"],
        );
        for (pointer, value) in [
            ("/linux/mountExtensions/idmap/enabled", json!(true)),
            ("/linux/cgroup/v2", json!(true)),
            ("/linux/apparmor/enabled", json!(false)),
            ("/linux/netDevices/enabled", json!(false)),
            ("/ociVersionMin", json!("1.0.0")),
        ] {
            assert_eq!(document.pointer(pointer), Some(&value), "{pointer}");
        }
        assert!(
            !document.to_string().contains("null"),
            "unknown is no answer: {document}"
        );
        serde_json::from_value::<Features>(document).unwrap();
    }

    #[test]
    fn what_is_refused_is_not_listed() {
        let document = document();
        let lacks = |pointer, word: &str| {
            let listed = list(&document, pointer);
            assert!(!listed.iter().any(|l| l == word), "{pointer} has {word}");
        };
        lacks("/hooks", "createContainer");
        lacks("/linux/seccomp/actions", "SCMP_ACT_NOTIFY");
        lacks("/linux/seccomp/archs", "SCMP_ARCH_AARCH64");
        lacks(
            "/linux/seccomp/supportedFlags",
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
        );
    }
}
