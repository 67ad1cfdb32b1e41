//! containerd's tasks over one pod: the state machine, without the protocol's encoding (`service`) and without a policy of its own.
//!
//! ```text
//! Create ──► boot, or place in the pod ──► created ──► Start ──► running ──► exit ──► Delete ──► the last one ends the pod
//! ```
//!
//! - What containerd asks about (State, Pids, Connect, Stats) is answered from here, never by waiting for the guest.
//! - Events are put into their queue at the moment of the change that they tell, so that their order is that of the changes. An
//!   init's exit comes after those of its exec processes.
//! - What changes something runs to its end, even when the client that asked goes away.
#![forbid(unsafe_code)]

pub mod bootstrap;
mod connections;
mod create;
mod delete;
mod error;
pub mod events;
mod exec;
mod metrics;
mod offers;
mod process;
mod sandbox;
mod sandbox_service;
mod server;
pub mod stdio;
mod task_service;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bulkhead_agent_protocol::agent as wire;
use containerd_shim_protos::events::task as events_wire;
use tokio::sync::{Notify, watch};

pub use create::CONFIG_NAME;
pub use error::Error;
pub use process::{Exit, Phase, Process};
pub use server::Server;
pub use task_service::services;

use self::{
    events::{Event, Events, timestamp},
    metrics::Usage,
    sandbox::ApiPod,
    stdio::Handed,
};
use crate::{
    audit::Audit,
    config::Config,
    machine::agent,
    oci::{asked::Asked, host_limits},
    pod::{self, Container, KILLED_PATIENCE, Pod, Trouble, promptly},
};

/// How long exec processes may take to end after their container's init has: the agent has killed them by then.
const STRAGGLERS: Duration = Duration::from_secs(5);

/// Where the shim is.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// containerd's namespace.
    pub namespace: String,
    /// Another configuration file than the default one.
    pub config: Option<PathBuf>,
    /// Of a daemon that no containerd has started: what its clients hand over for streams to be.
    pub handed: Option<Arc<Handed>>,
}

/// A container as containerd's task.
#[derive(Debug)]
pub struct Task {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its init.
    pub init: Arc<Process>,
    pod: Arc<Pod>,
    /// The pod's end is this task's.
    holds_pod: bool,
    /// `None`: a pod's own container, of which nothing runs in the guest.
    guest: Option<Guest>,
    execs: Mutex<BTreeMap<String, Arc<Exec>>>,
    usage: Usage,
    /// One Delete at a time, and one Update.
    deletion: tokio::sync::Mutex<()>,
    updating: tokio::sync::Mutex<()>,
}

/// What is kept of a container's configuration.
#[derive(Debug)]
struct Guest {
    /// For exec processes: filter and personality.
    process: wire::Process,
    container: Container,
}

/// An exec process and what it will run.
#[derive(Debug)]
struct Exec {
    process: Process,
    spec: wire::Process,
}

impl Exec {
    /// Ends one that was never started: whoever waits for it learns that it never will be.
    fn never_run(&self) -> Result<Exit, Error> {
        let exit = Exit::now(0);
        let ended = self.process.step(&[Phase::Added], Phase::Stopped(exit));
        ended.map_err(|phase| self.process.refuse("delete", phase))?;
        Ok(exit)
    }
}

impl Task {
    /// The pid that stands for it on the host.
    pub fn pid(&self) -> u32 {
        self.pod.pid.unsigned_abs()
    }

    /// Refuses what needs an answer of a guest that stands still.
    fn awake(&self, verb: &str) -> Result<(), Error> {
        match self.pod.is_paused() {
            true => Err(Error::State(format!(
                "cannot {verb}: the pod {:?} is paused; resume it first",
                self.pod.id
            ))),
            false => Ok(()),
        }
    }

