//! Memory that is plugged into a running machine, and unplugged again (VIRTIO 1.2 §5.15).
//!
//! ```text
//! shim ── PlugMemory ──► requested size ── interrupt ──► driver
//! driver ── PLUG ──► is there, and no more than requested? ──► noted
//!        ── UNPLUG ──► a hole in the file of guest memory ──► noted
//! ```
//!
//! The region is a range of guest physical addresses behind RAM that no memory map lists. The
//! driver chooses which of its blocks it plugs; as it does so it may use them. A block that was
//! unplugged is the host's: a hole. What KVM knows of the region is as much of its start as the shim has
//! ever asked for: a guest that does not keep to what it has plugged has no more than that, and the
//! pod's cgroup counts what it touches (docs/adr/0019-sizes-that-move.md).
//!
//! What is plugged stays plugged when a driver resets the device (§5.15.5.2); the next one asks for
//! the state, or unplugs all.

use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard};

use bulkhead_vmm_config::PluggedStats;
use thiserror::Error;
use virtio_bindings::bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use vmm_sys_util::epoll::EventSet;

use super::device::{ActivateError, Activation, QUEUE_FEATURES, VirtioDevice};
use super::signal::Signal;
use crate::event_loop::{Handler, Poller};

mod blocks;
mod request;
mod running;
#[cfg(test)]
pub(super) mod tests;

use blocks::Blocks;
use running::Running;

/// [`VirtioDevice::name`].
pub const NAME: &str = "mem";

/// §5.15.3: nobody may touch what is unplugged.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// A block: a huge page of ours, and of Linux, which plugs nothing smaller.
const BLOCK: u64 = 2 << 20;

/// Linux asks for one thing at a time.
const QUEUE: u16 = 8;

/// Fields of the configuration space (§5.15.4).
const USABLE_REGION_SIZE: u32 = 32;
const PLUGGED_SIZE: u32 = 40;
const REQUESTED_SIZE: u32 = 48;
const CONFIG: usize = 56;

/// Makes the first so many bytes of the region memory of the machine, whole units of the region.
pub type Show = Box<dyn FnMut(u64) -> Result<(), Box<dyn Error + Send + Sync>> + Send>;

/// A [`Plug`] whose device has no transport yet.
pub struct Unwired(Arc<Mutex<Worker>>);

/// Guest physical addresses in which memory may be plugged.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// The first.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes by which the guest's kernel adds memory; start and size are multiples.
    pub unit: u64,
}

/// The device cannot ask for so much.
#[derive(Debug, Error)]
pub enum PlugError {
    /// The region has an end.
    #[error("{mib} MiB cannot be plugged, up to {most} MiB can")]
    TooMuch {
        /// What was asked for.
        mib: u64,
        /// The region.
        most: u64,
    },
    /// The host refuses.
    #[error("the memory cannot be shown to the guest")]
    Show(#[source] Box<dyn Error + Send + Sync>),
}

/// All of it outlives a reset.
struct Size {
    blocks: Blocks,
    /// Bytes from the region's start in which blocks may be plugged; never fewer than before.
    usable: u64,
    /// Bytes that the driver is to have plugged.
    requested: u64,
    refused: u64,
}

struct Worker {
    poller: Poller,
    running: Option<Running>,
    size: Size,
}

/// The device. Its handler must be attached to the event loop that made the poller.
pub struct Mem {
    worker: Arc<Mutex<Worker>>,
    config: [u8; CONFIG],
}

/// By which the machine asks for another size. To be used on the event loop's thread.
pub struct Plug {
    worker: Arc<Mutex<Worker>>,
    /// Of the device's transport.
    signal: Signal,
    show: Show,
}

impl Mem {
    /// A device with nothing plugged, that was not activated yet.
    pub fn new(region: Region, poller: Poller) -> Mem {
        let mut config = [0; CONFIG];
        config[..8].copy_from_slice(&BLOCK.to_le_bytes());
        config[16..24].copy_from_slice(&region.start.to_le_bytes());
        config[24..32].copy_from_slice(&region.size.to_le_bytes());
        let size = Size {
            blocks: Blocks::new(region),
            usable: 0,
            requested: 0,
            refused: 0,
        };
        let worker = Worker {
            poller,
            running: None,
            size,
        };
        Mem {
            worker: Arc::new(Mutex::new(worker)),
            config,
        }
    }

    /// The part that runs on the event loop.
    pub fn handler(&self) -> Arc<Mutex<dyn Handler>> {
        self.worker.clone()
    }

    /// The machine's access to it, to be wired.
    pub fn unwired(&self) -> Unwired {
        Unwired(self.worker.clone())
    }
}

impl Unwired {
    /// `signal` is that of the device's transport, `show` is called before a driver hears of more.
    pub fn wire(self, signal: Signal, show: Show) -> Plug {
        Plug {
            worker: self.0,
            signal,
            show,
        }
    }
}

impl Plug {
    /// Asks the driver to have `mib` MiB plugged, in whole blocks. It acts when it can, if it wants
    /// to.
    ///
    /// # Errors
    /// The region is smaller, or KVM refuses the memory: then nothing has changed.
    pub fn request(&mut self, mib: u64) -> Result<(), PlugError> {
        let size = &mut lock(&self.worker).size;
        let region = size.blocks.region();
        let bytes = mib
            .checked_mul(1 << 20)
            .and_then(|bytes| bytes.checked_next_multiple_of(BLOCK))
            .filter(|&bytes| bytes <= region.size)
            .ok_or(PlugError::TooMuch {
                mib,
                most: region.size >> 20,
            })?;
        // Linux adds whole units, and uses of them what it has plugged.
        let usable = bytes.next_multiple_of(region.unit).max(size.usable);
        if usable > size.usable {
            (self.show)(usable).map_err(PlugError::Show)?;
        }
        if bytes == size.requested {
            return Ok(());
        }
        size.usable = usable;
        size.requested = bytes;
        let registers = self.signal.registers();
        for (field, value) in [(USABLE_REGION_SIZE, usable), (REQUESTED_SIZE, bytes)] {
            registers.store_long(VIRTIO_MMIO_CONFIG + field, value);
        }
        self.signal.config_changed();
        Ok(())
    }

    /// As it is now.
    pub fn stats(&self) -> PluggedStats {
        let size = &lock(&self.worker).size;
        PluggedStats {
            requested_bytes: size.requested,
            plugged_bytes: size.blocks.plugged(),
            refused: size.refused,
        }
    }
}

impl VirtioDevice for Mem {
    fn id(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn features(&self) -> u64 {
        QUEUE_FEATURES | UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let running = Running::new(activation)?;
        let mut worker = lock(&self.worker);
        let poller = worker.poller.clone();
        let kick = worker.running.insert(running).queue().kick();
        let watched = poller.add(kick, 0, EventSet::IN);
        watched.map_err(|error| {
            worker.running = None;
            ActivateError::Host(Box::new(error))
        })
    }

    fn reset(&mut self) {
        lock(&self.worker).stop();
    }
}

impl Worker {
    fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            // It is watched as long as the device runs; a failure leaves a key that nobody knows.
            let _ = self.poller.remove(running.queue().kick());
        }
    }
}

impl Handler for Worker {
    fn ready(&mut self, _key: u32, _events: EventSet) {
        let Some(running) = &mut self.running else {
            return;
        };
        if let Err(failure) = running.serve(&mut self.size) {
            failure.tell(running.signal());
            self.stop();
        }
    }
}

fn lock(worker: &Mutex<Worker>) -> MutexGuard<'_, Worker> {
    worker.lock().expect("a handler does not panic")
}
