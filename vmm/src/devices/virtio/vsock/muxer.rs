//! All connections of a running device: packets from the tx queue to sockets, and turns at the rx queue.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::super::chain::{Buffers, Chain};
use super::super::fault::{Fault, Notice};
use super::super::queue::VirtQueue;
use super::super::signal::Signal;
use super::connection::{Connection, ConnectionState, Ports, Turn};
use super::host::HostEnd;
use super::packet::{GUEST_CID, HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op};
use super::ring::RxRing;
use super::{DEVICE, FIRST_TOKEN};
use crate::event_loop::Poller;

/// Resets that wait for an rx buffer; past it the tx queue rests (§5.10.6.1: additional resources, but bounded ones).
const MAX_REPLIES: usize = 256;
/// Packets, or turns, that one wake-up serves before other devices get theirs.
const TURNS: usize = 512;

/// Ports that the guest may dial, each once.
pub(super) type Offers = HashMap<u32, OwnedFd>;

pub(super) struct Queues {
    pub(super) rx: VirtQueue,
    pub(super) tx: VirtQueue,
    /// Held so that it stays the driver's; nothing is reported by it.
    pub(super) events: VirtQueue,
}

enum Step {
    Done,
    Starved,
    Progress,
}

pub(super) struct Muxer {
    memory: GuestMemoryMmap,
    signal: Signal,
    poller: Poller,
    rx: RxRing,
    tx: VirtQueue,
    _events: VirtQueue,
    packet: Chain,
    /// The tx queue rests because the replies are too many.
    tx_rests: bool,
    replies: VecDeque<Header>,
    connections: HashMap<u32, Connection>,
    tokens: HashMap<Ports, u32>,
    /// Connections that want a turn, the next one first.
    turns: VecDeque<u32>,
    /// Ended for the guest, but the host has not taken the last bytes yet.
    drains: HashMap<u32, HostEnd>,
    next_token: u32,
}

impl Muxer {
    pub(super) fn new(
        memory: GuestMemoryMmap,
        signal: Signal,
        queues: Queues,
        poller: Poller,
    ) -> Muxer {
        Muxer {
            rx: RxRing::new(queues.rx, memory.clone()),
            tx: queues.tx,
            _events: queues.events,
            memory,
            signal,
            poller,
            packet: Chain::default(),
            tx_rests: false,
            replies: VecDeque::new(),
            connections: HashMap::new(),
            tokens: HashMap::new(),
            turns: VecDeque::new(),
            drains: HashMap::new(),
            next_token: FIRST_TOKEN,
        }
    }

    /// Sockets held.
    pub(super) fn sockets(&self) -> usize {
        self.connections.len() + self.drains.len()
    }

    pub(super) fn signal(&self) -> &Signal {
        &self.signal
    }

    pub(super) fn kicks(&self) -> [&VirtQueue; 2] {
        [&self.rx.queue, &self.tx]
    }

    /// Closes every socket.
    pub(super) fn close(self) {
        let ends = self.connections.into_values().map(|end| end.host);
        for host in ends.chain(self.drains.into_values()) {
            host.close(&self.poller);
        }
    }

    /// What its connections are to the guest, if the device has nothing to do.
    pub(super) fn at_rest(&self) -> Option<Vec<ConnectionState>> {
        let idle = self.replies.is_empty() && self.turns.is_empty() && self.drains.is_empty();
        let states = self.connections.values().map(Connection::at_rest);
        states.collect::<Option<_>>().filter(|_| idle)
    }

    /// Joins a connection that the guest has to a socket of the host.
    ///
    /// # Errors
    /// epoll_ctl(2)'s.
    pub(super) fn resume(&mut self, state: &ConnectionState, socket: OwnedFd) -> io::Result<()> {
        self.join(socket, |host| Connection::resumed(host, state))
    }

