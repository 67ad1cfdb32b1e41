//! The machine's network devices and the places for more, for the thread that talks to the shim.

use std::sync::{Arc, Mutex, MutexGuard};

use bulkhead_vmm_config::NetStats;
use thiserror::Error;

use super::{Backend, Counters, Net};
use crate::devices::virtio::mmio::{MmioTransport, PlaceTaken};

/// A device cannot be added.
#[derive(Debug, Error)]
pub enum PlugError {
    /// Every place has its device.
    #[error("the machine has no place for another network device")]
    Full(#[from] PlaceTaken),
    /// The host has no descriptors.
    #[error("making the device's descriptors failed")]
    Host(#[from] std::io::Error),
}

/// Devices first, then empty places; both in the order of the shim.
pub struct NetPorts {
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    counters: Vec<Counters>,
    vcpus: usize,
}

impl NetPorts {
    /// Those of a machine with this many vCPUs, with the counters of the devices that it has now.
    pub fn new(counters: Vec<Counters>, vcpus: usize) -> NetPorts {
        NetPorts {
            transports: Vec::new(),
            counters,
            vcpus,
        }
    }

    /// Adds the next device's, or the next place's.
    pub fn add(&mut self, transport: Arc<Mutex<MmioTransport>>) {
        self.transports.push(transport);
    }

    /// How many pairs of queues a device may have.
    pub fn most_pairs(&self) -> usize {
        self.vcpus
    }

    /// Puts a device into the next empty place.
    ///
    /// # Errors
    /// There is none.
    pub fn plug(&mut self, backend: Backend) -> Result<(), PlugError> {
        let transport = self.transports.get(self.counters.len()).ok_or(PlaceTaken)?;
        let device = Net::new(backend)?;
        let counters = device.counters();
        lock(transport).replace_device(Box::new(device))?;
        self.counters.push(counters);
        Ok(())
    }

    /// Tells the guest whether a device's link is up. `false`: there is no such device.
    pub fn set_link(&self, device: u32, up: bool) -> bool {
        let device = device as usize;
        let exists = device < self.counters.len();
        if exists {
            lock(&self.transports[device]).set_link(up);
        }
        exists
    }

    /// Of each device.
    pub fn stats(&self) -> Vec<NetStats> {
        self.counters.iter().map(Counters::snapshot).collect()
    }
}

fn lock(transport: &Mutex<MmioTransport>) -> MutexGuard<'_, MmioTransport> {
    transport.lock().expect("a device does not panic")
}
