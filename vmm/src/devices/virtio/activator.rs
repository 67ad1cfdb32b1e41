//! The thread on which devices start and stop.
//!
//! ```text
//! vCPU ── STATUS: 0 or DRIVER_OK ──► Attended ──► the thread "device": MmioTransport ── activate, reset ──► device
//!      ◄───────────── done ────────
//! ```
//!
//! Starting a device takes system calls that a vCPU's thread has no other use for: descriptors are
//! copied and watched, taps changed, the fs process is asked over its socket. So the vCPU waits
//! while this thread makes them. The event loop's thread does not: it answers the shim while a back
//! end takes its time.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};

use bulkhead_vmm_config::Role;
use virtio_bindings::bindings::virtio_mmio::VIRTIO_MMIO_STATUS;

use super::mmio::{MmioTransport, lock};
use super::registers::DRIVER_OK;
use crate::bus::BusDevice;
use crate::seccomp::{self, SeccompError};

type Transport = Arc<Mutex<MmioTransport>>;

/// A step of a driver that waits to be taken.
struct Step {
    transport: Transport,
    status: [u8; 4],
    taken: Arc<(Mutex<bool>, Condvar)>,
}

#[derive(Default)]
struct Desk {
    steps: Mutex<VecDeque<Step>>,
    came: Condvar,
}

/// Takes drivers' steps on a thread of its own; copies are the same one.
#[derive(Clone, Default)]
pub struct Activator(Arc<Desk>);

impl Activator {
    /// Starts the thread, which runs as long as the process does. Until then steps wait.
    ///
    /// # Errors
    /// The host refuses threads.
    pub fn start(&self) -> Result<(), SeccompError> {
        let desk = self.0.clone();
        let work = move |()| -> () {
            loop {
                let step = next(&desk);
                lock(&step.transport).write(VIRTIO_MMIO_STATUS.into(), &step.status);
                *step.taken.0.lock().expect("nobody panics with it") = true;
                step.taken.1.notify_one();
            }
        };
        seccomp::spawn("device".to_owned(), Role::Device, || Ok(()), work).map(drop)
    }

    /// Has a write to the status register made; returns when it is.
    fn write(&self, transport: &Transport, status: [u8; 4]) {
        let taken = Arc::new((Mutex::new(false), Condvar::new()));
        let step = Step {
            transport: transport.clone(),
            status,
            taken: taken.clone(),
        };
        let steps = self.0.steps.lock();
        steps.expect("nobody panics with it").push_back(step);
        self.0.came.notify_one();
        let done = taken.0.lock().expect("nobody panics with it");
        let _done = taken
            .1
            .wait_while(done, |done| !*done)
            .expect("nobody panics with it");
    }
}

fn next(desk: &Desk) -> Step {
    let steps = desk.steps.lock().expect("nobody panics with it");
    let mut steps = desk
        .came
        .wait_while(steps, |steps| steps.is_empty())
        .expect("nobody panics with it");
    steps.pop_front().expect("there is one")
}

/// A transport as vCPUs see it.
pub struct Attended {
    transport: Transport,
    activator: Activator,
}

impl Attended {
    /// Leaves to `activator` what starts and stops the device.
    pub fn new(transport: Transport, activator: Activator) -> Attended {
        Attended {
            transport,
            activator,
        }
    }
}

impl BusDevice for Attended {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.transport).read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let starts_or_stops = |status: [u8; 4]| {
            let value = u32::from_le_bytes(status);
            value == 0 || value & u32::from(DRIVER_OK) != 0
        };
        match data.try_into() {
            Ok(status) if offset == u64::from(VIRTIO_MMIO_STATUS) && starts_or_stops(status) => {
                self.activator.write(&self.transport, status);
            }
            _ => lock(&self.transport).write(offset, data),
        }
    }
}
