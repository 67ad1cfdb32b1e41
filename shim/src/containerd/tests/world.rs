//! A shim over guests in memory, and containerd that calls it.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use bulkhead_vmm_config::GuestEnd;
use containerd_shim_protos::{
    api,
    protobuf::{Message, well_known_types::any::Any},
    types::task::Status,
};
use serde_json::json;
use tokio::{sync::mpsc, task::yield_now, time::sleep};
use ttrpc::{
    Code, Request,
    r#async::{Service, TtrpcContext},
};

use super::{
    CONTAINERS, Kind, Loss, Op, Who,
    model::{self, Life, Model, Told},
    trace::{Entry, Reply, Trace, reply},
};
use crate::{
    containerd::{
        Place, Tasks,
        events::{Event, Events},
        services,
    },
    pod::testing::{self, Guest, WORDS, forget_guests, last_guest},
    sys::process::Death,
};

const SERVICE: &str = "containerd.task.v2.Task";
/// Of each container, 0: none. With the last one's a machine is larger than it was booted.
pub(super) const LIMITS_MIB: [u64; 3] = [0, 300, 400];
/// Longer than exec processes may outlive their init, and than the machine's last words are waited
/// for.
const WHILE: Duration = Duration::from_secs(6);

/// Ends the sequence without a word on the terminal: thousands of tries make a failure smaller.
pub(super) fn fail(text: String) -> ! {
    std::panic::resume_unwind(Box::new(text))
}

macro_rules! check {
    ($holds:expr, $($words:tt)*) => {
        if !$holds {
            $crate::containerd::tests::world::fail(format!($($words)*))
        }
    };
}
pub(super) use check;

pub(super) fn container(c: u8) -> String {
    format!("c{c}")
}

pub(super) fn exec(e: Option<u8>) -> String {
    e.map_or(String::new(), |e| format!("e{e}"))
}

/// The number in the name of a container or an exec process.
fn number(name: &str) -> u8 {
    name[1..].parse().expect("the test has named it")
}

/// Bundles, configuration and state: made once for each thread.
struct Host(tempfile::TempDir);

thread_local! {
    static HOST: Host = Host::new();
}

impl Host {
    fn new() -> Host {
        // Memory, where there is some: a disk's journal takes longer than all the rest.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let dir = dir.unwrap();
        let state = dir.path().join("state");
        fs::write(
            dir.path().join("config.toml"),
            format!("state_dir = {state:?}\nmax_vcpus = 4\n[audit]\npath = \"\"\n"),
        )
        .unwrap();
        for kind in [Kind::Alone, Kind::Pause] {
            for c in 0..CONTAINERS {
                let bundle = Host::bundle(dir.path(), kind, c);
                fs::create_dir_all(bundle.join("rootfs")).unwrap();
                let mut annotations = json!({});
                if kind == Kind::Pause {
                    annotations["io.kubernetes.cri.sandbox-id"] = "c0".into();
                    let kind = if c == 0 { "sandbox" } else { "container" };
                    annotations["io.kubernetes.cri.container-type"] = kind.into();
                }
                let memory = match LIMITS_MIB[usize::from(c)] {
                    0 => json!({}),
                    mib => json!({"limit": mib << 20}),
                };
                let kinds = ["pid", "network", "ipc", "uts", "mount", "cgroup"];
                let config = json!({
                    "ociVersion": "1.0.2",
                    "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
                    "root": {"path": "rootfs"},
                    "annotations": annotations,
                    "linux": {
                        "namespaces": kinds.map(|kind| json!({"type": kind})),
                        "resources": {"memory": memory},
                    },
                });
                fs::write(bundle.join("config.json"), config.to_string()).unwrap();
            }
        }
        Host(dir)
    }

    fn bundle(dir: &Path, kind: Kind, c: u8) -> PathBuf {
        dir.join(format!("{kind:?}{c}"))
    }
}

/// The shim, and what it was asked and has said.
pub(super) struct World {
    kind: Kind,
    dir: PathBuf,
    pub(super) tasks: Arc<Tasks>,
    services: Arc<HashMap<String, Service>>,
    pub(super) trace: Arc<Mutex<Trace>>,
    /// Calls of Wait that are not answered: which, who, of which turn, and how many ends there were
    /// before.
    waiting: Vec<(usize, Who, u32, usize)>,
}

