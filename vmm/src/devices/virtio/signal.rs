//! A device's way to its driver: the interrupt, its status register and the request for a reset.

use std::error::Error;
use std::io;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS,
};
use vmm_sys_util::eventfd::EventFd;

use super::fault::{Fault, HOST, Notice, Observer};
use super::registers::Registers;
use super::registers::{DRIVER_OK, FAILED};
use crate::irq::{Interrupt, IrqFd};

/// InterruptStatus bit 0 (VIRTIO 1.2 §4.2.2): a used buffer. The transport supplies it.
pub const USED_BUFFER: u32 = 1;
/// InterruptStatus bit 1: the configuration, or the request for a reset, has changed.
pub const CONFIG_CHANGE: u32 = 2;
/// The device's own bit of the status register (§2.1).
pub const NEEDS_RESET: u32 = 0x40;

struct Shared {
    device: &'static str,
    irq: IrqFd,
    /// [`CONFIG_CHANGE`] and [`NEEDS_RESET`] are kept where the driver reads them.
    registers: Registers,
    observer: Observer,
}

/// Shared by a transport and its device; cheap to clone.
#[derive(Clone)]
pub struct Signal(Arc<Shared>);

impl Signal {
    /// A quiet signal of the device called `device`.
    pub fn new(device: &'static str, irq: IrqFd, observer: Observer) -> Signal {
        Signal(Arc::new(Shared {
            device,
            irq,
            registers: Registers::zeroed(),
            observer,
        }))
    }

    /// Tells the driver that a used ring has grown. Call it after the ring's index was stored.
    pub fn used_buffer(&self) {
        self.raise();
    }

    /// Sets bits of a word of the configuration space, or clears them, and tells the driver that runs if that is a change. Only
    /// one thread may do so.
    pub fn change_config(&self, word: u32, bits: u32, on: bool) {
        let registers = self.0.registers;
        let change = if on { Registers::set } else { Registers::clear };
        if (change(registers, word, bits) & bits != 0) == on {
            return;
        }
        self.config_changed();
    }

    /// Tells the driver that runs of a change in the configuration space, which was stored before.
    /// Only one thread may do so.
    pub fn config_changed(&self) {
        let registers = self.0.registers;
        let generation = registers.load(VIRTIO_MMIO_CONFIG_GENERATION);
        registers.store(VIRTIO_MMIO_CONFIG_GENERATION, generation.wrapping_add(1));
        let runs = u32::from(DRIVER_OK);
        let status = registers.load(VIRTIO_MMIO_STATUS);
        if status & (runs | u32::from(FAILED)) == runs {
            registers.set(VIRTIO_MMIO_INTERRUPT_STATUS, CONFIG_CHANGE);
            self.raise();
        }
    }

    /// The guest's fault in a queue: asks for a reset (§2.1.2) and counts.
    pub fn fault(&self, fault: Fault) {
        self.note(fault);
        self.ask_for_reset(fault.name());
    }

    /// Counts a guest's fault that the device goes on after.
    pub fn note(&self, fault: Fault) {
        (self.0.observer)(Notice::Fault {
            device: self.0.device,
            fault,
        });
    }

    /// The host's fault: asks for a reset and reports.
    pub fn failed(&self, error: &dyn Error) {
        (self.0.observer)(Notice::Failed {
            device: self.0.device,
            error,
        });
        self.ask_for_reset(HOST);
    }

    /// Reports something else.
    pub fn observe(&self, notice: Notice<'_>) {
        (self.0.observer)(notice);
    }

    /// What the driver reads.
    pub fn registers(&self) -> Registers {
        self.0.registers
    }

    /// The interrupt's eventfd, for a vhost-user back end.
    pub fn call_fd(&self) -> &EventFd {
        self.0.irq.event_fd()
    }

    /// [`USED_BUFFER`] is not taken back: see [`super::mmio::INTERRUPT_ACK`].
    pub(super) fn acknowledge(&self, bits: u32) {
        let bits = bits & CONFIG_CHANGE;
        self.0.registers.clear(VIRTIO_MMIO_INTERRUPT_STATUS, bits);
    }

    fn ask_for_reset(&self, reason: &'static str) {
        let registers = self.0.registers;
        if registers.set(VIRTIO_MMIO_STATUS, NEEDS_RESET) & NEEDS_RESET == 0 {
            // §4.2.2: the status before the interrupt, or the driver finds nothing to do.
            registers.set(VIRTIO_MMIO_INTERRUPT_STATUS, CONFIG_CHANGE);
            self.raise();
            (self.0.observer)(Notice::NeedsReset {
                device: self.0.device,
                reason,
            });
        }
    }

    fn raise(&self) {
        match self.0.irq.raise() {
            Ok(()) => {}
            // The counter is full: the line is raised already and nobody has taken it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => (self.0.observer)(Notice::Failed {
                device: self.0.device,
                error: &error,
            }),
        }
    }
}
