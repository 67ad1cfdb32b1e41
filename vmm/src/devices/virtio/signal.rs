//! A device's way to its driver: the interrupt, its status register and the request for a reset.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::fault::{Fault, Notice, Observer};
use crate::irq::{Interrupt, IrqFd};

/// InterruptStatus bit 0 (VIRTIO 1.2 §4.2.2): a used buffer. The transport supplies it.
pub const USED_BUFFER: u32 = 1;
/// InterruptStatus bit 1: the configuration, or the request for a reset, has changed.
pub const CONFIG_CHANGE: u32 = 2;

struct Shared {
    device: &'static str,
    irq: IrqFd,
    /// [`CONFIG_CHANGE`] or nothing.
    status: AtomicU32,
    needs_reset: AtomicBool,
    generation: AtomicU32,
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
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            generation: AtomicU32::new(0),
            observer,
        }))
    }

    /// Tells the driver that a used ring has grown. Call it after the ring's index was stored.
    pub fn used_buffer(&self) {
        self.raise();
    }

    /// The guest's fault in a queue: asks for a reset (§2.1.2) and counts.
    pub fn fault(&self, fault: Fault) {
        self.note(fault);
        self.ask_for_reset();
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
        self.ask_for_reset();
    }

    /// Reports something else.
    pub fn observe(&self, notice: Notice<'_>) {
        (self.0.observer)(notice);
    }

    /// Whether the device waits for a reset.
    pub fn needs_reset(&self) -> bool {
        self.0.needs_reset.load(Ordering::SeqCst)
    }

    /// The interrupt's eventfd, for a vhost-user back end.
    pub fn call_fd(&self) -> &EventFd {
        self.0.irq.event_fd()
    }

    pub(super) fn interrupt_status(&self) -> u32 {
        self.0.status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.0.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.0.generation.load(Ordering::SeqCst)
    }

    pub(super) fn clear(&self) {
        self.0.needs_reset.store(false, Ordering::SeqCst);
        self.0.status.store(0, Ordering::SeqCst);
    }

    fn ask_for_reset(&self) {
        if !self.0.needs_reset.swap(true, Ordering::SeqCst) {
            // §4.2.2: the status before the interrupt, or the driver finds nothing to do.
            self.0.status.fetch_or(CONFIG_CHANGE, Ordering::SeqCst);
            self.raise();
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
