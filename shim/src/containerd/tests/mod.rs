//! The tasks of a shim as containerd sees them, over a guest in memory (`pod/testing`) and in
//! virtual time: random sequences of calls and of what happens in a guest and to it.
//!
//! - `one_call_after_another` compares every answer and every event with what a [`model`] says.
//! - `calls_at_once` has calls that overlap, guests that hang and ends at the worst moment; what
//!   must hold whatever comes first is
//!   checked on the [`trace`].
//!
//! docs/testing.md says how a failure is read and tried again.

mod hostile;
mod model;
mod named;
mod resized;
mod trace;
mod world;

use proptest::{
    prelude::*,
    test_runner::{Config, RngAlgorithm, RngSeed, TestError, TestRunner},
};

use crate::pod::testing::{Fault, Hang};

use self::{model::Model, world::World};

/// Who makes the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The first container has it.
    Alone,
    /// Container 0 is a pause container.
    Pause,
}

/// A container, and one of its exec processes or its init.
type Who = (u8, Option<u8>);

/// Something of the machine that goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// Its process is killed.
    Vmm,
    /// The guest powers off by itself.
    Guest,
    /// The fs process dies.
    Fs,
    /// The agent's connection breaks.
    Agent,
    /// The process that stands for the pod is killed.
    Stub,
}

/// A call of containerd's, or something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Create(u8, Option<Fault>),
    Start(Who, Option<Fault>),
    Exec(u8, u8),
    Kill(Who, i32),
    Wait(Who),
    State(Who),
    Pids(u8),
    Connect(u8),
    Pause(u8),
    Resume(u8),
    Delete(Who),
    Shutdown(u8),
    /// A process exits by itself.
    Exit(Who, u8),
    Lose(Loss),
    /// The guest stops to answer, or answers again.
    Hang(Option<Hang>),
    /// Exec processes outlive their init.
    Linger(bool),
    /// Seconds.
    Pass(u8),
}

/// An act, and whether the next one comes before anything has moved.
#[derive(Clone, Copy)]
struct Step {
    op: Op,
    at_once: bool,
}

impl std::fmt::Debug for Step {
    /// As it is written in a test.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (self.op, self.at_once).fmt(f)
    }
}

const CONTAINERS: u8 = 3;

fn who() -> impl Strategy<Value = Who> {
    let exec = prop_oneof![3 => Just(None), 2 => (0u8..2).prop_map(Some)];
    (0..CONTAINERS, exec)
}

fn fault() -> impl Strategy<Value = Option<Fault>> {
    prop_oneof![8 => Just(None), 1 => Just(Some(Fault::Refused)), 1 => Just(Some(Fault::NoProgram))]
}

fn loss() -> impl Strategy<Value = Loss> {
    const ALL: &[Loss] = &[Loss::Vmm, Loss::Guest, Loss::Fs, Loss::Agent, Loss::Stub];
    proptest::sample::select(ALL)
}

/// What is asked and happens where one call comes after another.
fn op() -> impl Strategy<Value = Op> {
    let c = || 0..CONTAINERS;
    let signal = proptest::sample::select(&[libc::SIGKILL, libc::SIGTERM, libc::SIGWINCH][..]);
    let status = proptest::sample::select(&[0u8, 1, 42][..]);
    prop_oneof![
        8 => (c(), fault()).prop_map(|(c, fault)| Op::Create(c, fault)),
        12 => (who(), fault()).prop_map(|(who, fault)| Op::Start(who, fault)),
        8 => (c(), 0u8..2).prop_map(|(c, e)| Op::Exec(c, e)),
        6 => (who(), signal).prop_map(|(who, signal)| Op::Kill(who, signal)),
        5 => who().prop_map(Op::Wait),
        3 => who().prop_map(Op::State),
        1 => c().prop_map(Op::Pids),
        1 => c().prop_map(Op::Connect),
        2 => c().prop_map(Op::Pause),
        2 => c().prop_map(Op::Resume),
        6 => who().prop_map(Op::Delete),
        1 => c().prop_map(Op::Shutdown),
        5 => (who(), status).prop_map(|(who, status)| Op::Exit(who, status)),
        1 => loss().prop_map(Op::Lose),
    ]
}

/// The same where they overlap.
fn step() -> impl Strategy<Value = Step> {
    let hang = proptest::sample::select(&[None, Some(Hang::Deaf), Some(Hang::Mute)][..]);
    let op = prop_oneof![
        20 => op(),
        2 => hang.prop_map(Op::Hang),
        1 => any::<bool>().prop_map(Op::Linger),
        1 => proptest::sample::select(&[1u8, 6, 15, 40][..]).prop_map(Op::Pass),
    ];
    (op, any::<bool>()).prop_map(|(op, at_once)| Step { op, at_once })
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Alone), Just(Kind::Pause)]
}

