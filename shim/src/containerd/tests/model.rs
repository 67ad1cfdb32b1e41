//! What containerd relies on, as a state machine without time: the answers to calls that come one
//! after another, and the events.

use std::collections::BTreeMap;

use ttrpc::Code;

use super::{CONTAINERS, Kind, Loss, Op, Who};
use crate::pod::testing::Fault;

/// Where a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// An exec process that is only written down.
    Added,
    Created,
    Running,
    Paused,
    Stopped(u32),
}

/// What containerd is told of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Told {
    Create,
    Start,
    ExecAdded(u8),
    ExecStarted(u8),
    Paused,
    Resumed,
    Exit(Option<u8>, u32),
    Delete(u32),
}

/// What an answer has beside its code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Refused(Code),
    Done,
    /// Wait and Delete.
    Exit(u32),
    State(Life),
    /// How many processes.
    Pids(usize),
    /// Whether there is a pid.
    Connect(bool),
    /// It comes with the process' end.
    Later,
}

/// A container, which one of its name it is, and an exec process or its init.
type OneLife = (u8, u32, Option<u8>);

#[derive(Debug)]
struct Task {
    /// Something runs in the guest.
    guest: bool,
    holds_pod: bool,
    init: Life,
    execs: BTreeMap<u8, Life>,
    /// Which one of its name it is.
    turn: u32,
}

/// A shim.
#[derive(Debug)]
pub(super) struct Model {
    kind: Kind,
    tasks: BTreeMap<u8, Task>,
    /// There is a pod, and it lives.
    pod: Option<bool>,
    turns: u32,
    /// By container, in their order.
    pub(super) told: BTreeMap<u8, Vec<Told>>,
    /// How processes ended: whoever waits must have been told.
    pub(super) ended: Vec<(OneLife, u32)>,
}

const NOT_FOUND: Answer = Answer::Refused(Code::NOT_FOUND);
const STATE: Answer = Answer::Refused(Code::FAILED_PRECONDITION);
const EXISTS: Answer = Answer::Refused(Code::ALREADY_EXISTS);

impl Model {
    pub(super) fn new(kind: Kind) -> Model {
        Model {
            kind,
            tasks: BTreeMap::new(),
            pod: None,
            turns: 0,
            told: BTreeMap::new(),
            ended: Vec::new(),
        }
    }

