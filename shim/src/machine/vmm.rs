//! The machine: `bulkhead-vmm run`, its requests and its events.
//!
//! ```text
//! starting ── Running ──► running ── Ended ──► gone (process collected)
//!    │                       │
//!    └────────── Failed, or dead without a word ──► gone
//! ```

#[cfg(test)]
mod attack_tests;
#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bulkhead_vmm_config::{Event, Fd, MAX_RESETS, PortOffer, Request, Stamp, VmStats};
use tokio::sync::{oneshot, watch};

use super::hardware;
pub use super::{
    end::{End, blocked, blocked_event},
    hardware::{Hardware, Nic},
};
use crate::{
    audit::{self, Audit},
    error::line,
    ledger::Ledger,
    machine::{
        control,
        peer::{self, Peer, Place},
    },
    text::brief,
};

/// Why the machine cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process could not be started.
    #[error(transparent)]
    Peer(#[from] peer::Error),
    /// The control socket broke.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// The machine is gone.
    #[error("{0}")]
    Gone(End),
    /// It did not answer. It may be stopped, or have no processor for long; whoever cannot wait kills it.
    #[error("the virtual machine did not answer {request} within {secs} s")]
    Silent {
        /// What was asked.
        request: &'static str,
        /// The limit.
        secs: u64,
    },
    /// It said no.
    #[error("the virtual machine refused {request}: {reason}")]
    Refused {
        /// What was asked.
        request: &'static str,
        /// Its words.
        reason: String,
    },
}

/// Most of a text of the process that becomes part of an error, and most of a line of the guest's console, in bytes.
const MAX_TEXT: usize = 4 << 10;
const MAX_LINE: usize = 1 << 10;

type Answer = oneshot::Sender<Result<Option<VmStats>, String>>;

#[derive(Debug, Default)]
struct Shared {
    runs: bool,
    landlock: Option<u32>,
    stamps: Vec<Stamp>,
    resets: usize,
    template_refused: Option<String>,
    waiting: VecDeque<Answer>,
}

/// A request's turn to be answered. It is given up unless the request has been sent, whether that failed or was not waited for: no
/// answer will come, and the next one would be taken for it.
struct Turn<'a>(&'a Mutex<Shared>);

impl Turn<'_> {
    /// After all others. Only who holds `Vm::sending` may have one.
    fn last(shared: &Mutex<Shared>, answer: Answer) -> Turn<'_> {
        locked(shared).waiting.push_back(answer);
        Turn(shared)
    }

    fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // Still the last, unless a broken machine has answered more than it was asked: then there is none.
        locked(self.0).waiting.pop_back();
    }
}

fn locked(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().expect("no panic while it is held")
}

/// A machine.
#[derive(Debug)]
pub struct Vm {
    peer: Arc<Peer>,
    shared: Arc<Mutex<Shared>>,
    end: watch::Receiver<Option<End>>,
    /// Keeps the order of packets that of `Shared::waiting`.
    sending: tokio::sync::Mutex<()>,
    patience: Duration,
    killed: AtomicBool,
}

/// How long the process may take over a request: each is a few system calls of its own, whatever the guest does. The first ones
/// wait until it has loaded the guest.
const PATIENCE: Duration = Duration::from_secs(30);

