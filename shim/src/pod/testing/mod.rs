//! A guest in memory: what a test tells to happen in it and to it, and an agent that serves the
//! real protocol over a connection in memory.
//!
//! ```text
//! containerd/ ─ Pod, Container, Access ─ Agent ═ ttrpc ═ cable ═ ttrpc ═ Init ─ Guest ◄─ the test
//! ```

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    io::{self, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use async_trait::async_trait;
use bulkhead_agent_protocol::{
    SEED,
    agent::{self as wire, ProgramProblem},
    agent_ttrpc::{Agent, create_agent},
};
use bulkhead_vmm_config::{GuestEnd, VmStats};
use futures_core::Stream;
use tokio::{
    io::{AsyncWriteExt, DuplexStream, duplex},
    sync::{mpsc, watch},
    task::JoinHandle,
};
use ttrpc::{
    Code,
    r#async::{Server, TtrpcContext, transport::Listener},
};

use crate::{
    machine::{fs, vmm::End},
    sys::process::Death,
};

/// What an init writes to its standard output before it exits, if it has one.
pub(crate) const WORDS: &[u8] = b"the last words of a process\n";

thread_local! {
    /// The guests that were booted on this thread, oldest first, and what serves their agents.
    static BOOTED: Mutex<Vec<(Arc<Guest>, Server)>> = const { Mutex::new(Vec::new()) };
    static NEXT: Cell<Option<Fault>> = const { Cell::new(None) };
    static NEXT_BUSY: Cell<u64> = const { Cell::new(0) };
    static NEXT_REFUSAL: Cell<Option<String>> = const { Cell::new(None) };
}

/// Forgets all guests of this thread.
pub(crate) fn forget_guests() {
    BOOTED.with(|booted| booted.lock().unwrap().clear());
}

/// The guests of this thread, oldest first.
pub(crate) fn guests() -> Vec<Arc<Guest>> {
    BOOTED.with(|booted| {
        let booted = booted.lock().unwrap();
        booted.iter().map(|(guest, _)| guest.clone()).collect()
    })
}

/// The guest that was booted last on this thread.
pub(crate) fn last_guest() -> Option<Arc<Guest>> {
    guests().pop()
}

/// What goes wrong in the next guest of this thread, as [`Guest::set_fault`].
pub(crate) fn fail_next_boot(fault: Option<Fault>) {
    NEXT.set(fault);
}

/// How many exits the guests of this thread have from now on between two looks.
pub(crate) fn keep_busy(exits: u64) {
    NEXT_BUSY.set(exits);
}

/// The VMM of the next guest of this thread refuses its template.
pub(crate) fn refuse_next_template(reason: &str) {
    NEXT_REFUSAL.set(Some(reason.into()));
}

/// When a guest does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hang {
    /// It does nothing.
    Deaf,
    /// It does what it is asked, and does not say so.
    Mute,
}

/// What goes wrong with the next request of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The agent refuses.
    Refused,
    /// There is no such program; StartProcess alone says so.
    NoProgram,
}

/// A process in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Created,
    Running,
    Exited(u32),
}

#[derive(Debug)]
struct Process {
    life: Life,
    stdout: Option<UnixStream>,
    written: u64,
}

/// By container, and exec process; an init's is empty.
type Name = (String, String);

#[derive(Debug, Default)]
struct State {
    hang: Option<Hang>,
    fault: Option<Fault>,
    /// Exec processes of a container outlive its init, as they never do in a real guest.
    lingers: bool,
    frozen: HashSet<String>,
    processes: BTreeMap<Name, Process>,
    /// How each process ended, whatever was forgotten since.
    exits: Vec<(Name, u32)>,
    ports: HashMap<u32, UnixStream>,
    /// The stub's life is the other end's.
    stub: Option<OwnedFd>,
    cable: Option<JoinHandle<()>>,
    /// What somebody else than the agent says, and whether he stays then.
    say: Option<mpsc::UnboundedSender<(Vec<u8>, bool)>>,
}

