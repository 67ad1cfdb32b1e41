//! The host's end of a connection: a socket, what it did not take yet, and what epoll watches it for.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::super::chain::Buffers;
use super::super::fault::Fault;
use super::super::sys::{IoVecs, MAX_BUFFERS};
use super::packet::HEADER_LEN;
use crate::event_loop::Poller;

/// Buffer space that the guest is promised for each connection; bounds what is kept of the guest's bytes.
pub const BUF_ALLOC: u32 = 256 * 1024;

/// What a read from the socket came to.
pub(super) enum Input {
    Bytes(usize),
    /// Nothing now.
    Empty,
    /// Nothing any more.
    End,
}

pub(super) struct HostEnd {
    socket: OwnedFd,
    /// Bytes of the guest that the socket did not take.
    backlog: VecDeque<u8>,
    /// The socket takes no more bytes, ever.
    deaf: bool,
    /// Bytes of the guest could not be delivered for that.
    lost: bool,
    /// Shut the socket down for writing when the backlog is empty.
    ending: bool,
    /// What epoll watches; `None` once the other end has hung up, which epoll would report for ever.
    watched: Option<EventSet>,
    token: u32,
}

impl HostEnd {
    pub(super) fn new(socket: OwnedFd, token: u32, poller: &Poller) -> io::Result<HostEnd> {
        poller.add(&socket, token, EventSet::IN)?;
        Ok(HostEnd {
            socket,
            backlog: VecDeque::new(),
            deaf: false,
            lost: false,
            ending: false,
            watched: Some(EventSet::IN),
            token,
        })
    }

    pub(super) fn backlog(&self) -> u32 {
        u32::try_from(self.backlog.len()).unwrap_or(u32::MAX)
    }

    /// The guest sent bytes that the host will never take.
    pub(super) fn has_lost(&self) -> bool {
        self.lost
    }

    /// Whether epoll tells when there is input. It does not after a hang-up, and reads never find the socket just empty then.
    pub(super) fn is_watched(&self) -> bool {
        self.watched.is_some()
    }

    /// Nothing is left to be written.
    pub(super) fn is_flushed(&self) -> bool {
        self.deaf || self.backlog.is_empty()
    }

    /// Takes `length` bytes that follow the header of a packet; what the socket does not take at once is kept.
    pub(super) fn write(
        &mut self,
        memory: &GuestMemoryMmap,
        packet: Buffers<'_>,
        length: u32,
    ) -> Result<(), Fault> {
        let length = length as usize;
        let mut written = 0;
        if self.backlog.is_empty() && !self.deaf && length > 0 {
            let mut list = IoVecs::new();
            // A chain is no longer than its queue, and the queue no longer than the list.
            if packet.list(memory, HEADER_LEN, length, &mut list)? {
                written = self.sent(list.send(self.socket.as_fd()));
            }
        }
        if written == length {
            return Ok(());
        }
        if self.deaf {
            self.lost = true;
            return Ok(());
        }
        let rest = length - written;
        packet.append_to(memory, HEADER_LEN + written, rest, &mut self.backlog)
    }

    /// Writes what was kept.
    pub(super) fn flush(&mut self) {
        while !self.deaf && !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let result = send(self.socket.as_raw_fd(), front, flags);
            let written = self.sent(result.map_err(io::Error::from));
            if written == 0 {
                return;
            }
            self.backlog.drain(..written);
        }
        // An idle connection keeps no buffer.
        self.backlog = VecDeque::new();
        self.end_if_flushed();
    }

    /// The guest sends no more: the host's reader gets its end of file behind the last byte.
    pub(super) fn end(&mut self) {
        self.ending = true;
        self.end_if_flushed();
    }

    /// The guest receives no more: the host's writer gets EPIPE.
    pub(super) fn refuse_input(&self) {
        // ENOTCONN only: the other end is gone already.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Read);
    }

    pub(super) fn read(&mut self, list: &mut IoVecs<'_>) -> Input {
        match list.receive(self.socket.as_fd()) {
            Ok(0) => Input::End,
            Ok(count) => Input::Bytes(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.watched.is_some() => {
                Input::Empty
            }
            // ECONNRESET: the host closed with bytes of the guest unread; nothing is left to read for us.
            Err(_) => Input::End,
        }
    }

    fn end_if_flushed(&mut self) {
        if self.ending && self.is_flushed() {
            // ENOTCONN only: the other end is gone already.
            let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
        }
    }

    fn sent(&mut self, result: io::Result<usize>) -> usize {
        match result {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(_) => {
                self.hear_no_more();
                0
            }
        }
    }

    fn hear_no_more(&mut self) {
        self.deaf = true;
        self.lost |= !self.backlog.is_empty();
        self.backlog = VecDeque::new();
    }

    /// The other end has gone altogether. What it wrote before can still be read, and never blocks.
    pub(super) fn hang_up(&mut self, poller: &Poller) {
        self.hear_no_more();
        self.unwatch(poller);
    }

    /// Watches for what is needed: input if `input`, and room for the backlog.
    ///
    /// With `lazily`, what is watched needlessly stays so until it fires, which spares most system calls of a busy stream.
    pub(super) fn watch(&mut self, input: bool, lazily: bool, poller: &Poller) {
        let Some(watched) = self.watched else { return };
        let mut needed = EventSet::empty();
        needed.set(EventSet::IN, input);
        needed.set(EventSet::OUT, !self.is_flushed());
        if watched == needed || lazily && watched.contains(needed) {
            return;
        }
        // A watched descriptor can only be refused for want of kernel memory; the next event tries again.
        if poller.modify(&self.socket, self.token, needed).is_ok() {
            self.watched = Some(needed);
        }
    }

    fn unwatch(&mut self, poller: &Poller) {
        if self.watched.take().is_some() {
            // It is watched, so this cannot fail; were it to, closing the socket does the same.
            let _ = poller.remove(&self.socket);
        }
    }

    /// Closes the socket so that the host reads an end of file and not ECONNRESET, which a close with unread input causes.
    pub(super) fn close(mut self, poller: &Poller) {
        self.unwatch(poller);
        self.refuse_input();
        let mut block = [0; 16 * 1024];
        loop {
            match recv(self.socket.as_raw_fd(), &mut block, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => break,
            }
        }
    }
}

const _: () = assert!(super::RING_SIZE as usize <= MAX_BUFFERS);
