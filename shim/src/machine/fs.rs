//! The fs process: `bulkhead-vmm fs`, which alone serves the pod's share.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    sync::OnceLock,
    time::Duration,
};

use bulkhead_vmm_config::{CachePolicy, Fd, FsConfig, FsEvent, FsRequest, Layer, WIRE_VERSION};

use crate::{
    audit::Event,
    config,
    error::line,
    ledger::Ledger,
    machine::{
        control,
        end::{blocked, blocked_event},
        hardware::indices,
        peer::{self, Peer, Place},
    },
    sys::process::Death,
    text::brief,
};

/// Most of a text of the process that becomes part of an error, in bytes.
const MAX_TEXT: usize = 4 << 10;

fn by(death: &Option<Death>) -> String {
    death.map_or(String::new(), |death| format!(" by {death}"))
}

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
    #[error("the file share's process died{}{line}", by(.death))]
    Died {
        /// How, when we could collect it.
        death: Option<Death>,
        /// The last log line that tells of trouble.
        line: String,
    },
    /// It did not answer, and was killed.
    #[error("the file share's process did not answer {request} within {secs} s and was killed")]
    Silent {
        /// What was asked.
        request: &'static str,
        /// The limit.
        secs: u64,
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
    patience: Duration,
    /// What it did not answer, and within how many seconds: it was killed for that.
    silent: OnceLock<(&'static str, u64)>,
}

/// How long it may take to let go of a tree: it closes descriptors. One that takes longer waits for a file system that hangs, or
/// does not want to.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Exchange {
    /// It has said that it serves.
    serves: bool,
    /// The version of Landlock by which it is restricted.
    landlock: Option<u32>,
    /// Answers that are on their way, in the order of the requests. Who gave up before its answer came leaves it to the next one.
    due: u32,
}

