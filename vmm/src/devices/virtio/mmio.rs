//! virtio-mmio version 2 (VIRTIO 1.2 §4.2): the register file between a driver and its device.
//!
//! ```text
//!  0 ──► ACKNOWLEDGE ──► DRIVER ──► FEATURES_OK ──► DRIVER_OK          one step a write, nothing is ever cleared
//!                          │            │               │
//!                   driver features   queues        all of it frozen
//!                    writable here   writable here
//!  0 ◄────────────────── reset, from any state
//! ```
//!
//! Kicks do not come here: each queue has an eventfd that KVM signals (ioeventfd on QueueNotify with the queue's index). Nor do
//! reads, where the host can show the guest the page that they are answered from ([`Registers`]).

use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_mmio::*;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::device::{ActivateError, Activation, VirtioDevice};
use super::fault::{Fault, Observer};
use super::queue::{Layout, MAX_SIZE, VirtQueue};
use super::registers::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, Registers};
use super::signal::{NEEDS_RESET, Signal, USED_BUFFER};
use crate::bus::BusDevice;
use crate::irq::IrqFd;

/// Offset of the register that a driver kicks a queue by; its value is the queue's index.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;
/// Offset of the register that a driver acknowledges interrupts by.
///
/// The used-buffer bit reads 1 as long as a driver runs: a back end in another process raises the interrupt itself, and a
/// driver only looks at its rings if the bit is set. So acknowledging [`USED_BUFFER`] alone changes nothing, and an ioeventfd
/// that nobody reads may swallow that write, which spares an exit to user space for each interrupt.
pub const INTERRUPT_ACK: u64 = VIRTIO_MMIO_INTERRUPT_ACK as u64;

/// "virt", §4.2.2.
const MAGIC: u32 = 0x7472_6976;
/// Ours, "BLKH"; nothing depends on it.
const VENDOR: u32 = 0x484b_4c42;

/// §2.1: the steps of the status register in their order.
const STEPS: [u8; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

/// The status of a driver that has taken all of them.
const RUNNING: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

/// The transport, for whoever has it next.
pub fn lock(transport: &Mutex<MmioTransport>) -> MutexGuard<'_, MmioTransport> {
    transport.lock().expect("a device does not panic")
}

/// There is a device already, or its place has too few queues.
#[derive(Debug, Error)]
#[error("there is no free place for a device")]
pub struct PlaceTaken;

/// A queue while the driver sets it up.
struct QueueSetup {
    max_size: u16,
    layout: Layout,
    ready: bool,
    kick: EventFd,
}

/// What a driver has made of a transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Of the device that it drives (VIRTIO 1.2 §5).
    device: u32,
    status: u8,
    /// The features that it has accepted.
    accepted: u64,
    /// Each queue's place, and whether it is ready.
    queues: Vec<(Layout, bool)>,
}

impl TransportState {
    /// Address and bytes of what its queues are made of.
    pub fn rings(&self) -> impl Iterator<Item = (u64, u64)> {
        let ready = self.queues.iter().filter(|(_, ready)| *ready);
        ready.flat_map(|(layout, _)| layout.parts())
    }
}

/// A driver of another machine cannot go on with a device.
#[derive(Debug, Error)]
pub enum ResumeError {
    /// There is another device.
    #[error("its device is {0} with {1} queues, this one is {2} with {3}")]
    Device(u32, usize, u32, usize),
    /// The driver was about to start the device, or to reset it.
    #[error("its driver is in the middle of something: status {0:#x}")]
    Status(u8),
    /// What the driver accepted is not offered here.
    #[error("features {0:#x} that its driver uses are not offered")]
    Features(u64),
    /// A queue is where no memory is.
    #[error("queue {0} is not in memory")]
    Layout(usize),
    /// The device cannot start.
    #[error("its device does not start")]
    Activate(#[from] ActivateError),
}

/// The registers of one device.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemoryMmap,
    signal: Signal,
    status: u8,
    offered: u64,
    accepted: u64,
    /// The driver wrote a feature bit past the 64 that exist.
    beyond_features: bool,
    offered_select: u32,
    accepted_select: u32,
    queue_select: u32,
    queues: Vec<QueueSetup>,
}

