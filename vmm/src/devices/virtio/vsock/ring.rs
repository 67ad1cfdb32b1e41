//! The rx queue: packets to the guest, each in a buffer that the driver offered.

use vm_memory::GuestMemoryMmap;

use super::super::chain::{Buffers, Chain};
use super::super::fault::Fault;
use super::super::queue::VirtQueue;
use super::super::sys::IoVecs;
use super::host::{HostEnd, Input};
use super::packet::{HEADER_LEN, Header};

/// Buffers that one read from a socket fills: Linux offers 4 KiB each, and a system call a buffer would be the bottleneck.
pub(super) const MAX_BATCH: usize = 32;
/// Largest payload of a packet to the guest, in bytes; Linux drops what is longer.
const MAX_PAYLOAD: usize = 64 * 1024;

/// What [`RxRing::fill`] came to.
pub(super) enum Fill {
    /// The driver has offered no buffer.
    Starved,
    /// The socket has nothing now.
    Empty,
    /// The socket has nothing any more.
    End,
    /// Packets were sent.
    Sent {
        bytes: u32,
        packets: usize,
        /// Everything that was asked for: there may be more.
        full: bool,
    },
}

pub(super) struct RxRing {
    pub(super) queue: VirtQueue,
    memory: GuestMemoryMmap,
    chains: Vec<Chain>,
    room: [usize; MAX_BATCH],
}

impl RxRing {
    pub(super) fn new(queue: VirtQueue, memory: GuestMemoryMmap) -> RxRing {
        let mut chains = Vec::new();
        chains.resize_with(MAX_BATCH, Chain::default);
        RxRing {
            queue,
            memory,
            chains,
            room: [0; MAX_BATCH],
        }
    }

    /// Sends a packet without payload; false when there is no buffer.
    pub(super) fn send(&mut self, header: &Header) -> Result<bool, Fault> {
        let chain = &mut self.chains[0];
        if !self.queue.pop(chain)? {
            return Ok(false);
        }
        header.write(&self.memory, packet_buffer(chain)?)?;
        self.queue.push(chain, HEADER_LEN as u32)?;
        Ok(true)
    }

    /// Reads at most `credit` bytes from a socket straight into at most `batch` packets that begin with `header`.
    pub(super) fn fill(
        &mut self,
        host: &mut HostEnd,
        header: Header,
        credit: u32,
        batch: usize,
    ) -> Result<Fill, Fault> {
        let mut list = IoVecs::new();
        let mut asked = 0;
        let mut count = 0;
        while count < batch.min(MAX_BATCH) && asked < credit as usize {
            let chain = &mut self.chains[count];
            if !self.queue.pop(chain)? {
                break;
            }
            let buffer = packet_buffer(chain)?;
            let room = (buffer.length() as usize - HEADER_LEN)
                .min(MAX_PAYLOAD)
                .min(credit as usize - asked);
            if !buffer.list(&self.memory, HEADER_LEN, room, &mut list)? {
                self.queue.unpop(chain);
                break;
            }
            self.room[count] = room;
            asked += room;
            count += 1;
        }
        if count == 0 {
            return Ok(Fill::Starved);
        }
        let (bytes, none) = match host.read(&mut list) {
            Input::Bytes(bytes) => (bytes, Fill::Empty),
            Input::Empty => (0, Fill::Empty),
            Input::End => (0, Fill::End),
        };
        let packets = self.announce(header, bytes, count)?;
        Ok(if packets == 0 {
            none
        } else {
            Fill::Sent {
                bytes: bytes as u32,
                packets,
                full: bytes == asked,
            }
        })
    }

    /// Puts headers before the `bytes` that were read into the first of `count` chains, and the other chains back.
    fn announce(&mut self, header: Header, bytes: usize, count: usize) -> Result<usize, Fault> {
        let mut rest = bytes;
        let mut packets = 0;
        while rest > 0 {
            let length = rest.min(self.room[packets]) as u32;
            let chain = &self.chains[packets];
            let header = Header {
                len: length,
                ..header
            };
            header.write(&self.memory, chain.writable())?;
            self.queue.push(chain, HEADER_LEN as u32 + length)?;
            rest -= length as usize;
            packets += 1;
        }
        for chain in self.chains[packets..count].iter().rev() {
            self.queue.unpop(chain);
        }
        Ok(packets)
    }
}

/// A buffer without room for a byte of payload would starve its connection for ever.
fn packet_buffer(chain: &Chain) -> Result<Buffers<'_>, Fault> {
    let buffer = chain.only_writable()?;
    if buffer.length() as usize <= HEADER_LEN {
        return Err(Fault::ChainTooShort);
    }
    Ok(buffer)
}
