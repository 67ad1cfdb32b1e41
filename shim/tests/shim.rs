//! The shim as containerd starts it, where no machine is needed: its greeting, its services, and what it says of itself.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api,
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::Message,
    sandbox_api,
    sandbox_async::SandboxClient,
    shim_async::{Client, TaskClient},
    types::introspection::RuntimeInfo,
};
use ttrpc::{Code, r#async::transport::Socket};

const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-bulkhead-v1");
/// No pod of this name is ever started.
const ID: &str = "a";

/// A directory with a bundle and room for the socket, and the shim that was started in it.
struct Shim {
    place: tempfile::TempDir,
    socket: PathBuf,
    pid: u32,
}

impl Shim {
    /// As containerd 2.3 starts one.
    fn start(events: Option<&str>, environment: &[(&str, &str)]) -> Shim {
        let place = tempfile::tempdir().unwrap();
        let mut params = BootstrapParams {
            instance_id: ID.into(),
            namespace: "n".into(),
            containerd_ttrpc_address: events.unwrap_or_default().into(),
            ..Default::default()
        };
        params.set_socket_dir(place.path().join("s").to_str().unwrap().into());
        let bytes = params.write_to_bytes().unwrap();
        let output = run(
            place.path(),
            &["-namespace", "n", "-id", ID, "start"],
            environment,
            &bytes,
        );
        Shim::of(place, &output)
    }

    /// The daemon that a `start` has told of.
    fn of(place: tempfile::TempDir, started: &Output) -> Shim {
        let text = String::from_utf8_lossy(&started.stderr);
        assert!(started.status.success(), "{text}");
        let result = BootstrapResult::parse_from_bytes(&started.stdout).unwrap();
        let socket = PathBuf::from(result.address.strip_prefix("unix://").unwrap());
        let mut shim = Shim {
            place,
            socket,
            pid: 0,
        };
        shim.pid = shim.ask_pid();
        shim
    }

    fn ask_pid(&self) -> u32 {
        block_on(async {
            let (_, tasks) = self.services().await;
            let request = api::ConnectRequest {
                id: ID.into(),
                ..Default::default()
            };
            let connected = tasks.connect(context(), &request).await;
            connected.unwrap().shim_pid
        })
    }

    async fn client(&self) -> Client {
        let stream = tokio::net::UnixStream::connect(&self.socket).await;
        Client::new(Socket::new(stream.unwrap()))
    }

    async fn services(&self) -> (SandboxClient, TaskClient) {
        let client = self.client().await;
        (SandboxClient::new(client.clone()), TaskClient::new(client))
    }

    fn environment(&self) -> Vec<String> {
        let bytes = fs::read(format!("/proc/{}/environ", self.pid)).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        text.split_terminator('\0').map(String::from).collect()
    }

    fn create(&self, id: &str) -> sandbox_api::CreateSandboxRequest {
        sandbox_api::CreateSandboxRequest {
            sandbox_id: id.into(),
            bundle_path: self.place.path().to_str().unwrap().into(),
            ..Default::default()
        }
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        let path = format!("/proc/{}/stat", self.pid);
        block_on(async {
            let (sandbox, tasks) = self.services().await;
            let request = sandbox_api::ShutdownSandboxRequest {
                sandbox_id: ID.into(),
                ..Default::default()
            };
            if sandbox.shutdown_sandbox(context(), &request).await.is_err() {
                let request = api::ShutdownRequest {
                    id: ID.into(),
                    ..Default::default()
                };
                let _ = tasks.shutdown(context(), &request).await;
            }
        });
        let deadline = Instant::now() + Duration::from_secs(30);
        while Path::new(&path).exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn run(directory: &Path, words: &[&str], environment: &[(&str, &str)], input: &[u8]) -> Output {
    let mut child = Command::new(SHIM)
        .args(words)
        .env_remove("TTRPC_ADDRESS")
        .envs(environment.iter().copied())
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap().block_on(work)
}

fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(Duration::from_secs(30))
}

#[track_caller]
fn code<T>(answer: ttrpc::Result<T>) -> Code {
    match answer {
        Ok(_) => panic!("it was done"),
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        Err(other) => panic!("{other}"),
    }
}

/// Whoever starts it may have descriptors open, and a mask, that are not meant for it.
#[test]
fn the_daemon_has_nothing_that_it_did_not_choose() {
    let place = tempfile::tempdir().unwrap();
    let script = r#"umask 0000; exec 7</etc/passwd 9>&1; exec "$0" "$@""#;
    let mut params = BootstrapParams {
        instance_id: ID.into(),
        namespace: "n".into(),
        ..Default::default()
    };
    params.set_socket_dir(place.path().join("s").to_str().unwrap().into());
    let mut child = Command::new("/bin/sh")
        .args(["-c", script, SHIM, "-namespace", "n", "-id", ID, "start"])
        .current_dir(place.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let bytes = params.write_to_bytes().unwrap();
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    // It ends with `start`: the daemon holds no copy of our pipe.
    let output = child.wait_with_output().unwrap();
    let shim = Shim::of(place, &output);
    let status = fs::read_to_string(format!("/proc/{}/status", shim.pid)).unwrap();
    let line = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        line.unwrap().split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(line("Umask:"), "0022");
    let set = |name: &str| u64::from_str_radix(&line(name), 16).unwrap();
    assert_eq!((set("CapInh:"), set("CapAmb:")), (0, 0));
    assert_eq!(set("CapEff:"), set("CapPrm:"));
    // CAP_NET_RAW, CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_BOOT, CAP_SYS_TIME, CAP_BPF.
    for number in [13, 16, 17, 22, 25, 39] {
        assert_eq!(set("CapEff:") & 1 << number, 0, "{number}");
    }
    for entry in fs::read_dir(format!("/proc/{}/fd", shim.pid)).unwrap() {
        let path = entry.unwrap().path();
        let Ok(target) = fs::read_link(&path) else {
            continue;
        };
        let target = target.to_str().unwrap();
        assert!(
            target == "/dev/null"
                || ["socket:", "anon_inode:"]
                    .iter()
                    .any(|kind| target.starts_with(kind)),
            "{}: {target}",
            path.display()
        );
    }
}

#[test]
fn events_go_where_the_greeting_says_and_else_where_the_environment_does() {
    let environment = [("TTRPC_ADDRESS", "/environment")];
    let cases = [
        (Some("/greeting"), &environment[..], "/greeting"),
        (None, &environment[..], "/environment"),
        (None, &[], ""),
    ];
    for (greeting, environment, expected) in cases {
        let shim = Shim::start(greeting, environment);
        let found = shim.environment();
        assert!(
            found.contains(&format!("TTRPC_ADDRESS={expected}")),
            "{found:?}"
        );
        let mode = fs::metadata(&shim.socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}

#[test]
fn what_is_not_offered_is_unimplemented() {
    let shim = Shim::start(None, &[]);
    block_on(async {
        let client = shim.client().await;
        for (service, method) in [
            ("containerd.services.streaming.v1.Streaming", "Stream"),
            ("containerd.services.transfer.v1.Transfer", "Transfer"),
            ("containerd.services.mounts.v1.Mounts", "Activate"),
            ("containerd.task.v4.Task", "State"),
            ("", ""),
            ("containerd.task.v3.Task", "Fly"),
            ("containerd.runtime.sandbox.v1.Sandbox", "UpdateSandbox"),
        ] {
            let request = ttrpc::Request {
                service: service.into(),
                method: method.into(),
                timeout_nano: 30_000_000_000,
                ..Default::default()
            };
            let answered = client.request(request).await;
            assert_eq!(code(answered), Code::UNIMPLEMENTED, "{service}/{method}");
        }
        // Both names of the service that there is.
        for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
            let request = ttrpc::Request {
                service: service.into(),
                method: "State".into(),
                timeout_nano: 30_000_000_000,
                ..Default::default()
            };
            assert_eq!(code(client.request(request).await), Code::NOT_FOUND);
        }
    });
}

#[test]
fn one_shim_is_one_sandbox() {
    let shim = Shim::start(None, &[]);
    block_on(async {
        let (sandbox, _) = shim.services().await;
        sandbox
            .create_sandbox(context(), &shim.create(ID))
            .await
            .unwrap();
        for id in [ID, "another"] {
            let again = sandbox.create_sandbox(context(), &shim.create(id)).await;
            assert_eq!(code(again), Code::ALREADY_EXISTS, "{id}");
        }
        let status = async |verbose| {
            let request = sandbox_api::SandboxStatusRequest {
                sandbox_id: ID.into(),
                verbose,
                ..Default::default()
            };
            sandbox.sandbox_status(context(), &request).await.unwrap()
        };
        assert!(status(false).await.info.is_empty());
        let info = status(true).await.info;
        assert_eq!(
            (info["pid"].as_str(), info["state"].as_str()),
            ("0", "SANDBOX_NOTREADY")
        );
        assert_eq!(info["shim_pid"], shim.pid.to_string());
    });
}

#[test]
fn the_description_has_the_features_document() {
    let place = tempfile::tempdir().unwrap();
    let output = run(place.path(), &["-info"], &[], b"");
    let info = RuntimeInfo::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(
        info.features.type_url,
        "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
    );
    let features: oci_spec::runtime::Features =
        serde_json::from_slice(&info.features.value).unwrap();
    let options = features.mount_options().as_ref().unwrap();
    assert!(options.contains(&"rro".to_string()));
}
