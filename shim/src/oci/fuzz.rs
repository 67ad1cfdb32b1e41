//! Configurations that an image, an engine or a user of Kubernetes writes.

use protobuf::Message;
use tempfile::TempDir;

use super::*;
use crate::{config::Config, pod::Size};

thread_local! {
    /// A bundle's directory with what the configurations of the corpus name.
    static BUNDLE: TempDir = {
        let dir = tempfile::tempdir().unwrap();
        for name in ["rootfs", "volume"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("file"), "").unwrap();
        dir
    };
}

/// What every plan keeps to, whatever the configuration says.
fn sound(plan: &Plan, directory: &Path) {
    let container = &plan.container;
    let bytes = container.write_to_bytes().expect("the agent can be told");
    let told = agent::Container::parse_from_bytes(&bytes).unwrap();
    assert_eq!(&told, container);
    // No path of the host reaches the agent.
    let directory = directory.as_os_str().as_encoded_bytes();
    assert!(
        !bytes
            .windows(directory.len())
            .any(|window| window == directory)
    );
    for path in container
        .masked_paths
        .iter()
        .chain(&container.readonly_paths)
    {
        assert!(path.starts_with('/'), "{path:?}");
    }
    assert!(container.sysctls.keys().all(|name| is_sysctl(name)));
    assert_eq!(container.cgroup, "pod/c1");
    let binds = container
        .mounts
        .iter()
        .filter(|mount| mount.source.is_empty());
    assert!(plan.binds.len() <= binds.count());
    plan.mount_points();
    plan.owner();
}

/// Any config.json, alone, in a pod and as a pod.
fn config(data: &[u8]) {
    let Ok(spec) = parse(data) else { return };
    BUNDLE.with(|dir| {
        let bundle = Bundle {
            directory: dir.path().canonicalize().unwrap(),
            spec,
        };
        if let Ok(plan) = plan(&bundle, "c1") {
            sound(&plan, &bundle.directory);
        }
        let pod = PodPaths {
            pid: Some(42),
            network: Some("/run/netns/pod".into()),
            alone: false,
            has_guest: true,
            shm: Some("/dev".into()),
        };
        for from in [RootFrom::Bundle, RootFrom::Mounts] {
            if let Ok(plan) = plan_in_pod(&bundle, "c1", &pod, from) {
                sound(&plan, &bundle.directory);
            }
        }
        let _ = check_sandbox(&bundle);
        if let Ok(plan) = pod_plan(&bundle) {
            assert!(
                plan.hostname.len() <= 64 || plan.hostname.is_empty(),
                "{plan:?}"
            );
        }
        let annotations = bundle.spec.annotations().clone().unwrap_or_default();
        role(&annotations, "c1");
    });
}

/// What engines send beside it: an exec's process, new limits, a sandbox's options.
fn requests(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    match kind % 3 {
        0 => drop(exec_process(rest, &agent::Process::default())),
        1 => {
            if let Ok((resources, _)) = new_limits(rest) {
                assert!(resources.devices.is_empty() && !resources.set_devices);
            }
        }
        _ => {
            let options = protobuf::well_known_types::any::Any {
                type_url: "x/runtime.v1.PodSandboxConfig".into(),
                value: rest.to_vec(),
                ..Default::default()
            };
            let Ok(config) = cri::parse(Some(&options)) else {
                return;
            };
            if cri::check(&config).is_ok() {
                let files = PodFiles::beneath(Path::new("/nowhere"));
                let plan = cri::plan(&config, "pod", "", files);
                assert!(plan.sysctls.keys().all(|name| is_sysctl(name)));
            }
            if let Ok(limits) = cri::limits(&config) {
                assert_ne!(limits.memory, Some(0));
                let _ = Size::of(&limits, &Config::default());
            }
            cri::cgroups_path(&config, "pod");
        }
    }
}

#[test]
fn fuzz_config_json() {
    bulkhead_fuzz::run("config_json", config);
}

#[test]
fn fuzz_engine_requests() {
    bulkhead_fuzz::run("engine_requests", requests);
}
