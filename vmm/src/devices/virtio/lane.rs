//! A queue whose chains are worked off in turns: a guest may name as much memory at once as it
//! likes, and others on the event loop do not wait for all of it.

use std::io;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use thiserror::Error;
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::chain::{Chain, in_one_region};
use super::fault::Fault;
use super::queue::VirtQueue;
use super::signal::Signal;

/// Steps and system calls of a turn.
const TURN_CALLS: u32 = 512;
/// Bytes that a turn gives back. The host takes resident memory back at some GiB a second.
const TURN_BYTES: u32 = 64 << 20;

/// Whole parts of what devices take at once: pages, and blocks of memory.
const _: () = assert!(TURN_BYTES.is_multiple_of(2 << 20));

/// Why a device stops in the middle of its work.
#[derive(Debug, Error)]
pub enum Failure {
    /// The guest's fault.
    #[error(transparent)]
    Guest(#[from] Fault),
    /// The host's fault.
    #[error("give {length:#x} bytes of guest memory at {start:?} back to the host")]
    Host {
        /// Where.
        start: GuestAddress,
        /// Bytes.
        length: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Failure {
    /// Asks the driver for a reset, and counts or reports why.
    pub fn tell(self, signal: &Signal) {
        match self {
            Failure::Guest(fault) => signal.fault(fault),
            error @ Failure::Host { .. } => signal.failed(&error),
        }
    }
}

/// What is left of a turn.
pub struct Turn {
    calls: u32,
    bytes: u32,
}

impl Turn {
    fn new() -> Turn {
        Turn {
            calls: TURN_CALLS,
            bytes: TURN_BYTES,
        }
    }

    fn is_over(&self) -> bool {
        self.calls == 0 || self.bytes == 0
    }

    /// The part of `length` bytes, whole pages, that is for this turn.
    pub fn part(&self, length: u64) -> u32 {
        u32::try_from(length).map_or(self.bytes, |length| length.min(self.bytes))
    }

    /// Takes a step, or a call that gives `bytes` back, off the turn. One that is more than is left
    /// ends it.
    pub fn spend(&mut self, bytes: u32) {
        self.spend_calls(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// Takes what is as much work as so many steps off the turn.
    pub fn spend_calls(&mut self, calls: u32) {
        self.calls = self.calls.saturating_sub(calls);
    }
}

/// How far a chain is worked off.
#[derive(Default, PartialEq, Eq)]
pub struct Place {
    /// The buffer.
    pub piece: usize,
    /// Bytes of the buffer, or of the chain where that is one string of bytes.
    pub offset: u32,
}

/// A queue and the chain that is being worked off.
pub struct Lane {
    queue: VirtQueue,
    chain: Chain,
    /// `None` between chains.
    place: Option<Place>,
}

impl Lane {
    /// A lane without a chain.
    pub fn new(queue: VirtQueue) -> Lane {
        Lane {
            queue,
            chain: Chain::default(),
            place: None,
        }
    }

    /// Its queue.
    pub fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    /// Works off chains until there is none or the turn is over. `step` does a bounded part of a
    /// chain and tells after the last how many bytes it has written into it.
    ///
    /// # Errors
    /// The rings', or those of `step`: the queue must not be used any more.
    pub fn serve(
        &mut self,
        mut step: impl FnMut(&Chain, &mut Place, &mut Turn) -> Result<Option<u32>, Failure>,
    ) -> Result<(), Failure> {
        self.queue.take_kick();
        self.queue.suppress_kicks()?;
        let mut turn = Turn::new();
        loop {
            if turn.is_over() {
                self.queue.kick_self();
                break;
            }
            if self.place.is_none() && !self.next()? {
                break;
            }
            turn.spend(0);
            let place = self.place.get_or_insert_default();
            if let Some(written) = step(&self.chain, place, &mut turn)? {
                self.place = None;
                self.queue.push(&self.chain, written)?;
            }
        }
        Ok(self.queue.signal_used()?)
    }

    /// Takes the next chain; false when there is none and a kick will tell of one.
    fn next(&mut self) -> Result<bool, Fault> {
        while !self.queue.pop(&mut self.chain)? {
            if !self.queue.ask_for_kick()? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Makes a hole in the file of guest memory: what was there is free for the host, and reads as
/// zeros from now on.
///
/// # Errors
/// The range is not in one region of guest memory, or the host refuses.
pub fn give_back(
    memory: &GuestMemoryMmap,
    start: GuestAddress,
    length: u32,
) -> Result<(), Failure> {
    let outside = Fault::OutsideMemory(start, length);
    if length == 0 {
        return Ok(());
    }
    let region = memory.find_region(start).ok_or(outside)?;
    if !in_one_region(memory, start, length.into()) {
        return Err(outside.into());
    }
    let host = |source| Failure::Host {
        start,
        length,
        source,
    };
    let file = region
        .file_offset()
        .ok_or_else(|| host(io::ErrorKind::Unsupported.into()))?;
    // Both are below the size of the file, which fits an off_t.
    let offset = file.start() + start.unchecked_offset_from(region.start_addr());
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    loop {
        match fallocate(file.file(), mode, offset as i64, length.into()) {
            Ok(()) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(host(error.into())),
        }
    }
}