impl MmioTransport {
    /// The transport of a device that was not activated yet.
    ///
    /// # Errors
    /// eventfd(2)'s.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        irq: IrqFd,
        observer: Observer,
    ) -> std::io::Result<MmioTransport> {
        let queues = device.queue_sizes().iter().map(|&max_size| {
            assert!(max_size.is_power_of_two() && max_size <= MAX_SIZE);
            Ok(QueueSetup {
                max_size,
                layout: Layout::default(),
                ready: false,
                // A back end in another process has it too, and may fill or empty it at any moment.
                kick: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            })
        });
        let transport = MmioTransport {
            queues: queues.collect::<std::io::Result<_>>()?,
            signal: Signal::new(device.name(), irq, observer),
            offered: device.features(),
            device,
            memory,
            status: 0,
            accepted: 0,
            beyond_features: false,
            offered_select: 0,
            accepted_select: 0,
            queue_select: 0,
        };
        transport.show_constants();
        transport.show_selected();
        Ok(transport)
    }

    /// What the driver reads; to be shown to the guest at the transport's window, read-only.
    pub fn registers(&self) -> Registers {
        self.signal.registers()
    }

    /// The way to the driver, which no lock of the transport is in.
    pub fn signal(&self) -> Signal {
        self.signal.clone()
    }

    /// The kicks, by queue index, for ioeventfds at [`QUEUE_NOTIFY`] with the index as 4-byte data match.
    ///
    /// # Errors
    /// dup(2)'s.
    pub fn queue_events(&self) -> std::io::Result<Vec<EventFd>> {
        self.queues
            .iter()
            .map(|queue| queue.kick.try_clone())
            .collect()
    }

    /// Puts another device in the place of one that no driver has touched (its id is 0). It has at most as many queues.
    ///
    /// # Errors
    /// The place is taken, or too small.
    pub fn replace_device(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), PlaceTaken> {
        let sizes = device.queue_sizes();
        if self.device.id() != 0 || sizes.len() > self.queues.len() {
            return Err(PlaceTaken);
        }
        // A driver was not to touch it; what a hostile one has written is forgotten.
        self.reset();
        self.queues.truncate(sizes.len());
        for (queue, &max_size) in self.queues.iter_mut().zip(sizes) {
            assert!(max_size.is_power_of_two() && max_size <= MAX_SIZE);
            queue.max_size = max_size;
        }
        self.offered = device.features();
        self.device = device;
        self.show_constants();
        self.show_selected();
        Ok(())
    }

    /// What the driver has made of it, unless it, or the device, is in the middle of something.
    pub fn at_rest(&self) -> Option<TransportState> {
        let status = self.registers().load(VIRTIO_MMIO_STATUS) as u8;
        (status == 0 || status == RUNNING).then(|| TransportState {
            device: self.device.id(),
            status,
            accepted: self.accepted,
            queues: self
                .queues
                .iter()
                .map(|queue| (queue.layout, queue.ready))
                .collect(),
        })
    }

    /// Goes on with a driver that has done all that: nobody has touched the transport before. Each
    /// queue is looked at once, as if it had been kicked.
    ///
    /// # Errors
    /// It is the driver of another device, or the device cannot start.
    pub fn resume(&mut self, state: &TransportState) -> Result<(), ResumeError> {
        let (id, count) = (self.device.id(), self.queues.len());
        if (state.device, state.queues.len()) != (id, count) {
            let (device, queues) = (state.device, state.queues.len());
            return Err(ResumeError::Device(device, queues, id, count));
        }
        // Of a place without a device the driver has read that it is none.
        if state.status == 0 {
            return Ok(());
        }
        if state.status != RUNNING {
            return Err(ResumeError::Status(state.status));
        }
        self.accepted = state.accepted;
        if !self.features_acceptable() {
            return Err(ResumeError::Features(state.accepted));
        }
        for (index, (queue, &(layout, ready))) in
            self.queues.iter_mut().zip(&state.queues).enumerate()
        {
            if ready && !layout.is_valid(&self.memory, queue.max_size) {
                return Err(ResumeError::Layout(index));
            }
            (queue.layout, queue.ready) = (layout, ready);
        }
        self.set_status(state.status);
        self.registers()
            .set(VIRTIO_MMIO_INTERRUPT_STATUS, USED_BUFFER);
        self.start(true)?;
        for queue in self.queues.iter().filter(|queue| queue.ready) {
            // The only error is a full counter, which wakes as well.
            let _ = queue.kick.write(1);
        }
        // An interrupt that was under way when the machine was saved.
        self.signal.used_buffer();
        self.show_selected();
        Ok(())
    }

    /// Everything that no write changes. What is not stored reads zero: there is no VIRTIO_F_RING_RESET.
    fn show_constants(&self) {
        let registers = self.registers();
        registers.store(VIRTIO_MMIO_MAGIC_VALUE, MAGIC);
        registers.store(VIRTIO_MMIO_VERSION, 2);
        registers.store(VIRTIO_MMIO_DEVICE_ID, self.device.id());
        registers.store(VIRTIO_MMIO_VENDOR_ID, VENDOR);
        // §4.2.2: no shared memory region has the length -1.
        for offset in [
            VIRTIO_MMIO_SHM_LEN_LOW,
            VIRTIO_MMIO_SHM_LEN_HIGH,
            VIRTIO_MMIO_SHM_BASE_LOW,
            VIRTIO_MMIO_SHM_BASE_HIGH,
        ] {
            registers.store(offset, u32::MAX);
        }
        registers.store_config(self.device.config());
    }

    /// What the select registers choose.
    fn show_selected(&self) {
        let registers = self.registers();
        let queue = self.selected();
        let size = queue.map_or(0, |queue| queue.max_size.into());
        let ready = queue.map_or(0, |queue| queue.ready.into());
        let offered = half(self.offered, self.offered_select);
        registers.store(VIRTIO_MMIO_DEVICE_FEATURES, offered);
        registers.store(VIRTIO_MMIO_QUEUE_NUM_MAX, size);
        registers.store(VIRTIO_MMIO_QUEUE_READY, ready);
    }

    fn write_register(&mut self, offset: u16, value: u32) {
        match u32::from(offset) {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.offered_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.accepted_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(offset, value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NUM
            | VIRTIO_MMIO_QUEUE_DESC_LOW
            | VIRTIO_MMIO_QUEUE_DESC_HIGH
            | VIRTIO_MMIO_QUEUE_AVAIL_LOW
            | VIRTIO_MMIO_QUEUE_AVAIL_HIGH
            | VIRTIO_MMIO_QUEUE_USED_LOW
            | VIRTIO_MMIO_QUEUE_USED_HIGH => self.place_queue(offset, value),
            VIRTIO_MMIO_QUEUE_READY => self.ready_queue(offset, value),
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify_queue(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.signal.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            VIRTIO_MMIO_SHM_SEL => {}
            _ => self.signal.note(Fault::Register(offset)),
        }
        self.show_selected();
    }

    /// Adds the driver's bits to those that it reads; the device may add its own at any time.
    fn set_status(&mut self, bits: u8) {
        self.status |= bits;
        self.registers().set(VIRTIO_MMIO_STATUS, bits.into());
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let bad = Fault::Status(self.status, value as u8);
        // A driver adds its bit to what it has read, where the device's own bit may be set.
        let Ok(value) = u8::try_from(value & !NEEDS_RESET) else {
            return self.signal.note(bad);
        };
        let step = STEPS.into_iter().find(|step| self.status & step == 0);
        match value ^ self.status {
            0 => {}
            // Any state may fail; the device then waits for its reset and does nothing else.
            FAILED if value & FAILED != 0 => self.set_status(FAILED),
            bit if self.status & FAILED == 0 && Some(bit) == step => self.advance(bit),
            _ => self.signal.note(bad),
        }
    }

    fn advance(&mut self, step: u8) {
        if step == FEATURES_OK && !self.features_acceptable() {
            // §2.2.2: the bit stays clear, which the driver reads back.
            return self.signal.note(Fault::Features(self.accepted));
        }
        self.set_status(step);
        if step == DRIVER_OK {
            // See INTERRUPT_ACK.
            self.registers()
                .set(VIRTIO_MMIO_INTERRUPT_STATUS, USED_BUFFER);
            self.activate();
        }
    }

    fn features_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0
            && self.accepted & 1 << VIRTIO_F_VERSION_1 != 0
            && !self.beyond_features
    }

    fn activate(&mut self) {
        match self.start(false) {
            Ok(()) => {}
            Err(ActivateError::Guest(fault)) => self.signal.fault(fault),
            Err(ActivateError::Host(error)) => self.signal.failed(&*error),
        }
    }

    /// Gives the device its queues, from their start or from where they were left.
    fn start(&mut self, resumed: bool) -> Result<(), ActivateError> {
        let event_idx = self.accepted & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queue = |setup: &QueueSetup| -> Result<Option<VirtQueue>, ActivateError> {
            if !setup.ready {
                return Ok(None);
            }
            let kick = setup.kick.try_clone();
            let kick = kick.map_err(|error| ActivateError::Host(Box::new(error)))?;
            let (memory, signal) = (self.memory.clone(), self.signal.clone());
            let mut queue = VirtQueue::new(setup.layout, event_idx, memory, kick, signal)?;
            if resumed {
                queue.resume()?;
            }
            Ok(Some(queue))
        };
        let queues = self.queues.iter().map(queue).collect::<Result<_, _>>()?;
        self.device.activate(Activation {
            memory: self.memory.clone(),
            features: self.accepted,
            queues,
            signal: self.signal.clone(),
        })
    }

    fn reset(&mut self) {
        self.device.reset();
        // The device is quiet: nobody else stores here now.
        self.registers().store(VIRTIO_MMIO_INTERRUPT_STATUS, 0);
        self.registers().store(VIRTIO_MMIO_STATUS, 0);
        self.status = 0;
        self.accepted = 0;
        self.beyond_features = false;
        self.offered_select = 0;
        self.accepted_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            queue.layout = Layout::default();
            queue.ready = false;
            // An old kick must not wake the next driver's device. An error: there was none.
            let _ = queue.kick.read();
        }
    }

    fn accept_features(&mut self, offset: u16, value: u32) {
        if self.status & (DRIVER | FEATURES_OK | FAILED) != DRIVER {
            return self.signal.note(Fault::Frozen(offset));
        }
        match self.accepted_select {
            0 => self.accepted = self.accepted & !0xffff_ffff | u64::from(value),
            1 => self.accepted = self.accepted & 0xffff_ffff | u64::from(value) << 32,
            _ => self.beyond_features |= value != 0,
        }
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    /// The selected queue, where queues may be written (§3.1.1 step 7).
    fn writable_queue(&mut self) -> Option<&mut QueueSetup> {
        let in_setup = self.status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK;
        let index = usize::try_from(self.queue_select).ok()?;
        self.queues.get_mut(index).filter(|_| in_setup)
    }

    fn place_queue(&mut self, offset: u16, value: u32) {
        let Some(queue) = self.writable_queue().filter(|queue| !queue.ready) else {
            return self.signal.note(Fault::Frozen(offset));
        };
        let layout = &mut queue.layout;
        match u32::from(offset) {
            // A size past 16 bits is no power of two that fits: 0 keeps it refused.
            VIRTIO_MMIO_QUEUE_NUM => layout.size = u16::try_from(value).unwrap_or(0),
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut layout.table, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut layout.table, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut layout.available, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut layout.available, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut layout.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut layout.used, value),
            _ => unreachable!("write_register lists the same registers"),
        }
    }

    fn ready_queue(&mut self, offset: u16, value: u32) {
        let memory = self.memory.clone();
        let index = self.queue_select as u16;
        // Linux says so once more of each queue when it lets a device go, which it has reset before.
        if value == 0 && self.selected().is_some_and(|queue| !queue.ready) {
            return;
        }
        let Some(queue) = self.writable_queue() else {
            return self.signal.note(Fault::Frozen(offset));
        };
        let valid = queue.layout.is_valid(&memory, queue.max_size);
        queue.ready = value == 1 && valid;
        if value == 1 && !valid {
            self.signal.note(Fault::QueueLayout(index));
        }
    }

    /// Only where no ioeventfd took the kick: tests, and values that are no queue's index.
    fn notify_queue(&mut self, value: u32) {
        let running = self.status & (DRIVER_OK | FAILED) == DRIVER_OK;
        let queue = usize::try_from(value)
            .ok()
            .and_then(|index| self.queues.get(index))
            .filter(|queue| running && queue.ready);
        match queue {
            // The only error is a full counter, which wakes as well.
            Some(queue) => drop(queue.kick.write(1)),
            None => self.signal.note(Fault::Register(QUEUE_NOTIFY as u16)),
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.registers().read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (register(offset, data.len()), data.try_into()) {
            (Some(register), Ok(value)) => self.write_register(register, u32::from_le_bytes(value)),
            _ => self.signal.note(Fault::Register(offset as u16)),
        }
    }
}

/// §4.2.2.2: registers are 32 bits wide and aligned.
fn register(offset: u64, width: usize) -> Option<u16> {
    let aligned = width == 4 && offset.is_multiple_of(4);
    u16::try_from(offset).ok().filter(|_| aligned)
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;