/// A virtual machine with its guest, its fs process and its stub.
#[derive(Debug)]
pub(crate) struct Guest {
    state: Mutex<State>,
    /// Something has changed.
    changes: watch::Sender<u64>,
    end: watch::Sender<Option<End>>,
    fs_end: watch::Sender<Option<Death>>,
    pub(super) killed: AtomicBool,
    /// MiB of memory beside what it was booted with, what it is to have, the most that it takes,
    /// and what it keeps.
    pub(crate) plugged: AtomicU64,
    pub(crate) requested: AtomicU64,
    pub(crate) pluggable: AtomicU64,
    pub(crate) kept: AtomicU64,
    /// Processors that are online; 0: nobody has said.
    pub(crate) processors: AtomicU32,
    /// Exits until now, and how many there are between two looks.
    exits: AtomicU64,
    pub(crate) busy: AtomicU64,
    /// Where it is saved.
    saves: Mutex<Option<[File; 2]>>,
    /// Why the template that it was given is of no use.
    pub(super) refusal: Mutex<Option<String>>,
    /// The seed of each StartSandbox that it has heard.
    pub(crate) seeds: Mutex<Vec<Vec<u8>>>,
}

/// One connection, then none for ever.
struct Only(Option<DuplexStream>);

impl Stream for Only {
    type Item = io::Result<DuplexStream>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.0.take() {
            Some(stream) => Poll::Ready(Some(Ok(stream))),
            None => Poll::Pending,
        }
    }
}

impl Guest {
    /// Boots it: the host's end of its agent's connection.
    pub(crate) async fn boot() -> (Arc<Guest>, DuplexStream) {
        let (host, mut host_socket) = duplex(64 << 10);
        let (mut guest_socket, agent) = duplex(64 << 10);
        let (say, mut said) = mpsc::unbounded_channel::<(Vec<u8>, bool)>();
        let cable = tokio::spawn(async move {
            let passing = tokio::io::copy_bidirectional(&mut host_socket, &mut guest_socket);
            let said = tokio::select! {
                _ = passing => None,
                said = said.recv() => said,
            };
            let Some((words, stays)) = said else { return };
            // Whoever does not read them has closed his end.
            let _ = host_socket.write_all(&words).await;
            if stays {
                std::future::pending::<()>().await;
            }
        });
        let guest = Arc::new(Guest {
            state: Mutex::new(State {
                cable: Some(cable),
                say: Some(say),
                fault: NEXT.get(),
                ..State::default()
            }),
            changes: watch::Sender::new(0),
            end: watch::Sender::new(None),
            fs_end: watch::Sender::new(None),
            killed: AtomicBool::new(false),
            plugged: AtomicU64::new(0),
            requested: AtomicU64::new(0),
            pluggable: AtomicU64::new(u64::MAX),
            kept: AtomicU64::new(0),
            processors: AtomicU32::new(0),
            exits: AtomicU64::new(0),
            busy: AtomicU64::new(NEXT_BUSY.get()),
            saves: Mutex::default(),
            refusal: Mutex::new(NEXT_REFUSAL.take()),
            seeds: Mutex::default(),
        });
        let init = Arc::new(Init(guest.clone()));
        let mut server = Server::new()
            .add_listener(Listener::new(Only(Some(agent))))
            .register_service(create_agent(init));
        server.start().await.expect("it has a listener");
        BOOTED.with(|booted| booted.lock().unwrap().push((guest.clone(), server)));
        (guest, host)
    }

    /// It may be saved there.
    pub(super) fn save_to(&self, [state, memory, _]: &[File; 3]) {
        let files = [state, memory].map(|file| file.try_clone().unwrap());
        *self.saves.lock().unwrap() = Some(files);
    }

    /// Writes itself down, which ends it.
    pub(super) fn save(&self) {
        let files = self.saves.lock().unwrap().take();
        let files = files.expect("it was given files to be saved to");
        for mut file in files {
            file.write_all(b"a machine").unwrap();
        }
        self.end_itself(GuestEnd::Saved);
    }

    pub(super) fn count_exits(&self) -> u64 {
        let busy = self.busy.load(Ordering::Relaxed);
        self.exits.fetch_add(busy, Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.state());
        self.changes.send_modify(|count| *count += 1);
        changed
    }

