//! An agent that lies, floods, stalls and disconnects, over a real socket.

use std::{
    io::{Read, Write},
    sync::mpsc,
};

use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_RESPONSE, MessageHeader};

use super::*;
use crate::sys::memory_tests::{Noise, withstand};

/// The guest's end: it does as the test wants, in a thread of its own, and nobody waits for it.
fn guest(attack: impl FnOnce(UnixStream) + Send + 'static) -> Agent {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs
        .set_write_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    std::thread::spawn(move || attack(theirs));
    Agent::new(ours, &Audit::default()).unwrap()
}

/// Reads a request: its stream.
fn request(stream: &mut UnixStream) -> u32 {
    let mut header = [0; MESSAGE_HEADER_LENGTH];
    stream.read_exact(&mut header).unwrap();
    let header = MessageHeader::from(header);
    let mut payload = vec![0; header.length as usize];
    stream.read_exact(&mut payload).unwrap();
    header.stream_id
}

fn frame(kind: u8, stream_id: u32, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut header = MessageHeader::new_response(stream_id, length);
    header.type_ = kind;
    let mut bytes: Vec<u8> = header.into();
    bytes.extend(payload);
    bytes
}

/// An answer to StartProcess that is as it should be.
fn good(stream_id: u32) -> Vec<u8> {
    let answer = StartProcessResponse::default().write_to_bytes().unwrap();
    let mut response = ttrpc::Response::new();
    response.set_status(ttrpc::get_status(ttrpc::Code::OK, "fine"));
    response.payload = answer;
    let payload = response.write_to_bytes().unwrap();
    frame(
        MESSAGE_TYPE_RESPONSE,
        stream_id,
        payload.len() as u32,
        &payload,
    )
}

#[test]
fn one_that_disconnects_at_any_byte_is_lost_at_once() {
    let whole = good(1).len();
    for cut in 0..=whole {
        withstand(async || {
            let agent = guest(move |mut stream| {
                let answer = good(request(&mut stream));
                let _ = stream.write_all(&answer[..cut]);
            });
            let started = agent.start("c").await;
            assert_eq!(
                started.is_ok(),
                cut == whole,
                "{cut} of {whole}: {started:?}"
            );
            agent.lost().await;
        });
    }
}

#[test]
fn one_that_stalls_at_any_byte_is_waited_for_no_longer_than_a_call_may_take() {
    let whole = good(1).len();
    for cut in 0..whole {
        withstand(async || {
            let (stays, goes) = mpsc::channel::<()>();
            let agent = guest(move |mut stream| {
                let answer = good(request(&mut stream));
                let _ = stream.write_all(&answer[..cut]);
                // Its end stays open until the test is done.
                let _ = goes.recv();
            });
            let limit = Some(Duration::from_millis(20));
            let nothing = Empty::default();
            let asked = agent.call::<Empty>("Pause", &nothing, limit).await;
            assert!(matches!(asked, Err(Error::Lost { .. })));
            drop(stays);
        });
    }
}

#[test]
fn one_that_says_anything_makes_the_shim_do_nothing_but_end() {
    for seed in 1..=1500 {
        withstand(async || {
            let agent = guest(move |mut stream| {
                let mut noise = Noise(seed * 0x9e37_79b9);
                let stream_id = request(&mut stream);
                let said = match noise.below(4) {
                    0 => {
                        let count = noise.below(10_000);
                        noise.bytes(count)
                    }
                    1 => {
                        let count = noise.below(3000);
                        let payload = noise.bytes(count);
                        frame(MESSAGE_TYPE_RESPONSE, stream_id, count as u32, &payload)
                    }
                    2 => {
                        let length = noise.next() as u32;
                        let payload = noise.bytes(300);
                        frame(noise.next() as u8, noise.next() as u32, length, &payload)
                    }
                    _ => noise.spoil(&good(stream_id)),
                };
                for part in said.chunks(1 + noise.below(400)) {
                    if stream.write_all(part).is_err() {
                        return;
                    }
                }
            });
            // Whatever comes of it.
            let _ = agent.start("c").await;
            agent.lost().await;
        });
    }
}

#[test]
fn one_that_floods_is_cut_off() {
    for asked in [true, false] {
        let (tell, told) = mpsc::channel();
        withstand(async || {
            let agent = guest(move |mut stream| {
                let stream_id = if asked { request(&mut stream) } else { 1 };
                let answer = good(stream_id);
                let mut sent = 0u64;
                // Far more than anybody would read of it.
                while sent < 1 << 30 && stream.write_all(&answer).is_ok() {
                    sent += answer.len() as u64;
                }
                tell.send(sent).unwrap();
            });
            if asked {
                agent.start("c").await.unwrap();
            }
            let lost = agent.lost().await.to_string();
            assert!(lost.contains("an answer to nothing"), "{lost}");
            // Who asks now is told, and waits for nothing.
            agent.pause("c").await.unwrap_err();
        });
        let sent = told.recv().unwrap();
        assert!(sent < 4 << 20, "{sent} bytes");
    }
}

#[test]
fn giant_frames_are_not_collected() {
    for length in [256 << 10, (256 << 10) + 1, 4 << 20, u32::MAX - 10, u32::MAX] {
        withstand(async || {
            let agent = guest(move |mut stream| {
                let stream_id = request(&mut stream);
                let head = frame(MESSAGE_TYPE_RESPONSE, stream_id, length, &[]);
                let _ = stream.write_all(&head);
                let part = [0u8; 64 << 10];
                let mut left = (length as usize).min(64 << 20);
                while left > 0 && stream.write_all(&part[..left.min(part.len())]).is_ok() {
                    left -= left.min(part.len());
                }
            });
            agent.start("c").await.unwrap_err();
            agent.lost().await;
        });
    }
}

#[test]
fn the_longest_answers_that_pass_are_bounded() {
    let file = |number: usize| CgroupFile {
        name: format!("{number}"),
        value: "x".repeat(4000),
        ..CgroupFile::default()
    };
    for files in [1, 60, 250, 100_000] {
        withstand(async || {
            let agent = guest(move |mut stream| {
                let stream_id = request(&mut stream);
                let files = (0..files).map(|number| match files {
                    100_000 => CgroupFile::default(),
                    _ => file(number),
                });
                let answer = ContainerStatsResponse {
                    files: files.collect(),
                    ..ContainerStatsResponse::default()
                };
                let mut response = ttrpc::Response::new();
                response.payload = answer.write_to_bytes().unwrap();
                let payload = response.write_to_bytes().unwrap();
                let length = payload.len() as u32;
                let answer = frame(MESSAGE_TYPE_RESPONSE, stream_id, length, &payload);
                let _ = stream.write_all(&answer);
            });
            let _ = agent.stats("c").await;
            agent.lost().await;
        });
    }
}
