//! The client of the guest's agent: ttrpc over the connection that the agent dials.
//!
//! The first request is written before the guest runs, so its answer is the sign of readiness. What the agent answers comes
//! from the guest: sizes are capped by ttrpc, text is made printable, numbers are checked where they are used.

use std::{future::Future, os::unix::net::UnixStream, time::Duration};

use bulkhead_agent_protocol::{
    PROTOCOL_VERSION,
    agent::{
        AnswerConnectionRequest, CgroupFile, ChangeVolumeRequest, ConnectListenerRequest,
        Container, ContainerRequest, CreateContainerRequest, CreateExecRequest, Empty,
        EndSocketsRequest, Listeners, Network, ProcessRequest, ResizeTerminalRequest, Resources,
        ServeSocketRequest, SignalProcessRequest, SocketConnection, SocketRequest,
        StartSandboxRequest, StartSandboxResponse, Stdio, UpdateContainerRequest, VolumeChange,
        VolumeRequest, WaitProcessResponse,
    },
    agent_ttrpc::AgentClient,
};
use ttrpc::{r#async::transport::Socket, context::Context};

use crate::logs::printable;

/// Why the agent did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It answered with an error.
    #[error("{message}")]
    Refused {
        /// The RPC's status code.
        code: ttrpc::Code,
        /// Its words, made printable.
        message: String,
    },
    /// No answer came: the connection or the machine is gone.
    #[error("the guest's agent did not answer {call}: {reason}")]
    Lost {
        /// The RPC.
        call: &'static str,
        /// Why.
        reason: String,
    },
    /// The connection could not be set up.
    #[error("cannot use the agent's connection")]
    Connect(#[source] std::io::Error),
}

impl Error {
    /// The shells' exit status of a program that was not found (127) or cannot be executed (126), where that is why a process was
    /// not started. By the agent's words, whose status code is that of any bad request.
    pub fn exec_status(&self) -> Option<u8> {
        let Error::Refused { message, .. } = self else {
            return None;
        };
        match () {
            () if message.ends_with("executable file not found in $PATH") => Some(127),
            () if message.ends_with("no such file or directory") => Some(127),
            () if message.ends_with("permission denied") => Some(126),
            () if message.ends_with("exec format error") => Some(126),
            () => None,
        }
    }
}

/// The agent of one guest.
#[derive(Clone)]
pub struct Agent(AgentClient);

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Agent")
    }
}

/// Names one process of a container: its init when `exec` is empty.
fn process(container: &str, exec: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: container.into(),
        exec_id: exec.into(),
        ..ProcessRequest::default()
    }
}

fn container(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.into(),
        ..ContainerRequest::default()
    }
}

fn volume(number: u64) -> VolumeRequest {
    VolumeRequest {
        volume: number,
        ..VolumeRequest::default()
    }
}

impl Agent {
    /// Takes the host's end of the connection; the guest need not have dialled yet.
    pub fn new(stream: UnixStream) -> Result<Agent, Error> {
        stream.set_nonblocking(true).map_err(Error::Connect)?;
        let stream = tokio::net::UnixStream::from_std(stream).map_err(Error::Connect)?;
        let client = ttrpc::r#async::Client::new(Socket::new(stream));
        Ok(Agent(AgentClient::new(client)))
    }