    fn execs(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Exec>>> {
        self.execs.lock().expect("no panic while it is held")
    }

    fn exec(&self, exec_id: &str) -> Result<Arc<Exec>, Error> {
        let found = self.execs().get(exec_id).cloned();
        found.ok_or_else(|| {
            let text = format!("no exec process {exec_id:?} in container {:?}", self.id);
            Error::NotFound(text)
        })
    }

    /// Waits for the end of the init, or of an exec process; `None`: there is no such process.
    pub async fn ended(&self, exec_id: &str) -> Option<Exit> {
        match exec_id {
            "" => Some(self.init.ended().await),
            exec_id => Some(self.exec(exec_id).ok()?.process.ended().await),
        }
    }

    /// Whether a process runs, once it is not on its way to its exec any more.
    pub async fn runs(&self, exec_id: &str) -> bool {
        let runs = async |process: &Process| {
            process.settled().await;
            matches!(process.phase(), Phase::Running | Phase::Paused)
        };
        match exec_id {
            "" => runs(&self.init).await,
            exec_id => match self.exec(exec_id) {
                Ok(exec) => runs(&exec.process).await,
                Err(_) => false,
            },
        }
    }

    /// Takes no more input for a process that has ended.
    pub fn stop_input(&self, exec_id: &str) {
        // One that is not there has none.
        let _ = self.with(exec_id, Process::stop_input);
    }

    /// Runs `act` on the init, or on an exec process when `exec_id` names one.
    fn with<T>(&self, exec_id: &str, act: impl FnOnce(&Process) -> T) -> Result<T, Error> {
        match exec_id {
            "" => Ok(act(&self.init)),
            exec_id => Ok(act(&self.exec(exec_id)?.process)),
        }
    }
}

/// A task, or a reserved id.
#[derive(Debug)]
enum Slot {
    Making,
    Made(Arc<Task>),
}

/// All tasks of a shim.
#[derive(Debug)]
pub struct Tasks {
    place: Place,
    events: Events,
    tasks: Mutex<HashMap<String, Slot>>,
    pod: Mutex<Option<Arc<Pod>>>,
    /// When the pod was made by the sandbox service.
    api_pod: Mutex<Option<Arc<ApiPod>>>,
    shutdown: Notify,
    /// How many are deleted and have hooks to run yet; sent also when one was made or could not be.
    leaving: watch::Sender<usize>,
}

impl Tasks {
    /// None yet.
    pub fn new(place: Place, events: Events) -> Arc<Tasks> {
        Arc::new(Tasks {
            place,
            events,
            tasks: Mutex::default(),
            pod: Mutex::default(),
            api_pod: Mutex::default(),
            shutdown: Notify::new(),
            leaving: watch::Sender::new(0),
        })
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.tasks.lock().expect("no panic while it is held")
    }

    fn task(&self, id: &str) -> Result<Arc<Task>, Error> {
        match self.slots().get(id) {
            Some(Slot::Made(task)) => Ok(task.clone()),
            Some(Slot::Making) => Err(Error::State(format!("container {id:?} is being made"))),
            None => Err(Error::NotFound(format!("no container {id:?}"))),
        }
    }

    /// Waits until `holds` says so of the number of containers; those that are being made or
    /// deleted count.
    pub async fn until(&self, mut holds: impl FnMut(usize) -> bool) {
        let mut news = self.leaving.subscribe();
        loop {
            let leaving = *news.borrow_and_update();
            if holds(self.slots().len() + leaving) {
                return;
            }
            // The sender is in `self`.
            let _ = news.changed().await;
        }
    }

    /// Waits until a container has been made, or is not there.
    pub async fn made(&self, id: &str) -> Option<Arc<Task>> {
        let mut news = self.leaving.subscribe();
        loop {
            news.mark_unchanged();
            match self.task(id) {
                Ok(task) => return Some(task),
                Err(Error::State(_)) => drop(news.changed().await),
                Err(_) => return None,
            }
        }
    }

    fn all(&self) -> Vec<Arc<Task>> {
        let slots = self.slots();
        let made = slots.values().filter_map(|slot| match slot {
            Slot::Made(task) => Some(task.clone()),
            Slot::Making => None,
        });
        made.collect()
    }

    fn pod(&self) -> Option<Arc<Pod>> {
        self.pod.lock().expect("no panic while it is held").clone()
    }

