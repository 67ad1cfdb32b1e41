//! A device whose driver runs.

use std::ops::Range;

use virtio_bindings::bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::super::chain::Chain;
use super::super::device::Activation;
use super::super::fault::Fault;
use super::super::lane::{Failure, Lane, Turn, give_back};
use super::super::queue::VirtQueue;
use super::super::signal::Signal;
use super::blocks::State;
use super::request::{PLUG, REQUEST, RESPONSE, Request, Response, STATE, UNPLUG, UNPLUG_ALL};
use super::{BLOCK, PLUGGED_SIZE, Size};

/// The queue and what it is about.
pub struct Running {
    memory: GuestMemoryMmap,
    signal: Signal,
    lane: Lane,
    /// Blocks that the chain of now has yet to give back. They were read once: what the driver
    /// writes over its request afterwards changes nothing.
    leaving: Option<Range<usize>>,
}

impl Running {
    /// Takes the queue.
    ///
    /// # Errors
    /// It is missing.
    pub fn new(mut activation: Activation) -> Result<Running, Fault> {
        Ok(Running {
            lane: Lane::new(activation.take_queue(0)?),
            memory: activation.memory,
            signal: activation.signal,
            leaving: None,
        })
    }

    /// The way to the driver.
    pub fn signal(&self) -> &Signal {
        &self.signal
    }

    /// Its queue.
    pub fn queue(&self) -> &VirtQueue {
        self.lane.queue()
    }

    /// Answers requests.
    ///
    /// # Errors
    /// The guest's or the host's fault.
    pub fn serve(&mut self, size: &mut Size) -> Result<(), Failure> {
        let Running {
            memory,
            signal,
            lane,
            leaving,
        } = self;
        lane.serve(|chain, _, turn| {
            let response = match leaving {
                Some(range) => unplug(memory, range, size, turn)?,
                None => match decide(read(memory, chain)?, size, turn) {
                    Decision::Answer(response) => Some(response),
                    Decision::Unplug(range) => {
                        *leaving = Some(range);
                        None
                    }
                },
            };
            let Some(response) = response else {
                return Ok(None);
            };
            *leaving = None;
            // A driver that has its answer may look.
            let plugged = size.blocks.plugged();
            let field = VIRTIO_MMIO_CONFIG + PLUGGED_SIZE;
            signal.registers().store_long(field, plugged);
            chain.writable().write(memory, &response.bytes())?;
            Ok(Some(RESPONSE as u32))
        })
    }
}

/// Reads a request that there is room to answer.
fn read(memory: &GuestMemoryMmap, chain: &Chain) -> Result<Request, Fault> {
    if (chain.writable().length() as usize) < RESPONSE {
        return Err(Fault::ChainTooShort);
    }
    let mut bytes = [0; REQUEST];
    chain.readable().read(memory, &mut bytes)?;
    Ok(Request::parse(&bytes))
}

/// What follows from a request.
enum Decision {
    Answer(Response),
    Unplug(Range<usize>),
}

/// The rules of VIRTIO 1.2 §5.15.6.1 to §5.15.6.4.
fn decide(request: Request, size: &mut Size, turn: &mut Turn) -> Decision {
    let Request {
        kind,
        address,
        count,
    } = request;
    if kind == UNPLUG_ALL {
        return Decision::Unplug(size.blocks.all());
    }
    let range = size.blocks.range(address, count, size.usable);
    let named = range.map(|range| {
        spend(turn, range.len());
        (size.blocks.state(range.clone()), range)
    });
    let response = match (kind, named) {
        (STATE, Some((state, _))) => Response::State(state),
        (UNPLUG, Some((State::Plugged, range))) => return Decision::Unplug(range),
        (PLUG, Some((State::Unplugged, range))) => {
            if size.blocks.plugged() + range.len() as u64 * BLOCK > size.requested {
                Response::Nack
            } else {
                size.blocks.set(range, true);
                Response::Ack
            }
        }
        _ => Response::Error,
    };
    if matches!(response, Response::Nack | Response::Error) {
        size.refused = size.refused.saturating_add(1);
    }
    Decision::Answer(response)
}

/// Gives back the next blocks of the range that are plugged, as many as the turn has room for.
fn unplug(
    memory: &GuestMemoryMmap,
    range: &mut Range<usize>,
    size: &mut Size,
    turn: &mut Turn,
) -> Result<Option<Response>, Failure> {
    let Some(run) = size.blocks.run(range.clone()) else {
        return Ok(Some(Response::Ack));
    };
    spend(turn, run.start - range.start);
    // A turn has whole blocks left, and this one is not over.
    let length = turn.part(run.len() as u64 * BLOCK);
    let start = GuestAddress(size.blocks.address(run.start));
    give_back(memory, start, length)?;
    turn.spend(length);
    let end = run.start + (u64::from(length) / BLOCK) as usize;
    size.blocks.set(run.start..end, false);
    range.start = end;
    Ok(None)
}

/// Looking at blocks is work, too.
fn spend(turn: &mut Turn, blocks: usize) {
    const BLOCKS_OF_A_CALL: usize = 128;
    turn.spend_calls((blocks / BLOCKS_OF_A_CALL) as u32);
}
