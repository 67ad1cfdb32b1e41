//! The file system device (VIRTIO 1.2 §5.11): its back end is another process, this is the vhost-user front end.
//!
//! ```text
//! driver ── kick ──► ioeventfd ─────────────────────────► fs process ── irqfd ──► driver
//!        ── registers ──► mmio ──► Fs ── vhost-user ────►   │ memfd: guest memory
//! ```
//!
//! After activation no thread of this process is on a request's way. Guest physical addresses serve as the front end's
//! "user addresses" of the protocol, which are only names that both sides agree on: the back end learns nothing of this
//! process's address space.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use thiserror::Error;
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vm_memory::{Address, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;

use super::device::{ActivateError, Activation, VirtioDevice};
use super::fault::{Notice, Observer};
use super::queue::VirtQueue;
use super::signal::Signal;
use crate::event_loop::{Handler, Poller};

const DEVICE: &str = "fs";
/// Bytes of a tag, §5.11.4.
const TAG_LEN: usize = 36;
const HIGH_PRIORITY_SIZE: u16 = 128;
/// Linux splits requests that need more descriptors than the queue has: 512 are 1 MiB in pages, and some.
const REQUEST_SIZE: u16 = 512;
/// Request queues that a device may have; Linux uses one for each vCPU at most.
pub const MAX_REQUEST_QUEUES: u32 = 32;

/// Features that the driver is offered if the back end has them; VERSION_1 is a must.
const WANTED: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Why the device has no back end.
#[derive(Debug, Error)]
pub enum FsError {
    /// The tag does not fit.
    #[error("virtio-fs tag {0:?} must have 1 to 36 bytes and no NUL")]
    Tag(String),
    /// The number of queues does not fit.
    #[error("virtio-fs device with {0} request queues: use 1 to {MAX_REQUEST_QUEUES}")]
    Queues(u32),
    /// The protocol failed in the named step.
    #[error("vhost-user back end of the file system: {step}; see the fs process's log")]
    Protocol {
        /// What was asked of the back end.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: vhost::Error,
    },
    /// The back end cannot do what virtio asks for.
    #[error(
        "vhost-user back end of the file system offers features {0:#x}, without what is needed"
    )]
    Features(u64),
    /// The memory cannot be shared.
    #[error("guest memory at {0:#x} is not a file: the file system's process cannot map it")]
    Memory(u64),
    /// The back end's process is gone.
    #[error("the file system's process closed its socket")]
    Gone,
    /// The socket cannot be watched.
    #[error("watch the file system's socket")]
    Watch(#[source] io::Error),
}

/// Notices that the back end has gone.
struct Watch {
    poller: Poller,
    socket: UnixStream,
    observer: Observer,
    gone: bool,
    signal: Option<Signal>,
}

/// The device. Its handler must be attached to the event loop that made the poller.
pub struct Fs {
    frontend: Frontend,
    watch: Arc<Mutex<Watch>>,
    config: [u8; TAG_LEN + 4],
    sizes: Vec<u16>,
    features: u64,
    /// Queues that the back end serves now.
    started: Vec<usize>,
}

impl Fs {
    /// Greets the back end at the other end of `socket` and waits for its answers.
    ///
    /// # Errors
    /// Bad parameters, or a back end that does not fit.
    pub fn new(
        tag: &str,
        socket: OwnedFd,
        request_queues: u32,
        poller: Poller,
        observer: Observer,
    ) -> Result<Fs, FsError> {
        let bytes = tag.as_bytes();
        if bytes.is_empty() || bytes.len() > TAG_LEN || bytes.contains(&0) {
            return Err(FsError::Tag(tag.to_owned()));
        }
        if !(1..=MAX_REQUEST_QUEUES).contains(&request_queues) {
            return Err(FsError::Queues(request_queues));
        }
        let mut config = [0; TAG_LEN + 4];
        config[..bytes.len()].copy_from_slice(bytes);
        config[TAG_LEN..].copy_from_slice(&request_queues.to_le_bytes());
        let mut sizes = vec![HIGH_PRIORITY_SIZE];
        sizes.resize(1 + request_queues as usize, REQUEST_SIZE);

        let socket = UnixStream::from(socket);
        let watched = socket.try_clone().map_err(FsError::Watch)?;
        let mut frontend = Frontend::from_stream(socket, sizes.len() as u64);
        let features = greet(&mut frontend)?;
        poller
            .add(&watched, 0, EventSet::empty())
            .map_err(FsError::Watch)?;
        let watch = Watch {
            poller,
            socket: watched,
            observer,
            gone: false,
            signal: None,
        };
        Ok(Fs {
            frontend,
            watch: Arc::new(Mutex::new(watch)),
            config,
            sizes,
            features,
            started: Vec::new(),
        })
    }

    /// The part that runs on the event loop.
    pub fn handler(&self) -> Arc<Mutex<dyn Handler>> {
        self.watch.clone()
    }

