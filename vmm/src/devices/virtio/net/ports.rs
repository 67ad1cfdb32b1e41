//! The machine's network devices and the places for more, for the thread that talks to the shim.

use std::sync::{Arc, Mutex};

use bulkhead_vmm_config::NetStats;
use thiserror::Error;
use virtio_bindings::bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

use super::{Backend, Counters, Net, Pairs, STATUS};
use crate::devices::virtio::mmio::{MmioTransport, PlaceTaken, lock};
use crate::devices::virtio::signal::Signal;

/// The word of the configuration space in which the status is, and the link's bit of it.
const LINK_WORD: u32 = VIRTIO_MMIO_CONFIG + (STATUS as u32 & !3);
const LINK_UP: u32 = VIRTIO_NET_S_LINK_UP << (8 * (STATUS % 4));

/// A device cannot be added.
#[derive(Debug, Error)]
pub enum PlugError {
    /// Every place has its device.
    #[error("the machine has no place for another network device")]
    Full(#[from] PlaceTaken),
}

/// Devices first, then empty places; both in the order of the shim.
pub struct NetPorts {
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    /// Of the transports, whose locks a driver can have held for long.
    signals: Vec<Signal>,
    counters: Vec<Counters>,
    /// Of the empty places, the next one last.
    spare: Vec<Pairs>,
    vcpus: usize,
}

impl NetPorts {
    /// Those of a machine with this many vCPUs, with the counters of the devices that it has now,
    /// and a pair of queues for each vCPU at each empty place.
    pub fn new(counters: Vec<Counters>, spare: Vec<Pairs>, vcpus: usize) -> NetPorts {
        NetPorts {
            transports: Vec::new(),
            signals: Vec::new(),
            counters,
            spare,
            vcpus,
        }
    }

    /// Adds the next device's, or the next place's.
    pub fn add(&mut self, transport: Arc<Mutex<MmioTransport>>) {
        self.signals.push(lock(&transport).signal());
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
        let pairs = self.spare.pop().ok_or(PlaceTaken)?;
        let device = Net::new(backend, pairs);
        let counters = device.counters();
        lock(transport).replace_device(Box::new(device))?;
        self.counters.push(counters);
        Ok(())
    }

    /// Tells the guest whether a device's link is up. `false`: there is no such device.
    pub fn set_link(&self, device: u32, up: bool) -> bool {
        let devices = &self.signals[..self.counters.len()];
        let signal = devices.get(device as usize);
        signal.map(|signal| set_link(signal, up)).is_some()
    }

    /// Of each device.
    pub fn stats(&self) -> Vec<NetStats> {
        self.counters.iter().map(Counters::snapshot).collect()
    }
}

pub(super) fn set_link(signal: &Signal, up: bool) {
    signal.change_config(LINK_WORD, LINK_UP, up);
}
