//! Sequences that the random ones have found, by what was wrong with them.

use super::{Kind, Op, Step, as_they_come, in_order, tried};
use crate::pod::testing::Hang;

fn must(test: impl FnOnce()) {
    tried(test).unwrap_or_else(|words| panic!("{words}"));
}

/// Somebody waits for an exec process that is deleted, or goes with its container, before it was
/// started: he waited for ever.
#[test]
fn who_waits_for_what_never_runs_is_told_that_it_is_gone() {
    let who = (0, Some(0));
    let waits = [Op::Create(0, None), Op::Exec(0, 0), Op::Wait(who)];
    must(|| in_order(Kind::Alone, &waits));
    let deleted = [&waits[..], &[Op::Delete(who)]].concat();
    must(|| in_order(Kind::Alone, &deleted));
}

fn steps(steps: &[(Op, bool)]) -> Vec<Step> {
    let steps = steps.iter();
    steps.map(|&(op, at_once)| Step { op, at_once }).collect()
}

/// An exec process is started when its init has ended and what that has written is still being
/// read, and the guest answers no more: its end was told after the init's.
#[test]
fn an_exec_process_that_comes_at_its_inits_end_ends_before_it() {
    let steps = steps(&[
        (Op::Create(1, None), false),
        (Op::Exec(1, 0), false),
        (Op::Start((1, None), None), false),
        (Op::Kill((1, None), libc::SIGKILL), false),
        (Op::Hang(Some(Hang::Deaf)), false),
        (Op::Start((1, Some(0)), None), false),
    ]);
    must(|| as_they_come(Kind::Alone, &steps));
}

/// The pod ends while a container is being made: it was there when all had been told to have ended,
/// and neither ended nor could be deleted.
#[test]
fn a_container_that_comes_at_the_pods_end_is_refused() {
    let steps = steps(&[
        (Op::Create(0, None), false),
        (Op::Delete((0, None)), true),
        (Op::Create(1, None), false),
    ]);
    for _ in 0..50 {
        must(|| as_they_come(Kind::Alone, &steps));
    }
}

/// An exec process is deleted twice at once: the second Delete waited for a lock that it held, and
/// with it the shim.
#[test]
fn an_exec_process_can_be_deleted_twice_at_once() {
    let who = (0, Some(0));
    let steps = steps(&[
        (Op::Create(0, None), false),
        (Op::Exec(0, 0), false),
        (Op::Start((0, None), None), false),
        (Op::Start(who, None), false),
        (Op::Kill(who, libc::SIGKILL), false),
        (Op::Delete(who), true),
        (Op::Delete(who), true),
        (Op::Exec(0, 0), false),
    ]);
    must(|| as_they_come(Kind::Alone, &steps));
}
