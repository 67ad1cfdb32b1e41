//! The network device (VIRTIO 1.2 §5.1) on a tap interface.
//!
//! ```text
//!  receiveq1  ◄── receive ──── tap queue 1        thread net-0 for the first pair of every device
//!  transmitq1 ─── transmit ──► tap queue 1        (control: on the first one's)
//!  receiveq2 ...                                  thread net-1 for the second
//! ```
//!
//! The threads are there before the guest's first instruction, for devices that come later too
//! ([`Workers`]).
//!
//! The guest gets every frame that the tap has, in the tap's form: with checksums to be finished and segments to be made where the
//! driver has agreed. A slot for a device that may come later is a device with the id 0, which drivers ignore (§4.2.2).

mod control;
mod header;
mod limit;
mod offload;
mod pace;
mod pair;
mod ports;
mod receive;
mod stats;
mod tap;
#[cfg(test)]
pub(super) mod tests;
mod transmit;

use std::sync::{Arc, Mutex, MutexGuard};

use bulkhead_vmm_config::{NetStats, RateLimit, Role};
use virtio_bindings::bindings::virtio_net::*;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

pub use self::ports::{NetPorts, PlugError};
pub use self::tap::{Tap, TapError};
use self::{
    control::Control,
    limit::Limiter,
    pace::Pace,
    pair::{Pair, Running},
    receive::Receiver,
    stats::Stats,
    transmit::Transmitter,
};
use super::device::{ActivateError, Activation, QUEUE_FEATURES, VirtioDevice};
use super::fault::Fault;
use crate::event_loop::EventLoop;
use crate::seccomp::{self, SeccompError};

/// What counters and logs call it.
pub const NAME: &str = "net";

/// Buffers that wait for frames; with them the driver's memory is spent.
const RECEIVE_QUEUE: u16 = 256;
/// 28 frames of 64 KiB in pages: there are no indirect descriptors.
const TRANSMIT_QUEUE: u16 = 512;
const CONTROL_QUEUE: u16 = 64;

/// The configuration space (§5.1.4): mac, status, max_virtqueue_pairs, mtu.
const CONFIG: usize = 12;
const STATUS: usize = 6;

/// What a device is on.
#[derive(Debug)]
pub struct Backend {
    /// One for each pair of queues.
    pub taps: Vec<Tap>,
    /// The guest's own address.
    pub mac: [u8; 6],
    /// Largest packet.
    pub mtu: u16,
    /// What the guest may receive.
    pub receive_limit: RateLimit,
    /// What the guest may send.
    pub transmit_limit: RateLimit,
}

/// Sizes of the queues of a device with this many pairs.
fn queue_sizes(pairs: usize) -> Vec<u16> {
    let mut sizes = [RECEIVE_QUEUE, TRANSMIT_QUEUE].repeat(pairs);
    sizes.push(CONTROL_QUEUE);
    sizes
}

/// A place for a device that may come later.
pub struct Slot(Vec<u16>);

impl Slot {
    /// A place for a device of at most this many pairs of queues.
    pub fn new(pairs: usize) -> Slot {
        Slot(queue_sizes(pairs))
    }
}

impl VirtioDevice for Slot {
    fn id(&self) -> u32 {
        0
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.0
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        // Not reached: VERSION_1 is not offered, without which no driver gets past FEATURES_OK.
        Err(Fault::Features(activation.features).into())
    }

    fn reset(&mut self) {}
}

/// The pairs of queues of one device, each on a thread of its own.
pub type Pairs = Vec<Arc<Mutex<Pair>>>;

/// The threads of all network devices of a machine: one for the first pairs of queues, one for the
/// second, and so on.
#[derive(Default)]
pub struct Workers {
    threads: Vec<EventLoop>,
    pairs: Pairs,
}

impl Workers {
    /// Makes places for a device of this many pairs.
    ///
    /// # Errors
    /// epoll_create1(2)'s.
    pub fn pairs(&mut self, count: usize) -> std::io::Result<Pairs> {
        while self.threads.len() < count {
            self.threads.push(EventLoop::new()?);
        }
        let place = |events: &mut EventLoop| {
            let pair = Arc::new(Mutex::new(Pair::new(events.next_poller())));
            events.attach(pair.clone());
            pair
        };
        let pairs: Pairs = self.threads.iter_mut().take(count).map(place).collect();
        self.pairs.extend(pairs.iter().cloned());
        Ok(pairs)
    }

    /// The pairs of all devices: while one is locked, its thread serves nothing.
    pub fn all(&self) -> Pairs {
        self.pairs.clone()
    }

