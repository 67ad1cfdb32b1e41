//! A balloon whose driver runs.

use std::ops::Range;

use bulkhead_vmm_config::BalloonStats;
use vm_memory::{Address, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::super::chain::{Chain, Piece, in_one_region};
use super::super::device::Activation;
use super::super::fault::Fault;
use super::super::lane::{Failure, Lane, Place, Turn, give_back};
use super::super::queue::VirtQueue;
use super::super::signal::Signal;
use super::{
    DEFLATE, Forget, INFLATE, PAGE, PAGE_REPORTING, REPORTING, STATISTICS, STATS_VQ, telling,
};

/// Nothing is written into a buffer, not even into those that the guest lets us write.
const DONE: Option<u32> = Some(0);

/// Bytes of a page number (§5.5.6: le32, in units of 4096 bytes whatever the guest's pages are).
const NUMBER: usize = 4;
/// Page numbers that are looked at together; Linux has as many in a list.
const BLOCK: usize = 256 * NUMBER;
/// Buffers of statistics that one wake-up looks at. Linux has one in all.
const TELLINGS: usize = 8;

/// The queues and what they are about.
pub struct Running {
    memory: Backed,
    signal: Signal,
    inflate: Lane,
    deflate: Lane,
    reporting: Option<Lane>,
    statistics: Option<VirtQueue>,
    /// The last buffer of statistics; the device has it while `told_held` says so.
    told: Chain,
    told_held: bool,
}

impl Running {
    /// Takes the queues that the accepted features have. §5.5.2 gives each queue a number; Linux's
    /// driver, and so every device, leaves no numbers out for queues that are not there.
    ///
    /// # Errors
    /// One is missing.
    pub fn new(mut activation: Activation, forget: Forget) -> Result<Running, Fault> {
        let has = |feature| activation.features & feature != 0;
        let (has_statistics, has_reporting) = (has(STATS_VQ), has(PAGE_REPORTING));
        let mut indices = 0..;
        let mut take = || activation.take_queue(indices.next().expect("it has no end"));
        Ok(Running {
            inflate: Lane::new(take()?),
            deflate: Lane::new(take()?),
            statistics: has_statistics.then(&mut take).transpose()?,
            reporting: has_reporting.then(&mut take).transpose()?.map(Lane::new),
            memory: Backed {
                memory: activation.memory,
                forget,
            },
            signal: activation.signal,
            told: Chain::default(),
            told_held: false,
        })
    }

    /// The way to the driver.
    pub fn signal(&self) -> &Signal {
        &self.signal
    }

    /// What is to be watched, and under which keys.
    pub fn kicks(&self) -> Vec<(u32, &EventFd)> {
        let mut kicks = vec![
            (INFLATE, self.inflate.queue().kick()),
            (DEFLATE, self.deflate.queue().kick()),
        ];
        kicks.extend(
            self.statistics
                .iter()
                .map(|queue| (STATISTICS, queue.kick())),
        );
        kicks.extend(
            self.reporting
                .iter()
                .map(|lane| (REPORTING, lane.queue().kick())),
        );
        kicks
    }

    /// Takes blocks of free pages.
    ///
    /// # Errors
    /// The guest's or the host's fault.
    pub fn take_reports(&mut self, stats: &mut BalloonStats) -> Result<(), Failure> {
        let Some(lane) = &mut self.reporting else {
            return Ok(());
        };
        lane.serve(|chain, place, turn| report(&self.memory, chain, place, turn, stats))
    }

    /// Takes pages that the driver has put into the balloon.
    ///
    /// # Errors
    /// The guest's or the host's fault.
    pub fn inflate(&mut self, stats: &mut BalloonStats) -> Result<(), Failure> {
        self.inflate
            .serve(|chain, place, turn| swallow(&self.memory, chain, place, turn, stats))
    }

    /// Lets the driver have pages back. It may use them without being asked for (no
    /// MUST_TELL_HOST): which they are is of no interest.
    ///
    /// # Errors
    /// The guest's fault.
    pub fn deflate(&mut self) -> Result<(), Failure> {
        self.deflate.serve(|chain, _, _| {
            chain.only_readable()?;
            Ok(DONE)
        })
    }

    /// Takes statistics, and keeps the newest buffer for [`Running::ask`].
    ///
    /// # Errors
    /// The guest's fault.
    pub fn listen(&mut self, stats: &mut BalloonStats) -> Result<(), Failure> {
        let Some(queue) = &mut self.statistics else {
            return Ok(());
        };
        queue.take_kick();
        let mut chain = Chain::default();
        for nth in 0.. {
            if nth == TELLINGS {
                queue.kick_self();
                break;
            }
            if queue.pop(&mut chain)? {
                stats.guest = telling::read(&self.memory.memory, chain.only_readable()?)?;
                std::mem::swap(&mut self.told, &mut chain);
                // A driver with more than one gets the older one back.
                if std::mem::replace(&mut self.told_held, true) {
                    queue.push(&chain, 0)?;
                }
            } else if !queue.ask_for_kick()? {
                break;
            }
        }
        Ok(queue.signal_used()?)
    }

    /// Asks for new statistics (§5.5.6.3: by giving the buffer back), once until they come.
    ///
    /// # Errors
    /// The guest's fault.
    pub fn ask(&mut self) -> Result<(), Failure> {
        if let Some(queue) = &mut self.statistics
            && std::mem::take(&mut self.told_held)
        {
            queue.push(&self.told, 0)?;
            queue.signal_used()?;
        }
        Ok(())
    }
}

/// Guest memory, and who else must know what is given back of it.
struct Backed {
    memory: GuestMemoryMmap,
    forget: Forget,
}

impl Backed {
    /// Gives whole pages back to the host.
    fn give_back(&self, start: GuestAddress, length: u32) -> Result<(), Failure> {
        let range = start.0..start.0.saturating_add(length.into());
        (self.forget)(range);
        give_back(&self.memory, start, length)
    }
}

/// Gives back a part of the blocks that a chain names.
fn report(
    memory: &Backed,
    chain: &Chain,
    place: &mut Place,
    turn: &mut Turn,
    stats: &mut BalloonStats,
) -> Result<Option<u32>, Failure> {
    let buffers = chain.only_writable()?;
    if *place == Place::default() {
        for piece in buffers.pieces() {
            whole_pages(piece)?;
        }
        stats.requests += 1;
    }
    let Some(piece) = buffers.pieces().get(place.piece) else {
        return Ok(DONE);
    };
    let length = turn.part((piece.length - place.offset).into());
    let start = piece.address.unchecked_add(place.offset.into());
    memory.give_back(start, length)?;
    turn.spend(length);
    stats.returned_bytes += u64::from(length);
    place.offset += length;
    if place.offset == piece.length {
        *place = Place {
            piece: place.piece + 1,
            offset: 0,
        };
    }
    Ok(None)
}

/// Gives back the pages of the next block of a list of page numbers.
fn swallow(
    memory: &Backed,
    chain: &Chain,
    place: &mut Place,
    turn: &mut Turn,
    stats: &mut BalloonStats,
) -> Result<Option<u32>, Failure> {
    let list = chain.only_readable()?;
    if place.offset == 0 {
        stats.requests += 1;
    }
    let mut block = [0; BLOCK];
    let count = BLOCK.min((list.length() - place.offset) as usize);
    if !count.is_multiple_of(NUMBER) {
        return Err(Fault::ChainTooShort.into());
    }
    list.read_at(&memory.memory, place.offset as usize, &mut block[..count])?;
    let runs = runs(&block[..count]);
    for run in &runs {
        let (start, length) = (GuestAddress(run.start), run.end - run.start);
        if !in_one_region(&memory.memory, start, length) {
            return Err(Fault::OutsideMemory(start, length as u32).into());
        }
    }
    for run in &runs {
        let length = (run.end - run.start) as u32;
        memory.give_back(GuestAddress(run.start), length)?;
        turn.spend(length);
        stats.returned_bytes += u64::from(length);
    }
    place.offset += count as u32;
    Ok(if place.offset == list.length() {
        DONE
    } else {
        None
    })
}

/// Page numbers as ranges of addresses; neighbours in order are one.
fn runs(block: &[u8]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for number in block.chunks_exact(NUMBER) {
        let number = u32::from_le_bytes(number.try_into().expect("four bytes"));
        let start = u64::from(number) * u64::from(PAGE);
        let end = start + u64::from(PAGE);
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

fn whole_pages(piece: &Piece) -> Result<(), Fault> {
    let Piece { address, length } = *piece;
    let whole = address.raw_value().is_multiple_of(PAGE.into()) && length.is_multiple_of(PAGE);
    whole
        .then_some(())
        .ok_or(Fault::PartOfPage(address, length))
}
