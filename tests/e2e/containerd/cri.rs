//! Pods as Kubernetes makes them: containerd's CRI, with a network that CNI sets up.

use std::fs;
use std::thread;

use bulkhead_tests::cri::Cri;
use bulkhead_tests::cri::messages::{
    ContainerConfig, ContainerMetadata, ContainerRequest, ContainerState, ContainerStatsResponse,
    ContainerStatusResponse, CreateContainerRequest, CreateContainerResponse, Empty,
    ExecSyncRequest, ExecSyncResponse, ImageSpec, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxRequest,
    RunPodSandboxRequest, RunPodSandboxResponse,
};
use bulkhead_tests::{Engine, Host, IMAGE, KubeletVolume, fresh_id, sandboxer, tail};
use tempfile::TempDir;

use crate::{eventually, shims_end};

/// CRI's names of the runtimes in the tests' configuration. Where the shim itself makes the pods there is nothing to compare with:
/// runc's shim has no sandbox service, and its pods are tested with the other way.
pub(super) fn handlers() -> &'static [&'static str] {
    match sandboxer() {
        "shim" => &["bulkhead"],
        _ => &["runc", "bulkhead"],
    }
}

pub(super) fn connect() -> Cri {
    Cri::connect(&Engine::get().socket())
}

fn namespaces(pid: NamespaceMode) -> NamespaceOption {
    NamespaceOption {
        pid: pid.into(),
        ..Default::default()
    }
}

/// Every container has processes of its own, as Kubernetes has it by default.
pub(super) fn private_pids() -> NamespaceMode {
    NamespaceMode::CONTAINER
}

/// A pod and the client that made it.
pub(super) struct Pod<'a> {
    cri: &'a Cri,
    id: String,
    config: PodSandboxConfig,
    pid: NamespaceMode,
}

fn config(pid: NamespaceMode) -> PodSandboxConfig {
    let name = fresh_id();
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.clone(),
            uid: name,
            namespace: "default".into(),
            ..Default::default()
        })
        .into(),
        hostname: "podname".into(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods-test".into(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces(pid)).into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

fn run(cri: &Cri, handler: &str, config: PodSandboxConfig) -> Result<String, String> {
    let request = RunPodSandboxRequest {
        config: Some(config).into(),
        runtime_handler: handler.into(),
        ..Default::default()
    };
    let answer: RunPodSandboxResponse = cri.call("RunPodSandbox", &request)?;
    Ok(answer.pod_sandbox_id)
}

impl<'a> Pod<'a> {
    #[track_caller]
    pub(super) fn start(cri: &'a Cri, handler: &str, pid: NamespaceMode) -> Pod<'a> {
        Pod::of(cri, handler, config(pid), pid)
    }

    /// One whose containers are privileged.
    #[track_caller]
    fn privileged(cri: &'a Cri, handler: &str) -> Pod<'a> {
        let pid = private_pids();
        let mut config = config(pid);
        let linux = config.linux.mut_or_insert_default();
        let security = linux.security_context.mut_or_insert_default();
        security.privileged = true;
        Pod::of(cri, handler, config, pid)
    }

    #[track_caller]
    fn of(cri: &'a Cri, handler: &str, config: PodSandboxConfig, pid: NamespaceMode) -> Pod<'a> {
        let id = run(cri, handler, config.clone());
        let id = id.unwrap_or_else(|error| panic!("{error}\n{}", tail(&Engine::get().log())));
        Pod {
            cri,
            id,
            config,
            pid,
        }
    }

    fn create(&self, script: &str, mounts: &[(&str, &str)]) -> Result<String, String> {
        let mounts = mounts.iter().map(|(host, inside)| Mount {
            host_path: (*host).into(),
            container_path: (*inside).into(),
            // As kubelet mounts them.
            readonly: host.contains("/volumes/kubernetes.io~"),
            ..Default::default()
        });
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: fresh_id(),
                ..Default::default()
            })
            .into(),
            image: Some(ImageSpec {
                image: IMAGE.into(),
                ..Default::default()
            })
            .into(),
            command: ["/bin/sh", "-c", script].map(String::from).into(),
            mounts: mounts.collect(),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources {
                    memory_limit_in_bytes: 64 << 20,
                    ..Default::default()
                })
                .into(),
                security_context: Some(LinuxContainerSecurityContext {
                    privileged: self.config.linux.security_context.privileged,
                    namespace_options: Some(namespaces(self.pid)).into(),
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config).into(),
            sandbox_config: Some(self.config.clone()).into(),
            ..Default::default()
        };
        let answer: CreateContainerResponse = self.cri.call("CreateContainer", &request)?;
        Ok(answer.container_id)
    }

    #[track_caller]
    pub(super) fn container(&self, script: &str, mounts: &[(&str, &str)]) -> String {
        let id = self.create(script, mounts).expect("it is created");
        let _: Empty = self.cri.ok("StartContainer", &container(&id));
        id
    }

    #[track_caller]
    pub(super) fn exec(&self, id: &str, script: &str) -> (i32, String) {
        let request = ExecSyncRequest {
            container_id: id.into(),
            cmd: ["/bin/sh", "-c", script].map(String::from).into(),
            timeout: 60,
            ..Default::default()
        };
        let answer: ExecSyncResponse = self.cri.ok("ExecSync", &request);
        let text = String::from_utf8_lossy(&answer.stdout)
            .trim_end()
            .to_owned();
        (answer.exit_code, text)
    }

    fn status(&self, id: &str) -> (ContainerState, i32, String) {
        let answer: ContainerStatusResponse = self.cri.ok("ContainerStatus", &container(id));
        let status = answer.status.unwrap_or_default();
        let state = status.state.enum_value().expect("a published state");
        (state, status.exit_code, status.reason)
    }

    #[track_caller]
    fn wait(&self, id: &str) -> (i32, String) {
        let mut last = self.status(id);
        eventually("the container exits", || {
            last = self.status(id);
            last.0 == ContainerState::CONTAINER_EXITED
        });
        (last.1, last.2)
    }

    #[track_caller]
    pub(super) fn remove(self) {
        let request = PodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        for method in ["StopPodSandbox", "RemovePodSandbox"] {
            let done: Result<Empty, String> = self.cri.call(method, &request);
            done.unwrap_or_else(|error| panic!("{error}\n{}", tail(&Engine::get().log())));
        }
    }
}

fn container(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.into(),
        timeout: 1,
        ..Default::default()
    }
}