    async fn when<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut changes = self.changes.subscribe();
        loop {
            changes.borrow_and_update();
            if let Some(found) = look(&mut self.state()) {
                return found;
            }
            let _ = changes.changed().await;
        }
    }

    /// Memory comes and goes by parts, in whole blocks: a step, and what there is then.
    pub(super) fn move_memory(&self) -> u64 {
        const STEP_MIB: u64 = 64;
        let [now, requested, most, kept] =
            [&self.plugged, &self.requested, &self.pluggable, &self.kept]
                .map(|number| number.load(Ordering::Relaxed));
        let wanted = requested.next_multiple_of(2);
        let next = match now < wanted {
            true => wanted.min(now + STEP_MIB).min(most).max(now),
            false => wanted.max(now.saturating_sub(STEP_MIB)).max(kept).min(now),
        };
        self.plugged.store(next, Ordering::Relaxed);
        next
    }

    /// Its machine ends.
    pub(crate) fn end(&self, end: End) {
        self.end.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(end);
            first
        });
        {
            let mut state = self.state();
            state.ports.clear();
            for process in state.processes.values_mut() {
                process.stdout = None;
            }
        }
        self.cut();
    }

    /// The guest's kernel ends it.
    pub(crate) fn end_itself(&self, end: GuestEnd) {
        self.end(End::Guest {
            end,
            console: Vec::new(),
            stats: Box::new(VmStats::default()),
        });
    }

    /// The VMM is killed, by somebody else than us.
    pub(crate) fn die(&self) {
        self.end(End::Died {
            death: Some(Death::Signal(libc::SIGKILL)),
            trouble: None,
            log: Vec::new(),
        });
    }

    pub(super) fn kill(&self) {
        self.killed.store(true, Ordering::Relaxed);
        self.die();
    }

    pub(super) fn has_ended_by(&self) -> Option<End> {
        self.end.borrow().clone()
    }

    pub(super) fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    pub(super) async fn ended(&self) -> End {
        let mut end = self.end.subscribe();
        let end = end.wait_for(Option::is_some).await;
        end.expect("the sender is in self").clone().expect("waited")
    }

    /// From now on somebody else has the agent's connection, who says this. He keeps it open then,
    /// or does not.
    pub(crate) fn fall(&self, words: Vec<u8>, stays: bool) {
        let say = self.state().say.take();
        // A machine that has gone says nothing.
        let _ = say.map(|say| say.send((words, stays)));
    }

    /// The agent's connection breaks.
    pub(crate) fn cut(&self) {
        let cable = self.state().cable.take();
        if let Some(cable) = cable {
            cable.abort();
        }
    }

    /// The fs process ends.
    pub(crate) fn end_fs(&self, death: Death) {
        self.fs_end.send_replace(Some(death));
    }

    pub(super) fn fs_is_gone(&self) -> bool {
        self.fs_end.borrow().is_some()
    }

    pub(super) fn fs_end(&self) -> fs::Error {
        let death = *self.fs_end.borrow();
        let line = String::new();
        fs::Error::Died { death, line }
    }

    pub(super) async fn fs_gone(&self) -> fs::Error {
        let mut end = self.fs_end.subscribe();
        let _ = end.wait_for(Option::is_some).await;
        self.fs_end()
    }

    pub(super) fn stub(&self) -> io::Result<OwnedFd> {
        let (theirs, ours) = UnixStream::pair()?;
        self.state().stub = Some(ours.into());
        Ok(theirs.into())
    }

    /// The process that stands for the pod is killed.
    pub(crate) fn kill_stub(&self) {
        self.state().stub = None;
    }

    pub(super) fn offer(&self, port: u32, stream: UnixStream) {
        self.state().ports.insert(port, stream);
    }

    pub(super) fn withdraw(&self, port: u32) {
        self.state().ports.remove(&port);
    }

    /// From now on it does not answer, or answers again.
    pub(crate) fn hang(&self, hang: Option<Hang>) {
        self.change(|state| state.hang = hang);
    }

    /// What goes wrong next.
    pub(crate) fn set_fault(&self, fault: Option<Fault>) {
        self.state().fault = fault;
    }

    /// Whether exec processes outlive their init.
    pub(crate) fn linger(&self, lingers: bool) {
        self.state().lingers = lingers;
    }

    /// A running process exits; `false`: it does not run.
    pub(crate) fn exit(&self, container: &str, exec: &str, status: u32) -> bool {
        self.change(|state| {
            let name = (container.to_string(), exec.to_string());
            let runs = state
                .processes
                .get(&name)
                .is_some_and(|process| process.life == Life::Running);
            if runs && !state.frozen.contains(container) {
                state.exit(&name, status);
            }
            runs
        })
    }

    /// Where a process is.
    pub(crate) fn life(&self, container: &str, exec: &str) -> Option<Life> {
        let name = (container.to_string(), exec.to_string());
        self.state().processes.get(&name).map(|found| found.life)
    }

    /// Whether a process with this name has ended with this status.
    pub(crate) fn has_exited(&self, container: &str, exec: &str, status: u32) -> bool {
        let state = self.state();
        let mut exits = state.exits.iter();
        exits.any(|((c, e), s)| (c.as_str(), e.as_str(), *s) == (container, exec, status))
    }
}

