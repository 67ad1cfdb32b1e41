//! The audit log: what only Bulkhead knows of a pod, one JSON object a line (docs/audit.md has the
//! schema; `bulkhead events` shows it).
//!
//! ```text
//! whoever knows ── tell ──► bounded queue ── a thread, while there is something ──► the file of all shims (file)
//! ```
//!
//! Nothing waits for the file but that thread: a full disk costs lines, and neither time nor a pod.
//! Of what is told a guest chooses texts, which are printable and cut, and how often something
//! happens, which is limited for each pod.
#![forbid(unsafe_code)]

mod file;
mod follow;
#[cfg(test)]
mod tests;
pub mod time;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::{Duration, Instant, SystemTime},
};

use bulkhead_vmm_config::Layer;
use serde::{Deserialize, Serialize};

pub use self::{
    file::{Log, MAX_LINE},
    follow::Follower,
};
use crate::{config::Config, text::brief};

/// Version of the schema: another one when a field that was there means something else, or is gone.
pub const VERSION: u32 = 1;

/// Most of a text that somebody else has written, and of a name, in bytes.
const MAX_TEXT: usize = 512;
const MAX_NAME: usize = 64;
/// Most kinds of a guest's faults that are counted in one line.
const MAX_FAULTS: usize = 12;
/// Lines that wait for the file.
const MAX_QUEUE: usize = 256;
/// Lines that a guest can cause: at once, and how long each of them takes to come back.
const BURST: u32 = 64;
const REFILL: Duration = Duration::from_secs(10);
/// How long a process that ends waits for its last lines.
const FAREWELL: Duration = Duration::from_secs(1);

/// What is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Event {
    /// The operator, or an engine's annotation, has chosen something that changes containment.
    Switch {
        /// The key in the configuration, the option or the annotation.
        name: String,
        /// Its value.
        value: String,
    },
    /// A process of the pod is in its jail.
    Layers {
        /// `vmm` or `fs`.
        process: String,
        /// The version of Landlock's interface; none where it is missing.
        landlock: Option<u32>,
        /// Threads of the process.
        threads: usize,
        /// Those of them that have a filter of system calls.
        filtered: usize,
        /// Whether it is in a user namespace of its own.
        user_namespace: bool,
        /// Layers that are missing, which the operator's configuration accepts.
        accepted_missing: Vec<Layer>,
    },
    /// A configuration asks for what a container in a machine is not given.
    Refused {
        /// The field, where there is one.
        #[serde(skip_serializing_if = "Option::is_none")]
        field: Option<String>,
        /// The error.
        reason: String,
    },
    /// The guest has broken a rule of a device, or the host has failed it: it stands still until
    /// the guest resets it.
    NeedsReset {
        /// The device.
        device: String,
        /// The rule.
        reason: String,
    },
    /// A thread made a system call that its filter does not have, which ended its process.
    Blocked {
        /// The thread's role.
        role: String,
        /// The call's name.
        call: String,
        /// Its number.
        number: i32,
    },
    /// A connection that the guest was offered and has not made was taken back.
    OfferWithdrawn {
        /// Its vsock port.
        port: u32,
    },
    /// Somebody was held to a limit.
    Limit {
        /// `container`, `pod`, `agent`, `vmm` or `fs`.
        of: String,
        /// `memory`, `processes`, `frame`, `answer`, `packet` or `log`.
        limit: String,
        /// Times, bytes or lines, as `detail` says.
        #[serde(skip_serializing_if = "Option::is_none")]
        count: Option<u64>,
        /// What happened.
        detail: String,
    },
    /// The pod has no machine any more.
    GuestEnd {
        /// How (docs/operations.md).
        how: String,
        /// The words of the log.
        reason: String,
        /// The guest's faults, by `device.rule`.
        #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
        faults: BTreeMap<String, u64>,
    },
    /// Lines about this pod that are not here.
    LeftOut {
        /// How many.
        lines: u64,
        /// `rate`: a guest caused too many; `file`: they could not be written.
        why: String,
    },
}

impl Event {
    /// A limit of this shim's that somebody has run into.
    pub fn limit(of: &str, limit: &str, count: Option<u64>, detail: impl Into<String>) -> Event {
        Event::Limit {
            of: of.into(),
            limit: limit.into(),
            count,
            detail: detail.into(),
        }
    }