#[test]
fn a_pod_lives_as_kubernetes_wants_it() {
    let cri = connect();
    for &handler in handlers() {
        let host = Host::now();
        let volume = TempDir::new().expect("a temporary directory");
        let data = volume.path().to_str().expect("plain");
        let pod = Pod::start(&cri, handler, NamespaceMode::CONTAINER);
        // An init container, then two that share a volume and memory.
        let init = pod.container("echo made > /data/init; exit 0", &[(data, "/data")]);
        assert_eq!(pod.wait(&init), (0, "Completed".into()), "{handler}");
        let first = pod.container("sleep 1000", &[(data, "/data")]);
        let second = pod.container("sleep 1000", &[(data, "/data")]);
        assert_eq!(
            pod.exec(&first, "cat /data/init; hostname"),
            (0, "made\npodname".into()),
            "{handler}"
        );
        assert_eq!(
            pod.exec(&second, "echo x > /dev/shm/y; exit 3").0,
            3,
            "{handler}"
        );
        assert_eq!(
            pod.exec(&first, "cat /dev/shm/y"),
            (0, "x".into()),
            "{handler}"
        );
        let inside = pod
            .exec(
                &first,
                "cat /etc/hostname; cat /proc/1/cmdline | tr '\\0' ' '",
            )
            .1;
        assert_eq!(inside, "podname\nsleep 1000", "{handler}");
        let stats: ContainerStatsResponse = cri.ok("ContainerStats", &container(&first));
        let used = stats.stats.memory.working_set_bytes.value;
        assert!(used > 0 && used < 64 << 20, "{handler}: {used}");
        // A container that is restarted is a new one in the same pod.
        let _: Empty = cri.ok("StopContainer", &container(&first));
        assert_eq!(pod.wait(&first).0, 137, "{handler}");
        let _: Empty = cri.ok("RemoveContainer", &container(&first));
        let again = pod.container("exit 5", &[]);
        assert_eq!(pod.wait(&again), (5, "Error".into()), "{handler}");
        pod.remove();
        shims_end();
        host.assert_nothing_left();
    }
}

