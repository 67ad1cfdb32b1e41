//! What was asked, answered and told, in its order, and what must hold of it whatever came first.

use std::collections::{BTreeMap, BTreeSet};

use containerd_shim_protos::{
    api,
    protobuf::{Message, MessageField, well_known_types::timestamp::Timestamp},
    types::task::Status,
};
use ttrpc::{Code, Response};

use super::{
    Op, Who,
    model::Told,
    world::{Queue, check, container, exec, told},
};
use crate::{containerd::events::Event, pod::testing::guests};

/// Seconds and nanoseconds.
type At = (i64, i32);
/// Status and time.
type Exit = (u32, At);

/// An answer.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    pub(super) code: Code,
    pub(super) text: String,
    pub(super) exit: Option<Exit>,
    pub(super) state: Option<Status>,
    /// Of Pids how many, of Connect the task's.
    pub(super) pids: usize,
}

fn at(time: &MessageField<Timestamp>) -> Option<At> {
    time.as_ref().map(|time| (time.seconds, time.nanos))
}

/// Reads an answer to `op`.
pub(super) fn reply(op: Op, response: Response) -> Reply {
    let status = response.status.unwrap_or_default();
    let mut reply = Reply {
        code: status.code(),
        text: status.message().into(),
        exit: None,
        state: None,
        pids: 0,
    };
    if reply.code != Code::OK {
        return reply;
    }
    fn read<M: Message>(bytes: &[u8]) -> M {
        M::parse_from_bytes(bytes).unwrap()
    }
    let bytes = &response.payload;
    match op {
        Op::Wait(_) => {
            let answer: api::WaitResponse = read(bytes);
            reply.exit = at(&answer.exited_at).map(|at| (answer.exit_status, at));
        }
        Op::Delete(_) => {
            let answer: api::DeleteResponse = read(bytes);
            reply.exit = at(&answer.exited_at).map(|at| (answer.exit_status, at));
        }
        Op::State(_) => {
            let answer: api::StateResponse = read(bytes);
            reply.exit = at(&answer.exited_at).map(|at| (answer.exit_status, at));
            reply.state = Some(answer.status.enum_value_or_default());
        }
        Op::Pids(_) => reply.pids = read::<api::PidsResponse>(bytes).processes.len(),
        Op::Connect(_) => reply.pids = read::<api::ConnectResponse>(bytes).task_pid as usize,
        _ => {}
    }
    reply
}

/// A line of the story.
#[derive(Debug)]
pub(super) enum Entry {
    Happened(Op),
    Asked(usize, Op),
    Answered(usize, Reply),
    Told(Event),
}

/// The story.
pub(super) struct Trace {
    queue: Queue,
    entries: Vec<Entry>,
    asked: Vec<(Op, Option<Reply>)>,
}

impl Trace {
    pub(super) fn new(queue: Queue) -> Trace {
        Trace {
            queue,
            entries: Vec::new(),
            asked: Vec::new(),
        }
    }

    /// Takes in what was told: before whatever is noted next.
    pub(super) fn listen(&mut self) {
        while let Ok((_, event)) = self.queue.try_recv() {
            self.entries.push(Entry::Told(event));
        }
    }

    pub(super) fn note(&mut self, entry: Entry) {
        self.listen();
        if let Entry::Answered(call, reply) = &entry {
            self.asked[*call].1 = Some(reply.clone());
        }
        self.entries.push(entry);
    }

    pub(super) fn ask(&mut self, op: Op) -> usize {
        let call = self.asked.len();
        self.asked.push((op, None));
        self.note(Entry::Asked(call, op));
        call
    }

    pub(super) fn reply(&self, call: usize) -> Option<Reply> {
        self.asked[call].1.clone()
    }

    fn events(&self) -> impl Iterator<Item = &Event> {
        self.entries.iter().filter_map(|entry| match entry {
            Entry::Told(event) => Some(event),
            _ => None,
        })
    }

