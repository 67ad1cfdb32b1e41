//! From the tap into the guest: frames go straight into the buffers that the driver has posted.
//!
//! Buffers are taken from the ring until the largest frame fits, and kept over frames. Where the driver has posted fewer, the
//! rest of a frame lands in memory of ours and is copied when more are posted, so that no frame is cut and none is read twice.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::GuestMemoryMmap;

use super::header;
use super::limit::Limiter;
use super::stats::Stats;
use super::tap::Tap;
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::fault::Fault;
use crate::devices::virtio::queue::VirtQueue;
use crate::devices::virtio::sys::IoVecs;

/// Frames that one wake-up moves before the other direction gets its turn.
const TURN: usize = 64;
const LARGEST: usize = header::SIZE + header::MAX_FRAME;

/// What the receiver waits for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// A frame.
    Frame,
    /// Buffers; their kick will come.
    Buffers,
    /// The rate limit.
    Time(Duration),
    /// Nothing any more: the interface is gone.
    Gone,
}

/// One receive queue and its queue of the tap.
pub struct Receiver {
    queue: VirtQueue,
    memory: GuestMemoryMmap,
    tap: Arc<Tap>,
    stats: Arc<Stats>,
    pub limiter: Limiter,
    merge: bool,
    /// Taken from the ring and not yet used, in order.
    posted: VecDeque<Chain>,
    room: usize,
    spare: Vec<Chain>,
    /// What a frame has left over when it has filled all of `posted`.
    spill: Box<[u8]>,
    /// Bytes in `spill`, which come behind those in the first `filled` bytes of `posted`.
    spilt: usize,
    filled: usize,
}

impl Receiver {
    pub fn new(
        queue: VirtQueue,
        memory: GuestMemoryMmap,
        tap: Arc<Tap>,
        stats: Arc<Stats>,
        limiter: Limiter,
        features: u64,
    ) -> Receiver {
        Receiver {
            queue,
            memory,
            tap,
            stats,
            limiter,
            merge: features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
            posted: VecDeque::new(),
            room: 0,
            spare: Vec::new(),
            // Not touched, so not resident, unless a driver is short of buffers.
            spill: vec![0; LARGEST].into_boxed_slice(),
            spilt: 0,
            filled: 0,
        }
    }

    /// Rings when the driver has posted buffers.
    pub fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    /// Moves frames until there is something to wait for, or others must have their turn, which is waiting for a frame, too.
    pub fn serve(&mut self) -> Result<Wait, Fault> {
        self.queue.suppress_kicks()?;
        let mut wait = Wait::Frame;
        for _ in 0..TURN {
            if let Some(reason) = self.receive()? {
                wait = reason;
                break;
            }
        }
        self.queue.signal_used()?;
        Ok(wait)
    }