impl World {
    /// Runs a test in a runtime of its own, in which time passes when nothing else can happen.
    pub(super) fn run(kind: Kind, test: impl AsyncFnOnce(&mut World)) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        let dir = HOST.with(|host| host.0.path().to_path_buf());
        // A sequence that failed may have left something.
        let _ = fs::remove_dir_all(dir.join("state"));
        runtime.block_on(async {
            let (events, queue) = Events::kept();
            let place = Place {
                namespace: "ns".into(),
                config: Some(dir.join("config.toml")),
                ..Place::default()
            };
            let tasks = Tasks::new(place, events);
            let mut world = World {
                kind,
                dir,
                services: Arc::new(services(&tasks)),
                tasks,
                trace: Arc::new(Mutex::new(Trace::new(queue))),
                waiting: Vec::new(),
            };
            test(&mut world).await;
        });
        forget_guests();
    }

    /// Lets everything happen that can without time.
    pub(super) async fn settle(&self) {
        // Everything is on this thread: each time, whatever was ready has its turn, and what it has
        // woken comes the next time.
        for _ in 0..16 {
            yield_now().await;
        }
        self.trace.lock().unwrap().listen();
    }

    fn output(&self, c: u8) -> PathBuf {
        self.dir.join(format!("{}.out", container(c)))
    }

    /// What an act asks of the shim, if it does.
    fn request(&self, op: Op) -> Option<(&'static str, Box<dyn MessageBytes>)> {
        let id = container;
        Some(match op {
            Op::Create(c, _) => {
                // One of them has an output.
                let stdout = match c {
                    1 => format!("file://{}", self.output(c).display()),
                    _ => String::new(),
                };
                let bundle = Host::bundle(&self.dir, self.kind, c);
                let request = api::CreateTaskRequest {
                    id: id(c),
                    bundle: bundle.display().to_string(),
                    stdout,
                    ..Default::default()
                };
                ("Create", Box::new(request))
            }
            Op::Start((c, e), _) => {
                let request = api::StartRequest {
                    id: id(c),
                    exec_id: exec(e),
                    ..Default::default()
                };
                ("Start", Box::new(request))
            }
            Op::Exec(c, e) => {
                let process = json!({"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"});
                let spec = Any {
                    value: process.to_string().into_bytes(),
                    ..Default::default()
                };
                let request = api::ExecProcessRequest {
                    id: id(c),
                    exec_id: exec(Some(e)),
                    spec: Some(spec).into(),
                    ..Default::default()
                };
                ("Exec", Box::new(request))
            }
            Op::Kill((c, e), signal) => {
                let request = api::KillRequest {
                    id: id(c),
                    exec_id: exec(e),
                    signal: signal.unsigned_abs(),
                    ..Default::default()
                };
                ("Kill", Box::new(request))
            }
            Op::Wait((c, e)) => {
                let request = api::WaitRequest {
                    id: id(c),
                    exec_id: exec(e),
                    ..Default::default()
                };
                ("Wait", Box::new(request))
            }
            Op::State((c, e)) => {
                let request = api::StateRequest {
                    id: id(c),
                    exec_id: exec(e),
                    ..Default::default()
                };
                ("State", Box::new(request))
            }
            Op::Pids(c) => {
                let request = api::PidsRequest {
                    id: id(c),
                    ..Default::default()
                };
                ("Pids", Box::new(request))
            }
            Op::Connect(c) => {
                let request = api::ConnectRequest {
                    id: id(c),
                    ..Default::default()
                };
                ("Connect", Box::new(request))
            }
            Op::Pause(c) => {
                let request = api::PauseRequest {
                    id: id(c),
                    ..Default::default()
                };
                ("Pause", Box::new(request))
            }
            Op::Resume(c) => {
                let request = api::ResumeRequest {
                    id: id(c),
                    ..Default::default()
                };
                ("Resume", Box::new(request))
            }
            Op::Delete((c, e)) => {
                let request = api::DeleteRequest {
                    id: id(c),
                    exec_id: exec(e),
                    ..Default::default()
                };
                ("Delete", Box::new(request))
            }
            Op::Shutdown(c) => {
                let request = api::ShutdownRequest {
                    id: id(c),
                    ..Default::default()
                };
                ("Shutdown", Box::new(request))
            }
            Op::Exit(..) | Op::Lose(_) | Op::Hang(_) | Op::Linger(_) | Op::Pass(_) => return None,
        })
    }

    /// Begins an act. A call goes on by itself: its number.
    pub(super) async fn begin(&mut self, op: Op) -> Option<usize> {
        let guest = last_guest();
        if let (Some(guest), Op::Create(_, fault) | Op::Start(_, fault)) = (&guest, op) {
            guest.set_fault(fault);
        }
        if let Op::Create(_, fault) = op {
            testing::fail_next_boot(fault);
        }
        let Some((method, request)) = self.request(op) else {
            self.trace.lock().unwrap().note(Entry::Happened(op));
            match op {
                Op::Pass(secs) => sleep(Duration::from_secs(secs.into())).await,
                _ => guest.iter().for_each(|guest| happen(guest, op)),
            }
            return None;
        };
        let request = Request {
            service: SERVICE.into(),
            method: method.into(),
            payload: request.bytes(),
            ..Request::default()
        };
        let call = self.trace.lock().unwrap().ask(op);
        let (services, trace) = (self.services.clone(), self.trace.clone());
        tokio::spawn(async move {
            let method = &services[SERVICE].methods[method];
            let answered = method.handler(TtrpcContext::default(), request).await;
            let answered = reply(op, answered.expect("refusals are answers"));
            trace.lock().unwrap().note(Entry::Answered(call, answered));
        });
        Some(call)
    }

    pub(super) fn reply(&self, call: usize) -> Option<Reply> {
        self.trace.lock().unwrap().reply(call)
    }

    /// Asks and waits for the answer, while time passes.
    pub(super) async fn call(&mut self, op: Op) -> Reply {
        let call = self.begin(op).await.expect("it is a call");
        let answered = async {
            loop {
                if let Some(reply) = self.reply(call) {
                    return reply;
                }
                sleep(Duration::from_secs(1)).await;
            }
        };
        match tokio::time::timeout(Duration::from_secs(1000), answered).await {
            Ok(reply) => reply,
            Err(_) => fail(format!("no answer to {op:?}{}", self.story())),
        }
    }

    /// Everything so far, for whoever reads a failure.
    pub(super) fn story(&self) -> String {
        self.trace.lock().unwrap().story()
    }

    /// The next act of an orderly sequence, and what the model says of it.
    pub(super) async fn step_beside(&mut self, model: &mut Model, op: Op) {
        let (turn, ends) = (model.turn(subject(op)), model.ended.len());
        let expected = model.step(op);
        let call = self.begin(op).await;
        self.settle().await;
        let waits = expected == model::Answer::Later;
        if let (Some(call), Op::Wait(who), true, Some(turn)) = (call, op, waits, turn) {
            self.waiting.push((call, who, turn, ends));
        }
        if let (Some(call), false) = (call, waits) {
            let mut reply = self.reply(call);
            if reply.is_none() {
                sleep(WHILE).await;
                self.settle().await;
                reply = self.reply(call);
            }
            let story = || self.story();
            let Some(reply) = reply else {
                fail(format!("no answer to {op:?}{}", story()))
            };
            let said = said(&expected, &reply);
            check!(
                said == expected,
                "{op:?} was answered with {said:?} ({}), and not with {expected:?}{}",
                reply.text,
                story()
            );
        }
        sleep(WHILE).await;
        self.settle().await;
        self.compare(model, op);
    }

    fn compare(&mut self, model: &Model, op: Op) {
        let told = self.trace.lock().unwrap().told();
        for c in 0..CONTAINERS {
            let of = |told: &BTreeMap<u8, Vec<Told>>| sorted(told.get(&c).cloned());
            let (told, expected) = (of(&told), of(&model.told));
            check!(
                told == expected,
                "after {op:?} containerd has been told of c{c}: {told:?}, and not {expected:?}{}",
                self.story()
            );
        }
        let trace = self.trace.lock().unwrap();
        self.waiting.retain(|(call, who, turn, ends)| {
            let mut ended = model.ended[*ends..].iter();
            let end = ended.find(|((c, t, e), _)| ((*c, *e), *t) == (*who, *turn));
            let status = trace.reply(*call).and_then(|reply| reply.exit);
            let status = status.map(|(status, _)| status);
            let expected = end.map(|(_, status)| *status);
            check!(
                status == expected,
                "after {op:?} whoever waits for {who:?} has heard {status:?}, and not {expected:?}{}",
                trace.story()
            );
            expected.is_none()
        });
    }

    /// Nothing is left.
    pub(super) async fn check_end(&mut self, model: &mut Model) {
        check!(model.is_empty(), "the model has something left: {model:?}");
        check!(
            self.waiting.is_empty(),
            "somebody still waits: {:?}{}",
            self.waiting,
            self.story()
        );
        self.check_trace();
    }

    /// Ends whatever is left of a storm.
    pub(super) async fn end_all(&mut self) {
        let deadline = 20;
        for c in (0..CONTAINERS).rev() {
            for tries in 0.. {
                check!(tries < deadline, "c{c} does not go{}", self.story());
                self.call(Op::Kill((c, None), libc::SIGKILL)).await;
                sleep(Duration::from_secs(60)).await;
                if self.call(Op::Delete((c, None))).await.code != Code::FAILED_PRECONDITION {
                    break;
                }
            }
        }
        sleep(Duration::from_secs(100)).await;
        self.settle().await;
    }

    /// What holds whatever came first; and nothing is left.
    pub(super) fn check_trace(&self) {
        let left: Vec<_> = self.tasks.slots().keys().cloned().collect();
        check!(left.is_empty(), "tasks are left: {left:?}{}", self.story());
        check!(self.tasks.pod().is_none(), "a pod is left{}", self.story());
        let files = everything_beneath(&self.dir.join("state"));
        check!(files.is_empty(), "left: {files:?}{}", self.story());
        self.trace.lock().unwrap().check();
        let written = fs::read(self.output(1)).unwrap_or_default();
        check!(
            written.chunks(WORDS.len()).all(|words| words == WORDS),
            "half a word is in the output of c1"
        );
        let _ = fs::remove_file(self.output(1));
    }
}

