//! The host's ends of the connections, a thread each.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::pattern;
use super::plan;
use super::support::{self, Setup};

/// Offers all ports and starts their other sides.
pub fn start(setup: &mut Setup) -> Vec<JoinHandle<()>> {
    let mut threads = Vec::new();
    let mut side = |port: u32, run: fn(u32, UnixStream)| {
        let socket = setup.offer(port);
        // A guest that goes silent is told as that, not waited for.
        socket.set_read_timeout(Some(support::LONG)).unwrap();
        socket.set_write_timeout(Some(support::LONG)).unwrap();
        threads.push(std::thread::spawn(move || run(port, socket)));
    };
    side(plan::ECHO, |port, socket| echo(port, socket, plan::BULK));
    side(plan::AGAIN, |port, socket| echo(port, socket, plan::SMALL));
    for nth in 0..plan::MANY {
        side(plan::FIRST_OF_MANY + nth, |port, socket| {
            echo(port, socket, plan::SMALL);
        });
    }
    side(plan::SINK, sink);
    side(plan::SOURCE, |port, mut socket| {
        socket.write_all(&pattern(port, plan::BULK)).unwrap();
    });
    side(plan::SLOW, |port, socket| {
        // Longer than a guest that closes waits for its reset (8 s in Linux): the device must answer before the host reads.
        std::thread::sleep(Duration::from_secs(10));
        check(port, socket, plan::SMALL);
    });
    side(plan::DEAF, |_, mut socket| {
        let mut first = [0];
        socket.read_exact(&mut first).unwrap();
    });
    side(plan::PING, |_, mut socket| {
        let mut message = [0; 64];
        while socket.read_exact(&mut message).is_ok() {
            socket.write_all(&message).unwrap();
        }
    });
    drop(setup.offer(plan::GONE));
    threads
}

/// Sends a pattern and ends, while it receives the same.
fn echo(port: u32, socket: UnixStream, count: usize) {
    let mut sender = socket.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        sender.write_all(&pattern(port, count)).unwrap();
        sender.shutdown(Shutdown::Write).unwrap();
    });
    check(port, socket, count);
    writer.join().unwrap();
}

fn sink(port: u32, mut socket: UnixStream) {
    let mut first = [0];
    socket.read_exact(&mut first).unwrap();
    let start = Instant::now();
    let mut rest = Vec::with_capacity(plan::BULK);
    socket.read_to_end(&mut rest).unwrap();
    let rate = plan::BULK as f64 / start.elapsed().as_secs_f64() / 1e6;
    println!("port {port}: {rate:.0} MB/s from the guest");
    rest.insert(0, first[0]);
    assert!(
        rest == pattern(port, plan::BULK),
        "port {port}: other bytes"
    );
}

fn check(port: u32, mut socket: UnixStream, count: usize) {
    let mut bytes = Vec::with_capacity(count);
    socket.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), count, "port {port}");
    assert!(bytes == pattern(port, count), "port {port}: other bytes");
}
