//! The client of the guest's agent: ttrpc over the connection that the agent dials.
//!
//! The first request is written before the guest runs, so its answer is the sign of readiness. What the agent answers comes
//! from the guest: frames are capped (`line`), answers looked at before they are decoded (`answer`), text is made printable
//! and cut, numbers are checked where they are used. No answer is waited for without an end but those that come when something
//! happens in the guest.

mod answer;
#[cfg(test)]
mod attack_tests;
mod line;

use std::{os::unix::net::UnixStream, time::Duration};

use bulkhead_agent_protocol::{
    PROTOCOL_VERSION, SEED,
    agent::{
        AnswerConnectionRequest, CgroupFile, ChangeVolumeRequest, ConnectListenerRequest,
        Container, ContainerRequest, ContainerStatsResponse, CreateContainerRequest,
        CreateExecRequest, CreateProcessResponse, Empty, EndSocketsRequest, Listeners, Network,
        ProcessRequest, ProgramProblem, ReclaimMemoryRequest, ReclaimMemoryResponse,
        ResizeTerminalRequest, Resources, ServeSocketRequest, SetProcessorsRequest,
        SignalProcessRequest, SocketConnection, SocketRequest, StartProcessResponse,
        StartSandboxRequest, StartSandboxResponse, Stdio, UpdateContainerRequest, VolumeChange,
        VolumeRequest, WaitProcessResponse,
    },
};
use protobuf::{EnumOrUnknown, Message};
use tokio::io::{AsyncRead, AsyncWrite};
use ttrpc::r#async::{Client, transport::Socket};

use self::{
    answer::Answer,
    line::{Line, State},
};
use crate::{audit::Audit, text::brief};

/// The service's name in agent.proto.
const SERVICE: &str = "bulkhead.agent.v1.Agent";
/// Most of a text from the guest that becomes part of an error, in bytes.
const MAX_TEXT: usize = 4 << 10;
/// Most of a name from the guest.
const MAX_NAME: usize = 128;
/// How long the guest may take over what costs it little.
const QUICK: Duration = Duration::from_secs(60);
/// How long the guest may take over what a container's own configuration makes long: copies into its tmpfs mounts, hooks.
const LONG: Duration = Duration::from_secs(600);