trait MessageBytes {
    fn bytes(&self) -> Vec<u8>;
}

impl<M: Message> MessageBytes for M {
    fn bytes(&self) -> Vec<u8> {
        self.write_to_bytes().unwrap()
    }
}

/// Something happens in the guest or to it.
fn happen(guest: &Guest, op: Op) {
    match op {
        Op::Exit((c, e), status) => {
            guest.exit(&container(c), &exec(e), status.into());
        }
        Op::Lose(Loss::Vmm) => guest.die(),
        Op::Lose(Loss::Guest) => guest.end_itself(GuestEnd::PowerOff),
        Op::Lose(Loss::Fs) => guest.end_fs(Death::Signal(libc::SIGSEGV)),
        Op::Lose(Loss::Agent) => guest.cut(),
        Op::Lose(Loss::Stub) => guest.kill_stub(),
        Op::Hang(hang) => guest.hang(hang),
        Op::Linger(lingers) => guest.linger(lingers),
        other => unreachable!("{other:?} is a call"),
    }
}

/// The container that an act is about.
pub(super) fn subject(op: Op) -> u8 {
    match op {
        Op::Create(c, _) | Op::Exec(c, _) | Op::Pids(c) | Op::Connect(c) => c,
        Op::Pause(c) | Op::Resume(c) | Op::Shutdown(c) => c,
        Op::Start((c, _), _) | Op::Kill((c, _), _) | Op::Exit((c, _), _) => c,
        Op::Wait((c, _)) | Op::State((c, _)) | Op::Delete((c, _)) => c,
        Op::Lose(_) | Op::Hang(_) | Op::Linger(_) | Op::Pass(_) => CONTAINERS,
    }
}