    /// Whether a guest, or whoever makes its containers, can bring it about as often as they want.
    fn repeats(&self) -> bool {
        !matches!(
            self,
            Event::Switch { .. }
                | Event::Layers { .. }
                | Event::Blocked { .. }
                | Event::GuestEnd { .. }
                | Event::LeftOut { .. }
        )
    }

    /// With texts that are printable and short.
    fn bounded(mut self) -> Event {
        let text = |text: &mut String| *text = brief(text, MAX_TEXT);
        let name = |name: &mut String| *name = brief(name, MAX_NAME);
        match &mut self {
            Event::Switch { name, value } => {
                text(name);
                text(value);
            }
            Event::Refused { field, reason } => {
                field.iter_mut().for_each(text);
                text(reason);
            }
            Event::NeedsReset { device, reason } => {
                name(device);
                text(reason);
            }
            Event::Limit { detail, .. } => text(detail),
            Event::GuestEnd { reason, faults, .. } => {
                text(reason);
                let kept = std::mem::take(faults).into_iter().take(MAX_FAULTS);
                *faults = kept
                    .map(|(mut fault, count)| {
                        name(&mut fault);
                        (fault, count)
                    })
                    .collect();
            }
            Event::Layers { .. }
            | Event::Blocked { .. }
            | Event::OfferWithdrawn { .. }
            | Event::LeftOut { .. } => {}
        }
        self
    }
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// [`VERSION`].
    pub v: u32,
    /// When it was told ([`time::written`]).
    pub time: String,
    /// containerd's namespace; `default` for the command.
    pub namespace: String,
    /// The pod.
    pub pod: String,
    /// The container, where it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

/// What is told of one pod; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Audit(Option<Arc<Told>>);

#[derive(Debug)]
struct Told {
    namespace: String,
    pod: String,
    log: Log,
    state: Mutex<State>,
    /// The thread that writes has ended.
    idle: Condvar,
}

#[derive(Debug)]
struct State {
    queue: VecDeque<Vec<u8>>,
    /// A thread writes them.
    writing: bool,
    /// Lines that could not be written, and whether that has been said.
    lost: u64,
    said: bool,
    /// What a guest may still cause, since when, and what it caused beyond.
    left: u32,
    filled: Instant,
    left_out: u64,
    /// The pod's end has been told.
    ended: bool,
}

#[cfg(test)]
impl Audit {
    /// Of a pod `p` whose log is in this directory, whoever runs the test.
    pub(crate) fn in_directory(directory: &std::path::Path) -> Audit {
        let settings = crate::config::Audit {
            path: directory.join("audit.jsonl"),
            ..crate::config::Audit::default()
        };
        let log = Log::of(&settings).expect("it has a path");
        Audit(Some(Told::new(log, "ns", "p")))
    }

    /// What has been told.
    pub(crate) fn told(&self) -> Vec<Event> {
        self.finish();
        let log = self.0.as_ref().expect("it is kept").log.clone();
        let mut follower = Follower::new(log);
        let lines = std::iter::from_fn(|| follower.line().expect("it can be read"));
        let lines = lines.map(|line| serde_json::from_slice::<Line>(&line).expect("a line"));
        lines.map(|line| line.event).collect()
    }
}

impl Audit {
    /// Of a pod, where the operator wants it.
    pub fn of(config: &Config, namespace: &str, pod: &str) -> Audit {
        // Nobody else can do anything that would have to be told.
        let is_root = nix::unistd::geteuid().is_root();
        let log = Log::of(&config.audit).filter(|_| is_root);
        Audit(log.map(|log| Told::new(log, namespace, pod)))
    }

    /// Whether anything is kept: what costs something to find out need not be found out else.
    pub fn is_kept(&self) -> bool {
        self.0.is_some()
    }

    /// Tells of the pod.
    pub fn tell(&self, event: Event) {
        self.tell_of(None, event);
    }