    fn start(&mut self, activation: &Activation) -> Result<(), FsError> {
        // PROTOCOL_FEATURES keeps the rings disabled until each is set up.
        let features = activation.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(features).step("set features")?;
        self.frontend
            .set_mem_table(&memory_table(&activation.memory)?)
            .step("share the guest's memory")?;
        for (index, queue) in activation.queues.iter().enumerate() {
            if let Some(queue) = queue {
                self.start_queue(index, queue, &activation.signal)?;
            }
        }
        Ok(())
    }

    fn start_queue(
        &mut self,
        index: usize,
        queue: &VirtQueue,
        signal: &Signal,
    ) -> Result<(), FsError> {
        let layout = queue.layout();
        let rings = VringConfigData {
            queue_max_size: self.sizes[index],
            queue_size: layout.size,
            flags: 0,
            desc_table_addr: layout.table,
            used_ring_addr: layout.used,
            avail_ring_addr: layout.available,
            log_addr: None,
        };
        let frontend = &mut self.frontend;
        frontend
            .set_vring_num(index, layout.size)
            .step("set a queue's size")?;
        frontend
            .set_vring_addr(index, &rings)
            .step("set a queue's address")?;
        frontend
            .set_vring_base(index, queue.next_available())
            .step("set a queue's start")?;
        frontend
            .set_vring_call(index, signal.call_fd())
            .step("set a queue's interrupt")?;
        // The back end starts the queue when it has the kick: from here on it must be stopped again.
        self.started.push(index);
        frontend
            .set_vring_kick(index, queue.kick())
            .step("set a queue's kick")?;
        frontend
            .set_vring_enable(index, true)
            .step("enable a queue")
    }

    fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().expect("a handler does not panic")
    }
}

impl VirtioDevice for Fs {
    fn id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn name(&self) -> &'static str {
        DEVICE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        // The lock is not held while the back end is asked: its death is noticed meanwhile.
        if self.watch().gone {
            return Err(ActivateError::Host(Box::new(FsError::Gone)));
        }
        self.start(&activation)
            .map_err(|error| ActivateError::Host(Box::new(error)))?;
        self.watch().signal = Some(activation.signal);
        Ok(())
    }

    fn reset(&mut self) {
        self.watch().signal = None;
        for index in std::mem::take(&mut self.started) {
            // GET_VRING_BASE stops the queue, and its answer says that it has stopped. Both only fail when the back end is
            // gone, which the watch reports, and then nothing touches the queue any more.
            let _ = self.frontend.set_vring_enable(index, false);
            let _ = self.frontend.get_vring_base(index);
        }
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.watch().unwatch();
    }
}

impl Watch {
    fn unwatch(&mut self) {
        // A hang-up is reported for ever. Where it is not watched any more, ENOENT says so.
        let _ = self.poller.remove(&self.socket);
    }
}

impl Handler for Watch {
    fn ready(&mut self, _key: u32, events: EventSet) {
        if self.gone || !events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            return;
        }
        self.gone = true;
        self.unwatch();
        match &self.signal {
            Some(signal) => signal.failed(&FsError::Gone),
            None => (self.observer)(Notice::Failed {
                device: DEVICE,
                error: &FsError::Gone,
            }),
        }
    }
}

/// Negotiates the protocol; returns the features that the driver is offered.
fn greet(frontend: &mut Frontend) -> Result<u64, FsError> {
    frontend.set_owner().step("take ownership")?;
    let features = frontend.get_features().step("get features")?;
    let needed = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | 1 << VIRTIO_F_VERSION_1;
    if features & needed != needed {
        return Err(FsError::Features(features));
    }
    let wanted = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ;
    let offered = frontend
        .get_protocol_features()
        .step("get protocol features")?;
    let accepted = offered & wanted;
    frontend
        .set_protocol_features(accepted)
        .step("set protocol features")?;
    if accepted.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        // Without it a refused request would be silent.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    Ok(features & WANTED)
}

fn memory_table(memory: &GuestMemoryMmap) -> Result<Vec<VhostUserMemoryRegionInfo>, FsError> {
    let region = |region: &vm_memory::GuestRegionMmap| {
        let start = region.start_addr().raw_value();
        let file = region.file_offset().ok_or(FsError::Memory(start))?;
        Ok(VhostUserMemoryRegionInfo {
            guest_phys_addr: start,
            memory_size: region.len(),
            userspace_addr: start,
            mmap_offset: file.start(),
            mmap_handle: file.file().as_raw_fd(),
        })
    };
    memory.iter().map(region).collect()
}

/// Names the step of the protocol that failed.
trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, FsError>;
}

impl<T> Step<T> for vhost::Result<T> {
    fn step(self, step: &'static str) -> Result<T, FsError> {
        self.map_err(|source| FsError::Protocol { step, source })
    }
}

#[cfg(test)]
pub(super) mod tests;
