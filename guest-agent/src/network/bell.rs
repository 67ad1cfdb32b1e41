//! The kernel's word that a socket begins or ends to listen: a program that it runs for every TCP socket of the guest.
//!
//! ```text
//!  listen(2)   TCP_LISTEN_CB: from now on tell of changes of this socket's state; ring "listens"
//!  close(2)    STATE_CB, from TCP_LISTEN: ring "ends"
//! ```
//!
//! Both come just before the kernel does it, while it holds the socket's lock (inet_listen, tcp_set_state), so that who reads
//! at once may read too early: each ring names the socket and what is to come. A listen(2) that fails rings as well.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use crate::bpf::{self, Purpose, Ring, Wide, code, instruction, wide};
use crate::stream::Stream;

/// Bytes of the ring: 682 records.
const SIZE: usize = 16 << 10;

/// A socket is about to listen, or to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Event {
    /// The kernel's name of the socket.
    pub(super) cookie: u64,
    pub(super) listens: bool,
}

/// The program, attached for as long as this is.
#[derive(Debug)]
pub(super) struct Bell {
    ring: Ring<2>,
    /// The ring's descriptor once more, to wait for.
    rung: Stream,
    _link: OwnedFd,
}

impl Bell {
    /// Attaches the program to a cgroup; it rings for the sockets of the calling thread's network namespace.
    pub(super) fn attach(cgroup: &Path) -> io::Result<Self> {
        let cgroup = std::fs::File::open(cgroup)?;
        let ring = Ring::new(SIZE)?;
        let program = program(
            linux::netlink::namespace_cookie()?,
            ring.as_fd().as_raw_fd() as u32,
        );
        let program = bpf::load(Purpose::Sockets, &program)?;
        let link = bpf::link(cgroup.as_fd(), Purpose::Sockets, program.as_fd())?;
        let rung = Stream::new(ring.as_fd().try_clone_to_owned()?)?;
        Ok(Self {
            ring,
            rung,
            _link: link,
        })
    }

    /// Waits for events. `false` with them: some may be missing.
    pub(super) async fn wait(&mut self) -> io::Result<(Vec<Event>, bool)> {
        loop {
            // Before the records are taken, so that a ring in between is not forgotten.
            self.rung.readiness().readable().await?.clear_ready();
            let (records, all) = self.ring.take();
            if records.is_empty() {
                continue;
            }
            let event = |[cookie, listens]: [u64; 2]| Event {
                cookie,
                listens: listens != 0,
            };
            return Ok((records.into_iter().map(event).collect(), all));
        }
    }
}

/// Registers: result, arguments, two that calls keep, the stack.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R4: u8 = 4;
const CONTEXT: u8 = 6;
const LISTENS: u8 = 7;
const STACK: u8 = 10;

/// Offsets in struct bpf_sock_ops.
const OPERATION: i16 = 0;
const OLD_STATE: i16 = 4;
const CALLBACKS: i16 = 84;

const BPF_SOCK_OPS_STATE_CB: u32 = 10;
const BPF_SOCK_OPS_TCP_LISTEN_CB: u32 = 11;
const BPF_SOCK_OPS_STATE_CB_FLAG: u32 = 1 << 2;
const BPF_TCP_LISTEN: u32 = 10;
const BPF_RB_FORCE_WAKEUP: u32 = 1 << 1;

/// Numbers of helpers.
const GET_SOCKET_COOKIE: u32 = 46;
const SOCK_OPS_CB_FLAGS_SET: u32 = 59;
const GET_NETNS_COOKIE: u32 = 122;
const RINGBUF_OUTPUT: u32 = 130;

fn copy(destination: u8, source: u8) -> u64 {
    instruction(code::MOVE, destination, source, 0, 0)
}

fn set(destination: u8, number: u32) -> u64 {
    instruction(code::MOVE_IMMEDIATE, destination, 0, 0, number)
}

fn load(destination: u8, offset: i16) -> u64 {
    instruction(code::LOAD_WORD, destination, CONTEXT, offset, 0)
}

fn store(offset: i16, source: u8) -> u64 {
    instruction(code::STORE_DOUBLE, STACK, source, offset, 0)
}

fn call(helper: u32) -> u64 {
    instruction(code::CALL, 0, 0, 0, helper)
}

/// Rings for the sockets of one network namespace. Other operations are answered as without a program (a reply of 0).
fn program(namespace: u64, ring: u32) -> Vec<u64> {
    let end = [set(R0, 1), instruction(code::EXIT, 0, 0, 0, 0)];
    let mut ring_it = vec![copy(R1, CONTEXT), call(GET_SOCKET_COOKIE)];
    ring_it.extend([store(-16, R0), store(-8, LISTENS)]);
    ring_it.extend(wide(R1, Wide::Map(ring)));
    ring_it.push(copy(R2, STACK));
    ring_it.push(instruction(code::ADD_IMMEDIATE, R2, 0, 0, -16i32 as u32));
    ring_it.extend([set(R3, 16), set(R4, BPF_RB_FORCE_WAKEUP)]);
    ring_it.push(call(RINGBUF_OUTPUT));

    let mut ours = vec![copy(R1, CONTEXT), call(GET_NETNS_COOKIE)];
    ours.extend(wide(R2, Wide::Number(namespace)));
    let skipped = ring_it.len() as i16;
    ours.push(instruction(code::JUMP_IF_DIFFERENT, R0, R2, skipped, 0));
    ours.extend(ring_it);

    // What another program has asked to be told of stays asked for.
    let mut listens = vec![set(LISTENS, 1), load(R2, CALLBACKS)];
    listens.push(instruction(
        code::OR_IMMEDIATE,
        R2,
        0,
        0,
        BPF_SOCK_OPS_STATE_CB_FLAG,
    ));
    listens.extend([copy(R1, CONTEXT), call(SOCK_OPS_CB_FLAGS_SET)]);

    // Neither operation: over everything else.
    let to_end = (listens.len() + ours.len()) as i16;
    let mut ends = vec![load(R2, OLD_STATE)];
    let to_ours = instruction(code::JUMP, 0, 0, listens.len() as i16, 0);
    let from_other_state = instruction(code::JUMP_IF_NOT_EQUAL, R2, 0, 2 + to_end, BPF_TCP_LISTEN);
    ends.extend([from_other_state, set(LISTENS, 0), to_ours]);

    let mut program = vec![copy(CONTEXT, R1), load(R2, OPERATION)];
    program.push(instruction(
        code::JUMP_IF_EQUAL,
        R2,
        0,
        1 + ends.len() as i16,
        BPF_SOCK_OPS_TCP_LISTEN_CB,
    ));
    program.push(instruction(
        code::JUMP_IF_NOT_EQUAL,
        R2,
        0,
        ends.len() as i16 + to_end,
        BPF_SOCK_OPS_STATE_CB,
    ));
    program.extend(ends);
    program.extend(listens);
    program.extend(ours);
    program.extend(end);
    program
}
