//! The entropy device (VIRTIO 1.2 §5.4): fills whatever the driver offers from getrandom(2).

use std::sync::{Arc, Mutex};

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::chain::Chain;
use super::device::{ActivateError, Activation, QUEUE_FEATURES, VirtioDevice};
use super::fault::Fault;
use super::queue::VirtQueue;
use super::signal::Signal;
use super::sys;
use crate::event_loop::{Handler, Poller};

/// Most bytes that one chain gets (§5.4.6.1 lets the device write fewer than asked), so that no request runs long.
const MAX_BYTES: usize = 64 * 1024;
const QUEUE_SIZE: u16 = 64;
/// Chains that one wake-up serves before others get their turn.
const TURN: usize = 64;

#[derive(Debug, Error)]
enum Error {
    #[error(transparent)]
    Guest(#[from] Fault),
    #[error("get random bytes for the guest")]
    Host(#[from] std::io::Error),
}

struct Running {
    memory: GuestMemoryMmap,
    requests: VirtQueue,
    signal: Signal,
    chain: Chain,
}

struct Worker {
    poller: Poller,
    running: Option<Running>,
}

/// The device. Its handler must be attached to the event loop that made the poller.
pub struct Rng(Arc<Mutex<Worker>>);

impl Rng {
    /// A device that was not activated yet.
    pub fn new(poller: Poller) -> Rng {
        Rng(Arc::new(Mutex::new(Worker {
            poller,
            running: None,
        })))
    }

    /// The part that runs on the event loop.
    pub fn handler(&self) -> Arc<Mutex<dyn Handler>> {
        self.0.clone()
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn features(&self) -> u64 {
        QUEUE_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let mut worker = self.0.lock().expect("a handler does not panic");
        let requests = activation.take_queue(0)?;
        worker
            .poller
            .add(requests.kick(), 0, EventSet::IN)
            .map_err(|error| ActivateError::Host(Box::new(error)))?;
        worker.running = Some(Running {
            memory: activation.memory,
            requests,
            signal: activation.signal,
            chain: Chain::default(),
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.0.lock().expect("a handler does not panic").stop();
    }
}

impl Worker {
    fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            // It is watched as long as the device runs; a failure leaves a key that nobody knows.
            let _ = self.poller.remove(running.requests.kick());
        }
    }
}

impl Handler for Worker {
    fn ready(&mut self, _key: u32, _events: EventSet) {
        let Some(running) = &mut self.running else {
            return;
        };
        match running.serve() {
            Ok(()) => return,
            Err(Error::Guest(fault)) => running.signal.fault(fault),
            Err(error @ Error::Host(_)) => running.signal.failed(&error),
        }
        self.stop();
    }
}

impl Running {
    fn serve(&mut self) -> Result<(), Error> {
        self.requests.take_kick();
        self.requests.suppress_kicks()?;
        for served in 0.. {
            if served == TURN {
                self.requests.kick_self();
                break;
            }
            if self.requests.pop(&mut self.chain)? {
                self.fill()?;
            } else if !self.requests.ask_for_kick()? {
                break;
            }
        }
        Ok(self.requests.signal_used()?)
    }

    fn fill(&mut self) -> Result<(), Error> {
        let buffers = self.chain.only_writable()?;
        let count = MAX_BYTES.min(buffers.length() as usize);
        let mut filled = Ok(());
        buffers.each(&self.memory, 0, count, |slice| {
            if filled.is_ok() {
                filled = sys::fill_random(&slice);
            }
        })?;
        filled?;
        Ok(self.requests.push(&self.chain, count as u32)?)
    }
}

#[cfg(test)]
pub(super) mod tests;