#[test]
fn config_maps_and_secrets_follow_the_host() {
    let cri = connect();
    for &handler in handlers() {
        let host = Host::now();
        let mut config = KubeletVolume::new(
            "kubernetes.io~configmap",
            &[("key", b"1", 0o644), ("gone", b"1", 0o644)],
        );
        let secret = KubeletVolume::with_group(
            "kubernetes.io~secret",
            Some(1234),
            &[("token", b"secret", 0o400)],
        );
        let [at, secret_at] =
            [&config, &secret].map(|v| v.path().to_str().expect("plain").to_owned());
        let pod = Pod::start(&cri, handler, NamespaceMode::CONTAINER);
        let mounts = [(at.as_str(), "/config"), (&secret_at, "/secret")];
        let ids = [(); 2].map(|()| pod.container("sleep 1000", &mounts));
        for id in &ids {
            let seen = pod.exec(id, "cat /config/key; stat -L -c ' %a %u %g' /secret/token");
            assert_eq!(seen, (0, "1 440 0 1234".into()), "{handler}");
            assert_ne!(pod.exec(id, "echo x > /config/new").0, 0, "{handler}");
        }
        config.write(&[("key", b"2", 0o644), ("new", b"2", 0o600)]);
        let wait = "until cat /config/new; do sleep 0.01; done 2>/dev/null
            until [ ! -L /config/gone ]; do sleep 0.01; done
            cat /config/key; ls /config";
        for id in &ids {
            assert_eq!(pod.exec(id, wait), (0, "22key\nnew".into()), "{handler}");
        }
        if handler == "bulkhead" {
            // What cannot be repeated is told, and followed by what can.
            let logged = Engine::get().log().len();
            let large = vec![0; 17 << 20];
            config.write(&[("large", &large, 0o644)]);
            eventually("the shim tells of it", || {
                let log = Engine::get().log();
                log[logged..].contains("more than 16 MiB")
            });
            assert_eq!(pod.exec(&ids[0], "cat /config/key"), (0, "2".into()));
            config.write(&[("key", b"3", 0o644)]);
            let wait = "until [ $(cat /config/key) = 3 ]; do sleep 0.01; done
                until [ ! -L /config/large ] && [ ! -L /config/new ]; do sleep 0.01; done; ls /config";
            assert_eq!(pod.exec(&ids[0], wait), (0, "key".into()));
        }
        // A restarted container has the volume as it is by then.
        let _: Empty = cri.ok("StopContainer", &container(&ids[0]));
        let _: Empty = cri.ok("RemoveContainer", &container(&ids[0]));
        let again = pod.container("sleep 1000", &mounts);
        assert_eq!(
            pod.exec(&again, "ls /config").1,
            pod.exec(&ids[1], "ls /config").1,
            "{handler}"
        );
        pod.remove();
        shims_end();
        host.assert_nothing_left();
    }
}

/// The kernel says that it dropped events (IN_Q_OVERFLOW), and then the volume is looked at as a whole.
#[test]
fn what_inotify_drops_is_not_lost() {
    const LIMIT: &str = "/proc/sys/fs/inotify/max_queued_events";
    let cri = connect();
    let host = Host::now();
    let first = [("key", &b"0"[..], 0o644)];
    let mut volumes = [(); 3].map(|()| KubeletVolume::new("kubernetes.io~configmap", &first));
    let at: Vec<_> = volumes.iter().map(|v| v.path().to_owned()).collect();
    let mounts: Vec<_> = ["/a", "/b", "/c"]
        .iter()
        .zip(&at)
        .map(|(inside, at)| (at.to_str().expect("plain"), *inside))
        .collect();
    let pod = Pod::start(&cri, "bulkhead", private_pids());
    let usual = fs::read_to_string(LIMIT).expect("Linux");
    // Of an instance that is made now: the pod's.
    fs::write(LIMIT, "1").expect("root may");
    let id = pod.container("sleep 1000", &mounts);
    fs::write(LIMIT, usual).expect("root may");
    for n in 1..=20 {
        let text = n.to_string();
        for volume in &mut volumes {
            volume.write(&[("key", text.as_bytes(), 0o644)]);
        }
    }
    let last = "n=0; until [ $(cat /a/key)$(cat /b/key)$(cat /c/key) = 202020 ]; do
        n=$((n+1)); [ $n -lt 100 ] || { cat /?/key; exit 1; }; sleep 0.1; done";
    assert_eq!(pod.exec(&id, last), (0, String::new()));
    pod.remove();
    shims_end();
    host.assert_nothing_left();
}

