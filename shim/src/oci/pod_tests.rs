//! What an engine's configurations mean beside a lone bundle's.

use serde_json::{Value, json};

use super::*;
use bulkhead_agent_protocol::agent::namespaces::Kind;

fn bundle(change: impl FnOnce(&mut Value)) -> (tempfile::TempDir, Bundle) {
    let mut config = json!({
        "ociVersion": "1.1.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/", "apparmorProfile": "cri-containerd.apparmor.d"},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/dev/shm", "type": "bind", "source": "/dev", "options": ["rbind", "rw"]}],
        "linux": {"namespaces": [
            {"type": "mount"},
            {"type": "pid"},
            {"type": "ipc", "path": "/proc/42/ns/ipc"},
            {"type": "network", "path": "/run/netns/pod"}
        ]}
    });
    change(&mut config);
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("rootfs")).unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let bundle = Bundle::load(dir.path()).unwrap();
    (dir, bundle)
}

fn paths() -> PodPaths {
    PodPaths {
        pid: Some(42),
        network: Some("/run/netns/pod".into()),
        alone: false,
        has_guest: false,
        shm: Some("/dev".into()),
    }
}

#[test]
fn a_members_paths_are_the_pods() {
    let (_dir, bundle) = bundle(|_| ());
    let plan = plan_in_pod(&bundle, "c", &paths(), RootFrom::Bundle).unwrap();
    let namespaces = &plan.container.namespaces;
    assert_eq!(namespaces.ipc, Kind::SANDBOX.into());
    assert_eq!(namespaces.network, Kind::SANDBOX.into());
    assert_eq!(namespaces.pid, Kind::NEW.into());
    assert_eq!(plan.container.mounts[0].source, GUEST_SHM);
    assert!(plan.binds.is_empty());
}

#[test]
fn a_root_that_comes_as_mounts_needs_no_directory_in_the_bundle() {
    let (dir, bundle) = bundle(|_| ());
    fs::remove_dir(dir.path().join("rootfs")).unwrap();
    plan_in_pod(&bundle, "c", &paths(), RootFrom::Mounts).unwrap();
    let error = plan_in_pod(&bundle, "c", &paths(), RootFrom::Bundle).unwrap_err();
    assert!(error.to_string().contains("rootfs"), "{error}");
    // Whatever is there is not looked at.
    fs::write(dir.path().join("rootfs"), "").unwrap();
    plan_in_pod(&bundle, "c", &paths(), RootFrom::Mounts).unwrap();
}

#[test]
fn paths_of_others_are_refused() {
    let (_dir, bundle) = bundle(|_| ());
    let other = PodPaths {
        pid: Some(43),
        ..paths()
    };
    let error = plan_in_pod(&bundle, "c", &other, RootFrom::Bundle)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("linux.namespaces: ipc with a path"),
        "{error}"
    );
}

#[test]
fn a_member_without_a_namespace_that_others_would_share_is_refused() {
    for kind in ["pid", "network", "mount"] {
        let (_dir, bundle) = bundle(|config| {
            let listed = config["linux"]["namespaces"].as_array_mut().unwrap();
            listed.retain(|namespace| namespace["type"] != kind);
        });
        let error = plan_in_pod(&bundle, "c", &paths(), RootFrom::Bundle)
            .unwrap_err()
            .to_string();
        assert!(error.contains(&format!("without {kind}")), "{error}");
    }
    let (_dir, bundle) = bundle(|config| {
        let listed = config["linux"]["namespaces"].as_array_mut().unwrap();
        listed.retain(|namespace| namespace["type"] != "ipc");
    });
    let plan = plan_in_pod(&bundle, "c", &paths(), RootFrom::Bundle).unwrap();
    assert_eq!(plan.container.namespaces.ipc, Kind::AGENT.into());
}

#[test]
fn an_engines_default_profile_is_ignored_and_a_chosen_one_is_not() {
    let (_dir, chosen) = bundle(|config| {
        config["process"]["apparmorProfile"] = json!("mine");
    });
    let error = plan_in_pod(&chosen, "c", &paths(), RootFrom::Bundle)
        .unwrap_err()
        .to_string();
    assert!(error.contains("process.apparmorProfile"), "{error}");
    // Without an engine nobody sets a default.
    let (_dir, lone) = bundle(|config| {
        config["linux"]["namespaces"] =
            json!([{"type": "mount"}, {"type": "pid"}, {"type": "network"}]);
        config["mounts"] = json!([]);
    });
    let error = plan(&lone, "c").unwrap_err().to_string();
    assert!(error.contains("process.apparmorProfile"), "{error}");
}

#[test]
fn a_pod_is_read_from_its_own_container() {
    let (_dir, bundle) = bundle(|config| {
        config["hostname"] = json!("pod");
        config["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
    });
    check_sandbox(&bundle).unwrap();
    let pod = pod_plan(&bundle).unwrap();
    assert_eq!(pod.hostname, "pod");
    assert_eq!(
        pod.paths.network.as_deref(),
        Some(Path::new("/run/netns/pod"))
    );
    assert!(pod.shm_bytes > 0 && pod.sysctls.len() == 1);
}

#[test]
fn only_a_lone_container_whose_namespace_may_be_filled_later_has_room_for_interfaces() {
    let hook = json!([{"path": "/bin/true"}]);
    let rooms = |named: bool, hooks: Value| {
        let (_dir, bundle) = bundle(|config| {
            config["hooks"] = hooks;
            if !named {
                config["linux"]["namespaces"][3] = json!({"type": "network"});
            }
        });
        let mut pod = pod_plan(&bundle).unwrap();
        let in_a_pod = pod.later_interfaces();
        pod.paths.alone = true;
        pod.paths.has_guest = true;
        [in_a_pod, pod.later_interfaces()]
    };
    assert_eq!(rooms(true, json!({})), [0, 0]);
    assert_eq!(rooms(true, json!({"poststart": hook})), [0, 0]);
    assert_eq!(rooms(true, json!({"createRuntime": hook})), [0, 4]);
    assert_eq!(rooms(true, json!({"prestart": hook})), [0, 4]);
    assert_eq!(rooms(false, json!({})), [0, 4]);
}

#[test]
fn namespaces_of_the_node_are_refused_by_kubernetes_words() {
    for (kind, word) in [
        ("network", "hostNetwork"),
        ("pid", "hostPID"),
        ("ipc", "hostIPC"),
    ] {
        let (_dir, bundle) = bundle(|config| {
            let listed = config["linux"]["namespaces"].as_array_mut().unwrap();
            listed.retain(|namespace| namespace["type"] != kind);
        });
        let error = check_sandbox(&bundle).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}
