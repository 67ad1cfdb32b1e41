//! One connection: credit both ways, ends both ways (VIRTIO 1.2 §5.10.6.3 to 6.5).
//!
//! ```text
//!            dial of an offered port
//!                      │ RESPONSE
//!                      ▼
//!   host writes ──► bytes up to the guest's credit ──► end of file ──► SHUTDOWN(no send) ─┐
//!   guest sends ──► bytes up to BUF_ALLOC ──► SHUTDOWN(no send) ──► end of file ──────────┴──► both: RST, gone
//! ```
//!
//! A host end that closes is told to the guest as "no send" only. "No receive" and RST follow when the guest sends bytes
//! that nobody takes: a reset straight behind the RESPONSE would race with connect(2) in the guest, which then waits for a
//! state that has passed. Linux keeps what it has received when a RST comes, so that no reset loses bytes.

use std::num::Wrapping;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::super::chain::Buffers;
use super::super::fault::Fault;
use super::host::{BUF_ALLOC, HostEnd};
use super::packet::{GUEST_CID, HOST_CID, Header, NO_RECEIVE, NO_SEND, TYPE_STREAM, op};
use super::ring::{Fill, MAX_BATCH, RxRing};
use crate::event_loop::Poller;

/// The guest is told of room when it may know of less than this, the largest packet of Linux, in bytes …
const LOW_ROOM: u32 = 64 * 1024;
/// … or when so much more has become free since it was told.
const ROOM_STEP: u32 = BUF_ALLOC / 4;

/// What identifies a connection, as the guest and the host are one address each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) guest: u32,
    pub(super) host: u32,
}

/// What a turn at the rx queue came to.
pub(super) enum Turn {
    /// There is no rx buffer; the turn goes on when there is.
    Starved,
    /// There may be more to send, after others had their turn.
    Again,
    /// Nothing is left to send now.
    Idle,
    /// The connection has ended, and the guest knows.
    Over,
}

/// What a connection at rest is to the guest's driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionState {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
    sent: u32,
    peer_taken: u32,
    peer_alloc: u32,
    received: u32,
    told_forwarded: u32,
}

pub(super) struct Connection {
    pub(super) ports: Ports,
    pub(super) host: HostEnd,
    /// It is in the list of those that want a turn.
    pub(super) scheduled: bool,
    answered: bool,
    /// The host's socket may have something to read.
    input: bool,
    input_ended: bool,
    /// Buffers that the next read asks for.
    batch: usize,
    /// Bytes sent to the guest, and the guest's account of them.
    sent: Wrapping<u32>,
    peer_taken: Wrapping<u32>,
    peer_alloc: u32,
    /// Bytes received from the guest; those no longer in the backlog, as the guest was last told.
    received: Wrapping<u32>,
    told_forwarded: Wrapping<u32>,
    room_asked: bool,
    /// `flags` of SHUTDOWN: the guest's, and those that it was told.
    guest_ended: u32,
    told_ended: u32,
}

impl Connection {
    /// A connection that the guest has dialled and not been answered yet.
    pub(super) fn new(ports: Ports, host: HostEnd, request: &Header) -> Connection {
        Connection {
            ports,
            host,
            scheduled: false,
            answered: false,
            input: true,
            input_ended: false,
            batch: 1,
            sent: Wrapping(0),
            peer_taken: Wrapping(request.fwd_cnt),
            peer_alloc: request.buf_alloc,
            received: Wrapping(0),
            told_forwarded: Wrapping(0),
            room_asked: false,
            guest_ended: 0,
            told_ended: 0,
        }
    }

    /// What it is to the guest, if nothing is under way on it: each side has all bytes and all
    /// words of the other.
    pub(super) fn at_rest(&self) -> Option<ConnectionState> {
        let ended = self.input_ended || self.guest_ended | self.told_ended != 0;
        let rests = self.answered
            && !self.scheduled
            && !ended
            && self.host.backlog() == 0
            && !self.wants_turn();
        rests.then_some(ConnectionState {
            guest_port: self.ports.guest,
            host_port: self.ports.host,
            sent: self.sent.0,
            peer_taken: self.peer_taken.0,
            peer_alloc: self.peer_alloc,
            received: self.received.0,
            told_forwarded: self.told_forwarded.0,
        })
    }

    /// The same connection, joined to another socket.
    pub(super) fn resumed(host: HostEnd, state: &ConnectionState) -> Connection {
        Connection {
            ports: Ports {
                guest: state.guest_port,
                host: state.host_port,
            },
            host,
            scheduled: false,
            answered: true,
            input: true,
            input_ended: false,
            batch: 1,
            sent: Wrapping(state.sent),
            peer_taken: Wrapping(state.peer_taken),
            peer_alloc: state.peer_alloc,
            received: Wrapping(state.received),
            told_forwarded: Wrapping(state.told_forwarded),
            room_asked: false,
            guest_ended: 0,
            told_ended: 0,
        }
    }

    /// Takes a packet other than REQUEST and RST.
    ///
    /// # Errors
    /// [`Fault::Packet`]: the connection must be reset. Others are the queue's.
    pub(super) fn take(
        &mut self,
        memory: &GuestMemoryMmap,
        header: &Header,
        packet: Buffers<'_>,
    ) -> Result<(), Fault> {
        self.peer_alloc = header.buf_alloc;
        self.peer_taken = Wrapping(header.fwd_cnt);
        if header.op != op::RW && header.len != 0 {
            return Err(Fault::Packet);
        }
        match header.op {
            op::RW => self.take_bytes(memory, header.len, packet),
            op::SHUTDOWN => {
                self.take_end(header.flags);
                Ok(())
            }
            op::CREDIT_UPDATE => Ok(()),
            op::CREDIT_REQUEST => {
                self.room_asked = true;
                Ok(())
            }
            _ => Err(Fault::Packet),
        }
    }