    /// What containerd was told, by container.
    pub(super) fn told(&self) -> BTreeMap<u8, Vec<Told>> {
        let mut all: BTreeMap<u8, Vec<Told>> = BTreeMap::new();
        for (c, told) in self.events().map(told) {
            all.entry(c).or_default().push(told);
        }
        all
    }

    pub(super) fn story(&self) -> String {
        let mut story = String::from("\nwhat happened:\n");
        for entry in &self.entries {
            story += &match entry {
                Entry::Happened(op) => format!("  happens    {op:?}\n"),
                Entry::Asked(call, op) => format!("  asks   {call:3} {op:?}\n"),
                Entry::Answered(call, reply) => {
                    let Reply { code, text, .. } = reply;
                    let (op, exit) = (&self.asked[*call].0, reply.exit.map(|exit| exit.0));
                    format!("  hears  {call:3} {op:?}: {code:?} {exit:?} {text}\n")
                }
                Entry::Told(event) => format!("  is told    {:?}\n", told(event)),
            };
        }
        story
    }

    /// Checks what must hold whatever came first.
    pub(super) fn check(&self) {
        self.check_order();
        self.check_counts();
        self.check_exits();
        self.check_facts();
    }

    /// Of each container: made, then started, then ended after its exec processes, then deleted,
    /// and nothing of what is not there.
    fn check_order(&self) {
        let mut tasks: BTreeMap<u8, Seen> = BTreeMap::new();
        // Deletes of exec processes that were asked for: as often another one may come.
        let mut going: BTreeMap<Who, usize> = BTreeMap::new();
        for entry in &self.entries {
            match entry {
                Entry::Asked(_, Op::Delete(who)) => *going.entry(*who).or_default() += 1,
                Entry::Asked(_, Op::Start((c, None), _)) => {
                    tasks
                        .entry(*c)
                        .and_modify(|task| task.asked_to_start = true);
                }
                Entry::Told(event) => self.check_event(&mut tasks, &mut going, event),
                _ => {}
            }
        }
        check!(tasks.is_empty(), "not deleted: {tasks:?}{}", self.story());
    }

    fn check_event(
        &self,
        tasks: &mut BTreeMap<u8, Seen>,
        going: &mut BTreeMap<Who, usize>,
        event: &Event,
    ) {
        let (c, what) = told(event);
        let wrong = |why: &str| -> ! {
            super::world::fail(format!("{what:?} of c{c}: {why}{}", self.story()))
        };
        if what == Told::Create {
            if tasks.insert(c, Seen::default()).is_some() {
                wrong("it is there already");
            }
            return;
        }
        let Some(task) = tasks.get_mut(&c) else {
            wrong("it is not there");
        };
        if task.exit.is_some() && !matches!(what, Told::Delete(_)) {
            wrong("its init has ended");
        }
        match what {
            Told::Start if task.started => wrong("it has been started"),
            Told::Start => task.started = true,
            Told::ExecAdded(e) => {
                if task.execs.insert(e, SeenExec::default()).is_some() {
                    match going.get_mut(&(c, Some(e))) {
                        Some(deletes) if *deletes > 0 => *deletes -= 1,
                        _ => wrong("there is one"),
                    }
                }
            }
            Told::ExecStarted(e) | Told::Exit(Some(e), _) => {
                let Some(exec) = task.execs.get_mut(&e) else {
                    wrong("it was not added");
                };
                if exec.ended {
                    wrong("it has ended");
                }
                match what {
                    Told::ExecStarted(_) if exec.started => wrong("it has been started"),
                    Told::ExecStarted(_) => exec.started = true,
                    _ => exec.ended = true,
                }
            }
            Told::Exit(None, status) => {
                if task.execs.values().any(|exec| exec.started && !exec.ended) {
                    wrong("an exec process has not ended");
                }
                task.exit = Some(status);
            }
            Told::Delete(status) => {
                match task.exit {
                    Some(exit) if exit != status => wrong("it had ended otherwise"),
                    None if task.started => wrong("its end was not told"),
                    None if !task.asked_to_start => wrong("its end was not told"),
                    _ => {}
                }
                tasks.remove(&c);
            }
            Told::Create | Told::Paused | Told::Resumed => {}
        }
    }