/// Why the agent did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It answered with an error.
    #[error("{message}")]
    Refused {
        /// The RPC's status code.
        code: ttrpc::Code,
        /// Its words, made printable, and without their middle where they are long.
        message: String,
    },
    /// The process ended because its program cannot be executed.
    #[error("{message}")]
    Program {
        /// The shells' exit status: 127 for one that was not found, 126 for one that is not executable.
        status: u8,
        /// The agent's words, as those of a refusal.
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
    /// The host has no random bytes.
    #[error("cannot draw random bytes for the guest")]
    Seed(#[source] std::io::Error),
}

impl Error {
    /// The shells' exit status of a program that was not found or cannot be executed, where that is why a process was not started.
    pub fn exec_status(&self) -> Option<u8> {
        match self {
            Error::Program { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// The agent of one guest.
#[derive(Clone)]
pub struct Agent {
    client: Client,
    state: State,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Agent")
    }
}

/// Whether a process' program can be executed.
fn runs(problem: EnumOrUnknown<ProgramProblem>, reason: &str) -> Result<(), Error> {
    let status = match problem.enum_value() {
        Ok(ProgramProblem::NONE) => return Ok(()),
        Ok(ProgramProblem::NOT_FOUND) => 127,
        // A number that our agent does not say is a problem all the same.
        Ok(ProgramProblem::NOT_EXECUTABLE) | Err(_) => 126,
    };
    Err(Error::Program {
        status,
        message: brief(reason, MAX_TEXT),
    })
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
    pub fn new(stream: UnixStream, audit: &Audit) -> Result<Agent, Error> {
        stream.set_nonblocking(true).map_err(Error::Connect)?;
        let stream = tokio::net::UnixStream::from_std(stream).map_err(Error::Connect)?;
        Ok(Agent::over(stream, audit))
    }

    /// The same for any connection.
    pub(crate) fn over(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static,
        audit: &Audit,
    ) -> Agent {
        let (line, state) = Line::new(stream, audit);
        let client = Client::new(Socket::new(line));
        Agent { client, state }
    }

    /// Waits until the connection cannot be used any more: an error that tells why.
    pub async fn lost(&self) -> Error {
        let reason = self.state.ended().await;
        let call = "any more";
        Error::Lost { call, reason }
    }

    /// Asks and waits, for `limit` at most.
    async fn call<A: Answer>(
        &self,
        method: &'static str,
        request: &impl Message,
        limit: Option<Duration>,
    ) -> Result<A, Error> {
        let lost = |reason: String| Error::Lost {
            call: method,
            reason: brief(&reason, MAX_TEXT),
        };
        let payload = request
            .write_to_bytes()
            .map_err(|error| lost(error.to_string()))?;
        let request = ttrpc::Request {
            service: SERVICE.into(),
            method: method.into(),
            payload,
            ..ttrpc::Request::default()
        };
        self.state.ask();
        // No deadline for the agent: it would give up halfway.
        let answered = self.client.request(request);
        let answered = match limit {
            None => answered.await,
            Some(limit) => match tokio::time::timeout(limit, answered).await {
                Ok(answered) => answered,
                Err(_) => return Err(lost(format!("no answer within {} s", limit.as_secs()))),
            },
        };
        let response = match answered {
            Ok(response) => response,
            Err(ttrpc::Error::RpcStatus(status)) => {
                return Err(Error::Refused {
                    code: status.code(),
                    message: brief(status.message(), MAX_TEXT),
                });
            }
            Err(other) => return Err(lost(other.to_string())),
        };
        answer::decode(&response.payload).map_err(|refusal| {
            let reason = format!("its answer to {method} is not understood: {refusal}");
            // As for a frame that is not: nothing that it says is worth anything now.
            self.state.refuse("answer", &reason);
            lost(reason)
        })
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
        // Of the host's: it may go on from a template, as others do.
        let mut seed = [0; SEED];
        linux::random(&mut seed).map_err(|errno| Error::Seed(errno.into()))?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let request = StartSandboxRequest {
            version: PROTOCOL_VERSION,
            sandbox_id: sandbox_id.into(),
            hostname: hostname.into(),
            share_tag: share_tag.into(),
            shm_bytes,
            network: network.into(),
            realtime_ns: now.map_or(0, |since| since.as_nanos() as u64),
            seed: seed.into(),
            ..StartSandboxRequest::default()
        };
        // Its caller knows how long a boot may take.
        let answer: StartSandboxResponse = self.call("StartSandbox", &request, None).await?;
        Ok(StartSandboxResponse {
            agent_version: brief(&answer.agent_version, MAX_NAME),
            kernel_release: brief(&answer.kernel_release, MAX_NAME),
            ..answer
        })
    }

    /// Makes the guest's network, once more, with the interfaces that have come.
    pub async fn configure_network(&self, network: &Network) -> Result<(), Error> {
        self.call::<Empty>("ConfigureNetwork", network, Some(QUICK))
            .await?;
        Ok(())
    }

    /// Answers when the ports that somebody listens on are others than `known`.
    pub async fn watch_listeners(&self, known: &Listeners) -> Result<Listeners, Error> {
        self.call("WatchListeners", known, None).await
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
        self.call::<Empty>("ConnectListener", &request, Some(QUICK))
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
        let answer: CreateProcessResponse =
            self.call("CreateContainer", &request, Some(LONG)).await?;
        runs(answer.problem, &answer.reason)
    }

    /// Adds a process to a running container, up to the point before exec.
    pub async fn create_exec(&self, request: &CreateExecRequest) -> Result<(), Error> {
        let answer: CreateProcessResponse = self.call("CreateExec", request, Some(LONG)).await?;
        runs(answer.problem, &answer.reason)
    }

    /// Lets a container's init exec.
    pub async fn start(&self, container: &str) -> Result<(), Error> {
        self.start_process(container, "").await
    }

    /// Lets a created process exec; its init when `exec` is empty, as everywhere.
    pub async fn start_process(&self, container: &str, exec: &str) -> Result<(), Error> {
        let request = process(container, exec);
        let answer: StartProcessResponse = self.call("StartProcess", &request, Some(LONG)).await?;
        runs(answer.problem, &answer.reason)
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
        self.call("WaitProcess", &request, None).await
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
        self.call::<Empty>("SignalProcess", &request, Some(QUICK))
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
        self.call::<Empty>("ResizeTerminal", &request, Some(QUICK))
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
        self.call::<Empty>("DeleteProcess", &request, Some(QUICK))
            .await?;
        Ok(())
    }

    /// Freezes all processes of a container.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        let request = container(id);
        self.call::<Empty>("PauseContainer", &request, Some(QUICK))
            .await?;
        Ok(())
    }

    /// Thaws them.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        let request = container(id);
        self.call::<Empty>("ResumeContainer", &request, Some(QUICK))
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
        self.call::<Empty>("UpdateContainer", &request, Some(QUICK))
            .await?;
        Ok(())
    }

    /// The files of a container's cgroup that tell what it uses.
    pub async fn stats(&self, id: &str) -> Result<Vec<CgroupFile>, Error> {
        let request = container(id);
        let _long = self.state.allow_long();
        let answer: ContainerStatsResponse =
            self.call("ContainerStats", &request, Some(QUICK)).await?;
        Ok(answer.files)
    }

    /// Has page cache of the containers freed, at most so many bytes; how many it were, in the
    /// guest's words.
    pub async fn reclaim_memory(&self, bytes: u64) -> Result<u64, Error> {
        let request = ReclaimMemoryRequest {
            bytes,
            ..ReclaimMemoryRequest::default()
        };
        let answer: ReclaimMemoryResponse =
            self.call("ReclaimMemory", &request, Some(QUICK)).await?;
        Ok(answer.bytes)
    }

    /// Has the guest run on the first `count` processors of its machine.
    pub async fn set_processors(&self, count: u32) -> Result<(), Error> {
        let request = SetProcessorsRequest {
            count,
            ..SetProcessorsRequest::default()
        };
        self.call::<Empty>("SetProcessors", &request, Some(QUICK))
            .await?;
        Ok(())
    }

    /// Makes an empty volume.
    pub async fn create_volume(&self, number: u64) -> Result<(), Error> {
        let request = volume(number);
        self.call::<Empty>("CreateVolume", &request, Some(QUICK))
            .await?;
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
        self.call::<Empty>("ChangeVolume", &request, Some(QUICK))
            .await?;
        Ok(())
    }

    /// Unmounts a volume.
    pub async fn delete_volume(&self, number: u64) -> Result<(), Error> {
        let request = volume(number);
        self.call::<Empty>("DeleteVolume", &request, Some(QUICK))
            .await?;
        Ok(())
    }

    /// Listens at a socket of the host.
    pub async fn serve_socket(&self, request: &ServeSocketRequest) -> Result<(), Error> {
        self.call::<Empty>("ServeSocket", request, Some(QUICK))
            .await?;
        Ok(())
    }

    /// Listens there no longer; connections go on.
    pub async fn stop_socket(&self, socket: u64) -> Result<(), Error> {
        let request = SocketRequest {
            socket,
            ..SocketRequest::default()
        };
        self.call::<Empty>("StopSocket", &request, Some(QUICK))
            .await?;
        Ok(())
    }

    /// Ends all sockets of a place in the share, with their connections.
    pub async fn end_sockets(&self, place: &str) -> Result<(), Error> {
        let request = EndSocketsRequest {
            place: place.into(),
            ..EndSocketsRequest::default()
        };
        self.call::<Empty>("EndSockets", &request, Some(QUICK))
            .await?;
        Ok(())
    }

    /// Answers when somebody has connected to such a socket.
    pub async fn next_connection(&self) -> Result<SocketConnection, Error> {
        self.call("NextConnection", &Empty::default(), None).await
    }

    /// Joins a connection with the stream with this port; 0: closes it.
    pub async fn answer_connection(&self, connection: u64, stream_port: u32) -> Result<(), Error> {
        let request = AnswerConnectionRequest {
            connection,
            stream_port,
            ..AnswerConnectionRequest::default()
        };
        self.call::<Empty>("AnswerConnection", &request, Some(QUICK))
            .await?;
        Ok(())
    }

    /// Powers the guest off. The answer may be lost with the machine, so only a refusal is an error.
    pub async fn shutdown(&self, limit: Duration) -> Result<(), Error> {
        let asked = self
            .call::<Empty>("Shutdown", &Empty::default(), Some(limit))
            .await;
        match asked {
            Ok(_) | Err(Error::Lost { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MessageHeader};

    use super::*;

    /// A guest that answers the first request with this envelope, and then nothing.
    fn guest(mut stream: UnixStream, response: ttrpc::Response) {
        std::thread::spawn(move || {
            let mut header = [0; MESSAGE_HEADER_LENGTH];
            stream.read_exact(&mut header).unwrap();
            let request = MessageHeader::from(header);
            stream
                .read_exact(&mut vec![0; request.length as usize])
                .unwrap();
            let payload = response.write_to_bytes().unwrap();
            let header = MessageHeader::new_response(request.stream_id, payload.len() as u32);
            let mut frame: Vec<u8> = header.into();
            frame.extend(payload);
            // It may be refused before its end.
            let _ = stream.write_all(&frame);
            let _ = stream.read(&mut [0]);
        });
    }

    async fn soon<T>(work: impl Future<Output = T>) -> T {
        let limited = tokio::time::timeout(Duration::from_secs(10), work).await;
        limited.expect("it waits")
    }

    #[tokio::test]
    async fn a_guest_that_is_silent_is_not_waited_for() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let agent = Agent::new(ours, &Audit::default()).unwrap();
        let limit = Some(Duration::from_millis(100));
        let asked = soon(agent.call::<Empty>("Nothing", &Empty::default(), limit)).await;
        assert!(matches!(asked, Err(Error::Lost { .. })), "{asked:?}");
        // It may still come to itself.
        let lost = tokio::time::timeout(Duration::from_millis(50), agent.lost()).await;
        lost.unwrap_err();
    }

    #[tokio::test]
    async fn an_answer_with_more_than_it_has_is_the_end_of_the_guest() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = Agent::new(ours, &Audit::default()).unwrap();
        let mut response = ttrpc::Response::new();
        // Field 7, a number.
        response.payload = [0x38, 1].repeat(1000);
        guest(theirs, response);
        let asked = soon(agent.pause("c")).await;
        let Err(Error::Lost { reason, .. }) = asked else {
            panic!("{asked:?}")
        };
        assert!(reason.contains("field 7"), "{reason}");
        let lost = soon(agent.lost()).await.to_string();
        assert!(lost.contains("field 7"), "{lost}");
    }

    #[tokio::test]
    async fn the_words_of_a_guest_are_printable_and_cut() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = Agent::new(ours, &Audit::default()).unwrap();
        let words = format!(
            "forged\n2026-11-29 ERROR {}: permission denied",
            "x".repeat(100_000)
        );
        let mut response = ttrpc::Response::new();
        response.set_status(ttrpc::get_status(ttrpc::Code::INTERNAL, words));
        guest(theirs, response);
        let error = soon(agent.start("c")).await.unwrap_err();
        // No words of a guest decide a status.
        assert_eq!(error.exec_status(), None);
        let text = error.to_string();
        assert!(text.len() <= MAX_TEXT && !text.contains('\n'), "{text}");
    }

    #[tokio::test]
    async fn a_program_that_cannot_run_has_the_shells_status() {
        // The last one is a number that our agent does not say.
        for (problem, status) in [(1, 127), (2, 126), (9, 126)] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let agent = Agent::new(ours, &Audit::default()).unwrap();
            let answer = StartProcessResponse {
                problem: protobuf::EnumOrUnknown::from_i32(problem),
                reason: format!("exec: {}\nforged", "x".repeat(100_000)),
                ..StartProcessResponse::default()
            };
            let mut response = ttrpc::Response::new();
            response.payload = answer.write_to_bytes().unwrap();
            guest(theirs, response);
            let error = soon(agent.start("c")).await.unwrap_err();
            assert_eq!(error.exec_status(), Some(status));
            let text = error.to_string();
            assert!(text.len() <= MAX_TEXT && !text.contains('\n'), "{text}");
        }
    }

    #[tokio::test]
    async fn a_release_that_is_a_log_line_is_none() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = Agent::new(ours, &Audit::default()).unwrap();
        let hostile = StartSandboxResponse {
            kernel_release: format!("6.12\nERROR containerd: {}", "x".repeat(100_000)),
            ..StartSandboxResponse::default()
        };
        let mut response = ttrpc::Response::new();
        response.payload = hostile.write_to_bytes().unwrap();
        guest(theirs, response);
        let ready = soon(agent.start_sandbox("s", "h", "share", 0, None)).await;
        let release = ready.unwrap().kernel_release;
        assert!(release.starts_with("6.12\\n") && release.len() <= MAX_NAME);
    }
}