impl State {
    fn exit(&mut self, name: &Name, status: u32) {
        if name.1.is_empty() && !self.lingers {
            let others = self.processes.iter();
            let others = others.filter(|((container, exec), process)| {
                *container == name.0 && !exec.is_empty() && !matches!(process.life, Life::Exited(_))
            });
            let others: Vec<Name> = others.map(|(other, _)| other.clone()).collect();
            for other in others {
                self.exit(&other, 137);
            }
        }
        let process = self.processes.get_mut(name).expect("who asks has found it");
        process.life = Life::Exited(status);
        if let Some(mut stdout) = process.stdout.take()
            && stdout.write_all(WORDS).is_ok()
        {
            process.written = WORDS.len() as u64;
        }
        self.exits.push((name.clone(), status));
    }

    fn stream(&mut self, port: u32) -> Option<UnixStream> {
        self.ports.remove(&port)
    }

    fn signal(&mut self, name: &Name, signal: u32) -> ttrpc::Result<()> {
        let life = self.processes.get(name).map(|process| process.life);
        let status = 128 + signal;
        match (life, signal as i32) {
            (None | Some(Life::Exited(_)), _) => return Err(refuse(Code::NOT_FOUND)),
            (_, libc::SIGKILL) => self.exit(name, status),
            (_, libc::SIGTERM) if !self.frozen.contains(&name.0) => self.exit(name, status),
            // It is ignored, or handled.
            _ => {}
        }
        Ok(())
    }
}

/// PID 1 of the guest.
struct Init(Arc<Guest>);

fn refuse(code: Code) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, "no".to_string()))
}

impl Init {
    /// Does something that is asked for, when the guest does anything.
    async fn act<T>(&self, act: impl FnOnce(&mut State) -> ttrpc::Result<T>) -> ttrpc::Result<T> {
        let guest = &self.0;
        let heard = |state: &mut State| (state.hang != Some(Hang::Deaf)).then_some(());
        guest.when(heard).await;
        let done = guest.change(act);
        let answers = |state: &mut State| state.hang.is_none().then_some(());
        guest.when(answers).await;
        done
    }

    async fn make(&self, name: Name, stdio: wire::Stdio) -> ttrpc::Result<()> {
        self.act(|state| {
            if state.fault == Some(Fault::Refused) {
                return Err(refuse(Code::INTERNAL));
            }
            let init = (name.0.clone(), String::new());
            let init = state.processes.get(&init).map(|init| init.life);
            match (name.1.is_empty(), init) {
                (true, None) | (false, Some(Life::Running)) => {}
                _ => return Err(refuse(Code::FAILED_PRECONDITION)),
            }
            if state.processes.contains_key(&name) {
                return Err(refuse(Code::ALREADY_EXISTS));
            }
            let stdout = state.stream(stdio.stdout_port);
            let process = Process {
                life: Life::Created,
                stdout,
                written: 0,
            };
            state.processes.insert(name, process);
            Ok(())
        })
        .await
    }
}

fn name(request: wire::ProcessRequest) -> Name {
    (request.container_id, request.exec_id)
}