    /// What was done was told, as often; what was asked was answered.
    fn check_counts(&self) {
        let mut answered: BTreeMap<&str, usize> = BTreeMap::new();
        for (op, reply) in &self.asked {
            let Some(reply) = reply else {
                check!(false, "no answer to {op:?}{}", self.story());
                continue;
            };
            if reply.code == Code::OK {
                *answered.entry(kind_of_call(*op)).or_default() += 1;
            }
        }
        let mut told_of: BTreeMap<&str, usize> = BTreeMap::new();
        for (_, what) in self.events().map(told) {
            *told_of.entry(kind_of_event(what)).or_default() += 1;
        }
        answered.remove("");
        told_of.remove("");
        check!(
            answered == told_of,
            "done {answered:?}, and told {told_of:?}{}",
            self.story()
        );
    }

    /// One process, one end: its event, Wait, State and Delete say the same; and what they say is
    /// so.
    fn check_exits(&self) {
        let mut ends: BTreeMap<Who, BTreeSet<Exit>> = BTreeMap::new();
        // What containerd has been told by an event, and how many ends may be told by an answer
        // alone.
        let mut spoken: BTreeMap<Who, BTreeSet<Exit>> = BTreeMap::new();
        let mut silent: BTreeMap<Who, usize> = BTreeMap::new();
        for (op, reply) in &self.asked {
            let Some(reply) = reply else { continue };
            match op {
                Op::Wait(who) | Op::State(who) | Op::Delete(who) => {
                    if let Some(exit) = reply.exit {
                        ends.entry(*who).or_default().insert(exit);
                    }
                    if let Op::Delete((c, None)) = op {
                        // An exec process that was never started goes with its container.
                        for e in [0, 1] {
                            *silent.entry((*c, Some(e))).or_default() += 1;
                        }
                    }
                    if let (Op::Delete((_, Some(_))), Code::OK) = (op, reply.code) {
                        *silent.entry(*who).or_default() += 1;
                    }
                }
                Op::Start(who, _) if reply.code != Code::OK => {
                    *silent.entry(*who).or_default() += 1;
                }
                _ => {}
            }
        }
        for event in self.events() {
            if let Event::Exit(event) = event {
                let exec = (event.id != event.container_id).then_some(&event.id);
                let number = |name: &String| name[1..].parse().unwrap();
                let who = (number(&event.container_id), exec.map(number));
                let exit = (event.exit_status, at(&event.exited_at).unwrap());
                spoken.entry(who).or_default().insert(exit);
                self.check_truth(who, exit.0);
            }
        }
        for (who, ends) in ends {
            let spoken = spoken.remove(&who).unwrap_or_default();
            let only_answered = ends.difference(&spoken).count();
            let most = silent.get(&who).copied().unwrap_or(0);
            check!(
                only_answered <= most,
                "{who:?} has ended as {ends:?} by answers, and as {spoken:?} by events{}",
                self.story()
            );
        }
    }

    /// A status is that of the process, or one of a pod that ended. Nothing that was killed has
    /// ended well.
    fn check_truth(&self, (c, e): Who, status: u32) {
        let (container, exec) = (container(c), exec(e));
        let guests = guests();
        let exited = guests
            .iter()
            .any(|guest| guest.has_exited(&container, &exec, status));
        let peace = |op: &Op| *op == Op::Kill((c, None), libc::SIGTERM);
        let in_peace = status == 0
            && (c, e) == (0, None)
            && self.asked.iter().any(|(op, _)| peace(op))
            && guests.iter().all(|guest| guest.life("c0", "").is_none());
        check!(
            exited || in_peace || status == 137 || status == 255,
            "nothing has ended {:?} with {status}{}",
            (c, e),
            self.story()
        );
    }