#[test]
fn processes_of_a_pod_are_shared_when_asked() {
    let cri = connect();
    for &handler in handlers() {
        let pod = Pod::start(&cri, handler, NamespaceMode::POD);
        let first = pod.container("exec sleep 1234", &[]);
        let second = pod.container("exec sleep 1000", &[]);
        let seen = pod.exec(&second, "ps | grep -c '[s]leep 1234'");
        assert_eq!(seen, (0, "1".into()), "{handler}");
        let _: Empty = cri.ok("StopContainer", &container(&first));
        // Not pid 1, and so not deaf to SIGTERM.
        assert_eq!(pod.wait(&first).0, 143, "{handler}");
        assert_eq!(
            pod.status(&second).0,
            ContainerState::CONTAINER_RUNNING,
            "{handler}"
        );
        pod.remove();
    }
}

#[test]
fn running_out_of_memory_is_the_reason() {
    let cri = connect();
    for &handler in handlers() {
        let pod = Pod::start(&cri, handler, NamespaceMode::CONTAINER);
        let greedy = pod.container("exec dd if=/dev/zero of=/dev/null bs=200M count=1", &[]);
        assert_eq!(pod.wait(&greedy), (137, "OOMKilled".into()), "{handler}");
        pod.remove();
    }
}

#[test]
fn a_pod_outlives_containerd() {
    for &handler in handlers() {
        let host = Host::now();
        let first = connect();
        let pod = Pod::start(&first, handler, NamespaceMode::CONTAINER);
        let id = pod.container("sleep 1000", &[]);
        Engine::get().restart();
        let cri = connect();
        let pod = Pod { cri: &cri, ..pod };
        assert_eq!(
            pod.status(&id).0,
            ContainerState::CONTAINER_RUNNING,
            "{handler}"
        );
        assert_eq!(pod.exec(&id, "exit 4").0, 4, "{handler}");
        pod.remove();
        shims_end();
        // containerd itself is a new process.
        host.assert_nothing_left_but(&["containerd --config"]);
    }
}

#[test]
fn what_a_machine_cannot_give_is_refused_and_nothing_is_left() {
    let cri = connect();
    let host = Host::now();
    for (options, reason) in [
        (
            NamespaceOption {
                network: NamespaceMode::NODE.into(),
                ..Default::default()
            },
            "hostNetwork",
        ),
        (
            NamespaceOption {
                pid: NamespaceMode::NODE.into(),
                ..Default::default()
            },
            "hostPID",
        ),
        (
            NamespaceOption {
                ipc: NamespaceMode::NODE.into(),
                ..Default::default()
            },
            "hostIPC",
        ),
    ] {
        let mut config = config(NamespaceMode::CONTAINER);
        let security = config
            .linux
            .mut_or_insert_default()
            .security_context
            .mut_or_insert_default();
        security.namespace_options = Some(options).into();
        let error = run(&cri, "bulkhead", config).expect_err(reason);
        assert!(error.contains(reason), "{error}");
    }
    shims_end();
    host.assert_nothing_left();
}

#[test]
fn a_privileged_container_is_privileged_in_its_machine_and_has_no_device_of_the_host() {
    let cri = connect();
    let host = Host::now();
    let pod = Pod::privileged(&cri, "bulkhead");
    let id = pod.container("sleep 1000", &[]);
    let script = "mkdir /new && mount -t tmpfs new /new && echo mounted; ls /dev/vda /dev/kvm 2>&1 | grep -c 'No such'";
    let seen = pod.exec(&id, script);
    assert_eq!(seen, (0, "mounted\n2".into()));
    pod.remove();
    // An operator who has left privileged_without_host_devices out.
    let pod = Pod::privileged(&cri, "bulkhead-with-host-devices");
    let id = pod.create("sleep 1000", &[]).expect("it only notes it");
    let started: Result<Empty, String> = cri.call("StartContainer", &container(&id));
    let error = started.expect_err("the host's devices are not in a guest");
    assert!(
        error.contains("linux.devices: /dev/") && error.contains("device of the host"),
        "{error}"
    );
    pod.remove();
    shims_end();
    host.assert_nothing_left();
}

#[test]
fn pods_at_once_leave_nothing() {
    let cri = connect();
    let host = Host::now();
    thread::scope(|scope| {
        for n in 0..4 {
            let cri = &cri;
            scope.spawn(move || {
                let pod = Pod::start(cri, "bulkhead", NamespaceMode::CONTAINER);
                let id = pod.container(&format!("exit {n}"), &[]);
                assert_eq!(pod.wait(&id).0, n);
                pod.remove();
            });
        }
    });
    shims_end();
    host.assert_nothing_left();
    assert_eq!(fs::read_dir("/run/netns").map_or(0, Iterator::count), 0);
}
