//! Calls to a container's monitor, by the commands that engines run.

use std::{io, time::Duration};

use containerd_shim_protos::{
    api,
    protobuf::{MessageField, well_known_types::any::Any},
    shim_async::{Client as Wire, TaskClient},
    types::task::Status,
};
use ttrpc::{Code, r#async::transport::Socket, context};

use super::{room::Room, ticket};
use crate::containerd::stdio::SCHEME;

/// How long a monitor may take over an answer that it has by itself.
const PROMPT: Duration = Duration::from_secs(30);

/// Why a call has failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no monitor any more.
    #[error("the monitor of container {0:?} has ended")]
    Gone(String),
    /// It has refused.
    #[error("{0}")]
    Refused(String, Code),
    /// The connection broke, or there was no answer.
    #[error("no answer from the container's monitor: {0}")]
    Broken(String),
}

impl Error {
    /// The process, or the container, has ended or never was.
    pub fn is_missing(&self) -> bool {
        matches!(self, Error::Gone(_) | Error::Refused(_, Code::NOT_FOUND))
    }
}

impl From<ttrpc::Error> for Error {
    fn from(error: ttrpc::Error) -> Error {
        match error {
            ttrpc::Error::RpcStatus(status) => {
                Error::Refused(status.message.clone(), status.code())
            }
            other => Error::Broken(other.to_string()),
        }
    }
}

/// A connection to a monitor. Within an event loop.
pub struct Client {
    id: String,
    tasks: TaskClient,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// [`Error::Gone`]
    pub fn connect(room: &Room) -> Result<Client, Error> {
        let connect = || -> io::Result<Socket> {
            let stream = room.connect()?;
            stream.set_nonblocking(true)?;
            Ok(Socket::new(tokio::net::UnixStream::from_std(stream)?))
        };
        match connect() {
            Ok(socket) => Ok(Client {
                id: room.id.clone(),
                tasks: TaskClient::new(Wire::new(socket)),
            }),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                Err(Error::Gone(room.id.clone()))
            }
            Err(error) => Err(Error::Broken(error.to_string())),
        }
    }

    /// Makes the container of the bundle; its streams have been handed over.
    pub async fn create(&self, bundle: &str, terminal: bool) -> Result<u32, Error> {
        let stream = format!("{SCHEME}{}", ticket(&self.id, ""));
        let request = api::CreateTaskRequest {
            id: self.id.clone(),
            bundle: bundle.into(),
            stdin: stream.clone(),
            stdout: stream.clone(),
            stderr: if terminal { String::new() } else { stream },
            terminal,
            ..Default::default()
        };
        let context = context::Context::default();
        Ok(self.tasks.create(context, &request).await?.pid)
    }

    /// Adds a process to the container; its streams have been handed over.
    pub async fn exec(&self, exec_id: &str, process: Vec<u8>, terminal: bool) -> Result<(), Error> {
        let stream = format!("{SCHEME}{}", ticket(&self.id, exec_id));
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process,
            ..Any::default()
        };
        let request = api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            stdin: stream.clone(),
            stdout: stream.clone(),
            stderr: if terminal { String::new() } else { stream },
            terminal,
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.tasks.exec(prompt(), &request).await?;
        Ok(())
    }

    /// Lets the init run, or an exec process; the pid that stands for the pod.
    pub async fn start(&self, exec_id: &str) -> Result<u32, Error> {
        let request = api::StartRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let context = context::Context::default();
        Ok(self.tasks.start(context, &request).await?.pid)
    }

    /// Where the container is in its life, in the words of OCI runtime.md#state.
    pub async fn state(&self) -> Result<&'static str, Error> {
        let request = api::StateRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        let state = self.tasks.state(prompt(), &request).await?;
        Ok(match state.status.enum_value_or_default() {
            Status::CREATED => "created",
            Status::RUNNING => "running",
            Status::PAUSED | Status::PAUSING => "paused",
            Status::STOPPED | Status::UNKNOWN => "stopped",
        })
    }

    /// Sends a signal to the init, or to every process.
    pub async fn kill(&self, signal: u32, all: bool) -> Result<(), Error> {
        let request = api::KillRequest {
            id: self.id.clone(),
            signal,
            all,
            ..Default::default()
        };
        self.tasks.kill(prompt(), &request).await?;
        Ok(())
    }

    /// Waits for the init's end: its exit status.
    pub async fn wait(&self) -> Result<u32, Error> {
        let request = api::WaitRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        let context = context::Context::default();
        Ok(self.tasks.wait(context, &request).await?.exit_status)
    }

    /// Forgets the container, and gives back what it held.
    pub async fn delete(&self) -> Result<(), Error> {
        let request = api::DeleteRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        let context = context::Context::default();
        self.tasks.delete(context, &request).await?;
        Ok(())
    }

    /// Freezes the container.
    pub async fn pause(&self) -> Result<(), Error> {
        let request = api::PauseRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        self.tasks.pause(prompt(), &request).await?;
        Ok(())
    }

    /// Thaws it.
    pub async fn resume(&self) -> Result<(), Error> {
        let request = api::ResumeRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        self.tasks.resume(prompt(), &request).await?;
        Ok(())
    }

    /// Sets new limits: `LinuxResources` as JSON.
    pub async fn update(&self, resources: Vec<u8>) -> Result<(), Error> {
        let request = api::UpdateTaskRequest {
            id: self.id.clone(),
            resources: MessageField::some(Any {
                value: resources,
                ..Any::default()
            }),
            ..Default::default()
        };
        self.tasks.update(prompt(), &request).await?;
        Ok(())
    }

    /// What the container uses: `io.containerd.cgroups.v2.Metrics`.
    pub async fn stats(&self) -> Result<Vec<u8>, Error> {
        let request = api::StatsRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        let answer = self.tasks.stats(prompt(), &request).await?;
        Ok(answer.stats.into_option().unwrap_or_default().value)
    }
}

fn prompt() -> context::Context {
    context::with_duration(PROMPT)
}