    fn set_pod(&self, pod: Option<Arc<Pod>>) {
        *self.pod.lock().expect("no panic while it is held") = pod;
    }

    /// What is told of the pod, or of the one that a container would have made.
    fn audit(&self, config: Option<&Path>, id: &str) -> Audit {
        match self.pod() {
            Some(pod) => pod.access.audit().clone(),
            None => {
                let config = Config::load(config.or(self.place.config.as_deref()));
                Audit::of(&config.unwrap_or_default(), &self.place.namespace, id)
            }
        }
    }

    /// Passes a result on, and tells of it if it refuses something of a container.
    fn heed<T>(
        &self,
        config: Option<&Path>,
        id: &str,
        result: Result<T, Error>,
    ) -> Result<T, Error> {
        if let Some(event) = result.as_ref().err().and_then(Error::refusal) {
            self.audit(config, id).tell_of(Some(id), event);
        }
        result
    }

    /// Waits until containerd has let the shim go.
    pub async fn released(&self) {
        self.shutdown.notified().await;
    }

    /// Shutdown: heeded when nothing is left to look after.
    async fn shut_down(&self, id: &str) -> Result<(), Error> {
        if !self.slots().is_empty() {
            return Ok(());
        }
        match self.api_pod() {
            Some(sandbox) if sandbox.id == id => return self.shut_down_lost(&sandbox).await,
            None if self.pod().is_none() => self.shutdown.notify_one(),
            _ => {}
        }
        Ok(())
    }

    /// Ends everything because the shim was told to end.
    pub async fn close(&self, limit: Duration) {
        if let Some(pod) = self.pod() {
            pod.begin_end();
            self.end_all(137, false);
            pod.destroy().await;
        }
        self.events.drained(limit).await;
    }

    /// Sends a signal. A process that has ended is not found, whatever the signal.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let task = self.task(id)?;
        let phase = task.with(exec_id, Process::phase)?;
        match phase {
            Phase::Stopped(_) => return Err(Error::NotFound("process already finished".into())),
            Phase::Added => return Err(task.with(exec_id, |p| p.refuse("kill", phase))?),
            _ => {}
        }
        if task.guest.is_none() {
            self.kill_holder(&task, signal).await;
            return Ok(());
        }
        match signal == libc::SIGKILL as u32 {
            // As a frozen container dies of it, too.
            true if self.wake(&task.pod).await.is_err() => {
                task.pod.access.kill();
                return Ok(());
            }
            true => {}
            false => task.awake("signal")?,
        }
        let agent = task.pod.agent();
        let all = all && exec_id.is_empty();
        match promptly(agent.signal_process(id, exec_id, signal, all)).await {
            Ok(()) if signal == libc::SIGKILL as u32 && exec_id.is_empty() => {
                tokio::spawn(end_of_the_killed(task.clone()));
                Ok(())
            }
            // A guest that does not even kill is ended from outside; the watch tells the rest.
            Err(pod::Error::Hung(secs)) if signal == libc::SIGKILL as u32 => {
                tracing::error!(
                    secs,
                    "the guest does not answer SIGKILL: the machine is killed"
                );
                task.pod.access.kill();
                Ok(())
            }
            Err(pod::Error::Agent(agent::Error::Lost { .. })) => {
                Err(Error::NotFound("process already finished".into()))
            }
            other => Ok(other?),
        }
    }

    /// The pod's own container behaves like the pause program: it ends by SIGINT and SIGTERM in peace.
    async fn kill_holder(&self, task: &Arc<Task>, signal: u32) {
        let status = match signal as i32 {
            libc::SIGKILL => 137,
            libc::SIGINT | libc::SIGTERM => 0,
            _ => return,
        };
        if let Err(error) = self.wake(&task.pod).await {
            tracing::warn!(error = %error, "the pod still stands still");
        }
        self.finish(task, &task.init, Exit::now(status), false);
    }

    /// Lets a pod go on that stands still, without a word: what follows is told.
    async fn wake(&self, pod: &Pod) -> Result<(), Error> {
        if pod.is_paused() {
            pod.resume().await?;
            let holder = self.all().into_iter().find(|task| task.holds_pod);
            let _ = holder.map(|task| task.init.step(&[Phase::Paused], Phase::Running));
        }
        Ok(())
    }