#[async_trait]
impl Agent for Init {
    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: wire::StartSandboxRequest,
    ) -> ttrpc::Result<wire::StartSandboxResponse> {
        // Of bytes of zeros it is one in 2^512.
        let seed = request.seed;
        assert!(seed.len() == SEED && seed.iter().any(|byte| *byte != 0));
        self.0.seeds.lock().unwrap().push(seed);
        Ok(wire::StartSandboxResponse::default())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        _: wire::UpdateContainerRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.act(|_| Ok(wire::Empty::default())).await
    }

    async fn set_processors(
        &self,
        _: &TtrpcContext,
        request: wire::SetProcessorsRequest,
    ) -> ttrpc::Result<wire::Empty> {
        let processors = &self.0.processors;
        self.act(|_| {
            processors.store(request.count, Ordering::Relaxed);
            Ok(wire::Empty::default())
        })
        .await
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: wire::CreateContainerRequest,
    ) -> ttrpc::Result<wire::CreateProcessResponse> {
        let name = (request.container_id, String::new());
        self.make(name, request.stdio.unwrap_or_default()).await?;
        Ok(wire::CreateProcessResponse::default())
    }

    async fn create_exec(
        &self,
        _: &TtrpcContext,
        request: wire::CreateExecRequest,
    ) -> ttrpc::Result<wire::CreateProcessResponse> {
        let name = (request.container_id, request.exec_id);
        self.make(name, request.stdio.unwrap_or_default()).await?;
        Ok(wire::CreateProcessResponse::default())
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: wire::ProcessRequest,
    ) -> ttrpc::Result<wire::StartProcessResponse> {
        let name = name(request);
        self.act(|state| {
            let fault = state.fault;
            if fault == Some(Fault::Refused) {
                return Err(refuse(Code::INTERNAL));
            }
            let process = state.processes.get_mut(&name);
            let Some(process) = process.filter(|process| process.life == Life::Created) else {
                return Err(refuse(Code::FAILED_PRECONDITION));
            };
            process.life = Life::Running;
            let mut answer = wire::StartProcessResponse::default();
            if fault == Some(Fault::NoProgram) {
                answer.problem = ProgramProblem::NOT_FOUND.into();
                state.exit(&name, 127);
            }
            Ok(answer)
        })
        .await
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: wire::ProcessRequest,
    ) -> ttrpc::Result<wire::WaitProcessResponse> {
        let name = name(request);
        let exited = self.0.when(|state| match state.processes.get(&name) {
            _ if state.hang.is_some() => None,
            None => Some(None),
            Some(process) => match process.life {
                Life::Exited(status) => Some(Some((status, process.written))),
                _ => None,
            },
        });
        let (exit_status, stdout_bytes) = exited.await.ok_or_else(|| refuse(Code::NOT_FOUND))?;
        Ok(wire::WaitProcessResponse {
            exit_status,
            stdout_bytes,
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: wire::SignalProcessRequest,
    ) -> ttrpc::Result<wire::Empty> {
        let name = (request.container_id, request.exec_id);
        self.act(|state| state.signal(&name, request.signal))
            .await?;
        Ok(wire::Empty::default())
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: wire::ProcessRequest,
    ) -> ttrpc::Result<wire::Empty> {
        let (container, exec) = name(request);
        self.act(|state| {
            let name = (container.clone(), exec.clone());
            match state.processes.get(&name).map(|process| process.life) {
                None => return Err(refuse(Code::NOT_FOUND)),
                Some(Life::Exited(_)) => {}
                Some(_) => return Err(refuse(Code::FAILED_PRECONDITION)),
            }
            state
                .processes
                .retain(|(c, e), _| *c != container || !exec.is_empty() && *e != exec);
            if exec.is_empty() {
                state.frozen.remove(&container);
            }
            Ok(())
        })
        .await?;
        Ok(wire::Empty::default())
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: wire::ContainerRequest,
    ) -> ttrpc::Result<wire::Empty> {
        let id = request.container_id;
        self.act(|state| Ok(state.frozen.insert(id))).await?;
        Ok(wire::Empty::default())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: wire::ContainerRequest,
    ) -> ttrpc::Result<wire::Empty> {
        let id = request.container_id;
        self.act(|state| Ok(state.frozen.remove(&id))).await?;
        Ok(wire::Empty::default())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: wire::Empty) -> ttrpc::Result<wire::Empty> {
        self.act(|_| Ok(())).await?;
        self.0.end_itself(GuestEnd::PowerOff);
        Ok(wire::Empty::default())
    }
}
