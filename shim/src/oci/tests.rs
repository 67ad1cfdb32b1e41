//! Whole configurations: what `runc spec` writes, and one change at a time to it.

use bulkhead_agent_protocol::agent::namespaces::Kind;
use serde_json::{Value, json};

use super::*;

/// The output of `runc spec` 1.1.15, by our own hand: same fields, same values.
fn runc_spec() -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    json!({
        "ociVersion": "1.0.2-dev",
        "process": {
            "terminal": true,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities, "ambient": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "runc",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/acpi", "/proc/kcore"],
            "readonlyPaths": ["/proc/bus", "/proc/sys"]
        }
    })
}

/// Plans a bundle with this configuration.
fn planned(config: &Value) -> Result<Plan, String> {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("rootfs")).unwrap();
    fs::create_dir(dir.path().join("volume")).unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let told = |error: Error| match std::error::Error::source(&error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    };
    let bundle = Bundle::load(dir.path()).map_err(told)?;
    plan(&bundle, "c1").map_err(told)
}

/// `runc spec` with the value at a JSON pointer replaced.
fn with(pointer: &str, value: Value) -> Value {
    let mut config = runc_spec();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let parent = config.pointer_mut(parent).unwrap();
    match parent.as_array_mut() {
        Some(list) => list.push(value),
        None => drop(parent.as_object_mut().unwrap().insert(key.into(), value)),
    }
    config
}

fn refusal(pointer: &str, value: Value) -> String {
    planned(&with(pointer, value)).expect_err(pointer)
}

#[test]
fn runc_spec_is_converted_whole() {
    let plan = planned(&runc_spec()).unwrap();
    let container = &plan.container;
    assert_eq!(container.root, "", "known when the share has it");
    assert!(container.root_readonly && plan.root.read_only);
    assert_eq!(container.root_propagation, 0);
    assert_eq!(
        (container.hostname.as_str(), container.cgroup.as_str()),
        ("runc", "pod/c1")
    );
    let namespaces = &container.namespaces;
    for kind in [
        &namespaces.pid,
        &namespaces.mount,
        &namespaces.uts,
        &namespaces.ipc,
        &namespaces.cgroup,
    ] {
        assert_eq!(*kind, Kind::NEW.into());
    }
    // The only container of its pod has the pod's network.
    assert_eq!(namespaces.network, Kind::SANDBOX.into());
    assert_eq!(namespaces.user, Kind::AGENT.into());
    assert_eq!(container.mounts.len(), 7);
    let dev = &container.mounts[1];
    assert_eq!(
        (dev.fstype.as_str(), dev.data.as_str()),
        ("tmpfs", "mode=755,size=65536k")
    );
    assert_eq!(dev.flags, libc::MS_NOSUID | libc::MS_STRICTATIME);
    assert_eq!(container.mounts[3].source, "shm");
    assert_eq!(container.mounts[6].flags & libc::MS_RDONLY, libc::MS_RDONLY);
    assert!(plan.binds.is_empty());
    let process = &container.process;
    assert!(process.terminal && process.no_new_privileges);
    assert_eq!(process.args, ["sh"]);
    assert_eq!(process.umask, -1);
    let capabilities = (1 << 29) | (1 << 5) | (1 << 10);
    assert_eq!(process.capabilities.bounding, capabilities);
    assert_eq!(process.capabilities.inheritable, 0);
    assert_eq!(process.rlimits[0].resource, libc::RLIMIT_NOFILE);
    assert_eq!(container.masked_paths.len(), 2);
    let rule = &container.resources.devices[0];
    assert_eq!(
        (rule.allow, rule.kind, rule.major, rule.minor, rule.access),
        (false, 'a' as u32, -1, -1, 7)
    );
    assert!(plan.host_limits.is_empty() && plan.hooks == HostHooks::default());
}

