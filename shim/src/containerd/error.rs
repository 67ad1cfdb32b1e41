//! Why a request about a task fails, and the one map from there to the status that containerd sees.

use ttrpc::Code;

use crate::{
    audit::Event,
    config,
    containerd::stdio,
    error::line,
    ids,
    machine::agent,
    oci::{self, cri},
    pod, sys,
};

/// A request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such task or process, or it has ended.
    #[error("{0}")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}")]
    Exists(String),
    /// Not in this state.
    #[error("{0}")]
    State(String),
    /// The request contradicts itself.
    #[error("{0}")]
    Invalid(String),
    /// Not known now, but perhaps later.
    #[error("{0}")]
    Unavailable(String),
    /// Not offered.
    #[error("{0} is not offered")]
    Unimplemented(&'static str),
    /// An id that cannot be used.
    #[error(transparent)]
    Id(#[from] ids::Error),
    /// The operator's configuration.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// config.json.
    #[error(transparent)]
    Oci(#[from] oci::Error),
    /// Kubernetes' words about the pod.
    #[error(transparent)]
    Cri(#[from] cri::Error),
    /// The standard streams.
    #[error(transparent)]
    Stdio(#[from] stdio::Error),
    /// The pod.
    #[error(transparent)]
    Pod(#[from] pod::Error),
    /// A system call.
    #[error("cannot {action}")]
    Io {
        /// What.
        action: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// What the audit log has of it, if it refuses what a container in a machine is not given.
    pub(super) fn refusal(&self) -> Option<Event> {
        match self {
            Error::Oci(error) => error.refusal(),
            Error::Pod(error) => error.refusal(),
            Error::Cri(cri::Error::Unsupported { field, reason }) => Some(Event::Refused {
                field: Some((*field).into()),
                reason: reason.clone(),
            }),
            _ => None,
        }
    }

    fn code(&self) -> Code {
        match self {
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::Exists(_) => Code::ALREADY_EXISTS,
            Error::State(_) => Code::FAILED_PRECONDITION,
            Error::Cri(cri::Error::Write { .. }) => Code::UNKNOWN,
            Error::Invalid(_) | Error::Id(_) | Error::Oci(_) | Error::Cri(_) => {
                Code::INVALID_ARGUMENT
            }
            Error::Unavailable(_) => Code::UNAVAILABLE,
            Error::Unimplemented(_) => Code::UNIMPLEMENTED,
            Error::Pod(error) => pod_code(error),
            _ => Code::UNKNOWN,
        }
    }

    /// One line, with the guest's last words where they explain it.
    pub fn text(&self) -> String {
        match self {
            Error::Pod(error) => error.text(),
            _ => line(self),
        }
    }
}

impl From<agent::Error> for Error {
    fn from(error: agent::Error) -> Error {
        pod::Error::from(error).into()
    }
}

fn pod_code(error: &pod::Error) -> Code {
    match error {
        pod::Error::Ended(_) | pod::Error::GuestTaken(_) => Code::FAILED_PRECONDITION,
        pod::Error::PrivatePids | pod::Error::Size(_) => Code::INVALID_ARGUMENT,
        pod::Error::Socket(error) if error.is_refusal() => Code::INVALID_ARGUMENT,
        pod::Error::Hung(_) => Code::DEADLINE_EXCEEDED,
        pod::Error::Agent(agent::Error::Program { .. }) => Code::INVALID_ARGUMENT,
        pod::Error::Agent(agent::Error::Refused { code, .. }) => match code {
            // Of what containerd must not take for its own: an agent that lacks a method, or half a container.
            Code::UNIMPLEMENTED | Code::ALREADY_EXISTS => Code::UNKNOWN,
            code => *code,
        },
        _ => Code::UNKNOWN,
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.text()))
    }
}

/// Runs to the end even when the client goes away or its deadline passes.
pub(super) async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> ttrpc::Result<T> {
    let done = tokio::spawn(work).await;
    // Configurations and filters were parsed; in a pod that idles for days their memory is somebody else's.
    sys::trim_memory();
    match done {
        Ok(done) => done.map_err(ttrpc::Error::from),
        Err(error) => Err(Error::Io {
            action: "finish the request".into(),
            source: std::io::Error::other(error),
        }
        .into()),
    }
}