    /// Has a connection on a socket of the host from now on.
    fn join(
        &mut self,
        socket: OwnedFd,
        connect: impl FnOnce(HostEnd) -> Connection,
    ) -> io::Result<()> {
        let token = self.free_token();
        let connection = connect(HostEnd::new(socket, token, &self.poller)?);
        let ports = connection.ports;
        self.connections.insert(token, connection);
        self.tokens.insert(ports, token);
        self.schedule(token);
        self.signal.observe(Notice::Connected { port: ports.host });
        Ok(())
    }

    /// The driver has offered rx buffers.
    pub(super) fn rx_ready(&mut self) -> Result<(), Fault> {
        self.rx.queue.take_kick();
        self.receive()
    }

    /// The driver has sent packets.
    pub(super) fn tx_ready(&mut self, offers: &mut Offers) -> Result<(), Fault> {
        self.tx.take_kick();
        self.tx.suppress_kicks()?;
        for served in 0.. {
            self.tx_rests = self.replies.len() >= MAX_REPLIES;
            if self.tx_rests {
                break;
            }
            if served == TURNS {
                self.tx.kick_self();
                break;
            }
            let mut chain = std::mem::take(&mut self.packet);
            let popped = self.tx.pop(&mut chain)?;
            if popped {
                self.take_packet(chain.only_readable()?, offers)?;
                self.tx.push(&chain, 0)?;
            }
            self.packet = chain;
            if !popped && !self.tx.ask_for_kick()? {
                break;
            }
        }
        self.tx.signal_used()?;
        self.receive()
    }