#[test]
fn bind_mounts_go_through_the_share() {
    let mut config = runc_spec();
    let mounts = config["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/data", "type": "bind", "source": "volume", "options": ["rbind", "ro", "rslave"]}));
    mounts.push(
        json!({"destination": "etc/file", "source": "file", "options": ["bind", "rro", "noexec"]}),
    );
    mounts.push(json!({"destination": "/masked", "type": "bind", "source": "/dev/null", "options": ["bind"]}));
    let plan = planned(&config).unwrap();
    let mounts = &plan.container.mounts[7..];
    assert_eq!(mounts[0].source, "");
    assert_eq!(mounts[0].fstype, "");
    assert_eq!(
        mounts[0].flags,
        libc::MS_BIND | libc::MS_REC | libc::MS_RDONLY
    );
    assert_eq!(mounts[0].propagation, [libc::MS_SLAVE | libc::MS_REC]);
    assert_eq!(
        (mounts[1].source.as_str(), mounts[1].destination.as_str()),
        ("", "/etc/file")
    );
    assert_eq!(mounts[2].source, "/dev/null", "the guest's own");
    assert_eq!(plan.binds.len(), 2);
    let (volume, file) = (&plan.binds[0], &plan.binds[1]);
    assert!(volume.directory && volume.recursive && volume.read_only && !volume.read_only_whole);
    assert_eq!(volume.propagation, HostPropagation::Slave);
    assert!(!file.directory && !file.recursive && file.read_only_whole);
    assert_eq!((volume.mount, file.mount), (7, 8));
    assert_eq!(file.propagation, HostPropagation::Private);
}

#[test]
fn every_unsupported_feature_is_refused_by_its_name() {
    for (pointer, value, name) in [
        (
            "/process/apparmorProfile",
            json!("p"),
            "process.apparmorProfile",
        ),
        ("/process/selinuxLabel", json!("l"), "process.selinuxLabel"),
        ("/linux/mountLabel", json!("l"), "linux.mountLabel"),
        ("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt"),
        (
            "/linux/netDevices",
            json!({"eth0": {"name": "e"}}),
            "linux.netDevices",
        ),
        (
            "/linux/memoryPolicy",
            json!({"mode": "MPOL_INTERLEAVE"}),
            "linux.memoryPolicy",
        ),
        (
            "/linux/personality",
            json!({"domain": "LINUX", "flags": ["ADDR_NO_RANDOMIZE"]}),
            "linux.personality.flags",
        ),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            "SCMP_ACT_NOTIFY",
        ),
        (
            "/linux/resources/network",
            json!({"classID": 3}),
            "linux.resources.network",
        ),
        (
            "/hooks",
            json!({"createContainer": [{"path": "/x"}]}),
            "hooks.createContainer",
        ),
        ("/vm", json!({"kernel": {"path": "/k"}}), "vm"),
        (
            "/linux/devices",
            json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]),
            "/dev/sda (8:0)",
        ),
        (
            "/linux/devices",
            json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]),
            "/dev/kvm",
        ),
        (
            "/linux/namespaces/-",
            json!({"type": "user", "path": "/proc/1/ns/user"}),
            "user with a path",
        ),
        (
            "/linux/namespaces",
            json!([{"type": "pid"}, {"type": "network"}]),
            "without mount",
        ),
        (
            "/mounts/-",
            json!({"destination": "/x", "type": "ext4", "source": "/dev/sda1"}),
            "(/x): type",
        ),
        (
            "/mounts/-",
            json!({"destination": "/x", "type": "bind", "source": "/proc/sys", "options": ["rbind"]}),
            "host's proc",
        ),
        (
            "/mounts/-",
            json!({"destination": "/x", "type": "bind", "source": "/sys", "options": ["rbind"]}),
            "host's sysfs",
        ),
    ] {
        let error = refusal(pointer, value);
        assert!(
            error.contains(name) && error.contains("is not supported"),
            "{pointer}: {error}"
        );
    }
}

#[test]
fn a_shared_mount_is_refused_to_whoever_could_mount_in_it() {
    let shared = json!({"destination": "/x", "type": "bind", "source": "volume", "options": ["rbind", "rshared"]});
    let mut config = with("/mounts/-", shared);
    let plan = planned(&config).unwrap();
    let flags = libc::MS_SLAVE | libc::MS_REC;
    assert_eq!(plan.container.mounts.last().unwrap().propagation, [flags]);
    assert_eq!(plan.binds[0].propagation, HostPropagation::Slave);
    for bounding in [json!({"bounding": ["CAP_SYS_ADMIN"]}), json!({})] {
        config["process"]["capabilities"] = bounding;
        let error = planned(&config).unwrap_err();
        assert!(
            error.contains("shared propagation is not supported"),
            "{error}"
        );
    }
}

