//! The Sandbox service to the letter, as containerd 2 uses it with `sandboxer = "shim"`: the shim is started beside containerd, in
//! a bundle without config.json, and spoken to. `make test-containerd2` has the same from containerd itself.

mod life;

use std::path::Path;
use std::process::{Command, Stdio};

use bulkhead_tests::cri::messages::PodSandboxConfig;
use bulkhead_tests::{Bundle, fresh_id, run};
use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::{Message, well_known_types::any::Any};
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use serde_json::json;
use tempfile::TempDir;
use ttrpc::r#async::transport::Socket;

use crate::rpc::{context, delete, start, wait};

const SHIM: &str = "containerd-shim-bulkhead-v1";

/// A shim, started as containerd starts one, and the bundle that it was started in.
pub(super) struct Shim {
    pub(super) bundle: TempDir,
    pub(super) id: String,
    socket: String,
}

/// What containerd's connection carries.
pub(super) struct Services {
    sandbox: SandboxClient,
    pub(super) task: TaskClient,
}

impl Shim {
    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(SHIM);
        let words = ["-namespace", "sandboxes", "-address", "", "-id", &self.id];
        command.args(words).arg(verb);
        command.current_dir(self.bundle.path()).stdin(Stdio::null());
        command
    }

    pub(super) fn start() -> Shim {
        let mut shim = Shim {
            bundle: TempDir::with_prefix("sandbox-").expect("a temporary directory"),
            id: fresh_id(),
            socket: String::new(),
        };
        let started = run(&mut shim.command("start"));
        let address = started.text();
        let path = address.strip_prefix("unix://");
        let path = path.unwrap_or_else(|| panic!("no address: {started}"));
        shim.socket = path.into();
        shim
    }

    pub(super) async fn services(&self) -> Services {
        let stream = tokio::net::UnixStream::connect(&self.socket).await;
        let client = Client::new(Socket::new(stream.expect("the shim listens")));
        Services {
            sandbox: SandboxClient::new(client.clone()),
            task: TaskClient::new(client),
        }
    }

    fn create(&self, config: &PodSandboxConfig) -> api::CreateSandboxRequest {
        let options = Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: config.write_to_bytes().expect("no required fields"),
            ..Any::default()
        };
        api::CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: self.bundle.path().to_str().expect("plain").into(),
            options: Some(options).into(),
            ..Default::default()
        }
    }
}

impl Services {
    /// CreateSandbox and StartSandbox; the pid.
    async fn boot(&self, shim: &Shim) -> u32 {
        let config = PodSandboxConfig {
            hostname: "podname".into(),
            ..Default::default()
        };
        let create = shim.create(&config);
        let created = self.sandbox.create_sandbox(context(), &create).await;
        created.expect("created");
        let started = self.start(&shim.id).await.expect("started");
        assert!(started.created_at.is_some());
        started.pid
    }

    async fn start(&self, id: &str) -> ttrpc::Result<api::StartSandboxResponse> {
        let request = api::StartSandboxRequest {
            sandbox_id: id.into(),
            ..Default::default()
        };
        self.sandbox.start_sandbox(context(), &request).await
    }

    async fn status(&self, id: &str) -> ttrpc::Result<api::SandboxStatusResponse> {
        let request = api::SandboxStatusRequest {
            sandbox_id: id.into(),
            ..Default::default()
        };
        self.sandbox.sandbox_status(context(), &request).await
    }

    async fn ping(&self, id: &str) -> ttrpc::Result<api::PingResponse> {
        let request = api::PingRequest {
            sandbox_id: id.into(),
            ..Default::default()
        };
        self.sandbox.ping_sandbox(context(), &request).await
    }

    async fn metrics(&self, id: &str) -> ttrpc::Result<Metrics> {
        let request = api::SandboxMetricsRequest {
            sandbox_id: id.into(),
            ..Default::default()
        };
        let answer = self.sandbox.sandbox_metrics(context(), &request).await?;
        assert_eq!(answer.metrics.id, id);
        assert_eq!(
            answer.metrics.data.type_url,
            "io.containerd.cgroups.v2.Metrics"
        );
        let metrics = Metrics::parse_from_bytes(&answer.metrics.data.value);
        Ok(metrics.expect("the published message"))
    }

    async fn stop(&self, id: &str) -> ttrpc::Result<api::StopSandboxResponse> {
        let request = api::StopSandboxRequest {
            sandbox_id: id.into(),
            ..Default::default()
        };
        self.sandbox.stop_sandbox(context(), &request).await
    }

    async fn wait(&self, id: &str) -> ttrpc::Result<api::WaitSandboxResponse> {
        let request = api::WaitSandboxRequest {
            sandbox_id: id.into(),
            ..Default::default()
        };
        self.sandbox.wait_sandbox(context(), &request).await
    }

    async fn platform(&self, id: &str) -> ttrpc::Result<api::PlatformResponse> {
        let request = api::PlatformRequest {
            sandbox_id: id.into(),
            ..Default::default()
        };
        self.sandbox.platform(context(), &request).await
    }

    async fn shut_down(&self, id: &str) -> ttrpc::Result<api::ShutdownSandboxResponse> {
        let request = api::ShutdownSandboxRequest {
            sandbox_id: id.into(),
            ..Default::default()
        };
        self.sandbox.shutdown_sandbox(context(), &request).await
    }

    /// Creates and starts a container of the pod; its output goes to a file.
    async fn container(&self, shim: &Shim, pid: u32, bundle: &Bundle, output: &Path) -> String {
        bundle.write();
        let id = fresh_id();
        let request = CreateTaskRequest {
            id: id.clone(),
            bundle: bundle.path().to_str().expect("plain").into(),
            stdout: format!("file://{}", output.display()),
            ..Default::default()
        };
        let created = self.task.create(context(), &request).await;
        let created = created.unwrap_or_else(|error| panic!("{}: {error}", shim.id));
        assert_eq!(created.pid, pid, "one pid a pod");
        let started = self.task.start(context(), &start(&id, "")).await;
        started.expect("it starts");
        id
    }

    /// The exit status that Wait and Delete agree upon.
    pub(super) async fn end(&self, id: &str) -> u32 {
        let waited = self.task.wait(context(), &wait(id, "")).await;
        let deleted = self.task.delete(context(), &delete(id, "")).await;
        let statuses = (
            waited.expect("ended").exit_status,
            deleted.expect("deleted").exit_status,
        );
        assert_eq!(statuses.0, statuses.1);
        statuses.0
    }
}

/// A member's bundle as CRI makes them: the pod's namespaces by its pid.
fn member(shim: &Shim, pid: u32, script: &str) -> Bundle {
    Bundle::busybox().script(script).edit(|config| {
        config["annotations"] = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": shim.id,
        });
        config["hostname"] = json!(null);
        let joined = |kind: &str, file: &str| json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")});
        config["linux"]["namespaces"] = json!([
            {"type": "mount"}, {"type": "pid"}, {"type": "cgroup"},
            joined("ipc", "ipc"), joined("uts", "uts"), joined("network", "net"),
        ]);
    })
}
