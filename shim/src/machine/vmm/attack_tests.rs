//! A VMM that lies, floods, stalls and disconnects, over a real control socket, with a process that
//! only ends when it is killed.

use std::{os::fd::AsFd, time::Instant};

use bulkhead_vmm_config::{GuestEnd, MAX_PACKET, Phase};
use linux::packet;

use super::*;
use crate::sys::memory_tests::{Noise, withstand};

/// The shim's machine, and the VMM's end, which the test says things through.
fn machine() -> (Vm, OwnedFd) {
    let (peer, theirs) = peer::tests::idle();
    (Vm::of(Arc::new(peer)), theirs.into_socket())
}

fn say(socket: &OwnedFd, bytes: &[u8]) {
    packet::send(socket.as_fd(), bytes, &[]).unwrap();
}

/// It is ended, by force where it must be, and who asks now is told so.
async fn is_ended(vm: &Vm) -> End {
    let end = vm.ended().await;
    let since = Instant::now();
    vm.stats().await.unwrap_err();
    vm.withdraw_port(1).await.unwrap_err();
    assert!(since.elapsed() < Duration::from_secs(5));
    end
}

fn ended(lines: usize) -> Event {
    Event::Ended {
        end: GuestEnd::Panic,
        console: vec!["\u{1b}x".into(); lines],
        stats: VmStats::default(),
    }
}

#[test]
fn one_that_breaks_off_at_any_byte_of_a_packet_is_ended() {
    let whole = serde_json::to_vec(&ended(1)).unwrap();
    for cut in 1..whole.len() {
        withstand(async || {
            let (vm, theirs) = machine();
            say(&theirs, &whole[..cut]);
            let end = is_ended(&vm).await;
            assert!(matches!(end, End::Failed { .. }), "{cut}: {end:?}");
        });
    }
}

#[test]
fn one_that_says_anything_is_ended() {
    let good = [
        serde_json::to_vec(&Event::Running { landlock: Some(7) }).unwrap(),
        serde_json::to_vec(&Event::Stats(VmStats::default())).unwrap(),
        serde_json::to_vec(&ended(3)).unwrap(),
        br#"{"needs_reset":{"device":"net","reason":"ring"}}"#.to_vec(),
        br#"{"blocked":{"role":"vcpu","call":59}}"#.to_vec(),
    ];
    for seed in 1..=300 {
        withstand(async || {
            let mut noise = Noise(seed * 0x9e37_79b9);
            let (vm, theirs) = machine();
            for _ in 0..noise.below(4) {
                let said = match noise.below(3) {
                    0 => {
                        let count = 1 + noise.below(2000);
                        noise.bytes(count)
                    }
                    _ => {
                        let which = noise.below(good.len());
                        noise.spoil(&good[which])
                    }
                };
                // It may have been ended for the one before.
                let _ = packet::send(theirs.as_fd(), &said, &[]);
            }
            drop(theirs);
            is_ended(&vm).await;
        });
    }
}

#[test]
fn one_that_floods_is_ended_at_the_first_word_too_many() {
    let stamp = |phase| {
        Event::Reached(Stamp {
            phase,
            at_ns: 1,
            exits: 1,
            irq_exits: 1,
        })
    };
    for event in [
        Event::Done,
        Event::Refused {
            reason: "x".repeat(30_000),
        },
        Event::Running { landlock: None },
        stamp(Phase::Init),
        Event::NeedsReset {
            device: "x".repeat(1000),
            reason: "\u{1b}".repeat(5000),
        },
        ended(10),
    ] {
        withstand(async || {
            let (vm, theirs) = machine();
            let bytes = serde_json::to_vec(&event).unwrap();
            let blocking = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty());
            nix::fcntl::fcntl(&theirs, blocking).unwrap();
            let flood = std::thread::spawn(move || {
                let mut sent = 0u64;
                // Until nobody hears it any more.
                while sent < 1 << 30 && packet::send(theirs.as_fd(), &bytes, &[]).is_ok() {
                    sent += bytes.len() as u64;
                }
                (sent, theirs)
            });
            let end = vm.ended().await;
            assert!(!matches!(end, End::Died { .. }), "{event:?}: {end:?}");
            // Dropping it closes the socket, as the pod's end does.
            drop(vm);
            let (sent, _) = tokio::task::spawn_blocking(|| flood.join().unwrap())
                .await
                .unwrap();
            assert!(sent < 16 << 20, "{event:?}: {sent} bytes");
        });
    }
}

#[test]
fn giant_packets_are_bounded() {
    let many: serde_json::Map<String, serde_json::Value> = (0..6000)
        .map(|number| (number.to_string(), 1.into()))
        .collect();
    let stats = serde_json::json!({"stats": {"kvm": {}, "user_exits": {}, "guest_faults": many}});
    let deep = [vec![b'['; MAX_PACKET / 2], vec![b']'; MAX_PACKET / 2]].concat();
    let too_long = vec![b'1'; MAX_PACKET + 1];
    let lines = serde_json::to_vec(&ended(4000)).unwrap();
    let words = serde_json::to_vec(&Event::Failed {
        reason: "\u{202e}".repeat(20_000),
    });
    for said in [
        stats.to_string().into_bytes(),
        deep,
        too_long,
        lines,
        words.unwrap(),
    ] {
        withstand(async || {
            let (vm, theirs) = machine();
            let asked = vm.stats();
            let answer = async {
                say(&theirs, &said);
                drop(theirs);
            };
            let (asked, ()) = tokio::join!(asked, answer);
            if let Ok(stats) = asked {
                assert_eq!(stats.guest_faults.len(), 6000);
            }
            let end = is_ended(&vm).await;
            let told: usize = end.last_lines().iter().map(String::len).sum();
            assert!(told + end.to_string().len() < 64 << 10, "{told}");
        });
    }
}

#[test]
fn one_that_says_nothing_is_waited_for_no_longer_than_a_request_may_take() {
    withstand(async || {
        let (mut vm, theirs) = machine();
        vm.patience = Duration::from_millis(50);
        let (ours, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let offer = vm.offer_port(1026, ours.into());
        assert!(matches!(offer.await, Err(Error::Silent { .. })));
        // Until its socket takes no more: then the sending has an end, too.
        vm.patience = Duration::from_millis(1);
        for _ in 0..500 {
            vm.stats().await.unwrap_err();
        }
        vm.kill();
        is_ended(&vm).await;
        drop(theirs);
    });
}