    /// Tells of one of its containers.
    pub fn tell_of(&self, container: Option<&str>, event: Event) {
        let Some(told) = &self.0 else { return };
        let mut state = told.state();
        if event.repeats() && !state.may_repeat(Instant::now()) {
            state.left_out = state.left_out.saturating_add(1);
            return;
        }
        let left_out = std::mem::take(&mut state.left_out);
        if left_out > 0 {
            told.put(&mut state, None, Event::left_out(left_out, "rate"));
        }
        told.put(&mut state, container, event);
        if !state.writing && !state.queue.is_empty() {
            let writer = told.clone();
            let started = std::thread::Builder::new().spawn(move || writer.write());
            state.writing = started.is_ok();
            if started.is_err() {
                state.lost += state.queue.len() as u64;
                state.queue.clear();
            }
        }
    }

    /// Tells of the pod's end, once: the first who knows of it knows why.
    pub fn tell_end(&self, how: &str, reason: &str, faults: BTreeMap<String, u64>) {
        let Some(told) = &self.0 else { return };
        let before = std::mem::replace(&mut told.state().ended, true);
        if !before {
            self.tell(Event::GuestEnd {
                how: how.into(),
                reason: reason.into(),
                faults,
            });
        }
    }

    /// Waits until everything is written, for a second at most.
    pub fn finish(&self) {
        let Some(told) = &self.0 else { return };
        let writes = |state: &mut State| state.writing;
        let waited = told.idle.wait_timeout_while(told.state(), FAREWELL, writes);
        let (state, slow) = waited.expect("no panic while it is held");
        drop(state);
        if slow.timed_out() {
            let path = told.log.path().display();
            tracing::warn!("the audit log {path} takes too long to be written: lines are lost");
        }
    }
}

impl Event {
    fn left_out(lines: u64, why: &str) -> Event {
        Event::LeftOut {
            lines,
            why: why.into(),
        }
    }
}

impl State {
    fn may_repeat(&mut self, now: Instant) -> bool {
        let came = now.saturating_duration_since(self.filled).as_nanos() / REFILL.as_nanos();
        let came = u32::try_from(came).unwrap_or(u32::MAX);
        if came > 0 {
            self.left = self.left.saturating_add(came).min(BURST);
            self.filled = now;
        }
        let left = self.left.checked_sub(1);
        self.left = left.unwrap_or(0);
        left.is_some()
    }
}

impl Told {
    fn new(log: Log, namespace: &str, pod: &str) -> Arc<Told> {
        Arc::new(Told {
            namespace: namespace.into(),
            pod: pod.into(),
            log,
            state: Mutex::new(State {
                queue: VecDeque::new(),
                writing: false,
                lost: 0,
                said: false,
                left: BURST,
                filled: Instant::now(),
                left_out: 0,
                ended: false,
            }),
            idle: Condvar::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while it is held")
    }

    fn line(&self, container: Option<&str>, event: Event) -> Vec<u8> {
        let line = Line {
            v: VERSION,
            time: time::written(SystemTime::now()),
            namespace: self.namespace.clone(),
            pod: self.pod.clone(),
            container: container.map(|id| brief(id, crate::ids::MAX_ID)),
            event: event.bounded(),
        };
        let mut text = serde_json::to_vec(&line).expect("made of strings and numbers");
        text.push(b'\n');
        text
    }

    fn put(&self, state: &mut State, container: Option<&str>, event: Event) {
        match state.queue.len() < MAX_QUEUE {
            true => state.queue.push_back(self.line(container, event)),
            false => state.lost += 1,
        }
    }

    /// Writes until nothing waits; a thread's whole life.
    fn write(&self) {
        loop {
            let line = {
                let mut state = self.state();
                let Some(line) = state.queue.pop_front() else {
                    state.writing = false;
                    self.idle.notify_all();
                    return;
                };
                line
            };
            let written = self.log.append(&line);
            let mut state = self.state();
            match written {
                Ok(()) => {
                    let lost = std::mem::take(&mut state.lost);
                    if lost > 0 {
                        let line = self.line(None, Event::left_out(lost, "file"));
                        state.queue.push_front(line);
                    }
                    state.said = false;
                }
                Err(error) => {
                    state.lost += 1;
                    if !std::mem::replace(&mut state.said, true) {
                        let path = self.log.path().display();
                        tracing::warn!(%error, "cannot write the audit log {path}: the pod goes on, lines are lost");
                    }
                }
            }
        }
    }
}