/// An answer in the model's words.
fn said(expected: &model::Answer, reply: &Reply) -> model::Answer {
    let status = reply.exit.map(|(status, _)| status);
    match (reply.code, expected) {
        (Code::OK, model::Answer::Exit(_)) => model::Answer::Exit(status.unwrap_or(u32::MAX)),
        (Code::OK, model::Answer::State(_)) => model::Answer::State(match reply.state {
            Some(Status::CREATED) => Life::Created,
            Some(Status::RUNNING) => Life::Running,
            Some(Status::PAUSED) => Life::Paused,
            _ => Life::Stopped(status.unwrap_or(u32::MAX)),
        }),
        (Code::OK, model::Answer::Pids(_)) => model::Answer::Pids(reply.pids),
        (Code::OK, model::Answer::Connect(_)) => model::Answer::Connect(reply.pids > 0),
        (Code::OK, _) => model::Answer::Done,
        (code, _) => model::Answer::Refused(code),
    }
}

/// Exec processes that end together end in any order.
fn sorted(told: Option<Vec<Told>>) -> Vec<Told> {
    let mut told = told.unwrap_or_default();
    let is_exec = |told: &Told| matches!(told, Told::Exit(Some(_), _));
    for run in told.chunk_by_mut(|a, b| is_exec(a) && is_exec(b)) {
        run.sort();
    }
    told
}

fn everything_beneath(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut all = Vec::new();
    for entry in entries.flatten() {
        all.extend(everything_beneath(&entry.path()));
        all.push(entry.path());
    }
    all
}

/// An event in the model's words, and the container that it is about.
pub(super) fn told(event: &Event) -> (u8, Told) {
    let of = |id: &str, told| (number(id), told);
    match event {
        Event::Create(e) => of(&e.container_id, Told::Create),
        Event::Start(e) => of(&e.container_id, Told::Start),
        Event::ExecAdded(e) => of(&e.container_id, Told::ExecAdded(number(&e.exec_id))),
        Event::ExecStarted(e) => of(&e.container_id, Told::ExecStarted(number(&e.exec_id))),
        Event::Paused(e) => of(&e.container_id, Told::Paused),
        Event::Resumed(e) => of(&e.container_id, Told::Resumed),
        Event::Exit(e) => {
            let exec = (e.id != e.container_id).then(|| number(&e.id));
            of(&e.container_id, Told::Exit(exec, e.exit_status))
        }
        Event::Delete(e) => of(&e.container_id, Told::Delete(e.exit_status)),
        Event::Oom(e) => fail(format!("memory ran out in {}", e.container_id)),
    }
}

/// The queue of events, as a test reads it.
pub(super) type Queue = mpsc::Receiver<(SystemTime, Event)>;