    /// Starts the threads.
    ///
    /// # Errors
    /// The host refuses threads.
    pub fn start(self) -> Result<(), SeccompError> {
        for (index, mut events) in self.threads.into_iter().enumerate() {
            let serve = move |()| {
                events
                    .run(|| false)
                    .expect("epoll_wait(2) on a descriptor that is open does not fail");
            };
            // It runs as long as the process does.
            seccomp::spawn(format!("net-{index}"), Role::Net, || Ok(()), serve)?;
        }
        Ok(())
    }
}

fn lock(pair: &Mutex<Pair>) -> MutexGuard<'_, Pair> {
    pair.lock().expect("a handler does not panic")
}

/// The device.
pub struct Net {
    taps: Vec<Arc<Tap>>,
    limiters: [Limiter; 2],
    pace: Pace,
    pairs: Pairs,
    stats: Arc<Stats>,
    sizes: Vec<u16>,
    features: u64,
    config: [u8; CONFIG],
}

impl Net {
    /// A device that was not activated yet, with at least as many `pairs` as the backend has taps.
    pub fn new(backend: Backend, pairs: Pairs) -> Net {
        let taps: Vec<Arc<Tap>> = backend.taps.into_iter().map(Arc::new).collect();
        assert!(taps.len() <= pairs.len());
        let count = taps.len() as u16;
        let mut features = QUEUE_FEATURES | offload::features(&taps[0]);
        for feature in [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_RX,
            VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        ] {
            features |= 1 << feature;
        }
        if count > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        let mut config = [0; CONFIG];
        config[..STATUS].copy_from_slice(&backend.mac);
        let words = [VIRTIO_NET_S_LINK_UP as u16, count, backend.mtu];
        for (place, word) in config[STATUS..].chunks_mut(2).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        Net {
            sizes: queue_sizes(taps.len()),
            taps,
            limiters: [backend.receive_limit, backend.transmit_limit].map(Limiter::new),
            pace: Pace::default(),
            pairs,
            stats: Arc::default(),
            features,
            config,
        }
    }

    /// Its counters, from any thread.
    pub fn counters(&self) -> Counters {
        Counters(self.stats.clone())
    }

    /// §5.1.2: the control queue comes behind all pairs, of which a driver without VIRTIO_NET_F_MQ knows one.
    fn used_pairs(&self, features: u64) -> usize {
        match features & 1 << VIRTIO_NET_F_MQ {
            0 => 1,
            _ => self.taps.len(),
        }
    }

    fn start_pair(
        &mut self,
        index: usize,
        activation: &mut Activation,
    ) -> Result<(), ActivateError> {
        let features = activation.features;
        let pairs = self.used_pairs(features);
        let queue = 2 * index as u16;
        let receive = activation.take_queue(queue)?;
        let transmit = activation.take_queue(queue + 1)?;
        let control = match index {
            0 if features & 1 << VIRTIO_NET_F_CTRL_VQ != 0 => {
                let queue = activation.take_queue(2 * pairs as u16)?;
                let taps = self.taps[..pairs].to_vec();
                let memory = activation.memory.clone();
                let pace = self.pace.clone();
                Some(Control::new(queue, memory, taps, features, pace))
            }
            _ => None,
        };
        let tap = &self.taps[index];
        let memory = || activation.memory.clone();
        let [receive_limit, transmit_limit] = self.limiters.clone();
        let (tap, stats) = (tap.clone(), self.stats.clone());
        let running = Running::new(
            Receiver::new(
                receive,
                memory(),
                tap.clone(),
                stats.clone(),
                receive_limit,
                features,
            ),
            Transmitter::new(
                transmit,
                memory(),
                tap.clone(),
                stats,
                transmit_limit,
                features,
            ),
            control,
            tap,
            activation.signal.clone(),
        );
        lock(&self.pairs[index]).start(running)
    }
}

/// A device's counters.
#[derive(Clone, Debug)]
pub struct Counters(Arc<Stats>);

impl Counters {
    /// As they are now.
    pub fn snapshot(&self) -> NetStats {
        self.0.snapshot()
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let host = |error| ActivateError::Host(Box::new(error));
        self.pace.wait();
        let flags = offload::flags(activation.features);
        self.taps[0].set_offloads(flags).map_err(host)?;
        for tap in &self.taps[1..] {
            // §5.1.6.5.5: one pair, until the driver asks for more.
            tap.attach_queue(false).map_err(host)?;
        }
        for index in 0..self.used_pairs(activation.features) {
            if let Err(error) = self.start_pair(index, &mut activation) {
                self.reset();
                return Err(error);
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        for pair in &self.pairs {
            lock(pair).stop();
        }
    }
}
