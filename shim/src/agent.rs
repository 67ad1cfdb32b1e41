//! The client of the guest's agent: ttrpc over the connection that the agent dials.
//!
//! The first request is written before the guest runs, so its answer is the sign of readiness. What the agent answers comes
//! from the guest: sizes are capped by ttrpc, text is made printable, numbers are checked where they are used.

use std::{future::Future, os::unix::net::UnixStream, time::Duration};

use bulkhead_agent_protocol::{
    PROTOCOL_VERSION,
    agent::{
        CreateContainerRequest, Empty, ProcessRequest, ResizeTerminalRequest, SignalProcessRequest,
        StartSandboxRequest, StartSandboxResponse, WaitProcessResponse,
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

/// The agent of one guest.
#[derive(Clone)]
pub struct Agent(AgentClient);

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Agent")
    }
}

/// Names one process of a container: its init.
fn init_of(container: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: container.into(),
        ..ProcessRequest::default()
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
    ) -> Result<StartSandboxResponse, Error> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let request = StartSandboxRequest {
            version: PROTOCOL_VERSION,
            sandbox_id: sandbox_id.into(),
            hostname: hostname.into(),
            share_tag: share_tag.into(),
            realtime_ns: now.map_or(0, |since| since.as_nanos() as u64),
            ..StartSandboxRequest::default()
        };
        call("StartSandbox", self.0.start_sandbox(unbounded(), &request)).await
    }

    /// Makes a container up to the point before exec.
    pub async fn create_container(&self, request: &CreateContainerRequest) -> Result<(), Error> {
        call(
            "CreateContainer",
            self.0.create_container(unbounded(), request),
        )
        .await?;
        Ok(())
    }

    /// Lets a container's init exec.
    pub async fn start(&self, container: &str) -> Result<(), Error> {
        call(
            "StartProcess",
            self.0.start_process(unbounded(), &init_of(container)),
        )
        .await?;
        Ok(())
    }

    /// Answers when a container's init has exited.
    pub async fn wait(&self, container: &str) -> Result<WaitProcessResponse, Error> {
        call(
            "WaitProcess",
            self.0.wait_process(unbounded(), &init_of(container)),
        )
        .await
    }

    /// Sends a signal to a container's init.
    pub async fn signal(&self, container: &str, signal: i32) -> Result<(), Error> {
        let request = SignalProcessRequest {
            container_id: container.into(),
            signal: signal.unsigned_abs(),
            ..SignalProcessRequest::default()
        };
        call(
            "SignalProcess",
            self.0.signal_process(unbounded(), &request),
        )
        .await?;
        Ok(())
    }

    /// Sets the size of a container's terminal.
    pub async fn resize(&self, container: &str, rows: u16, columns: u16) -> Result<(), Error> {
        let request = ResizeTerminalRequest {
            container_id: container.into(),
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
        call(
            "DeleteProcess",
            self.0.delete_process(unbounded(), &init_of(container)),
        )
        .await?;
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
