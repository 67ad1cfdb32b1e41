//! The socket device (VIRTIO 1.2 §5.10): streams that the guest dials, joined to descriptors that the host offered.
//!
//! ```text
//! guest: connect(2, port) ── REQUEST ──► is the port offered? ── no ──► RST
//!                                              │ yes, once
//!                                              ▼
//! guest's stream ◄── rx, tx queues ──► connection ◄── recvmsg, sendmsg ──► the offer's socket
//! ```
//!
//! Nothing here opens, names or dials anything on the host, and the host dials nothing in the guest. Bytes go between the
//! socket and guest memory in one system call; only what a full socket did not take is copied, at most [`BUF_ALLOC`] bytes
//! a connection, and then the guest's credit is used up.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::epoll::EventSet;

use super::device::{ActivateError, Activation, QUEUE_FEATURES, VirtioDevice};
use super::fault::Fault;
use crate::event_loop::{Handler, Poller};

mod connection;
mod host;
mod muxer;
pub mod packet;
mod ring;
#[cfg(test)]
pub(super) mod tests;

pub use connection::ConnectionState;
pub use host::BUF_ALLOC;

use muxer::{Muxer, Offers, Queues};

/// Most sockets held at once: offers, connections, and ends that the host has not read out.
pub const MAX_SOCKETS: usize = 1024;

const DEVICE: &str = "vsock";
/// Linux fills the rx ring with 4 KiB buffers when it starts: a power of two that costs a guest 512 KiB.
const RING_SIZE: u16 = 128;
/// Linux has eight event buffers.
const EVENT_RING_SIZE: u16 = 8;

const RX: u16 = 0;
const TX: u16 = 1;
const EVENTS: u16 = 2;
/// Keys of sockets start here; those of queues are the queues' indices.
const FIRST_TOKEN: u32 = 16;

/// Why a port cannot be offered.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OfferError {
    /// An offer of this port still waits for its dial.
    #[error("vsock port {0} is offered already; withdraw it first")]
    Offered(u32),
    /// [`MAX_SOCKETS`] is reached.
    #[error("{MAX_SOCKETS} vsock connections are open or offered; close some first")]
    Full,
}

/// The connections of a saved guest cannot go on.
#[derive(Debug, Error)]
pub enum ResumeError {
    /// Nobody of this machine waits for one.
    #[error("its connection to vsock port {0} has nobody to go on with")]
    NotOffered(u32),
    /// No driver runs.
    #[error("its vsock driver does not run")]
    Stopped,
    /// A socket cannot be watched.
    #[error("watch a socket")]
    Watch(#[source] io::Error),
}

/// What [`Ports::withdraw`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withdrawn {
    /// An offer that was not dialled.
    Offer,
    /// A connection, which was reset.
    Connection,
    /// Neither.
    Nothing,
}

struct Worker {
    poller: Poller,
    offers: Offers,
    muxer: Option<Muxer>,
}

/// The device. Its handler must be attached to the event loop that made the poller.
pub struct Vsock {
    worker: Arc<Mutex<Worker>>,
    config: [u8; 8],
}

/// The machine's access to a device's ports; cheap to clone.
#[derive(Clone)]
pub struct Ports(Arc<Mutex<Worker>>);

impl Vsock {
    /// A device that was not activated yet.
    pub fn new(poller: Poller) -> Vsock {
        let worker = Worker {
            poller,
            offers: Offers::new(),
            muxer: None,
        };
        Vsock {
            worker: Arc::new(Mutex::new(worker)),
            // §5.10.4: guest_cid.
            config: packet::GUEST_CID.to_le_bytes(),
        }
    }

    /// The part that runs on the event loop.
    pub fn handler(&self) -> Arc<Mutex<dyn Handler>> {
        self.worker.clone()
    }

    /// The part that the machine controls.
    pub fn ports(&self) -> Ports {
        Ports(self.worker.clone())
    }
}

