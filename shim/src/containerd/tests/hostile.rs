//! A guest that has fallen in the middle of a pod's life: whatever its agent's connection says from
//! then on, Kill, Delete and Shutdown are answered, in bounded time and memory.

use std::time::Duration;

use ttrpc::proto::{MESSAGE_TYPE_RESPONSE, MessageHeader};

use super::{Kind, Op, World};
use crate::{
    pod::testing::last_guest,
    sys::memory_tests::{Noise, bounded},
};

/// Most that all three may take, each with the waits of 10 s that a guest can cause.
const BOUND: Duration = Duration::from_secs(120);

fn frame(length: u32, payload: &[u8]) -> Vec<u8> {
    let mut header = MessageHeader::new_response(1, length);
    header.type_ = MESSAGE_TYPE_RESPONSE;
    let mut bytes: Vec<u8> = header.into();
    bytes.extend(payload);
    bytes
}

/// What it says, and whether it keeps the connection open then.
fn attacks() -> Vec<(&'static str, Vec<u8>, bool)> {
    let mut attacks = vec![
        ("nothing", Vec::new(), true),
        ("its end", Vec::new(), false),
        ("half a header", frame(9, &[])[..5].to_vec(), true),
        ("half an answer", frame(900, &[0x0a; 100]), true),
        (
            "half an answer and its end",
            frame(900, &[0x0a; 100]),
            false,
        ),
        ("a giant's beginning", frame(u32::MAX, &[0; 4096]), true),
        ("answers to nothing", frame(0, &[]).repeat(100_000), true),
        ("unknown fields", frame(2, &[0x38, 1]).repeat(1000), true),
    ];
    for seed in 1..=20 {
        let noise = Noise(seed * 0x9e37_79b9).bytes(5000);
        attacks.push(("noise", noise, seed % 2 == 0));
    }
    attacks
}

#[test]
fn a_fallen_guest_holds_up_neither_kill_nor_delete_nor_shutdown() {
    for kind in [Kind::Alone, Kind::Pause] {
        for (name, words, stays) in attacks() {
            bounded(|| {
                World::run(kind, async |world| {
                    let all: &[u8] = match kind {
                        Kind::Alone => &[0],
                        Kind::Pause => &[1, 0],
                    };
                    for c in all.iter().rev() {
                        world.call(Op::Create(*c, None)).await;
                        world.call(Op::Start((*c, None), None)).await;
                    }
                    last_guest().unwrap().fall(words, stays);
                    let since = tokio::time::Instant::now();
                    for c in all {
                        world.call(Op::Kill((*c, None), libc::SIGKILL)).await;
                        world.call(Op::Wait((*c, None))).await;
                        world.call(Op::Delete((*c, None))).await;
                    }
                    world.call(Op::Shutdown(0)).await;
                    let released = tokio::time::timeout(BOUND, world.tasks.released()).await;
                    assert!(released.is_ok(), "{kind:?}, {name}: the shim stays");
                    let took = since.elapsed();
                    assert!(took < BOUND, "{kind:?}, {name}: {took:?}");
                });
            });
        }
    }
}
