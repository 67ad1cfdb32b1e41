//! A queue whose chains are worked off in turns: a guest may name as much memory at once as it
//! likes, and others on the event loop do not wait for all of it.

use super::super::chain::Chain;
use super::super::fault::Fault;
use super::super::queue::VirtQueue;
use super::{Error, PAGE};

/// Steps and system calls of a turn.
const TURN_CALLS: u32 = 512;
/// Bytes that a turn gives back. The host takes resident memory back at some GiB a second.
const TURN_BYTES: u32 = 64 << 20;

const _: () = assert!(TURN_BYTES.is_multiple_of(PAGE));

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
    pub fn part(&self, length: u32) -> u32 {
        length.min(self.bytes)
    }

    /// Takes a step, or a call that gives `bytes` back, off the turn. One that is more than is left
    /// ends it.
    pub fn spend(&mut self, bytes: u32) {
        self.calls = self.calls.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
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
    /// chain and says whether that was the last.
    ///
    /// # Errors
    /// The rings', or those of `step`: the queue must not be used any more.
    pub fn serve(
        &mut self,
        mut step: impl FnMut(&Chain, &mut Place, &mut Turn) -> Result<bool, Error>,
    ) -> Result<(), Error> {
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
            if step(&self.chain, place, &mut turn)? {
                self.place = None;
                // Nothing is written into a buffer, not even into those that the guest lets us
                // write.
                self.queue.push(&self.chain, 0)?;
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
