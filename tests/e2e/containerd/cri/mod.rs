//! Pods as Kubernetes makes them: containerd's CRI, with a network that CNI sets up.

mod configs;
mod life;
mod network;
mod sizes;

use bulkhead_tests::cri::Cri;
use bulkhead_tests::cri::messages::{
    ContainerConfig, ContainerMetadata, ContainerRequest, ContainerState, ContainerStatusResponse,
    CreateContainerRequest, CreateContainerResponse, Empty, ExecSyncRequest, ExecSyncResponse,
    ImageSpec, LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata, PodSandboxRequest, RunPodSandboxRequest,
    RunPodSandboxResponse,
};
use bulkhead_tests::{Engine, IMAGE, fresh_id, sandboxer, tail};

use crate::eventually;

/// CRI's names of the runtimes in the tests' configuration. Where the shim itself makes the pods there is nothing to compare with:
/// runc's shim has no sandbox service, and its pods are tested with the other way.
pub(crate) fn handlers() -> &'static [&'static str] {
    match sandboxer() {
        "shim" => &["bulkhead"],
        _ => &["runc", "bulkhead"],
    }
}

pub(crate) fn connect() -> Cri {
    Cri::connect(&Engine::get().socket())
}

fn namespaces(pid: NamespaceMode) -> NamespaceOption {
    NamespaceOption {
        pid: pid.into(),
        ..Default::default()
    }
}

/// Every container has processes of its own, as Kubernetes has it by default.
pub(crate) fn private_pids() -> NamespaceMode {
    NamespaceMode::CONTAINER
}

/// A pod and the client that made it.
pub(crate) struct Pod<'a> {
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
    pub(crate) fn start(cri: &'a Cri, handler: &str, pid: NamespaceMode) -> Pod<'a> {
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
        let resources = LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        };
        self.create_with(script, mounts, resources)
    }

    fn create_with(
        &self,
        script: &str,
        mounts: &[(&str, &str)],
        resources: LinuxContainerResources,
    ) -> Result<String, String> {
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
                resources: Some(resources).into(),
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
    pub(crate) fn container(&self, script: &str, mounts: &[(&str, &str)]) -> String {
        let id = self.create(script, mounts).expect("it is created");
        let _: Empty = self.cri.ok("StartContainer", &container(&id));
        id
    }

    #[track_caller]
    pub(crate) fn exec(&self, id: &str, script: &str) -> (i32, String) {
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
    pub(crate) fn remove(self) {
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
