//! From the guest into the tap: each frame by one system call, straight from guest memory, behind a header of ours.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::GuestMemoryMmap;

use super::header::{self, Header};
use super::limit::Limiter;
use super::stats::Stats;
use super::tap::Tap;
use crate::devices::virtio::chain::{Buffers, Chain};
use crate::devices::virtio::fault::Fault;
use crate::devices::virtio::queue::VirtQueue;
use crate::devices::virtio::sys::IoVecs;

/// Frames that one wake-up moves before the other direction gets its turn.
const TURN: usize = 64;

/// What the transmitter waits for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// A kick.
    Kick,
    /// Room in the tap.
    Room,
    /// The rate limit.
    Time(Duration),
}

/// One transmit queue and its queue of the tap.
pub struct Transmitter {
    queue: VirtQueue,
    memory: GuestMemoryMmap,
    tap: Arc<Tap>,
    stats: Arc<Stats>,
    pub limiter: Limiter,
    features: u64,
    chain: Chain,
}

/// What became of a frame.
enum Sent {
    /// It is gone, one way or the other.
    Done,
    /// The tap has no room for it.
    Later,
}

impl Transmitter {
    pub fn new(
        queue: VirtQueue,
        memory: GuestMemoryMmap,
        tap: Arc<Tap>,
        stats: Arc<Stats>,
        limiter: Limiter,
        features: u64,
    ) -> Transmitter {
        Transmitter {
            queue,
            memory,
            tap,
            stats,
            limiter,
            features,
            chain: Chain::default(),
        }
    }

    /// Rings when the driver has frames.
    pub fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    /// Moves frames until there are none, or until something stands in their way.
    pub fn serve(&mut self) -> Result<Wait, Fault> {
        self.queue.suppress_kicks()?;
        let wait = self.send_all();
        self.queue.signal_used()?;
        wait
    }

    fn send_all(&mut self) -> Result<Wait, Fault> {
        for _ in 0..TURN {
            if !self.queue.pop(&mut self.chain)? {
                if !self.queue.ask_for_kick()? {
                    return Ok(Wait::Kick);
                }
                self.queue.suppress_kicks()?;
                continue;
            }
            if let Err(wait) = self.limiter.check() {
                self.queue.unpop(&self.chain);
                self.stats.throttled();
                return Ok(Wait::Time(wait));
            }
            match self.send()? {
                Sent::Done => self.queue.push(&self.chain, 0)?,
                Sent::Later => {
                    self.queue.unpop(&self.chain);
                    return Ok(Wait::Room);
                }
            }
        }
        self.queue.kick_self();
        Ok(Wait::Kick)
    }

    fn send(&mut self) -> Result<Sent, Fault> {
        let buffers = self.chain.only_readable()?;
        let length = (buffers.length() as usize)
            .checked_sub(header::SIZE)
            .filter(|&length| length >= header::MIN_FRAME)
            .ok_or(Fault::ChainTooShort)?;
        if length > header::MAX_FRAME {
            return Err(Fault::FrameTooLong);
        }
        let mut header = [0; header::SIZE];
        buffers.read(&self.memory, &mut header)?;
        let Some(header) = Header::parse(&header).checked(self.features, length)? else {
            self.stats.send_dropped();
            return Ok(Sent::Done);
        };
        match self.write(header, buffers, length)? {
            Ok(_) => self.stats.sent(length),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Sent::Later),
            // The host's kernel does not like it, or has no room, or the interface is gone: lost, as on a wire.
            Err(_) => self.stats.send_dropped(),
        }
        self.limiter.take(length);
        Ok(Sent::Done)
    }

    fn write(
        &self,
        header: Header,
        buffers: Buffers<'_>,
        length: usize,
    ) -> Result<io::Result<usize>, Fault> {
        let mut header = header.bytes();
        let mut whole = Vec::new();
        let mut list = IoVecs::new();
        list.push_own(&mut header);
        if !buffers.list(&self.memory, header::SIZE, length, &mut list)? {
            // More pieces than one call takes, which no driver has a reason for.
            whole.resize(header::SIZE + length, 0);
            buffers.read(&self.memory, &mut whole)?;
            list.push_own(&mut whole[header::SIZE..]);
        }
        Ok(list.write(self.tap.as_fd()))
    }
}