impl Vm {
    /// Starts the process and sends it its configuration. It runs when [`Vm::stamps`] says so.
    pub async fn start(
        place: Place<'_>,
        hardware: Hardware<'_>,
        ledger: &mut Ledger,
    ) -> Result<Vm, Error> {
        let peer = Arc::new(Peer::start(place, "run", ledger)?);
        let mut fds = Vec::new();
        let config = hardware::config(place.sandbox, &hardware, &peer, &mut fds);
        let sent = peer.control.send(&config, &fds).await;
        let vm = Vm::of(peer);
        match sent {
            Ok(()) => Ok(vm),
            // It died before it could read: its own words say more than our broken pipe.
            Err(error) if error.is_closed() => Err(Error::Gone(vm.ended().await)),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads what the process says from now on.
    fn of(peer: Arc<Peer>) -> Vm {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (ended, end) = watch::channel(None);
        tokio::spawn(watch_events(peer.clone(), shared.clone(), ended));
        Vm {
            peer,
            shared,
            end,
            sending: tokio::sync::Mutex::new(()),
            patience: PATIENCE,
            killed: AtomicBool::new(false),
        }
    }

    /// The process and, once it runs, the version of Landlock by which it says that it is
    /// restricted.
    pub fn jailed(&self) -> (i32, Option<u32>) {
        (self.peer.pid, locked(&self.shared).landlock)
    }

    /// Why it boots although it was given a template.
    pub fn template_refused(&self) -> Option<String> {
        locked(&self.shared).template_refused.clone()
    }

    /// The phases reached so far.
    pub fn stamps(&self) -> Vec<Stamp> {
        locked(&self.shared).stamps.clone()
    }

    /// How it ended, if it has.
    pub fn end(&self) -> Option<End> {
        self.end.borrow().clone()
    }

    /// Waits until the process is gone and tells how it ended.
    pub async fn ended(&self) -> End {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await {
            Ok(end) => end.clone().expect("waited for it"),
            Err(_) => End::Died {
                death: None,
                trouble: self.peer.tail.trouble(),
                log: self.peer.tail.lines(),
            },
        }
    }

    /// Lets the guest dial `port` once; its bytes come out of the other end of `fd`'s socketpair.
    pub async fn offer_port(&self, port: u32, fd: OwnedFd) -> Result<(), Error> {
        let offer = Request::OfferPort(PortOffer { port, fd: Fd(0) });
        self.request("a stream", &offer, &[fd.as_raw_fd()])
            .await
            .map(drop)
    }

    /// Adds a network interface; the guest finds it when it looks again.
    pub async fn plug(&self, nic: Nic) -> Result<(), Error> {
        let mut fds = Vec::new();
        let device = nic.config(hardware::indices(&mut fds));
        self.request("a network interface", &Request::PlugNet(device), &fds)
            .await
            .map(drop)
    }

    /// Tells the guest whether the link of its Nth network device carries frames.
    pub async fn set_link(&self, device: u32, up: bool) -> Result<(), Error> {
        let request = Request::SetLink { device, up };
        self.request("a change of a link", &request, &[])
            .await
            .map(drop)
    }

    /// Stops the vCPUs, or lets them run again.
    pub async fn set_paused(&self, paused: bool) -> Result<(), Error> {
        let (name, request) = match paused {
            true => ("to pause", Request::Pause),
            false => ("to resume", Request::Resume),
        };
        self.request(name, &request, &[]).await.map(drop)
    }

    /// Has the guest plug memory until it has so many MiB beside what it was booted with, or unplug
    /// it. It does so when it comes to it: the counters tell.
    pub async fn plug_memory(&self, mib: u64) -> Result<(), Error> {
        let request = Request::PlugMemory { mib };
        self.request("other memory", &request, &[]).await.map(drop)
    }

    /// Takes back a port that the guest has not dialled.
    pub async fn withdraw_port(&self, port: u32) -> Result<(), Error> {
        let request = Request::WithdrawPort { port };
        self.request("to forget a stream", &request, &[])
            .await
            .map(drop)
    }

    /// Kills the process without a word; [`Vm::ended`] tells.
    pub fn kill(&self) {
        self.killed.store(true, Ordering::Relaxed);
        self.peer.kill();
    }

    /// Whether we have killed it: its end comes.
    pub fn is_killed(&self) -> bool {
        self.killed.load(Ordering::Relaxed)
    }

    /// Changes how likely the host's kernel is to take the process when memory runs out.
    pub fn set_oom_score_adj(&self, value: i32) {
        self.peer.set_oom_score_adj(value);
    }

    /// Counters as of now.
    pub async fn stats(&self) -> Result<VmStats, Error> {
        let stats = self.request("its counters", &Request::Stats, &[]).await?;
        Ok(stats.unwrap_or_default())
    }

    /// Ends the machine without asking the guest.
    pub async fn stop(&self) -> Result<(), Error> {
        let send = async {
            let _order = self.sending.lock().await;
            Ok(self.peer.control.send(&Request::Stop, &[]).await?)
        };
        self.within("to stop", send).await
    }

    /// Has the machine written to the files that it was given for that, which ends it:
    /// [`Vm::ended`] tells whether it is.
    pub async fn save(&self) -> Result<(), Error> {
        let send = async {
            let _order = self.sending.lock().await;
            Ok(self.peer.control.send(&Request::Save, &[]).await?)
        };
        self.within("to be saved", send).await
    }

    async fn within<T>(
        &self,
        request: &'static str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        match tokio::time::timeout(self.patience, work).await {
            Ok(done) => done,
            Err(_) => Err(Error::Silent {
                request,
                secs: self.patience.as_secs(),
            }),
        }
    }

    async fn request(
        &self,
        name: &'static str,
        request: &Request,
        fds: &[i32],
    ) -> Result<Option<VmStats>, Error> {
        let exchange = async {
            tokio::select! {
                biased;
                answer = self.exchange(name, request, fds) => answer,
                // Its socket may outlive it: nobody answers then.
                end = self.ended() => Err(Error::Gone(end)),
            }
        };
        self.within(name, exchange).await
    }

    async fn exchange(
        &self,
        name: &'static str,
        request: &Request,
        fds: &[i32],
    ) -> Result<Option<VmStats>, Error> {
        let (answer, answered) = oneshot::channel();
        let sent = {
            let _order = self.sending.lock().await;
            let turn = Turn::last(&self.shared, answer);
            let sent = self.peer.control.send(request, fds).await;
            if sent.is_ok() {
                turn.keep();
            }
            sent
        };
        match sent {
            Ok(()) => {}
            Err(error) if error.is_closed() => return Err(Error::Gone(self.ended().await)),
            Err(error) => return Err(error.into()),
        }
        match answered.await {
            Ok(Ok(stats)) => Ok(stats),
            Ok(Err(reason)) => Err(Error::Refused {
                request: name,
                reason,
            }),
            Err(_) => Err(Error::Gone(self.ended().await)),
        }
    }
}

/// Reads events until the machine is gone, then publishes how.
async fn watch_events(
    peer: Arc<Peer>,
    shared: Arc<Mutex<Shared>>,
    ended: watch::Sender<Option<End>>,
) {
    let mut last_words = None;
    loop {
        // What it has said comes before its end, which comes by itself: the socket may outlive it.
        let received = tokio::select! {
            biased;
            received = peer.control.receive::<Event>() => received,
            () = peer.gone() => peer.control.receive_rest().await,
        };
        let broken = match received {
            Ok(Some(_)) if last_words.is_some() => "it goes on after its last words".into(),
            Ok(Some(event)) => match on_event(event, &shared, &peer.audit) {
                Ok(end) => {
                    // Whoever has taken it may have kept it from ending.
                    if matches!(end, Some(End::Failed { .. })) {
                        peer.kill();
                    }
                    last_words = end;
                    continue;
                }
                Err(what) => format!("it has said {what}"),
            },
            Ok(None) => break,
            Err(error) => line(&error),
        };
        let event = audit::Event::limit("vmm", "packet", None, &*broken);
        peer.audit.tell(event);
        last_words.get_or_insert(End::Failed {
            reason: format!("the virtual machine monitor is not understood: {broken}"),
        });
        // Nobody hears it any more: its end would not come by itself.
        peer.kill();
        break;
    }
    if let Some(reason) = peer.end_at_last("the virtual machine's").await {
        last_words.get_or_insert(End::Failed { reason });
    }
    let death = peer.death().await;
    let end = last_words.unwrap_or_else(|| End::Died {
        death,
        trouble: peer.tail.trouble(),
        log: peer.tail.lines(),
    });
    // Whoever waits for an answer learns that there will be none.
    locked(&shared).waiting.clear();
    let _ = ended.send(Some(end));
}

/// Hears an event: the end that it tells of, if it does. Only events that something has led to are heard: an answer for each
/// request, a stamp for each phase. A machine that says more would have us listen to nothing else.
fn on_event(
    event: Event,
    shared: &Mutex<Shared>,
    audit: &Audit,
) -> Result<Option<End>, &'static str> {
    let mut shared = locked(shared);
    let Shared {
        runs,
        landlock,
        stamps,
        resets,
        template_refused,
        waiting,
    } = &mut *shared;
    let mut answer = |answer| match waiting.pop_front() {
        Some(waiting) => {
            // The one who asked may have given up.
            let _ = waiting.send(answer);
            Ok(None)
        }
        None => Err("an answer to nothing"),
    };
    match event {
        Event::Running { .. } if *runs => Err("twice that it runs"),
        Event::Running { landlock: abi } => {
            (*runs, *landlock) = (true, abi);
            Ok(None)
        }
        Event::TemplateRefused { .. } if *runs => Err("too late that its template is refused"),
        Event::TemplateRefused { .. } if template_refused.is_some() => {
            Err("twice that its template is refused")
        }
        Event::TemplateRefused { reason } => {
            *template_refused = Some(brief(&reason, MAX_TEXT));
            Ok(None)
        }
        Event::Done => answer(Ok(None)),
        Event::Refused { reason } => answer(Err(brief(&reason, MAX_TEXT))),
        Event::Stats(stats) => answer(Ok(Some(stats))),
        Event::Reached(stamp) => {
            if stamps.iter().any(|other| other.phase == stamp.phase) {
                return Err("a phase of the boot twice");
            }
            stamps.push(stamp);
            Ok(None)
        }
        Event::NeedsReset { .. } if *resets == MAX_RESETS => {
            Err("too often that a device needs a reset")
        }
        Event::NeedsReset { device, reason } => {
            *resets += 1;
            audit.tell(audit::Event::NeedsReset { device, reason });
            Ok(None)
        }
        last => Ok(last_words(last, audit)),
    }
}

/// Hears an event after which no other one comes: the end that it tells of.
fn last_words(event: Event, audit: &Audit) -> Option<End> {
    match event {
        Event::Ended {
            end,
            console,
            stats,
        } => Some(End::Guest {
            end,
            console: console.iter().map(|line| brief(line, MAX_LINE)).collect(),
            stats: Box::new(stats),
        }),
        Event::Blocked(what) => {
            audit.tell(blocked_event(what));
            let reason = blocked(what);
            Some(End::Failed { reason })
        }
        Event::Failed { reason } => Some(End::Failed {
            reason: brief(&reason, MAX_TEXT),
        }),
        _ => None,
    }
}
