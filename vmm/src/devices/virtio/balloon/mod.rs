//! The balloon (VIRTIO 1.2 §5.5): the guest names memory that it does not use, and the host has it
//! back.
//!
//! ```text
//! driver ── reporting: blocks of free pages ──► checked ──► a hole in the file of guest RAM ──► used
//!        ── inflate: numbers of pages ────────► the same
//!        ── deflate: numbers of pages ────────► used: a page is there again when it is touched
//!        ── statistics: one buffer, held until somebody asks for new ones
//! ```
//!
//! Free page reporting does the work: Linux names what it has freed a while ago, and takes it again
//! without a word. The target of the balloon itself is always 0, so that nothing is ever taken from
//! a guest that it wants to keep; a driver that fills it all the same is served, and is told that
//! it may let the air out before it kills for memory (DEFLATE_ON_OOM).
//!
//! A guest can only give back its own RAM: each range is checked to be whole pages in one region,
//! all ranges of a chain before the first hole. Whoever still has such a page mapped, KVM, the fs
//! process, this process, finds zeros there.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use bulkhead_vmm_config::BalloonStats;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vmm_sys_util::epoll::EventSet;

use super::device::{ActivateError, Activation, QUEUE_FEATURES, VirtioDevice};
use super::lane::Failure;
use crate::event_loop::{Handler, Poller};

mod running;
mod telling;
#[cfg(test)]
pub(super) mod tests;

use running::Running;

/// Feature bits (§5.5.3).
const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_REPORTING: u64 = 1 << 5;

/// Linux puts one list of 256 page numbers or one buffer of statistics into a queue at a time.
const SMALL_QUEUE: u16 = 8;
/// Linux names 32 blocks at once and refuses a queue without room for them.
const REPORTING_QUEUE: u16 = 64;

/// Keys on the event loop.
const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const STATISTICS: u32 = 2;
const REPORTING: u32 = 3;

const PAGE: u32 = 4096;

/// Hears of ranges of guest physical addresses that the guest gives back, before they become holes.
pub type Forget = Arc<dyn Fn(Range<u64>) + Send + Sync>;

struct Worker {
    poller: Poller,
    running: Option<Running>,
    forget: Forget,
    /// They outlive a reset.
    stats: BalloonStats,
}

/// The device. Its handler must be attached to the event loop that made the poller.
pub struct Balloon(Arc<Mutex<Worker>>);

/// The machine's access to a device's counters; cheap to clone.
#[derive(Clone)]
pub struct Gauge(Arc<Mutex<Worker>>);

impl Balloon {
    /// A device that was not activated yet.
    pub fn new(poller: Poller, forget: Forget) -> Balloon {
        Balloon(Arc::new(Mutex::new(Worker {
            poller,
            running: None,
            forget,
            stats: BalloonStats::default(),
        })))
    }

    /// The part that runs on the event loop.
    pub fn handler(&self) -> Arc<Mutex<dyn Handler>> {
        self.0.clone()
    }

    /// Its counters. To be read on the event loop's thread.
    pub fn gauge(&self) -> Gauge {
        Gauge(self.0.clone())
    }
}

impl Gauge {
    /// As they are now; the guest is asked for new statistics, which come with the next call.
    pub fn read(&self) -> BalloonStats {
        let mut worker = lock(&self.0);
        let stats = worker.stats.clone();
        worker.run(|running, _| running.ask());
        stats
    }
}

impl VirtioDevice for Balloon {
    fn id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn name(&self) -> &'static str {
        "balloon"
    }

    fn features(&self) -> u64 {
        QUEUE_FEATURES | STATS_VQ | DEFLATE_ON_OOM | PAGE_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &[SMALL_QUEUE, SMALL_QUEUE, SMALL_QUEUE, REPORTING_QUEUE]
    }

    fn config(&self) -> &[u8] {
        // §5.5.4: num_pages, the target, and actual, which a driver writes only after it has put
        // pages in.
        &[0; 8]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut worker = lock(&self.0);
        let running = Running::new(activation, worker.forget.clone())?;
        let poller = worker.poller.clone();
        let kicks = worker.running.insert(running).kicks();
        let watched = kicks.into_iter().try_for_each(|(key, kick)| {
            // A failure leaves nothing watched: below.
            poller.add(kick, key, EventSet::IN)
        });
        watched.map_err(|error| {
            worker.stop();
            ActivateError::Host(Box::new(error))
        })
    }

    fn reset(&mut self) {
        lock(&self.0).stop();
    }
}

impl Worker {
    /// Lets the device work, and stops it at a fault, the guest's or the host's.
    fn run(&mut self, work: impl FnOnce(&mut Running, &mut BalloonStats) -> Result<(), Failure>) {
        let Some(running) = &mut self.running else {
            return;
        };
        if let Err(failure) = work(running, &mut self.stats) {
            failure.tell(running.signal());
            self.stop();
        }
    }

    fn stop(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        for (_, kick) in running.kicks() {
            // It is watched as long as the device runs; a failure leaves a key that nobody knows.
            let _ = self.poller.remove(kick);
        }
    }
}

impl Handler for Worker {
    fn ready(&mut self, key: u32, _events: EventSet) {
        self.run(|running, stats| match key {
            INFLATE => running.inflate(stats),
            DEFLATE => running.deflate(),
            STATISTICS => running.listen(stats),
            _ => running.take_reports(stats),
        });
    }
}

fn lock(worker: &Mutex<Worker>) -> MutexGuard<'_, Worker> {
    worker.lock().expect("a handler does not panic")
}