    /// What is so from the question to the answer decides the answer.
    fn check_facts(&self) {
        // By container: how often something has changed, whether it is there, and whether its init
        // has ended.
        let mut facts: BTreeMap<u8, Fact> = BTreeMap::new();
        let mut before: BTreeMap<usize, (u8, Fact)> = BTreeMap::new();
        for entry in &self.entries {
            match entry {
                Entry::Asked(call, op) => {
                    let c = super::world::subject(*op);
                    let fact = facts.entry(c).or_default();
                    if matches!(op, Op::Create(..) | Op::Start(..) | Op::Delete(..)) {
                        fact.changes += 1;
                        fact.moving += 1;
                    }
                    before.insert(*call, (c, *fact));
                }
                Entry::Answered(call, reply) => {
                    let (c, fact) = before[call];
                    let op = self.asked[*call].0;
                    let now = facts.entry(c).or_default();
                    let own = usize::from(matches!(
                        op,
                        Op::Create(..) | Op::Start(..) | Op::Delete(..)
                    ));
                    now.moving -= own;
                    if fact.changes == now.changes && fact.moving == own {
                        self.check_fact(op, fact, reply);
                    }
                    now.changes += own;
                }
                Entry::Told(event) => {
                    let (c, what) = told(event);
                    let fact = facts.entry(c).or_default();
                    fact.changes += 1;
                    match what {
                        Told::Create => (fact.there, fact.ended) = (true, false),
                        Told::Exit(None, _) => fact.ended = true,
                        Told::Delete(_) => fact.there = false,
                        _ => {}
                    }
                }
                Entry::Happened(_) => {}
            }
        }
    }

    fn check_fact(&self, op: Op, fact: Fact, reply: &Reply) {
        let expected = match (op, fact.there, fact.ended) {
            (Op::Create(..), true, _) => Code::ALREADY_EXISTS,
            (Op::Create(..) | Op::Connect(_) | Op::Shutdown(_), ..) => return,
            (_, false, _) => Code::NOT_FOUND,
            (Op::Kill((_, None), _), _, true) => Code::NOT_FOUND,
            (Op::Start((_, None), _) | Op::Pause(_) | Op::Resume(_), _, true) => {
                Code::FAILED_PRECONDITION
            }
            (Op::Wait((_, None)) | Op::State((_, None)) | Op::Pids(_), _, true) => Code::OK,
            (Op::State((_, None)) | Op::Pids(_), _, false) => Code::OK,
            _ => return,
        };
        check!(
            reply.code == expected,
            "{op:?} of {fact:?} was answered with {:?} and not with {expected:?}{}",
            reply.code,
            self.story()
        );
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Fact {
    changes: usize,
    /// Calls that change it and are not answered.
    moving: usize,
    there: bool,
    ended: bool,
}

/// What was told of a container that is there.
#[derive(Debug, Default)]
struct Seen {
    asked_to_start: bool,
    started: bool,
    exit: Option<u32>,
    execs: BTreeMap<u8, SeenExec>,
}

#[derive(Debug, Default)]
struct SeenExec {
    started: bool,
    ended: bool,
}

fn kind_of_call(op: Op) -> &'static str {
    match op {
        Op::Create(..) => "create",
        Op::Start((_, None), _) => "start",
        Op::Start(..) => "exec-started",
        Op::Exec(..) => "exec-added",
        Op::Pause(_) => "paused",
        Op::Resume(_) => "resumed",
        Op::Delete((_, None)) => "delete",
        _ => "",
    }
}

fn kind_of_event(told: Told) -> &'static str {
    match told {
        Told::Create => "create",
        Told::Start => "start",
        Told::ExecStarted(_) => "exec-started",
        Told::ExecAdded(_) => "exec-added",
        Told::Paused => "paused",
        Told::Resumed => "resumed",
        Told::Delete(_) => "delete",
        Told::Exit(..) => "",
    }
}