/// Runs a test: its words when it failed.
fn tried(test: impl FnOnce()) -> Result<(), String> {
    let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(test));
    tried.map_err(|panic| match panic.downcast::<String>() {
        Ok(words) => *words,
        Err(panic) => match panic.downcast::<&str>() {
            Ok(words) => (*words).into(),
            Err(_) => "it panicked".into(),
        },
    })
}

/// Runs a test of this module in a process of its own. Its time is not real, but the ends of
/// streams are: a child that another test of this process forks has them until it executes
/// something, and meanwhile all patience would be over.
fn alone(name: &str, test: impl FnOnce()) {
    const ALONE: &str = "BULKHEAD_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return test();
    }
    let program = std::env::current_exe().unwrap();
    let output = std::process::Command::new(program)
        .args([
            &format!("containerd::tests::{name}"),
            "--exact",
            "--nocapture",
        ])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let [words, errors] =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{words}{errors}");
    assert!(words.contains("1 passed"), "{words}");
}

/// Runs a test over many sequences; which ones, BULKHEAD_SEED says, and how many,
/// BULKHEAD_SEQUENCES.
fn over_many<S: Strategy>(sequences: u32, strategy: S, test: impl Fn(&S::Value)) {
    let number = |name| {
        let text = std::env::var(name).ok()?;
        Some(text.parse::<u64>().expect("it is a number"))
    };
    let clock = || {
        std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap()
            .as_nanos() as u64
    };
    let seed = number("BULKHEAD_SEED").unwrap_or_else(clock);
    let mut runner = TestRunner::new(Config {
        cases: number("BULKHEAD_SEQUENCES").map_or(sequences, |number| number as u32),
        failure_persistence: None,
        max_shrink_iters: 4000,
        max_shrink_time: 20_000,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(seed),
        ..Config::default()
    });
    let failed = std::cell::Cell::new(false);
    let since = std::time::Instant::now();
    let outcome = runner.run(&strategy, |value| {
        // What comes first of two things is the product's choice: while a failure is made smaller,
        // each try counts several times.
        let tries = if failed.get() { 20 } else { 1 };
        (0..tries).try_for_each(|_| {
            tried(|| test(&value)).map_err(|words| {
                failed.set(true);
                TestCaseError::fail(words)
            })
        })
    });
    eprintln!("BULKHEAD_SEED={seed}: {:?}", since.elapsed());
    match outcome {
        Ok(()) => {}
        Err(TestError::Fail(reason, value)) => {
            panic!("BULKHEAD_SEED={seed}: {reason}\nthe smallest sequence: {value:?}")
        }
        Err(TestError::Abort(reason)) => panic!("BULKHEAD_SEED={seed}: {reason}"),
    }
}

/// Runs the calls one after another beside the model.
fn in_order(kind: Kind, ops: &[Op]) {
    World::run(kind, async |world| {
        let mut model = Model::new(kind);
        for op in ops {
            world.step_beside(&mut model, *op).await;
        }
        for op in Model::farewell() {
            world.step_beside(&mut model, op).await;
        }
        world.check_end(&mut model).await;
    });
}

/// Runs the calls as they come, and checks what holds whatever comes first.
fn as_they_come(kind: Kind, steps: &[Step]) {
    World::run(kind, async |world| {
        for step in steps {
            world.begin(step.op).await;
            if !step.at_once {
                world.settle().await;
            }
        }
        world.end_all().await;
        world.check_trace();
    });
}

/// What most sequences need before anything can go wrong.
const OPENING: &[Op] = &[
    Op::Create(0, None),
    Op::Create(1, None),
    Op::Start((0, None), None),
    Op::Start((1, None), None),
    Op::Exec(1, 0),
    Op::Exec(1, 1),
    Op::Wait((1, Some(0))),
    Op::Wait((1, None)),
    Op::Start((1, Some(0)), None),
    Op::Start((1, Some(1)), None),
];

fn opening() -> impl Strategy<Value = Vec<Op>> {
    proptest::sample::subsequence(OPENING, 0..=OPENING.len())
}

fn sequences() -> impl Strategy<Value = (Kind, Vec<Op>)> {
    let rest = proptest::collection::vec(op(), 1..30);
    (kind(), opening(), rest).prop_map(|(kind, first, rest)| (kind, [first, rest].concat()))
}

fn storms() -> impl Strategy<Value = (Kind, Vec<Step>)> {
    let rest = proptest::collection::vec(step(), 1..30);
    (kind(), opening(), rest).prop_map(|(kind, first, rest)| {
        let at_once = false;
        let first = first.into_iter().map(|op| Step { op, at_once });
        (kind, first.chain(rest).collect())
    })
}

#[test]
fn one_call_after_another() {
    alone("one_call_after_another", || {
        over_many(1000, sequences(), |(kind, ops)| in_order(*kind, ops));
    });
}

#[test]
fn calls_at_once() {
    alone("calls_at_once", || {
        over_many(1000, storms(), |(kind, steps)| as_they_come(*kind, steps));
    });
}