    fn take_bytes(
        &mut self,
        memory: &GuestMemoryMmap,
        length: u32,
        packet: Buffers<'_>,
    ) -> Result<(), Fault> {
        // §5.10.6.3: no more than the room that it was promised, which also bounds our memory.
        let room = BUF_ALLOC.saturating_sub(self.host.backlog());
        if self.guest_ended & NO_SEND != 0 || length > room {
            return Err(Fault::Packet);
        }
        self.received += length;
        self.host.write(memory, packet, length)
    }

    fn take_end(&mut self, flags: u32) {
        self.guest_ended |= flags & (NO_RECEIVE | NO_SEND);
        if self.guest_ended & NO_RECEIVE != 0 {
            self.host.refuse_input();
        }
        if self.guest_ended & NO_SEND != 0 {
            self.host.end();
        }
    }

    /// Takes what epoll says of the host's end.
    pub(super) fn host_ready(&mut self, events: EventSet, poller: &Poller) {
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.host.hang_up(poller);
        } else if events.contains(EventSet::OUT) {
            self.host.flush();
        }
        self.input |= events.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR);
    }

    /// Watches the host's end for what is worth waking up for; see [`HostEnd::watch`].
    pub(super) fn watch(&mut self, lazily: bool, poller: &Poller) {
        let input = !self.input && self.wants_input();
        self.host.watch(input, lazily, poller);
    }

    /// Whether a turn at the rx queue would do anything.
    pub(super) fn wants_turn(&self) -> bool {
        !self.answered
            || self.may_read()
            || self.is_over()
            || self.ends() & !self.told_ended != 0
            || self.owes_room()
    }

    /// Sends what is due, in its order: the answer, bytes, ends, room.
    pub(super) fn turn(&mut self, ring: &mut RxRing) -> Result<Turn, Fault> {
        if !self.answered {
            if !self.send(ring, op::RESPONSE, 0)? {
                return Ok(Turn::Starved);
            }
            self.answered = true;
        }
        if self.may_read() {
            match self.send_input(ring)? {
                Turn::Idle => {}
                other => return Ok(other),
            }
        }
        if self.is_over() {
            let told = self.send(ring, op::RST, 0)?;
            return Ok(if told { Turn::Over } else { Turn::Starved });
        }
        let ends = self.ends();
        if ends & !self.told_ended != 0 {
            if !self.send(ring, op::SHUTDOWN, ends)? {
                return Ok(Turn::Starved);
            }
            self.told_ended = ends;
        }
        if self.owes_room() && !self.send(ring, op::CREDIT_UPDATE, 0)? {
            return Ok(Turn::Starved);
        }
        Ok(Turn::Idle)
    }

    fn send_input(&mut self, ring: &mut RxRing) -> Result<Turn, Fault> {
        let (header, credit) = (self.header(op::RW, 0), self.credit());
        match ring.fill(&mut self.host, header, credit, self.batch)? {
            Fill::Starved => return Ok(Turn::Starved),
            Fill::Empty => self.input = false,
            Fill::End => self.input_ended = true,
            Fill::Sent {
                bytes,
                packets,
                full,
            } => {
                self.sent += bytes;
                self.told(&header);
                if full || !self.host.is_watched() {
                    self.batch = (packets * 2).min(MAX_BATCH);
                    return Ok(Turn::Again);
                }
                // A short read has emptied the socket.
                self.batch = (packets + 1).min(MAX_BATCH);
                self.input = false;
            }
        }
        Ok(Turn::Idle)
    }

    fn send(&mut self, ring: &mut RxRing, op: u16, flags: u32) -> Result<bool, Fault> {
        let header = self.header(op, flags);
        let sent = ring.send(&header)?;
        if sent {
            self.told(&header);
        }
        Ok(sent)
    }

    fn header(&self, op: u16, flags: u32) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: GUEST_CID,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded().0,
        }
    }

    fn told(&mut self, header: &Header) {
        self.told_forwarded = Wrapping(header.fwd_cnt);
        self.room_asked = false;
    }

    /// Bytes that the guest has room for, by its own account. A guest that shrinks its buffer or counts wrongly gets none:
    /// what it claims is never memory of ours.
    fn credit(&self) -> u32 {
        self.peer_alloc
            .saturating_sub((self.sent - self.peer_taken).0)
    }

    fn forwarded(&self) -> Wrapping<u32> {
        self.received - Wrapping(self.host.backlog())
    }

    fn owes_room(&self) -> bool {
        if self.room_asked {
            return true;
        }
        let news = (self.forwarded() - self.told_forwarded).0;
        let known = BUF_ALLOC.saturating_sub((self.received - self.told_forwarded).0);
        self.guest_ended & NO_SEND == 0 && news > 0 && (news >= ROOM_STEP || known < LOW_ROOM)
    }

    fn wants_input(&self) -> bool {
        !self.input_ended && self.guest_ended & NO_RECEIVE == 0
    }

    fn may_read(&self) -> bool {
        self.input && self.wants_input() && self.credit() > 0
    }

    /// `flags` of the SHUTDOWN that the guest should have been sent.
    fn ends(&self) -> u32 {
        let mut flags = 0;
        if self.input_ended {
            flags |= NO_SEND;
        }
        if self.host.has_lost() {
            flags |= NO_RECEIVE;
        }
        flags
    }

    fn is_over(&self) -> bool {
        let to_guest = self.input_ended || self.guest_ended & NO_RECEIVE != 0;
        let to_host = self.guest_ended & NO_SEND != 0 || self.host.has_lost();
        to_guest && to_host
    }
}
