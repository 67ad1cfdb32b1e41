//! What an RPC can fail with, and the one map from there to the status that the shim sees.

use bulkhead_agent_protocol::agent::ProgramProblem;
use ttrpc::Code;

use crate::container::{CgroupError, CreateError, FailureKind, ProcessError};
use crate::machine::MachineError;
use crate::network::NetworkError;
use crate::share::ShareError;
use crate::sockets::SocketError;
use crate::volume::VolumeError;

/// An RPC failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The shim and the agent are of different versions.
    #[error(
        "the agent speaks version {ours} of the protocol and was asked for {theirs}: install shim and guest image together"
    )]
    Version {
        /// The agent's.
        ours: u32,
        /// The shim's.
        theirs: u32,
    },
    /// There is one sandbox a guest.
    #[error("the sandbox has been started already")]
    Started,
    /// Something of the request is malformed.
    #[error("{0}")]
    Invalid(String),
    /// No such container.
    #[error("no container \"{0}\"")]
    NoContainer(String),
    /// No such process.
    #[error("no process \"{process}\" in container \"{container}\"")]
    NoProcess {
        /// The container.
        container: String,
        /// The exec id.
        process: String,
    },
    /// The id is taken.
    #[error("there is a container \"{0}\" already")]
    ContainerExists(String),
    /// The id is taken.
    #[error("there is a process \"{process}\" in container \"{container}\" already")]
    ProcessExists {
        /// The container.
        container: String,
        /// The exec id.
        process: String,
    },
    /// It must have ended first.
    #[error("{0} is still running: kill it first")]
    Running(String),
    /// It is being made.
    #[error("{0} is still being made")]
    Unfinished(String),
    /// A container or an exec process could not be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// A process cannot do what is asked.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The guest as a whole.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The pod's network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// A socket of the host.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A mount of the host beneath a source.
    #[error(transparent)]
    Share(#[from] ShareError),
}

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::Version { .. } | Self::Started => Code::FAILED_PRECONDITION,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::NoContainer(_) | Self::NoProcess { .. } => Code::NOT_FOUND,
            Self::ContainerExists(_) | Self::ProcessExists { .. } => Code::ALREADY_EXISTS,
            Self::Running(_) | Self::Unfinished(_) => Code::FAILED_PRECONDITION,
            Self::Create(error) => match error {
                CreateError::Invalid(_) => Code::INVALID_ARGUMENT,
                CreateError::NotRunning => Code::FAILED_PRECONDITION,
                CreateError::Stage(failure) => stage_code(failure.kind),
                CreateError::Cgroup(error) => cgroup_code(error),
                _ => Code::INTERNAL,
            },
            Self::Process(error) => match error {
                ProcessError::State(_) => Code::FAILED_PRECONDITION,
                ProcessError::Exited => Code::NOT_FOUND,
                ProcessError::NoTerminal => Code::INVALID_ARGUMENT,
                ProcessError::Stage(failure) => stage_code(failure.kind),
                ProcessError::System { .. } => Code::INTERNAL,
            },
            Self::Cgroup(error) => cgroup_code(error),
            Self::Machine(_) | Self::Share(_) => Code::INTERNAL,
            Self::Network(error) => match error {
                NetworkError::Devices { .. } => Code::FAILED_PRECONDITION,
                NetworkError::ForeignSysctl(_)
                | NetworkError::Invalid { .. }
                | NetworkError::Port(_) => Code::INVALID_ARGUMENT,
                NetworkError::Connect { .. } => Code::UNAVAILABLE,
                NetworkError::Sysctl(_)
                | NetworkError::Refused { .. }
                | NetworkError::System { .. } => Code::INTERNAL,
            },
            Self::Socket(SocketError::Served(_)) => Code::ALREADY_EXISTS,
            Self::Socket(SocketError::NoConnection(_)) => Code::NOT_FOUND,
            Self::Socket(SocketError::System { .. }) => Code::INTERNAL,
            Self::Volume(VolumeError::Invalid { .. }) => Code::INVALID_ARGUMENT,
            Self::Volume(VolumeError::System { .. }) => Code::INTERNAL,
        }
    }
}

impl Error {
    /// Whether the program is the problem, and why; any other error stays one.
    pub(crate) fn into_program_problem(self) -> Result<(ProgramProblem, String), Self> {
        let (Self::Process(ProcessError::Stage(failure))
        | Self::Create(CreateError::Stage(failure))) = &self
        else {
            return Err(self);
        };
        match failure.kind {
            FailureKind::ProgramNotFound => Ok((ProgramProblem::NOT_FOUND, chain(&self))),
            FailureKind::ProgramNotExecutable => Ok((ProgramProblem::NOT_EXECUTABLE, chain(&self))),
            FailureKind::Invalid | FailureKind::Internal => Err(self),
        }
    }
}

/// A limit that this kernel does not have or that it refuses is the request's fault; anything else is the guest's.
fn cgroup_code(error: &CgroupError) -> Code {
    match error {
        CgroupError::InvalidPath { .. }
        | CgroupError::InvalidFile { .. }
        | CgroupError::Limit { .. }
        | CgroupError::Rule { .. } => Code::INVALID_ARGUMENT,
        CgroupError::Exists { .. } => Code::ALREADY_EXISTS,
        CgroupError::Write { source, .. } => match source.raw_os_error() {
            Some(libc::ENOENT | libc::EINVAL | libc::ERANGE | libc::EOPNOTSUPP | libc::ENODEV) => {
                Code::INVALID_ARGUMENT
            }
            _ => Code::INTERNAL,
        },
        CgroupError::Io { .. } | CgroupError::Timeout { .. } => Code::INTERNAL,
    }
}

fn stage_code(kind: FailureKind) -> Code {
    match kind {
        FailureKind::Internal => Code::INTERNAL,
        // NOT_FOUND means "no such container or process" to the shim, never "no such program".
        FailureKind::Invalid | FailureKind::ProgramNotFound | FailureKind::ProgramNotExecutable => {
            Code::INVALID_ARGUMENT
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), chain(&error)))
    }
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Transparent errors repeat their cause.
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