#[test]
fn contradictions_are_refused_with_the_field() {
    for (pointer, value, name) in [
        ("/ociVersion", json!("2.0.0"), "ociVersion"),
        ("/process/args", json!([]), "process.args"),
        ("/process/cwd", json!("relative"), "process.cwd"),
        (
            "/process/rlimits/-",
            json!({"type": "RLIMIT_NOFILE", "hard": 1, "soft": 1}),
            "RLIMIT_NOFILE twice",
        ),
        (
            "/process/rlimits/-",
            json!({"type": "RLIMIT_CORE", "hard": 1, "soft": 2}),
            "RLIMIT_CORE",
        ),
        (
            "/process/rlimits/-",
            json!({"type": "RLIMIT_NONE", "hard": 1, "soft": 2}),
            "RLIMIT_NONE",
        ),
        (
            "/process/ioPriority",
            json!({"class": "IOPRIO_CLASS_BE", "priority": 8}),
            "process.ioPriority",
        ),
        ("/root/path", json!("absent"), "absent"),
        ("/root/path", json!("file"), "is not a directory"),
        ("/linux/namespaces/-", json!({"type": "pid"}), "pid twice"),
        (
            "/linux/namespaces/-",
            json!({"type": "user"}),
            "linux.uidMappings",
        ),
        (
            "/linux/namespaces/-",
            json!({"type": "wormhole"}),
            "wormhole",
        ),
        (
            "/linux/uidMappings",
            json!([{"containerID": 0, "hostID": 1000, "size": 1}]),
            "linux.uidMappings",
        ),
        (
            "/linux/timeOffsets",
            json!({"monotonic": {"secs": 1}}),
            "linux.timeOffsets",
        ),
        (
            "/linux/rootfsPropagation",
            json!("rsideways"),
            "linux.rootfsPropagation",
        ),
        ("/linux/maskedPaths", json!(["proc"]), "linux.maskedPaths"),
        ("/linux/sysctl", json!({"net..x": "1"}), "linux.sysctl"),
        (
            "/hooks",
            json!({"poststop": [{"path": "relative"}]}),
            "hooks.poststop",
        ),
        (
            "/hooks",
            json!({"poststop": [{"path": "/x", "timeout": 0}]}),
            "hooks.poststop",
        ),
        (
            "/mounts/-",
            json!({"destination": "/x", "type": "bind", "source": "absent", "options": ["bind"]}),
            "absent",
        ),
        (
            "/mounts/-",
            json!({"destination": "/x", "type": "bind", "source": "volume", "options": ["bind", "size=1"]}),
            "size=1",
        ),
        (
            "/mounts/-",
            json!({"destination": "/x", "type": "proc", "source": "proc", "options": ["tmpcopyup"]}),
            "tmpcopyup",
        ),
        (
            "/mounts/-",
            json!({"destination": "/x", "type": "bind", "source": "volume", "options": ["bind", "idmap"]}),
            "idmap",
        ),
        (
            "/linux/resources/devices/-",
            json!({"allow": true, "access": "x"}),
            "access 'x'",
        ),
    ] {
        let error = refusal(pointer, value);
        assert!(error.contains(name), "{pointer}: {error}");
    }
    for gone in ["root", "process", "linux"] {
        let mut config = runc_spec();
        config.as_object_mut().unwrap().remove(gone);
        let error = planned(&config).unwrap_err();
        assert!(error.contains(&format!("{gone} is missing")), "{error}");
    }
}

#[test]
fn unknown_fields_are_tolerated() {
    let mut config = with("/future", json!({"x": 1}));
    config["linux"]["future"] = json!(true);
    config["process"]["user"]["future"] = json!([1]);
    planned(&config).unwrap();
}

#[test]
fn broken_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = Bundle::load(&dir.path().join("none")).unwrap_err();
    assert!(missing.to_string().contains("none"), "{missing}");
    let no_config = Bundle::load(dir.path()).unwrap_err();
    assert!(no_config.to_string().contains("config.json"), "{no_config}");
    fs::write(dir.path().join("config.json"), "{\"ociVersion\": ").unwrap();
    let broken = Bundle::load(dir.path()).unwrap_err().to_string();
    assert!(broken.contains("line 1"), "{broken}");
    fs::write(
        dir.path().join("config.json"),
        vec![b' '; (MAX_CONFIG + 1) as usize],
    )
    .unwrap();
    let large = Bundle::load(dir.path()).unwrap_err();
    assert!(matches!(large, Error::Read { .. }));
}