    /// After these nothing is left.
    pub(super) fn farewell() -> impl Iterator<Item = Op> {
        let each = (0..CONTAINERS).rev();
        each.flat_map(|c| {
            let who = (c, None);
            [Op::Kill(who, libc::SIGKILL), Op::Delete(who), Op::Wait(who)]
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty() && self.pod.is_none()
    }

    /// Which one of its name a container is.
    pub(super) fn turn(&self, c: u8) -> Option<u32> {
        self.tasks.get(&c).map(|task| task.turn)
    }

    /// The pod stands still, and the container is another one than that by which it does.
    fn sleeps(&self, c: u8) -> bool {
        let holder = self.tasks.get(&0).filter(|task| !task.guest);
        c != 0 && holder.is_some_and(|task| task.init == Life::Paused)
    }

    fn tell(&mut self, c: u8, told: Told) {
        self.told.entry(c).or_default().push(told);
    }

    fn life(&self, (c, e): Who) -> Option<Life> {
        let task = self.tasks.get(&c)?;
        match e {
            None => Some(task.init),
            Some(e) => task.execs.get(&e).copied(),
        }
    }

    /// Ends a process without a word.
    fn stop(&mut self, (c, e): Who, status: u32) {
        let task = self.tasks.get_mut(&c).expect("it is there");
        self.ended.push(((c, task.turn, e), status));
        match e {
            None => task.init = Life::Stopped(status),
            Some(e) => {
                task.execs.insert(e, Life::Stopped(status));
            }
        }
    }

    fn finish(&mut self, who: Who, status: u32) {
        if !matches!(self.life(who), Some(Life::Stopped(_))) {
            self.stop(who, status);
            self.tell(who.0, Told::Exit(who.1, status));
        }
    }

    /// An init ends, and before it what runs beside it.
    fn finish_all(&mut self, c: u8, execs: u32, init: u32) {
        let all = self.tasks[&c].execs.clone();
        for (e, life) in all {
            if life != Life::Added {
                self.finish((c, Some(e)), execs);
            }
        }
        self.finish((c, None), init);
    }

    fn end_pod(&mut self, status: u32) {
        let all: Vec<u8> = self.tasks.keys().copied().collect();
        for c in all {
            self.finish_all(c, status, status);
        }
    }

    /// A process of the guest, or a pause container, exits.
    fn exit(&mut self, who: Who, status: u32) {
        match who.1 {
            None => self.finish_all(who.0, 137, status),
            Some(_) => self.finish(who, status),
        }
    }

    pub(super) fn step(&mut self, op: Op) -> Answer {
        match op {
            Op::Create(c, fault) => self.create(c, fault),
            Op::Start((c, None), fault) => self.start(c, fault),
            Op::Start((c, Some(e)), fault) => self.start_exec(c, e, fault),
            Op::Exec(c, e) => self.exec(c, e),
            Op::Kill(who, signal) => self.kill(who, signal),
            Op::Wait(who) => match self.life(who) {
                None => NOT_FOUND,
                Some(Life::Stopped(status)) => Answer::Exit(status),
                Some(_) => Answer::Later,
            },
            Op::State(who) => match self.life(who) {
                None => NOT_FOUND,
                Some(Life::Added) => Answer::State(Life::Created),
                Some(life) => Answer::State(life),
            },
            Op::Pids(c) => match self.tasks.get(&c) {
                None => NOT_FOUND,
                Some(task) => {
                    let runs = task.execs.values().filter(|life| **life == Life::Running);
                    Answer::Pids(1 + runs.count())
                }
            },
            Op::Connect(c) => Answer::Connect(self.tasks.contains_key(&c)),
            Op::Pause(c) => self.turn_over(c, Life::Running, Life::Paused, Told::Paused),
            Op::Resume(c) => self.turn_over(c, Life::Paused, Life::Running, Told::Resumed),
            Op::Delete((c, None)) => self.delete(c),
            Op::Delete((c, Some(e))) => self.delete_exec(c, e),
            Op::Exit(who, status) => {
                let init = self.life((who.0, None));
                let guest = self.tasks.get(&who.0).is_some_and(|task| task.guest);
                if guest && init == Some(Life::Running) && self.life(who) == Some(Life::Running) {
                    self.exit(who, status.into());
                }
                Answer::Done
            }
            Op::Lose(loss) => {
                if self.pod == Some(true) {
                    self.end_pod(match loss {
                        Loss::Vmm | Loss::Stub => 137,
                        Loss::Guest | Loss::Fs | Loss::Agent => 255,
                    });
                    self.pod = Some(false);
                }
                Answer::Done
            }
            Op::Shutdown(_) | Op::Hang(_) | Op::Linger(_) | Op::Pass(_) => Answer::Done,
        }
    }

    fn create(&mut self, c: u8, fault: Option<Fault>) -> Answer {
        if self.tasks.contains_key(&c) {
            return EXISTS;
        }
        let pause = self.kind == Kind::Pause && c == 0;
        let boots = pause || self.kind == Kind::Alone && self.pod.is_none();
        match self.pod {
            Some(_) if pause => return STATE,
            Some(false) => return STATE,
            None if !boots => return STATE,
            _ => {}
        }
        if self.sleeps(c) {
            return STATE;
        }
        if !pause && fault == Some(Fault::Refused) {
            return Answer::Refused(Code::INTERNAL);
        }
        self.pod = Some(true);
        self.turns += 1;
        let task = Task {
            guest: !pause,
            holds_pod: boots,
            init: Life::Created,
            execs: BTreeMap::new(),
            turn: self.turns,
        };
        self.tasks.insert(c, task);
        self.tell(c, Told::Create);
        Answer::Done
    }

    /// What a process has ended with that could not be started.
    fn failure(fault: Option<Fault>) -> Option<(u32, Code)> {
        Some(match fault? {
            Fault::Refused => (255, Code::INTERNAL),
            Fault::NoProgram => (127, Code::INVALID_ARGUMENT),
        })
    }

    fn start(&mut self, c: u8, fault: Option<Fault>) -> Answer {
        let sleeps = self.sleeps(c);
        let Some(task) = self.tasks.get_mut(&c) else {
            return NOT_FOUND;
        };
        if task.init != Life::Created || sleeps {
            return STATE;
        }
        if let Some((status, code)) = Model::failure(fault).filter(|_| task.guest) {
            self.stop((c, None), status);
            return Answer::Refused(code);
        }
        task.init = Life::Running;
        self.tell(c, Told::Start);
        Answer::Done
    }

    fn exec(&mut self, c: u8, e: u8) -> Answer {
        let Some(task) = self.tasks.get_mut(&c) else {
            return NOT_FOUND;
        };
        if !task.guest || !matches!(task.init, Life::Created | Life::Running) {
            return STATE;
        }
        if task.execs.contains_key(&e) {
            return EXISTS;
        }
        task.execs.insert(e, Life::Added);
        self.tell(c, Told::ExecAdded(e));
        Answer::Done
    }

    fn start_exec(&mut self, c: u8, e: u8, fault: Option<Fault>) -> Answer {
        let Some(life) = self.life((c, Some(e))) else {
            return NOT_FOUND;
        };
        let runs = self.life((c, None)) == Some(Life::Running);
        if !runs || life != Life::Added || self.sleeps(c) {
            return STATE;
        }
        if let Some((status, code)) = Model::failure(fault) {
            self.stop((c, Some(e)), status);
            return Answer::Refused(code);
        }
        let task = self.tasks.get_mut(&c).expect("it has an exec process");
        task.execs.insert(e, Life::Running);
        self.tell(c, Told::ExecStarted(e));
        Answer::Done
    }

    fn kill(&mut self, who: Who, signal: i32) -> Answer {
        match self.life(who) {
            None | Some(Life::Stopped(_)) => return NOT_FOUND,
            Some(Life::Added) => return STATE,
            Some(_) => {}
        }
        let guest = self.tasks[&who.0].guest;
        let frozen = self.life((who.0, None)) == Some(Life::Paused);
        if self.sleeps(who.0) {
            if signal != libc::SIGKILL {
                return STATE;
            }
            let holder = self.tasks.get_mut(&0).expect("it holds the pod");
            holder.init = Life::Running;
        }
        match signal {
            libc::SIGKILL => self.exit(who, 137),
            // The pause program ends in peace.
            libc::SIGTERM if !guest => self.exit(who, 0),
            libc::SIGTERM if !frozen => self.exit(who, 143),
            _ => {}
        }
        Answer::Done
    }

    fn turn_over(&mut self, c: u8, from: Life, to: Life, told: Told) -> Answer {
        let sleeps = self.sleeps(c);
        match self.tasks.get_mut(&c) {
            None => NOT_FOUND,
            Some(task) if task.init != from || sleeps => STATE,
            Some(task) => {
                task.init = to;
                self.tell(c, told);
                Answer::Done
            }
        }
    }

    fn delete(&mut self, c: u8) -> Answer {
        match self.life((c, None)) {
            None => return NOT_FOUND,
            // Killed, which wakes a pod that stands still.
            Some(Life::Created) => drop(self.kill((c, None), libc::SIGKILL)),
            Some(Life::Stopped(_)) => {}
            Some(_) => return STATE,
        }
        let Some(Life::Stopped(status)) = self.life((c, None)) else {
            unreachable!("it has ended")
        };
        if self.tasks[&c].holds_pod {
            self.end_pod(137);
            self.pod = None;
        }
        let added = self.tasks[&c].execs.clone().into_iter();
        for (e, _) in added.filter(|(_, life)| *life == Life::Added) {
            self.stop((c, Some(e)), 0);
        }
        self.tasks.remove(&c);
        self.tell(c, Told::Delete(status));
        Answer::Exit(status)
    }

    fn delete_exec(&mut self, c: u8, e: u8) -> Answer {
        let status = match self.life((c, Some(e))) {
            None => return NOT_FOUND,
            Some(Life::Stopped(status)) => status,
            Some(Life::Added) => {
                self.stop((c, Some(e)), 0);
                0
            }
            Some(_) => return STATE,
        };
        let task = self.tasks.get_mut(&c).expect("it has an exec process");
        task.execs.remove(&e);
        Answer::Exit(status)
    }
}