    /// Pauses or resumes: a container's processes, or by the container that only holds a pod the
    /// pod.
    async fn set_paused(&self, id: &str, paused: bool) -> Result<(), Error> {
        let task = self.task(id)?;
        let (from, to, verb) = match paused {
            true => (Phase::Running, Phase::Paused, "pause"),
            false => (Phase::Paused, Phase::Running, "resume"),
        };
        let phase = task.init.phase();
        if phase != from {
            return Err(task.init.refuse(verb, phase));
        }
        let container_id = id.to_string();
        match (&task.guest, paused) {
            (None, true) => task.pod.pause().await?,
            (None, false) => task.pod.resume().await?,
            (Some(_), _) => {
                task.awake(verb)?;
                match paused {
                    true => promptly(task.pod.agent().pause(id)).await?,
                    false => promptly(task.pod.agent().resume(id)).await?,
                }
            }
        }
        task.init
            .step(&[from], to)
            .map_err(|phase| task.init.refuse(verb, phase))?;
        self.events.publish(match paused {
            true => Event::Paused(events_wire::TaskPaused {
                container_id,
                ..Default::default()
            }),
            false => Event::Resumed(events_wire::TaskResumed {
                container_id,
                ..Default::default()
            }),
        });
        Ok(())
    }

    /// Sets a terminal's size; nothing happens where there is none.
    pub async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        rows: u16,
        columns: u16,
    ) -> Result<(), Error> {
        let task = self.task(id)?;
        let (terminal, phase) = task.with(exec_id, |process| {
            process.set_size(rows, columns);
            (process.names.terminal, process.phase())
        })?;
        if !terminal || task.guest.is_none() {
            return Ok(());
        }
        match phase {
            // An exec process has no terminal before its start, which will look.
            Phase::Added | Phase::Stopped(_) => Ok(()),
            Phase::Starting if !exec_id.is_empty() => Ok(()),
            // Remembered, and not worth an error.
            _ if task.pod.is_paused() => Ok(()),
            _ => {
                let agent = task.pod.agent();
                Ok(promptly(agent.resize_process(id, exec_id, rows, columns)).await?)
            }
        }
    }

    /// Sets new limits.
    async fn update(&self, id: &str, json: &[u8]) -> Result<(), Error> {
        let task = self.task(id)?;
        let limits = crate::oci::new_limits(json).map_err(Error::from);
        let (mut resources, mut host) = self.heed(None, id, limits)?;
        if let Some(exit) = task.init.exit() {
            return Err(task.init.refuse("update", Phase::Stopped(exit)));
        }
        if task.guest.is_none() {
            // Kubernetes resizes a pod: what its containers may use is set on each of them.
            return Ok(task.pod.limit(&host).map(drop)?);
        }
        let _one = task.updating.lock().await;
        task.awake("update")?;
        let pod = &task.pod;
        let asked = Asked::anew(json)?;
        let claim = pod.claim(id, &asked).await.map_err(Error::from);
        let claim = self.heed(None, id, claim)?;
        if task.holds_pod {
            // As many processors of the guest stand for the host's as there are now.
            if let Some(list) = pod.processors(&claim) {
                host_limits::name_processors(&mut resources, list);
            }
            let vcpus = pod.size().vcpus;
            host.extend(host_limits::host_files(&mut resources, vcpus));
        }
        if task.holds_pod && !self.has_another(id) {
            host.extend(pod.time_bound(&resources));
        }
        let set = async {
            let limits = pod.limit(&host)?;
            let set = promptly(pod.agent().update(id, resources)).await;
            set.inspect_err(|_| limits.undo())
        };
        if let Err(error) = set.await {
            pod.disclaim(claim).await;
            return Err(error.into());
        }
        pod.commit(claim).await;
        // Whoever asks next is told of these limits, if the guest is quick.
        task.usage.settle(&task.pod, id).await;
        Ok(())
    }

    /// Ends a process and tells of it, once.
    fn finish(&self, task: &Task, process: &Process, exit: Exit, out_of_memory: bool) {
        let container_id = task.id.clone();
        let id = match process.exec_id.as_str() {
            "" => container_id.clone(),
            exec_id => exec_id.into(),
        };
        process.stop_and(exit, || {
            if out_of_memory {
                task.usage.note_out_of_memory();
                self.events.publish(Event::Oom(events_wire::TaskOOM {
                    container_id: container_id.clone(),
                    ..Default::default()
                }));
            }
            tracing::info!(container = %container_id, process = %id, status = exit.status, "exited");
            self.events.publish(Event::Exit(events_wire::TaskExit {
                container_id,
                id,
                pid: task.pid(),
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..Default::default()
            }));
        });
    }

    /// Ends what still runs, by our word, because the pod cannot go on: exec processes before their init.
    fn end_all(&self, status: u32, out_of_memory: bool) {
        for task in self.all() {
            self.end_execs(&task, status);
            self.finish(&task, &task.init, Exit::now(status), out_of_memory);
        }
    }

    fn end_execs(&self, task: &Task, status: u32) {
        let execs: Vec<_> = task.execs().values().cloned().collect();
        for exec in execs {
            if exec.process.phase() != Phase::Added {
                self.finish(task, &exec.process, Exit::now(status), false);
            }
        }
    }

    /// Watches the pod until its end, and tells of it when nobody wanted it.
    async fn guard(self: Arc<Self>, pod: Arc<Pod>) {
        let trouble: Trouble = pod.trouble().await;
        if !pod.begin_end() {
            return;
        }
        tracing::error!(reason = %trouble.reason, "the pod cannot go on");
        self.end_all(trouble.status, trouble.out_of_memory);
        pod.destroy().await;
    }

    /// Waits for a container's init in the guest and tells of its end.
    async fn attend_init(self: Arc<Self>, task: Arc<Task>) {
        // A connection that breaks is the pod's trouble, which tells of all.
        let Ok(answer) = task.pod.agent().wait(&task.id).await else {
            return;
        };
        let exit = Exit::now(answer.exit_status & 0xff);
        task.init.settled().await;
        let execs: Vec<_> = task.execs().values().cloned().collect();
        let stragglers = async {
            for exec in &execs {
                if exec.process.phase() != Phase::Added {
                    exec.process.ended().await;
                }
            }
        };
        if tokio::time::timeout(STRAGGLERS, stragglers).await.is_err() {
            tracing::warn!(container = %task.id, "exec processes outlive their container's init");
        }
        tokio::join!(
            task.init.heard(&answer),
            task.usage.settle(&task.pod, &task.id)
        );
        // Some of them may have come since.
        self.end_execs(&task, 137);
        if answer.oom_killed {
            task.pod.access.tell_memory(&task.id);
        }
        self.finish(&task, &task.init, exit, answer.oom_killed);
        // It may stay for long until it is deleted, as Kubernetes' init containers do.
        if !task.holds_pod {
            task.pod.release(&task.id).await;
        }
    }

    /// The same for an exec process.
    async fn attend_exec(self: Arc<Self>, task: Arc<Task>, exec: Arc<Exec>) {
        let id = &exec.process.exec_id;
        let Ok(answer) = task.pod.agent().wait_process(&task.id, id).await else {
            return;
        };
        let exit = Exit::now(answer.exit_status & 0xff);
        exec.process.heard(&answer).await;
        self.finish(&task, &exec.process, exit, false);
    }
}

/// Waits for the end of a container that was killed. A guest that says that it kills, and does not (it lies, or the process waits for
/// an fs process that does not serve), is ended from outside, and the watch tells the rest.
async fn end_of_the_killed(task: Arc<Task>) {
    if tokio::time::timeout(KILLED_PATIENCE, task.init.ended())
        .await
        .is_err()
    {
        tracing::error!(
            container = %task.id,
            secs = KILLED_PATIENCE.as_secs(),
            "killed, and yet it does not end: the machine is killed"
        );
        task.pod.access.kill();
    }
}