#[test]
fn the_rest_of_a_process_is_converted() {
    let mut config = with("/linux/personality", json!({"domain": "LINUX32"}));
    config["process"]["user"] =
        json!({"uid": 1000, "gid": 100, "umask": 18, "additionalGids": [5, 6]});
    config["process"]["oomScoreAdj"] = json!(-5);
    config["process"]["consoleSize"] = json!({"height": 24, "width": 80});
    config["process"]["scheduler"] =
        json!({"policy": "SCHED_BATCH", "nice": 5, "flags": ["SCHED_FLAG_RESET_ON_FORK"]});
    config["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    config["linux"]["sysctl"] = json!({"net.core.somaxconn": "256"});
    config["linux"]["rootfsPropagation"] = json!("rslave");
    config["linux"]["devices"] = json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 0, "gid": 0}]);
    let plan = planned(&config).unwrap();
    let process = &plan.container.process;
    assert_eq!(
        (process.uid, process.gid, process.umask),
        (1000, 100, 0o022)
    );
    assert_eq!(process.additional_gids, [5, 6]);
    assert_eq!(process.oom_score_adj, Some(-5));
    assert_eq!((process.rows, process.columns), (24, 80));
    assert_eq!(
        (
            process.scheduler.policy,
            process.scheduler.nice,
            process.scheduler.flags
        ),
        (3, 5, 1)
    );
    assert_eq!(process.io_priority.class, 3);
    assert_eq!(process.personality, Some(8));
    assert_eq!(
        plan.container.root_propagation,
        libc::MS_SLAVE | libc::MS_REC
    );
    assert_eq!(plan.container.sysctls["net.core.somaxconn"], "256");
    let device = &plan.container.devices[0];
    assert_eq!((device.major, device.minor, device.mode), (10, 229, 0o666));
}

#[test]
fn user_namespaces_bring_their_mappings() {
    let mut config = with("/linux/namespaces/-", json!({"type": "user"}));
    config["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100000, "size": 65536}]);
    config["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 200000, "size": 65536}]);
    config["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "time"}));
    config["linux"]["timeOffsets"] = json!({"boottime": {"secs": -3, "nanosecs": 7}});
    let idmapped = json!({"destination": "/x", "type": "bind", "source": "volume", "options": ["rbind", "ridmap"]});
    config["mounts"].as_array_mut().unwrap().push(idmapped);
    let plan = planned(&config).unwrap();
    let namespaces = &plan.container.namespaces;
    assert_eq!(namespaces.uid_mappings[0].host_id, 100000);
    assert_eq!(
        (namespaces.boottime.secs, namespaces.boottime.nanosecs),
        (-3, 7)
    );
    assert!(namespaces.monotonic.is_none());
    let mount = &plan.container.mounts[7];
    assert!(mount.idmap_recursive);
    assert_eq!(mount.gid_mappings[0].host_id, 200000);
}

#[test]
fn a_lone_container_without_namespaces_has_the_guests_own() {
    let mut config = with("/linux/namespaces", json!([{"type": "mount"}]));
    config["hostname"] = json!("");
    let plan = planned(&config).unwrap();
    let namespaces = &plan.container.namespaces;
    let found = [
        namespaces.mount,
        namespaces.pid,
        namespaces.ipc,
        namespaces.uts,
        namespaces.cgroup,
        namespaces.network,
        namespaces.user,
        namespaces.time,
    ];
    assert_eq!(found[0], Kind::NEW.into());
    assert_eq!(found[1..], [Kind::AGENT.into(); 7]);
    // Paths of the host stay what they are.
    for kind in ["pid", "network", "ipc", "uts"] {
        let path = json!([{"type": "mount"}, {"type": kind, "path": "/proc/1/ns/x"}]);
        let mut config = with("/linux/namespaces", path);
        config["hostname"] = json!("");
        let planned = planned(&config);
        match kind {
            // One that the engine names is the pod's (its interfaces are the guest's).
            "network" => assert!(planned.is_ok()),
            _ => {
                let error = planned.unwrap_err().to_string();
                assert!(error.contains(&format!("{kind} with a path")), "{error}");
            }
        }
    }
}

#[test]
fn hooks_go_where_they_can_run() {
    let hook =
        |path: &str| json!([{"path": path, "args": ["name", "arg"], "env": ["A=b"], "timeout": 5}]);
    let config = with(
        "/hooks",
        json!({
            "prestart": hook("/1"), "createRuntime": hook("/2"), "startContainer": hook("/3"),
            "poststart": hook("/4"), "poststop": [{"path": "/5"}],
        }),
    );
    let plan = planned(&config).unwrap();
    let paths = |hooks: &[HostHook]| {
        hooks
            .iter()
            .map(|hook| hook.path.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(paths(&plan.hooks.create), ["/1", "/2"]);
    assert_eq!(paths(&plan.hooks.started), ["/4"]);
    assert_eq!(plan.hooks.stopped[0].args, ["/5"]);
    let guest = &plan.container.start_container_hooks[0];
    assert_eq!((guest.path.as_str(), guest.timeout_secs), ("/3", 5));
}