impl Ports {
    /// Lets the guest dial `port` once. `socket` is one end of an `AF_UNIX` stream socketpair.
    ///
    /// Offers outlive a reset of the device; connections do not.
    ///
    /// # Errors
    /// The port is offered already, or there are too many sockets.
    pub fn offer(&self, port: u32, socket: OwnedFd) -> Result<(), OfferError> {
        let mut worker = lock(&self.0);
        let sockets = worker.muxer.as_ref().map_or(0, Muxer::sockets);
        if worker.offers.contains_key(&port) {
            return Err(OfferError::Offered(port));
        }
        if worker.offers.len() + sockets >= MAX_SOCKETS {
            return Err(OfferError::Full);
        }
        worker.offers.insert(port, socket);
        Ok(())
    }

    /// The guest's connections, if the device has nothing to do.
    pub fn at_rest(&self) -> Option<Vec<ConnectionState>> {
        let worker = lock(&self.0);
        worker
            .muxer
            .as_ref()
            .map_or(Some(Vec::new()), Muxer::at_rest)
    }

    /// Joins the connections of a saved guest, whose driver was resumed, to what is offered here.
    ///
    /// # Errors
    /// Something is not offered.
    pub fn resume(&self, connections: &[ConnectionState]) -> Result<(), ResumeError> {
        let mut worker = lock(&self.0);
        let Worker { offers, muxer, .. } = &mut *worker;
        for connection in connections {
            let port = connection.host_port;
            let socket = offers.remove(&port).ok_or(ResumeError::NotOffered(port))?;
            let muxer = muxer.as_mut().ok_or(ResumeError::Stopped)?;
            muxer
                .resume(connection, socket)
                .map_err(ResumeError::Watch)?;
        }
        Ok(())
    }

    /// Takes an offer back, or resets the connection that was made on it.
    pub fn withdraw(&self, port: u32) -> Withdrawn {
        let mut worker = lock(&self.0);
        if worker.offers.remove(&port).is_some() {
            return Withdrawn::Offer;
        }
        let mut reset = false;
        worker.run(|muxer, _| {
            reset = muxer.reset_port(port)?;
            Ok(())
        });
        if reset {
            Withdrawn::Connection
        } else {
            Withdrawn::Nothing
        }
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn name(&self) -> &'static str {
        DEVICE
    }

    fn features(&self) -> u64 {
        QUEUE_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[RING_SIZE, RING_SIZE, EVENT_RING_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queues = Queues {
            rx: activation.take_queue(RX)?,
            tx: activation.take_queue(TX)?,
            events: activation.take_queue(EVENTS)?,
        };
        let mut worker = lock(&self.worker);
        let poller = worker.poller.clone();
        let muxer = Muxer::new(activation.memory, activation.signal, queues, poller.clone());
        let [rx, tx] = worker.muxer.insert(muxer).kicks();
        let watched = poller
            .add(rx.kick(), RX.into(), EventSet::IN)
            .and_then(|()| poller.add(tx.kick(), TX.into(), EventSet::IN));
        // A kick that stays watched, and that nobody takes, would keep the thread busy.
        watched.map_err(|error| {
            worker.stop();
            ActivateError::Host(Box::new(error))
        })
    }

    fn reset(&mut self) {
        lock(&self.worker).stop();
    }
}

impl Worker {
    /// Lets the device work, and stops it at the guest's fault.
    fn run(&mut self, work: impl FnOnce(&mut Muxer, &mut Offers) -> Result<(), Fault>) {
        let Some(muxer) = &mut self.muxer else { return };
        if let Err(fault) = work(muxer, &mut self.offers) {
            muxer.signal().fault(fault);
            self.stop();
        }
    }

    fn stop(&mut self) {
        let Some(muxer) = self.muxer.take() else {
            return;
        };
        for queue in muxer.kicks() {
            // It is watched as long as the device runs; a failure leaves a key that nobody knows.
            let _ = self.poller.remove(queue.kick());
        }
        muxer.close();
    }
}

impl Handler for Worker {
    fn ready(&mut self, key: u32, events: EventSet) {
        self.run(|muxer, offers| match key {
            key if key == u32::from(RX) => muxer.rx_ready(),
            key if key == u32::from(TX) => muxer.tx_ready(offers),
            token => muxer.host_ready(token, events),
        });
    }
}

fn lock(worker: &Mutex<Worker>) -> MutexGuard<'_, Worker> {
    worker.lock().expect("a handler does not panic")
}
