//! vhost-user's back end: what the VMM says about memory and queues. Each queue has its thread
//! ([`ring`]).
//!
//! The vhost crate reads the messages; its companion vhost-user-backend is not used because it only listens on or connects to
//! a path, and this process has neither paths nor a network, only one end of a socketpair.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::tree::Engine;
use crate::memory::keep_out_of_dumps;
use crate::seccomp::SeccompError;
use lent::{GuestMemory, Lending, Region};
use ring::{Call, Ring, Server};

#[cfg(test)]
mod fuzz;
mod lent;
mod parts;
mod ring;

/// Largest queue: room for the 256 pages of the largest request, several at once.
pub const MAX_QUEUE_SIZE: u16 = 1024;

const FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// The threads of the queues.
pub struct Servers(Vec<Server>);

impl Servers {
    /// Starts them.
    ///
    /// # Errors
    /// The host refuses threads, or what they must become.
    pub fn start(
        queues: usize,
        engine: &Arc<Engine>,
    ) -> std::result::Result<Servers, SeccompError> {
        let servers = (0..queues).map(|index| Server::start(index, engine.clone()));
        servers.collect::<std::result::Result<_, _>>().map(Servers)
    }
}

/// Serves the VMM at the other end of `socket` until it closes. By `lender` the VMM is asked for
/// pages that a template lends; see [`crate::lending`].
///
/// # Errors
/// The VMM broke the protocol, or the socket failed.
pub fn serve(socket: OwnedFd, lender: Option<OwnedFd>, servers: Servers) -> Result<()> {
    let backend = Arc::new(Mutex::new(Backend::new(servers, Lending::new(lender))));
    let mut handler = BackendReqHandler::from_stream(UnixStream::from(socket), backend.clone());
    let end = loop {
        match handler.handle_request() {
            Ok(()) => {}
            Err(Error::Disconnected | Error::PartialMessage | Error::SocketBroken(_)) => {
                break Ok(());
            }
            Err(error) => break Err(error),
        }
    };
    backend.lock().expect("no request panics").stop_all();
    end
}

/// A descriptor of the VMM's that is of no use.
fn refused(index: u32, what: &str, why: &dyn std::error::Error) -> Error {
    let text = format!("queue {index}: {what}: {why}");
    Error::ReqHandlerError(io::Error::other(text))
}

/// The VMM's addresses of a region of guest memory.
struct Mapping {
    user: u64,
    guest: u64,
    size: u64,
}

#[derive(Default)]
struct Vring {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next: u16,
    enabled: bool,
    kick: Option<File>,
    call: Call,
    running: Option<Server>,
}

struct Backend {
    servers: Vec<Server>,
    vrings: Vec<Vring>,
    memory: Arc<GuestMemory>,
    lending: Lending,
    mappings: Vec<Mapping>,
    features: u64,
}

impl Backend {
    fn new(Servers(servers): Servers, lending: Lending) -> Backend {
        Backend {
            vrings: servers.iter().map(|_| Vring::default()).collect(),
            servers,
            memory: Arc::new(GuestMemory::new()),
            lending,
            mappings: Vec::new(),
            features: 0,
        }
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings
            .get_mut(index as usize)
            .ok_or(Error::InvalidParam)
    }

    fn guest_address(&self, user: u64) -> Result<u64> {
        self.mappings
            .iter()
            .find_map(|mapping| {
                let offset = user.checked_sub(mapping.user)?;
                (offset < mapping.size).then(|| mapping.guest + offset)
            })
            .ok_or(Error::InvalidParam)
    }

    /// Has a ring served when all that it needs has been said.
    fn start(&mut self, index: u32) -> Result<()> {
        let memory = self.memory.clone();
        let event_idx = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let server = self.servers.get(index as usize).cloned();
        let server = server.ok_or(Error::InvalidParam)?;
        let vring = self.vring(index)?;
        let (true, None, Some(kick)) = (vring.enabled, &vring.running, &vring.kick) else {
            return Ok(());
        };
        if vring.size == 0 || vring.descriptors == 0 {
            return Ok(());
        }
        let kick = kick.try_clone().map_err(Error::ReqHandlerError)?;
        let ring = Ring {
            queue: vring.queue(&memory, event_idx)?,
            memory,
            kick,
            call: vring.call.clone(),
        };
        let given = server.give(ring);
        given.map_err(|error| refused(index, "the kick cannot be watched", &error))?;
        vring.running = Some(server);
        Ok(())
    }

    fn stop_all(&mut self) {
        for vring in &mut self.vrings {
            vring.stop();
        }
    }
}

