//! Bulk data both ways at once, the device on a thread of its own.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::event_loop::{EventLoop, Handler};

const TOTAL: usize = 8 << 20;

struct Stop(Arc<AtomicBool>);

impl Handler for Stop {
    fn ready(&mut self, _key: u32, _events: EventSet) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A guest whose device runs on its own thread; it polls its rings.
struct Live {
    driver: Driver,
    sent: u32,
    peer_taken: u32,
    taken: u32,
    told: u32,
}

impl Live {
    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: GUEST_PORT,
            dst_port: PORT,
            kind: TYPE_STREAM,
            op,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.taken,
            ..Header::default()
        }
    }

    fn send(&mut self, mut header: Header, payload: &[u8]) {
        header.len = payload.len() as u32;
        let memory = &self.driver.memory;
        let at = GuestAddress(BUFFERS);
        memory.write_slice(&header.bytes(), at).unwrap();
        let at = GuestAddress(BUFFERS + 0x100);
        memory.write_slice(payload, at).unwrap();
        let length = payload.len() as u32;
        self.driver.queues[1].add(&[(BUFFERS, 44, 0), (BUFFERS + 0x100, length, 0)]);
        self.driver.notify(TX.into());
        self.told = self.taken;
        let start = Instant::now();
        while self.driver.queues[1].take_used().is_none() {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "the tx queue is stuck"
            );
            std::thread::yield_now();
        }
    }

    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, length) = self.driver.queues[0].take_used()?;
        let at = GuestAddress(HIGH_RAM + u64::from(head) * RX_BUFFER);
        let mut packet = vec![0; length as usize];
        self.driver.memory.read_slice(&mut packet, at).unwrap();
        self.driver.queues[0].publish(head as u16);
        self.driver.notify(RX.into());
        let header = Header::parse(packet[..HEADER_LEN].try_into().unwrap());
        self.peer_taken = header.fwd_cnt;
        self.taken = self.taken.wrapping_add(header.len);
        Some((header, packet.split_off(HEADER_LEN)))
    }

    fn room(&self) -> usize {
        (BUF_ALLOC - self.sent.wrapping_sub(self.peer_taken)) as usize
    }

    /// Sends all of `data`, then the end, and returns what came in until both ends.
    fn exchange(&mut self, data: &[u8]) -> Vec<u8> {
        let mut received = Vec::with_capacity(TOTAL);
        let mut sent = 0;
        let mut ended = false;
        let mut idle = Instant::now();
        loop {
            let mut progress = false;
            while let Some((header, payload)) = self.receive() {
                progress = true;
                match header.op {
                    op::RST => return received,
                    op::RW => received.extend(payload),
                    op::SHUTDOWN | op::CREDIT_UPDATE | op::RESPONSE => {}
                    other => panic!("op {other}"),
                }
            }
            if self.taken.wrapping_sub(self.told) > BUF_ALLOC / 2 {
                self.send(self.header(op::CREDIT_UPDATE), &[]);
            }
            let count = self.room().min(data.len() - sent).min(60_000);
            if count > 0 {
                self.send(self.header(op::RW), &data[sent..sent + count]);
                self.sent = self.sent.wrapping_add(count as u32);
                sent += count;
                progress = true;
            } else if sent == data.len() && !ended {
                let end = Header {
                    flags: NO_SEND,
                    ..self.header(op::SHUTDOWN)
                };
                self.send(end, &[]);
                ended = true;
            }
            if progress {
                idle = Instant::now();
            }
            assert!(
                idle.elapsed() < Duration::from_secs(20),
                "stuck at {sent}, {}",
                received.len()
            );
        }
    }
}

#[test]
fn eight_mebibytes_each_way_arrive_whole_and_end_in_order() {
    let mut events = EventLoop::new().unwrap();
    let vsock = Vsock::new(events.next_poller());
    let ports = vsock.ports();
    events.attach(vsock.handler());
    let stop = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let stopped = Arc::new(AtomicBool::new(false));
    events.next_poller().add(&stop, 0, EventSet::IN).unwrap();
    events.attach(Arc::new(Mutex::new(Stop(stopped.clone()))));
    let mut driver = Driver::new(vsock, memory());
    driver.start();
    for nth in 0..128 {
        driver.queues[0].add(&[(HIGH_RAM + nth * RX_BUFFER, RX_BUFFER as u32, WRITE)]);
    }
    let device = std::thread::spawn(move || events.run(|| stopped.load(Ordering::SeqCst)));

    let (mut host, theirs) = UnixStream::pair().unwrap();
    ports.offer(PORT, OwnedFd::from(theirs)).unwrap();
    let mut reader = host.try_clone().unwrap();
    let input = pattern(TOTAL);
    let output: Vec<u8> = pattern(TOTAL).into_iter().rev().collect();
    let written = output.clone();
    let writer = std::thread::spawn(move || {
        host.write_all(&written).unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let mut guest = Live {
        driver,
        sent: 0,
        peer_taken: 0,
        taken: 0,
        told: 0,
    };
    guest.send(guest.header(op::REQUEST), &[]);
    let start = Instant::now();
    let received = guest.exchange(&input);
    let took = start.elapsed();
    println!("{} MiB each way in {took:?}", TOTAL >> 20);
    assert!(received == output, "the guest got other bytes");
    assert!(reader.join().unwrap() == input, "the host got other bytes");
    writer.join().unwrap();
    stop.write(1).unwrap();
    device.join().unwrap().unwrap();
    assert!(!guest.driver.needs_reset());
}
