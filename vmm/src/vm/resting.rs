//! Devices when nothing moves, and when everything goes on.

use std::sync::{Arc, Mutex};

use bulkhead_vmm_config::GuestEnd;
use kvm_ioctls::{VcpuFd, VmFd};

use crate::arch::x86_64::interrupts::KvmRouter;
use crate::devices::ioapic::Ioapic;
use crate::devices::virtio::mmio::{MmioTransport, lock};
use crate::devices::virtio::vsock::Ports;
use crate::memory::Memory;
use crate::template::{BoardState, Saver, TemplateError};

/// The devices of a machine that may be saved, or that goes on.
pub struct Resting {
    ioapic: Arc<Mutex<Ioapic<KvmRouter>>>,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    ports: Ports,
}

impl Resting {
    /// All devices of a machine, the virtio devices in the order of their windows.
    pub fn new(
        ioapic: Arc<Mutex<Ioapic<KvmRouter>>>,
        transports: Vec<Arc<Mutex<MmioTransport>>>,
        ports: Ports,
    ) -> Resting {
        Resting {
            ioapic,
            transports,
            ports,
        }
    }

    /// Writes the machine, whose vCPUs have stopped, to the files of `saver`. The event loop has
    /// nothing to do.
    ///
    /// # Errors
    /// A device is not at rest; the files'.
    pub fn save(
        &self,
        saver: &Option<Saver>,
        (vm, vcpus): (&VmFd, &[VcpuFd]),
        memory: &Memory,
    ) -> Result<GuestEnd, TemplateError> {
        let Some(saver) = saver else {
            return Ok(GuestEnd::Stopped);
        };
        saver.save(vm, vcpus, memory, self.state()?)?;
        Ok(GuestEnd::Saved)
    }

    /// What they are to the guest.
    fn state(&self) -> Result<BoardState, TemplateError> {
        let connections = self.ports.at_rest().ok_or(TemplateError::Busy)?;
        let state = |(index, transport): (usize, &Arc<Mutex<MmioTransport>>)| {
            let state = lock(transport).at_rest();
            state.ok_or(TemplateError::Restless(index))
        };
        let transports = self.transports.iter().enumerate().map(state);
        Ok(BoardState {
            ioapic: self.ioapic.lock().expect("it does not panic").state(),
            transports: transports.collect::<Result<_, _>>()?,
            connections,
        })
    }

    /// Goes on with a guest to which they were that. Nobody has touched them before.
    ///
    /// # Errors
    /// They are other devices.
    pub fn resume(&self, state: &BoardState) -> Result<(), TemplateError> {
        let (theirs, ours) = (state.transports.len(), self.transports.len());
        if theirs != ours {
            return Err(TemplateError::Devices(theirs, ours));
        }
        let mut ioapic = self.ioapic.lock().expect("it does not panic");
        ioapic.resume(&state.ioapic)?;
        for (index, (transport, state)) in self.transports.iter().zip(&state.transports).enumerate()
        {
            let resumed = lock(transport).resume(state);
            resumed.map_err(|error| TemplateError::Device(index, error))?;
        }
        Ok(self.ports.resume(&state.connections)?)
    }
}