    /// Moves a frame, or says what must come first.
    fn receive(&mut self) -> Result<Option<Wait>, Fault> {
        if self.spilt > 0 {
            return self.place_spilt();
        }
        // Without merged buffers a frame has one, and what does not fit is dropped.
        self.post(if self.merge { LARGEST } else { 1 })?;
        if self.posted.is_empty() && !self.post_more()? {
            return Ok(Some(Wait::Buffers));
        }
        if let Err(wait) = self.limiter.check() {
            self.stats.throttled();
            return Ok(Some(Wait::Time(wait)));
        }
        match self.read()? {
            Ok(length) => self.take(length),
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN) => Ok(Some(Wait::Frame)),
                Some(libc::EBADFD | libc::EIO | libc::ENODEV) => Ok(Some(Wait::Gone)),
                // A frame that the kernel could not give: it is lost, and the next one may be good.
                _ => {
                    self.stats.receive_dropped();
                    Ok(None)
                }
            },
        }
    }

    /// Takes buffers from the ring until there is this much room, or no more.
    fn post(&mut self, wanted: usize) -> Result<(), Fault> {
        while self.room < wanted && self.post_one()? {}
        Ok(())
    }

    fn post_one(&mut self) -> Result<bool, Fault> {
        let mut chain = self.spare.pop().unwrap_or_default();
        if !self.queue.pop(&mut chain)? {
            self.spare.push(chain);
            return Ok(false);
        }
        let length = chain.only_writable()?.length() as usize;
        // Any buffer may become a frame's first, which has the header.
        if length < header::SIZE {
            return Err(Fault::ChainTooShort);
        }
        self.room += length;
        self.posted.push_back(chain);
        Ok(true)
    }

    /// Takes one more, or asks to be told when there is one.
    fn post_more(&mut self) -> Result<bool, Fault> {
        loop {
            if self.post_one()? {
                return Ok(true);
            }
            if !self.queue.ask_for_kick()? {
                return Ok(false);
            }
            self.queue.suppress_kicks()?;
        }
    }

    /// Reads a frame into the first buffers, and into ours what they cannot hold.
    fn read(&mut self) -> Result<io::Result<usize>, Fault> {
        let mut list = IoVecs::new();
        let mut room = 0;
        let chains = if self.merge { usize::MAX } else { 1 };
        for chain in self.posted.iter().take(chains) {
            let buffers = chain.writable();
            let length = buffers.length() as usize;
            if room >= LARGEST || !buffers.list(&self.memory, 0, length, &mut list)? {
                break;
            }
            room += length;
        }
        if room < LARGEST {
            list.push_own(&mut self.spill);
        }
        let read = list.read(self.tap.as_fd());
        if let Ok(length) = &read {
            self.filled = room.min(*length);
            self.spilt = length - self.filled;
        }
        Ok(read)
    }

    /// What becomes of a frame that `read` has got.
    fn take(&mut self, length: usize) -> Result<Option<Wait>, Fault> {
        self.limiter.take(length);
        match self.spilt {
            0 => self.finish(length),
            _ if self.merge => return self.place_spilt(),
            // §5.1.6.3.1 has the driver post buffers that are large enough.
            _ => self.drop_frame(),
        }?;
        Ok(None)
    }

    /// Copies the rest of a frame into buffers that were not there, or too many for one call, when it was read.
    fn place_spilt(&mut self) -> Result<Option<Wait>, Fault> {
        let length = self.filled + self.spilt;
        while self.room < length {
            if self.posted.len() == usize::from(self.queue.layout().size) {
                // All that the driver can ever post, and we hold it.
                self.drop_frame()?;
                return Ok(None);
            }
            if !self.post_more()? {
                return Ok(Some(Wait::Buffers));
            }
        }
        let mut begin = 0;
        let mut left = &self.spill[..self.spilt];
        for chain in &self.posted {
            let buffers = chain.writable();
            if begin >= self.filled && !left.is_empty() {
                let (here, rest) = left.split_at(left.len().min(buffers.length() as usize));
                buffers.write(&self.memory, here)?;
                left = rest;
            }
            begin += buffers.length() as usize;
        }
        self.finish(length)?;
        Ok(None)
    }

    /// Hands the buffers of a whole frame to the driver.
    fn finish(&mut self, length: usize) -> Result<(), Fault> {
        let mut end = 0;
        let ends = self.posted.iter().map(|chain| {
            end += chain.writable().length() as usize;
            end
        });
        let count = 1 + ends.take_while(|&end| end < length).count();
        let number = (count as u16).to_le_bytes();
        let first = self.posted[0].writable();
        first.write_at(&self.memory, header::NUM_BUFFERS, &number)?;
        let mut left = length;
        for _ in 0..count {
            let Some(chain) = self.posted.pop_front() else {
                break;
            };
            let room = chain.writable().length() as usize;
            let written = left.min(room);
            left -= written;
            self.room -= room;
            self.queue.push(&chain, written as u32)?;
            self.spare.push(chain);
        }
        self.spilt = 0;
        self.stats.received(length.saturating_sub(header::SIZE));
        Ok(())
    }

    /// Forgets a frame; its buffers are used for the next one.
    fn drop_frame(&mut self) -> Result<(), Fault> {
        self.spilt = 0;
        self.stats.receive_dropped();
        Ok(())
    }
}