impl Fs {
    /// Starts it and sends its configuration; [`Fs::serving`] waits for it. `socket` is its end of vhost-user's, `lender` that of
    /// its questions for what a template lends.
    pub async fn start(
        place: Place<'_>,
        share: &Path,
        (settings, accept_missing): (&config::Share, &[Layer]),
        (socket, lender): (OwnedFd, Option<OwnedFd>),
        ledger: &mut Ledger,
    ) -> Result<Fs, Error> {
        let peer = Peer::start(place, "fs", ledger)?;
        let mut fds = vec![socket.as_raw_fd(), peer.log.as_raw_fd()];
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
            accept_missing: accept_missing.to_vec(),
            lender: lender
                .as_ref()
                .map(|lender| indices(&mut fds)(lender.as_raw_fd())),
        };
        let fs = Fs {
            peer,
            exchange: tokio::sync::Mutex::default(),
            patience: PATIENCE,
            silent: OnceLock::new(),
        };
        match fs.peer.control.send(&config, &fds).await {
            Ok(()) => Ok(fs),
            Err(error) if error.is_closed() => Err(fs.closed().await),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until its jail is closed and it can serve; at once when that was before. One that does not within `limit` is killed.
    ///
    /// Nothing may be mounted in the share earlier: the kernel does not propagate a mount to a tree that is detached at that
    /// moment, as the share is while the process moves it into its jail.
    pub async fn serving(&self, limit: Duration) -> Result<(), Error> {
        let served = async {
            let mut exchange = self.exchange.lock().await;
            if exchange.serves {
                return Ok(());
            }
            match self.receive().await? {
                FsEvent::Serving { landlock } => {
                    exchange.serves = true;
                    exchange.landlock = landlock;
                    Ok(())
                }
                other => Err(refused("to serve", &other)),
            }
        };
        self.within(limit, "to serve", served).await
    }

    /// The process and, once it serves, the version of Landlock by which it says that it is
    /// restricted.
    pub async fn jailed(&self) -> (i32, Option<u32>) {
        (self.peer.pid, self.exchange.lock().await.landlock)
    }

    /// Closes everything at and beneath `tree` (relative to the share), so that it can be unmounted. A process that does not within
    /// 10 s is killed, which ends the pod.
    pub async fn detach(&self, tree: &str) -> Result<(), Error> {
        let detached = self.exchange_detach(tree);
        self.within(self.patience, "to detach a tree", detached)
            .await
    }

    async fn within(
        &self,
        limit: Duration,
        request: &'static str,
        work: impl Future<Output = Result<(), Error>>,
    ) -> Result<(), Error> {
        let silent = |(request, secs)| Err(Error::Silent { request, secs });
        // One that was killed and does not go (it waits within the kernel) is not waited for again.
        if let Some(before) = self.silent.get() {
            return silent(*before);
        }
        match tokio::time::timeout(limit, work).await {
            Ok(done) => done,
            Err(_) => {
                let first = *self.silent.get_or_init(|| (request, limit.as_secs()));
                self.kill();
                silent(first)
            }
        }
    }

    /// Kills the process; [`Fs::gone`] tells.
    pub fn kill(&self) {
        self.peer.kill();
    }

    async fn exchange_detach(&self, tree: &str) -> Result<(), Error> {
        let mut exchange = self.exchange.lock().await;
        let request = FsRequest::Detach { tree: tree.into() };
        match self.peer.control.send(&request, &[]).await {
            Ok(()) => {}
            Err(error) if error.is_closed() => return Err(self.closed().await),
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

    /// Changes how likely the host's kernel is to take the process when memory runs out.
    pub fn set_oom_score_adj(&self, value: i32) {
        self.peer.set_oom_score_adj(value);
    }

    /// Waits for its end: an error that tells how.
    pub async fn gone(&self) -> Error {
        // First its end: until then the packets in the socket are the answers that others wait for.
        let death = self.peer.death().await;
        if let Some((request, secs)) = self.silent.get().copied() {
            return Error::Silent { request, secs };
        }
        // Its last words may still be there.
        loop {
            match self.peer.control.receive_rest::<FsEvent>().await {
                Ok(Some(FsEvent::Failed { reason })) => return failed(&reason),
                Ok(Some(FsEvent::Blocked(what))) => {
                    self.peer.audit.tell(blocked_event(what));
                    return Error::Failed(blocked(what));
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        Error::Died {
            death,
            line: match self.peer.tail.trouble() {
                Some(line) => format!(": {line}"),
                None => String::new(),
            },
        }
    }

    /// Its socket is closed, so that its end is near, or is brought about.
    async fn closed(&self) -> Error {
        match self.peer.end_at_last("the file share's").await {
            Some(reason) => Error::Failed(reason),
            None => self.gone().await,
        }
    }

    async fn receive(&self) -> Result<FsEvent, Error> {
        let received = self.peer.control.receive().await;
        if let Err(error) = &received {
            let event = Event::limit("fs", "packet", None, line(error));
            self.peer.audit.tell(event);
        }
        match received? {
            Some(FsEvent::Failed { reason }) => Err(failed(&reason)),
            Some(FsEvent::Blocked(what)) => {
                self.peer.audit.tell(blocked_event(what));
                // Whoever has taken it may have kept it from ending.
                self.peer.kill();
                Err(Error::Failed(blocked(what)))
            }
            Some(event) => Ok(event),
            None => Err(self.closed().await),
        }
    }
}

fn failed(reason: &str) -> Error {
    Error::Failed(brief(reason, MAX_TEXT))
}

fn refused(request: &'static str, event: &FsEvent) -> Error {
    let reason = match event {
        FsEvent::Refused { reason } => brief(reason, MAX_TEXT),
        other => brief(&format!("its answer is {other:?}"), MAX_TEXT),
    };
    Error::Refused { request, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idle() -> (Fs, control::Control) {
        let (peer, theirs) = peer::tests::idle();
        let fs = Fs {
            peer,
            exchange: tokio::sync::Mutex::default(),
            patience: Duration::from_secs(10),
            silent: OnceLock::new(),
        };
        (fs, theirs)
    }

    #[tokio::test]
    async fn one_that_is_stopped_does_not_hold_up_a_detach_and_is_killed() {
        let (mut fs, _theirs) = idle();
        fs.patience = Duration::from_millis(100);
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(fs.peer.pid),
            nix::sys::signal::SIGSTOP,
        )
        .unwrap();
        // Whoever waits for its turn behind one that hangs waits no longer than that one.
        let both = async { tokio::join!(fs.detach("1"), fs.detach("2")) };
        let both = tokio::time::timeout(Duration::from_secs(10), both).await;
        let (first, second) = both.expect("it waits");
        assert!(matches!(first, Err(Error::Silent { .. })), "{first:?}");
        second.unwrap_err();
        let death = fs.peer.death().await;
        assert_eq!(
            death,
            Some(crate::sys::process::Death::Signal(libc::SIGKILL))
        );
        let since = std::time::Instant::now();
        fs.detach("3").await.unwrap_err();
        assert!(since.elapsed() < fs.patience, "it is asked again");
        // And the pod's end says why, not that it was killed.
        assert!(matches!(fs.gone().await, Error::Silent { .. }));
    }

    #[tokio::test]
    async fn one_that_never_serves_is_killed() {
        let (fs, _theirs) = idle();
        let served = fs.serving(Duration::from_millis(100));
        let served = tokio::time::timeout(Duration::from_secs(10), served).await;
        let error = served.expect("it waits").unwrap_err();
        assert!(matches!(error, Error::Silent { .. }), "{error}");
        assert!(fs.peer.death().await.is_some());
    }

    #[tokio::test]
    async fn a_request_that_the_kernel_refuses_is_told_and_not_waited_for() {
        let (fs, theirs) = idle();
        fs.peer.control.shrink();
        // EMSGSIZE.
        let tree = "x".repeat(32 << 10);
        let refused = fs.detach(&tree);
        let refused = tokio::time::timeout(Duration::from_secs(10), refused).await;
        let error = refused.expect("it waits").unwrap_err();
        assert!(
            matches!(error, Error::Control(control::Error::Io { .. })),
            "{error}"
        );
        let answer = FsEvent::Detached {
            inodes: 1,
            handles: 0,
        };
        theirs.send(&answer, &[]).await.unwrap();
        fs.detach("x").await.unwrap();
        fs.peer.kill();
    }

    #[tokio::test]
    async fn one_that_closes_its_socket_and_lives_on_is_ended() {
        let (fs, theirs) = idle();
        drop(theirs);
        let error = fs.detach("x").await.unwrap_err();
        assert!(error.to_string().contains("did not end"), "{error}");
        assert!(fs.peer.death().await.is_some());
    }

    /// It has handed its end of the socket to the VMM, say.
    #[tokio::test]
    async fn one_whose_socket_outlives_it_is_gone_all_the_same() {
        let (fs, theirs) = idle();
        let reason = "its last words".to_string();
        let words = FsEvent::Failed { reason };
        theirs.send(&words, &[]).await.unwrap();
        fs.kill();
        let gone = tokio::time::timeout(Duration::from_secs(10), fs.gone()).await;
        let error = gone.expect("it waits for ever");
        assert!(
            matches!(&error, Error::Failed(words) if words == "its last words"),
            "{error}"
        );
        let gone = tokio::time::timeout(Duration::from_secs(10), fs.gone()).await;
        assert!(matches!(
            gone.expect("it waits for ever"),
            Error::Died { .. }
        ));
        drop(theirs);
    }

    #[tokio::test]
    async fn an_answer_that_nobody_waits_for_is_nobody_elses() {
        let (fs, theirs) = idle();
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