impl Vring {
    fn queue(&self, memory: &GuestMemory, event_idx: bool) -> Result<Queue> {
        let invalid = |_| Error::InvalidParam;
        let mut queue = Queue::new(MAX_QUEUE_SIZE).map_err(invalid)?;
        queue.try_set_size(self.size).map_err(invalid)?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .map_err(invalid)?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.available))
            .map_err(invalid)?;
        queue
            .try_set_used_ring_address(GuestAddress(self.used))
            .map_err(invalid)?;
        queue.set_event_idx(event_idx);
        queue.set_next_avail(self.next);
        // SET_VRING_BASE tells one index only; the other is in the ring itself.
        let used = queue.used_idx(memory, Ordering::Acquire).map_err(invalid)?;
        queue.set_next_used(used.0);
        queue.set_ready(true);
        if queue.is_valid(memory) {
            Ok(queue)
        } else {
            Err(Error::InvalidParam)
        }
    }

    /// Ends the serving of the ring after the request that is served now.
    fn stop(&mut self) {
        if let Some(server) = self.running.take() {
            self.next = server.stop();
        }
    }
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all();
        for vring in &mut self.vrings {
            *vring = Vring::default();
        }
        self.features = 0;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.features = features;
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            // Without SET_VRING_ENABLE rings are enabled from the start.
            for index in 0..self.vrings.len() as u32 {
                self.vring(index)?.enabled = true;
                self.start(index)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        let running: Vec<u32> = (0..self.vrings.len() as u32)
            .filter(|index| self.vrings[*index as usize].running.is_some())
            .collect();
        self.stop_all();
        let lent = self.lending.lent().map_err(Error::ReqHandlerError)?;
        let mut mapped = Vec::new();
        let mut mappings = Vec::new();
        for (region, file) in regions.iter().zip(files) {
            let start = GuestAddress(region.guest_phys_addr);
            let mapping = region.mmap_region(file)?;
            keep_out_of_dumps(mapping.as_ptr(), mapping.size()).map_err(Error::ReqHandlerError)?;
            let mapping = GuestRegionMmap::new(mapping, start).ok_or(Error::InvalidParam)?;
            mapped.push(Region::new(mapping, lent.clone()));
            mappings.push(Mapping {
                user: region.user_addr,
                guest: region.guest_phys_addr,
                size: region.memory_size,
            });
        }
        let memory = GuestMemory::from_regions(mapped)
            .map_err(|error| Error::ReqHandlerError(io::Error::other(error)))?;
        self.memory = Arc::new(memory);
        self.mappings = mappings;
        running.into_iter().try_for_each(|index| self.start(index))
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(Error::InvalidParam);
        }
        self.vring(index)?.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = [descriptor, available, used].map(|user| self.guest_address(user));
        let [descriptors, available, used] = addresses;
        let vring = self.vring(index)?;
        (vring.descriptors, vring.available, vring.used) = (descriptors?, available?, used?);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.vring(index)?.next = base as u16;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(index)?;
        vring.stop();
        vring.kick = None;
        *vring.call.lock().expect("no code panics with it locked") = None;
        Ok(VhostUserVringState::new(index, u32::from(vring.next)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let vring = self.vring(index.into())?;
        vring.stop();
        vring.kick = fd;
        self.start(index.into())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let vring = self.vring(index.into())?;
        if let Some(fd) = &fd {
            // Interrupts that nobody takes would hold up the queue's thread, and with it whoever
            // stops the queue. No filter of the VMM's lets it change this afterwards.
            let flags = fcntl(fd, FcntlArg::F_GETFL).map_err(io::Error::from);
            let flags = OFlag::from_bits_retain(flags.map_err(Error::ReqHandlerError)?);
            if !flags.contains(OFlag::O_NONBLOCK) {
                let what = "writes to the interrupt would wait";
                return Err(refused(index.into(), what, &Errno::EINVAL));
            }
        }
        *vring.call.lock().expect("no code panics with it locked") = fd;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.vring(index.into()).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let vring = self.vring(index)?;
        vring.enabled = enable;
        if enable {
            self.start(index)
        } else {
            vring.stop();
            Ok(())
        }
    }

    // What follows belongs to protocol features that are not offered: the vhost crate refuses them before asking.

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(Error::InvalidOperation(
            "the VMM has the configuration space",
        ))
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation(
            "the VMM has the configuration space",
        ))
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("not a GPU"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("no reconnection"))
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Error::InvalidOperation("no reconnection"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(Error::InvalidOperation("memory comes as one table"))
    }

    fn add_mem_region(&mut self, _: &VhostUserSingleMemoryRegion, _: File) -> Result<()> {
        Err(Error::InvalidOperation("memory comes as one table"))
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidOperation("memory comes as one table"))
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("no state transfer"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("no state transfer"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory regions"))
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(Error::InvalidOperation("no dirty log"))
    }
}