    /// A socket is ready.
    pub(super) fn host_ready(&mut self, token: u32, events: EventSet) -> Result<(), Fault> {
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.host_ready(events, &self.poller);
            self.schedule(token);
            self.receive()?;
            if let Some(connection) = self.connections.get_mut(&token) {
                connection.watch(false, &self.poller);
            }
        } else if let Some(mut host) = self.drains.remove(&token) {
            if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
                host.hang_up(&self.poller);
            }
            host.flush();
            self.drain(token, host);
        }
        Ok(())
    }

    /// Resets every connection to `port`; false when there is none.
    pub(super) fn reset_port(&mut self, port: u32) -> Result<bool, Fault> {
        let to_port = |(ports, token): (&Ports, &u32)| (ports.host == port).then_some(*token);
        let tokens: Vec<u32> = self.tokens.iter().filter_map(to_port).collect();
        for token in &tokens {
            if let Some(connection) = self.forget(*token) {
                self.replies.push_back(reset_to(connection.ports));
                connection.host.close(&self.poller);
            }
        }
        self.receive()?;
        Ok(!tokens.is_empty())
    }

    fn take_packet(&mut self, packet: Buffers<'_>, offers: &mut Offers) -> Result<(), Fault> {
        let header = Header::read(&self.memory, packet)?;
        // The header was read, so the chain is as long.
        if header.len > packet.length() - HEADER_LEN as u32 {
            return Err(Fault::PacketPastChain);
        }
        if header.src_cid != GUEST_CID {
            // §5.10.6.4.1: there is nobody to answer to.
            self.signal.note(Fault::Packet);
            return Ok(());
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.refuse(&header);
            return Ok(());
        }
        let ports = Ports {
            guest: header.src_port,
            host: header.dst_port,
        };
        let token = self.tokens.get(&ports).copied();
        match (header.op, token) {
            (op::REQUEST, None) => self.dial(ports, &header, offers),
            (op::RST, None) => {}
            (_, None) => self.refuse(&header),
            (op::RST, Some(token)) => self.finish(token),
            (op::REQUEST, Some(token)) => self.violation(token),
            (_, Some(token)) => {
                let connection = self.connections.get_mut(&token);
                let connection = connection.expect("each token has a connection");
                match connection.take(&self.memory, &header, packet) {
                    Ok(()) => {
                        connection.watch(true, &self.poller);
                        self.schedule(token);
                    }
                    Err(Fault::Packet) => self.violation(token),
                    Err(fault) => return Err(fault),
                }
            }
        }
        Ok(())
    }

    fn dial(&mut self, ports: Ports, request: &Header, offers: &mut Offers) {
        let offer = offers.remove(&ports.host).filter(|_| request.len == 0);
        let Some(socket) = offer else {
            return self.refuse(request);
        };
        if let Err(error) = self.join(socket, |host| Connection::new(ports, host, request)) {
            self.refuse(request);
            self.signal.observe(Notice::Failed {
                device: DEVICE,
                error: &error,
            });
        }
    }

    /// Answers a packet by RST, unless it is one.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.replies.push_back(Header {
                op: op::RST,
                ..header.reversed()
            });
        }
    }

    fn violation(&mut self, token: u32) {
        self.signal.note(Fault::Packet);
        if let Some(connection) = self.connections.get(&token) {
            self.replies.push_back(reset_to(connection.ports));
        }
        self.finish(token);
    }

    /// Ends a connection for the guest; the host still gets every byte that came before.
    fn finish(&mut self, token: u32) {
        if let Some(Connection { mut host, .. }) = self.forget(token) {
            host.end();
            self.drain(token, host);
        }
    }

    fn drain(&mut self, token: u32, mut host: HostEnd) {
        if host.is_flushed() {
            host.close(&self.poller);
        } else {
            host.watch(false, false, &self.poller);
            self.drains.insert(token, host);
        }
    }

    fn forget(&mut self, token: u32) -> Option<Connection> {
        let connection = self.connections.remove(&token)?;
        self.tokens.remove(&connection.ports);
        Some(connection)
    }

    /// A key that was not used for the last four billion sockets, as old events may still come under it.
    fn free_token(&mut self) -> u32 {
        loop {
            let token = self.next_token;
            self.next_token = token.checked_add(1).unwrap_or(FIRST_TOKEN);
            if !self.connections.contains_key(&token) && !self.drains.contains_key(&token) {
                return token;
            }
        }
    }

    fn schedule(&mut self, token: u32) {
        if let Some(connection) = self.connections.get_mut(&token)
            && !connection.scheduled
            && connection.wants_turn()
        {
            connection.scheduled = true;
            self.turns.push_back(token);
        }
    }

    /// Sends to the guest until there is nothing to send, no buffer to put it in, or others must have their turn.
    fn receive(&mut self) -> Result<(), Fault> {
        self.rx.queue.suppress_kicks()?;
        for turn in 0.. {
            if turn == TURNS {
                self.rx.queue.kick_self();
                break;
            }
            match self.step()? {
                Step::Progress => {}
                Step::Done => break,
                Step::Starved if self.rx.queue.ask_for_kick()? => {}
                Step::Starved => break,
            }
        }
        if self.tx_rests && self.replies.len() < MAX_REPLIES {
            self.tx_rests = false;
            self.tx.kick_self();
        }
        self.rx.queue.signal_used()
    }

    fn step(&mut self) -> Result<Step, Fault> {
        if let Some(reply) = self.replies.front() {
            if !self.rx.send(reply)? {
                return Ok(Step::Starved);
            }
            self.replies.pop_front();
            return Ok(Step::Progress);
        }
        let Some(token) = self.turns.pop_front() else {
            return Ok(Step::Done);
        };
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(Step::Progress);
        };
        match connection.turn(&mut self.rx)? {
            Turn::Starved => {
                self.turns.push_front(token);
                return Ok(Step::Starved);
            }
            Turn::Again => {
                self.turns.push_back(token);
                // The guest's other vCPUs can take these while we read on.
                self.rx.queue.signal_used()?;
            }
            Turn::Idle => {
                connection.scheduled = false;
                connection.watch(true, &self.poller);
            }
            Turn::Over => self.finish(token),
        }
        Ok(Step::Progress)
    }
}

fn reset_to(ports: Ports) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: GUEST_CID,
        src_port: ports.host,
        dst_port: ports.guest,
        kind: TYPE_STREAM,
        op: op::RST,
        ..Header::default()
    }
}