    /// The first call of a sandbox; answered when the guest is ready.
    pub async fn start_sandbox(
        &self,
        sandbox_id: &str,
        hostname: &str,
        share_tag: &str,
        shm_bytes: u64,
        network: Option<Network>,
    ) -> Result<StartSandboxResponse, Error> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let request = StartSandboxRequest {
            version: PROTOCOL_VERSION,
            sandbox_id: sandbox_id.into(),
            hostname: hostname.into(),
            share_tag: share_tag.into(),
            shm_bytes,
            network: network.into(),
            realtime_ns: now.map_or(0, |since| since.as_nanos() as u64),
            ..StartSandboxRequest::default()
        };
        call("StartSandbox", self.0.start_sandbox(unbounded(), &request)).await
    }

    /// Makes the guest's network, once more, with the interfaces that have come.
    pub async fn configure_network(&self, network: &Network) -> Result<(), Error> {
        call(
            "ConfigureNetwork",
            self.0.configure_network(unbounded(), network),
        )
        .await?;
        Ok(())
    }

    /// Answers when the ports that somebody listens on are others than `known`.
    pub async fn watch_listeners(&self, known: &Listeners) -> Result<Listeners, Error> {
        call("WatchListeners", self.0.watch_listeners(unbounded(), known)).await
    }

    /// Connects to a listener in the guest, and joins it to the stream with this port.
    pub async fn connect_listener(
        &self,
        port: u16,
        ipv6: bool,
        stream_port: u32,
    ) -> Result<(), Error> {
        let request = ConnectListenerRequest {
            port: port.into(),
            ipv6,
            stream_port,
            ..ConnectListenerRequest::default()
        };
        call(
            "ConnectListener",
            self.0.connect_listener(unbounded(), &request),
        )
        .await?;
        Ok(())
    }

    /// Makes a container up to the point before exec.
    pub async fn create_container(
        &self,
        container: &str,
        spec: Container,
        stdio: Stdio,
    ) -> Result<(), Error> {
        let request = CreateContainerRequest {
            container_id: container.into(),
            spec: Some(spec).into(),
            stdio: Some(stdio).into(),
            ..CreateContainerRequest::default()
        };
        call(
            "CreateContainer",
            self.0.create_container(unbounded(), &request),
        )
        .await?;
        Ok(())
    }

    /// Adds a process to a running container, up to the point before exec.
    pub async fn create_exec(&self, request: &CreateExecRequest) -> Result<(), Error> {
        call("CreateExec", self.0.create_exec(unbounded(), request)).await?;
        Ok(())
    }

    /// Lets a container's init exec.
    pub async fn start(&self, container: &str) -> Result<(), Error> {
        self.start_process(container, "").await
    }

    /// Lets a created process exec; its init when `exec` is empty, as everywhere.
    pub async fn start_process(&self, container: &str, exec: &str) -> Result<(), Error> {
        let request = process(container, exec);
        call("StartProcess", self.0.start_process(unbounded(), &request)).await?;
        Ok(())
    }

    /// Answers when a container's init has exited.
    pub async fn wait(&self, container: &str) -> Result<WaitProcessResponse, Error> {
        self.wait_process(container, "").await
    }

    /// Answers when a process has exited.
    pub async fn wait_process(
        &self,
        container: &str,
        exec: &str,
    ) -> Result<WaitProcessResponse, Error> {
        let request = process(container, exec);
        call("WaitProcess", self.0.wait_process(unbounded(), &request)).await
    }

    /// Sends a signal to a container's init.
    pub async fn signal(&self, container: &str, signal: i32) -> Result<(), Error> {
        self.signal_process(container, "", signal.unsigned_abs(), false)
            .await
    }

    /// Sends a signal to a process, or with `all` to every process of the container.
    pub async fn signal_process(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let request = SignalProcessRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..SignalProcessRequest::default()
        };
        call(
            "SignalProcess",
            self.0.signal_process(unbounded(), &request),
        )
        .await?;
        Ok(())
    }

    /// Sets the size of the terminal of a container's init.
    pub async fn resize(&self, container: &str, rows: u16, columns: u16) -> Result<(), Error> {
        self.resize_process(container, "", rows, columns).await
    }

    /// Sets the size of a process' terminal.
    pub async fn resize_process(
        &self,
        container: &str,
        exec: &str,
        rows: u16,
        columns: u16,
    ) -> Result<(), Error> {
        let request = ResizeTerminalRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            rows: rows.into(),
            columns: columns.into(),
            ..ResizeTerminalRequest::default()
        };
        call(
            "ResizeTerminal",
            self.0.resize_terminal(unbounded(), &request),
        )
        .await?;
        Ok(())
    }

    /// Forgets an exited container with all that it held.
    pub async fn delete(&self, container: &str) -> Result<(), Error> {
        self.delete_process(container, "").await
    }

    /// Forgets an exited process.
    pub async fn delete_process(&self, container: &str, exec: &str) -> Result<(), Error> {
        let request = process(container, exec);
        call(
            "DeleteProcess",
            self.0.delete_process(unbounded(), &request),
        )
        .await?;
        Ok(())
    }

    /// Freezes all processes of a container.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        let request = container(id);
        call(
            "PauseContainer",
            self.0.pause_container(unbounded(), &request),
        )
        .await?;
        Ok(())
    }

    /// Thaws them.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        let request = container(id);
        call(
            "ResumeContainer",
            self.0.resume_container(unbounded(), &request),
        )
        .await?;
        Ok(())
    }

    /// Sets new limits.
    pub async fn update(&self, container: &str, resources: Resources) -> Result<(), Error> {
        let request = UpdateContainerRequest {
            container_id: container.into(),
            resources: Some(resources).into(),
            ..UpdateContainerRequest::default()
        };
        call(
            "UpdateContainer",
            self.0.update_container(unbounded(), &request),
        )
        .await?;
        Ok(())
    }

    /// The files of a container's cgroup that tell what it uses.
    pub async fn stats(&self, id: &str) -> Result<Vec<CgroupFile>, Error> {
        let request = container(id);
        let answer = call(
            "ContainerStats",
            self.0.container_stats(unbounded(), &request),
        )
        .await?;
        Ok(answer.files)
    }

    /// Makes an empty volume.
    pub async fn create_volume(&self, number: u64) -> Result<(), Error> {
        let request = volume(number);
        call("CreateVolume", self.0.create_volume(unbounded(), &request)).await?;
        Ok(())
    }

    /// Changes a volume; what comes before a failure stays.
    pub async fn change_volume(
        &self,
        volume: u64,
        changes: Vec<VolumeChange>,
    ) -> Result<(), Error> {
        let request = ChangeVolumeRequest {
            volume,
            changes,
            ..ChangeVolumeRequest::default()
        };
        call("ChangeVolume", self.0.change_volume(unbounded(), &request)).await?;
        Ok(())
    }

    /// Unmounts a volume.
    pub async fn delete_volume(&self, number: u64) -> Result<(), Error> {
        let request = volume(number);
        call("DeleteVolume", self.0.delete_volume(unbounded(), &request)).await?;
        Ok(())
    }

    /// Listens at a socket of the host.
    pub async fn serve_socket(&self, request: &ServeSocketRequest) -> Result<(), Error> {
        call("ServeSocket", self.0.serve_socket(unbounded(), request)).await?;
        Ok(())
    }

    /// Listens there no longer; connections go on.
    pub async fn stop_socket(&self, socket: u64) -> Result<(), Error> {
        let request = SocketRequest {
            socket,
            ..SocketRequest::default()
        };
        call("StopSocket", self.0.stop_socket(unbounded(), &request)).await?;
        Ok(())
    }

    /// Ends all sockets of a place in the share, with their connections.
    pub async fn end_sockets(&self, place: &str) -> Result<(), Error> {
        let request = EndSocketsRequest {
            place: place.into(),
            ..EndSocketsRequest::default()
        };
        call("EndSockets", self.0.end_sockets(unbounded(), &request)).await?;
        Ok(())
    }

    /// Answers when somebody has connected to such a socket.
    pub async fn next_connection(&self) -> Result<SocketConnection, Error> {
        let nothing = Empty::default();
        call(
            "NextConnection",
            self.0.next_connection(unbounded(), &nothing),
        )
        .await
    }

    /// Joins a connection with the stream with this port; 0: closes it.
    pub async fn answer_connection(&self, connection: u64, stream_port: u32) -> Result<(), Error> {
        let request = AnswerConnectionRequest {
            connection,
            stream_port,
            ..AnswerConnectionRequest::default()
        };
        let answered = self.0.answer_connection(unbounded(), &request);
        call("AnswerConnection", answered).await?;
        Ok(())
    }

    /// Powers the guest off. The answer may be lost with the machine, so only a refusal is an error.
    pub async fn shutdown(&self, limit: Duration) -> Result<(), Error> {
        let context = ttrpc::context::with_duration(limit);
        match call("Shutdown", self.0.shutdown(context, &Empty::default())).await {
            Ok(_) | Err(Error::Lost { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// No deadline: whoever calls also watches the machine, whose end breaks the connection.
fn unbounded() -> Context {
    Context::default()
}

/// The one map from ttrpc's errors to ours.
async fn call<T>(
    name: &'static str,
    answer: impl Future<Output = ttrpc::Result<T>>,
) -> Result<T, Error> {
    answer.await.map_err(|error| match error {
        ttrpc::Error::RpcStatus(status) if status.code() != ttrpc::Code::DEADLINE_EXCEEDED => {
            Error::Refused {
                code: status.code(),
                message: printable(status.message()),
            }
        }
        other => Error::Lost {
            call: name,
            reason: printable(&other.to_string()),
        },
    })
}
