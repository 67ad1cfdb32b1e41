//! The fs process: `bulkhead-vmm fs`, which alone serves the pod's share.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use bulkhead_vmm_config::{CachePolicy, Fd, FsConfig, FsEvent, FsRequest, WIRE_VERSION};

use crate::{
    config, control,
    ledger::Ledger,
    logs::printable,
    peer::{self, Peer, Place},
};

/// Why the share cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process could not be started.
    #[error(transparent)]
    Peer(#[from] peer::Error),
    /// The control socket broke.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// It said why it cannot go on.
    #[error("{0}")]
    Failed(String),
    /// It died without a word.
    #[error("the file share's process died{death}{line}")]
    Died {
        /// How.
        death: String,
        /// The last log line that tells of trouble.
        line: String,
    },
    /// It said no, or something unexpected.
    #[error("the file share's process refused {request}: {reason}")]
    Refused {
        /// What was asked.
        request: &'static str,
        /// Its words.
        reason: String,
    },
}

/// The fs process. One request at a time.
#[derive(Debug)]
pub struct Fs {
    peer: Peer,
    /// Held over a request and its answer.
    exchange: tokio::sync::Mutex<Exchange>,
}

#[derive(Debug, Default)]
struct Exchange {
    /// It has said that it serves.
    serves: bool,
    /// Answers that are on their way, in the order of the requests. Who gave up before its answer came leaves it to the next one.
    due: u32,
}

impl Fs {
    /// Starts it and sends its configuration; [`Fs::serving`] waits for it.
    pub async fn start(
        place: Place<'_>,
        share: &Path,
        settings: &config::Share,
        socket: OwnedFd,
        ledger: &mut Ledger,
    ) -> Result<Fs, Error> {
        let peer = Peer::start(place, "fs", ledger)?;
        let config = FsConfig {
            version: WIRE_VERSION,
            sandbox_id: place.sandbox.into(),
            share: share.to_string_lossy().into_owned(),
            socket: Fd(0),
            queues: settings.queues,
            cache: CachePolicy {
                entry_ms: settings.entry_ms,
                attr_ms: settings.attr_ms,
                keep_data: settings.keep_data,
            },
            max_inodes: settings.max_inodes,
            max_handles: settings.max_handles,
            log: Fd(1),
        };
        let fds = [socket.as_raw_fd(), peer.log.as_raw_fd()];
        let fs = Fs {
            peer,
            exchange: tokio::sync::Mutex::default(),
        };
        match fs.peer.control.send(&config, &fds).await {
            Ok(()) => Ok(fs),
            Err(control::Error::Io { .. }) => Err(fs.gone().await),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until its jail is closed and it can serve; at once when that was before.
    ///
    /// Nothing may be mounted in the share earlier: the kernel does not propagate a mount to a tree that is detached at that
    /// moment, as the share is while the process moves it into its jail.
    pub async fn serving(&self) -> Result<(), Error> {
        let mut exchange = self.exchange.lock().await;
        if exchange.serves {
            return Ok(());
        }
        match self.receive().await? {
            FsEvent::Serving => {
                exchange.serves = true;
                Ok(())
            }
            other => Err(refused("to serve", &other)),
        }
    }

    /// Closes everything at and beneath `tree` (relative to the share), so that it can be unmounted.
    pub async fn detach(&self, tree: &str) -> Result<(), Error> {
        let mut exchange = self.exchange.lock().await;
        let request = FsRequest::Detach { tree: tree.into() };
        match self.peer.control.send(&request, &[]).await {
            Ok(()) => {}
            Err(control::Error::Io { .. }) => return Err(self.gone().await),
            Err(error) => return Err(error.into()),
        }
        exchange.due += 1;
        loop {
            let answer = self.receive().await;
            exchange.due -= 1;
            match (exchange.due, answer?) {
                (1.., _) => {}
                (0, FsEvent::Detached { .. }) => return Ok(()),
                (0, other) => return Err(refused("to detach a tree", &other)),
            }
        }
    }

    /// Waits for its end: an error that tells how.
    pub async fn gone(&self) -> Error {
        // First its end: until then the packets in the socket are the answers that others wait for.
        let death = self.peer.death().await;
        // Its last words may still be there.
        loop {
            match self.peer.control.receive::<FsEvent>().await {
                Ok(Some(FsEvent::Failed { reason })) => return Error::Failed(printable(&reason)),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        Error::Died {
            death: death.map_or(String::new(), |death| format!(" by {death}")),
            line: match self.peer.tail.trouble() {
                Some(line) => format!(": {line}"),
                None => String::new(),
            },
        }
    }

    async fn receive(&self) -> Result<FsEvent, Error> {
        match self.peer.control.receive().await? {
            Some(FsEvent::Failed { reason }) => Err(Error::Failed(printable(&reason))),
            Some(event) => Ok(event),
            None => Err(self.gone().await),
        }
    }
}

fn refused(request: &'static str, event: &FsEvent) -> Error {
    let reason = match event {
        FsEvent::Refused { reason } => printable(reason),
        other => format!("its answer is {other:?}"),
    };
    Error::Refused { request, reason }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn an_answer_that_nobody_waits_for_is_nobody_elses() {
        let (peer, theirs) = peer::tests::idle();
        let fs = Fs {
            peer,
            exchange: tokio::sync::Mutex::default(),
        };
        for tree in ["a", "b"] {
            let given_up = tokio::time::timeout(Duration::from_millis(100), fs.detach(tree)).await;
            given_up.unwrap_err();
        }
        let answers = [
            FsEvent::Refused { reason: "a".into() },
            FsEvent::Refused { reason: "b".into() },
            FsEvent::Detached {
                inodes: 1,
                handles: 0,
            },
        ];
        for answer in answers {
            theirs.send(&answer, &[]).await.unwrap();
        }
        fs.detach("c").await.unwrap();
        fs.peer.kill();
    }
}
