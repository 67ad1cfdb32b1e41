//! What every virtio device is to its transport.

use std::error::Error;

use thiserror::Error;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestMemoryMmap;

use super::fault::Fault;
use super::queue::VirtQueue;
use super::signal::Signal;

/// Features of a device whose queues are [`VirtQueue`]s. No indirect descriptors: fewer of the guest's words to check.
pub const QUEUE_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Everything that a device gets at DRIVER_OK and gives up at reset.
pub struct Activation {
    /// Guest RAM.
    pub memory: GuestMemoryMmap,
    /// The accepted features, a subset of [`VirtioDevice::features`] with VERSION_1.
    pub features: u64,
    /// By index; `None` where the driver made none ready.
    pub queues: Vec<Option<VirtQueue>>,
    /// The way to the driver.
    pub signal: Signal,
}

impl Activation {
    /// Takes the queue that the device cannot do without.
    ///
    /// # Errors
    /// The driver did not make it ready.
    pub fn take_queue(&mut self, index: u16) -> Result<VirtQueue, Fault> {
        self.queues
            .get_mut(usize::from(index))
            .and_then(Option::take)
            .ok_or(Fault::QueueMissing(index))
    }
}

/// Why a device could not be activated; it asks for a reset instead.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The guest's fault.
    #[error(transparent)]
    Guest(#[from] Fault),
    /// The host's fault.
    #[error("activate the device")]
    Host(#[source] Box<dyn Error + Send + Sync>),
}

/// A virtio device. Called with the transport locked, while a vCPU waits: nothing here may wait for
/// the guest.
pub trait VirtioDevice: Send {
    /// VIRTIO 1.2 §5.
    fn id(&self) -> u32;
    /// A word for counters and logs.
    fn name(&self) -> &'static str;
    /// All offered features, ring features included.
    fn features(&self) -> u64;
    /// Largest size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// The device's configuration space at the start; reads past its end are zeros. No driver writes into it.
    fn config(&self) -> &[u8];
    /// Starts the queues.
    ///
    /// # Errors
    /// The device needs a reset.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Back to the state before [`VirtioDevice::activate`], from any state. When it returns, the device touches neither
    /// guest memory nor the interrupt.
    fn reset(&mut self);
}
