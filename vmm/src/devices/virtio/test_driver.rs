//! A driver for tests: does the status handshake, lays out rings in guest memory and speaks to a device through its
//! registers, as a guest would, without KVM.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::device::VirtioDevice;
use super::fault::{FaultCounters, Notice, Observer};
use super::mmio::MmioTransport;
use crate::bus::BusDevice;
use crate::event_loop::{EventLoop, Handler, Poller};
use crate::irq::IrqFd;

pub(crate) const RAM: u64 = 1 << 20;
/// A hole as below 4 GiB, then RAM again.
pub(crate) const HIGH_RAM: u64 = 4 << 20;
pub(crate) const RAM_SIZE: u64 = 1 << 20;
const RINGS: u64 = 0x1000;
const RINGS_STEP: u64 = 0x8000;
/// Buffers of tests lie here, behind all rings.
pub(crate) const BUFFERS: u64 = RAM / 2;

pub(crate) const WRITE: u16 = 2;
pub(crate) const NEXT: u16 = 1;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) mod reg {
    pub(crate) const DEVICE_FEATURES: u64 = 0x10;
    pub(crate) const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub(crate) const DRIVER_FEATURES: u64 = 0x20;
    pub(crate) const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub(crate) const QUEUE_SEL: u64 = 0x30;
    pub(crate) const QUEUE_NUM_MAX: u64 = 0x34;
    pub(crate) const QUEUE_NUM: u64 = 0x38;
    pub(crate) const QUEUE_READY: u64 = 0x44;
    pub(crate) const QUEUE_NOTIFY: u64 = 0x50;
    pub(crate) const INTERRUPT_STATUS: u64 = 0x60;
    pub(crate) const INTERRUPT_ACK: u64 = 0x64;
    pub(crate) const STATUS: u64 = 0x70;
    pub(crate) const QUEUE_DESC: u64 = 0x80;
    pub(crate) const QUEUE_AVAIL: u64 = 0x90;
    pub(crate) const QUEUE_USED: u64 = 0xa0;
}

/// Guest RAM with a hole in it, a part of one file as in a machine.
pub(crate) fn memory() -> GuestMemoryMmap {
    let file = File::from(memfd_create("RAM", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(2 * RAM_SIZE).unwrap();
    let range = |start, offset| {
        let file = FileOffset::new(file.try_clone().unwrap(), offset);
        (GuestAddress(start), RAM_SIZE as usize, Some(file))
    };
    GuestMemoryMmap::from_ranges_with_files([range(0, 0), range(HIGH_RAM, RAM_SIZE)]).unwrap()
}

/// Counts faults, ports and failures.
#[derive(Clone, Default)]
pub(crate) struct Notices {
    pub(crate) faults: FaultCounters,
    pub(crate) connected: Arc<Mutex<Vec<u32>>>,
    pub(crate) failures: Arc<Mutex<Vec<String>>>,
    pub(crate) resets: Arc<Mutex<Vec<(&'static str, &'static str)>>>,
}

impl Notices {
    pub(crate) fn observer(&self) -> Observer {
        let notices = self.clone();
        Arc::new(move |notice| match notice {
            Notice::Fault { device, fault } => notices.faults.count(device, &fault),
            Notice::Failed { error, .. } => {
                notices.failures.lock().unwrap().push(error.to_string());
            }
            Notice::NeedsReset { device, reason } => {
                notices.resets.lock().unwrap().push((device, reason));
            }
            Notice::Connected { port } => notices.connected.lock().unwrap().push(port),
        })
    }

    pub(crate) fn count(&self, name: &str) -> u64 {
        self.faults.snapshot().get(name).copied().unwrap_or(0)
    }
}

/// One ring as the driver sees it.
pub(crate) struct DriverQueue {
    pub(crate) size: u16,
    pub(crate) table: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    memory: GuestMemoryMmap,
    next_free: u16,
    next_available: u16,
    next_used: u16,
}

impl DriverQueue {
    fn new(index: u64, size: u16, memory: &GuestMemoryMmap) -> DriverQueue {
        let base = RINGS + index * RINGS_STEP;
        DriverQueue {
            size,
            table: base,
            available: base + 0x4000,
            used: base + 0x5000,
            memory: memory.clone(),
            next_free: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    pub(crate) fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let descriptor = Descriptor::new(address, len, flags, next);
        let at = GuestAddress(self.table + 16 * u64::from(index));
        self.memory.write_obj(descriptor, at).unwrap();
    }

    /// The same queue with another table, to be named by an indirect descriptor.
    pub(crate) fn with_table(&self, table: u64) -> DriverQueue {
        DriverQueue {
            table,
            memory: self.memory.clone(),
            ..*self
        }
    }

    /// Says that there are more available than fit, by so many.
    pub(crate) fn overrun(&mut self, past: u16) {
        let more = self.size.wrapping_add(past);
        self.set_available(self.next_available.wrapping_add(more));
    }

    /// Writes a chain of (address, length, flags) in the next descriptors and makes it available.
    pub(crate) fn add(&mut self, pieces: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_free;
        for (nth, &(address, len, flags)) in pieces.iter().enumerate() {
            let index = self.next_free;
            self.next_free = (index + 1) % self.size;
            let last = nth + 1 == pieces.len();
            let flags = if last { flags } else { flags | NEXT };
            self.descriptor(index, address, len, flags, self.next_free);
        }
        self.publish(head);
        head
    }

    pub(crate) fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        let at = GuestAddress(self.available + 4 + 2 * slot);
        self.memory.write_obj(head, at).unwrap();
        self.set_available(self.next_available.wrapping_add(1));
    }

    pub(crate) fn set_available(&mut self, index: u16) {
        self.next_available = index;
        let at = GuestAddress(self.available + 2);
        self.memory.store(index, at, Ordering::Release).unwrap();
    }

    pub(crate) fn set_used_event(&self, index: u16) {
        let at = GuestAddress(self.available + 4 + 2 * u64::from(self.size));
        self.memory.write_obj(index, at).unwrap();
    }

    /// Whether the driver has to kick for what it makes available next (§2.7.10.1).
    pub(crate) fn wants_kick(&self) -> bool {
        let at = GuestAddress(self.used + 4 + 8 * u64::from(self.size));
        let event: u16 = self.memory.read_obj(at).unwrap();
        event == self.next_available
    }

    pub(crate) fn take_used(&mut self) -> Option<(u32, u32)> {
        let at = GuestAddress(self.used + 2);
        let index: u16 = self.memory.load(at, Ordering::Acquire).unwrap();
        if index == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        let at = GuestAddress(self.used + 4 + 8 * slot);
        let element: [u32; 2] = self.memory.read_obj(at).unwrap();
        Some((element[0], element[1]))
    }
}

/// A transport with its driver.
pub(crate) struct Driver {
    pub(crate) transport: MmioTransport,
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) notices: Notices,
    pub(crate) irq: EventFd,
    pub(crate) queues: Vec<DriverQueue>,
}

impl Driver {
    pub(crate) fn new(device: impl VirtioDevice + 'static, memory: GuestMemoryMmap) -> Driver {
        Driver::with_notices(device, memory, Notices::default())
    }

    pub(crate) fn with_notices(
        device: impl VirtioDevice + 'static,
        memory: GuestMemoryMmap,
        notices: Notices,
    ) -> Driver {
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let line = IrqFd::new(irq.try_clone().unwrap());
        let (device, observer) = (Box::new(device), notices.observer());
        Driver {
            transport: MmioTransport::new(device, memory.clone(), line, observer).unwrap(),
            memory,
            notices,
            irq,
            queues: Vec::new(),
        }
    }

    /// The same driver, its memory and rings, in front of another device of the kind.
    pub(crate) fn go_on(
        self,
        device: impl VirtioDevice + 'static,
    ) -> Result<Driver, super::mmio::ResumeError> {
        let state = self.transport.at_rest().expect("it is at rest");
        let mut moved = Driver::new(device, self.memory.clone());
        moved.queues = self.queues;
        moved.transport.resume(&state)?;
        Ok(moved)
    }

    pub(crate) fn read(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    pub(crate) fn offered(&mut self) -> u64 {
        self.write(reg::DEVICE_FEATURES_SEL, 0);
        let low = self.read(reg::DEVICE_FEATURES);
        self.write(reg::DEVICE_FEATURES_SEL, 1);
        u64::from(low) | u64::from(self.read(reg::DEVICE_FEATURES)) << 32
    }

    /// Reset up to FEATURES_OK, with the given features; returns the status.
    pub(crate) fn negotiate(&mut self, features: u64) -> u32 {
        self.queues.clear();
        for status in [0, 1, 3] {
            self.write(reg::STATUS, status);
        }
        self.write(reg::DRIVER_FEATURES_SEL, 0);
        self.write(reg::DRIVER_FEATURES, features as u32);
        self.write(reg::DRIVER_FEATURES_SEL, 1);
        self.write(reg::DRIVER_FEATURES, (features >> 32) as u32);
        self.write(reg::STATUS, 0xb);
        self.read(reg::STATUS)
    }

    /// Places a queue at its maximal size; returns whether it is ready.
    pub(crate) fn place(&mut self, index: u32) -> bool {
        self.write(reg::QUEUE_SEL, index);
        let size = self.read(reg::QUEUE_NUM_MAX) as u16;
        let queue = DriverQueue::new(index.into(), size, &self.memory);
        let zeros = vec![0; RINGS_STEP as usize];
        self.memory
            .write_slice(&zeros, GuestAddress(queue.table))
            .unwrap();
        self.write(reg::QUEUE_NUM, size.into());
        for (register, address) in [
            (reg::QUEUE_DESC, queue.table),
            (reg::QUEUE_AVAIL, queue.available),
            (reg::QUEUE_USED, queue.used),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(reg::QUEUE_READY, 1);
        self.queues.push(queue);
        self.read(reg::QUEUE_READY) == 1
    }

    /// The whole handshake of a well-behaved driver with all features and queues.
    pub(crate) fn start(&mut self) {
        let features = self.offered();
        self.start_with(features);
    }

    pub(crate) fn start_with(&mut self, features: u64) {
        assert_eq!(self.negotiate(features), 0xb);
        for index in 0.. {
            self.write(reg::QUEUE_SEL, index);
            if self.read(reg::QUEUE_NUM_MAX) == 0 {
                break;
            }
            assert!(self.place(index), "queue {index}");
        }
        self.write(reg::STATUS, 0xf);
        assert_eq!(self.read(reg::STATUS), 0xf);
    }

    pub(crate) fn notify(&mut self, queue: u32) {
        self.write(reg::QUEUE_NOTIFY, queue);
    }

    /// How often the line was raised since the last call.
    pub(crate) fn interrupts(&self) -> u64 {
        self.irq.read().unwrap_or(0)
    }

    pub(crate) fn needs_reset(&mut self) -> bool {
        self.read(reg::STATUS) & 0x40 != 0
    }
}

/// Rings to end a [`Loop::settle`].
struct Bell(EventFd, Arc<AtomicBool>);

impl Handler for Bell {
    fn ready(&mut self, _key: u32, _events: EventSet) {
        self.0.read().unwrap();
        self.1.store(true, Ordering::SeqCst);
    }
}

/// Counts how often another handler is called.
struct Counted(Arc<Mutex<dyn Handler>>, Arc<AtomicUsize>);

impl Handler for Counted {
    fn ready(&mut self, key: u32, events: EventSet) {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.lock().unwrap().ready(key, events);
    }
}

/// An event loop that a test steps by hand.
pub(crate) struct Loop {
    events: EventLoop,
    bell: EventFd,
    rung: Arc<AtomicBool>,
    calls: Arc<AtomicUsize>,
}

impl Loop {
    pub(crate) fn new() -> Loop {
        let mut events = EventLoop::new().unwrap();
        let bell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let rung = Arc::new(AtomicBool::new(false));
        events.next_poller().add(&bell, 0, EventSet::IN).unwrap();
        let handler = Bell(bell.try_clone().unwrap(), rung.clone());
        events.attach(Arc::new(Mutex::new(handler)));
        Loop {
            events,
            bell,
            rung,
            calls: Arc::default(),
        }
    }

    pub(crate) fn poller(&self) -> Poller {
        self.events.next_poller()
    }

    pub(crate) fn attach(&mut self, handler: Arc<Mutex<dyn Handler>>) {
        let counted = Counted(handler, self.calls.clone());
        self.events.attach(Arc::new(Mutex::new(counted)));
    }

    /// Serves what is ready now, and what that makes ready, a few times over.
    pub(crate) fn settle(&mut self) {
        for _ in 0..4 {
            self.bell.write(1).unwrap();
            self.rung.store(false, Ordering::SeqCst);
            let rung = self.rung.clone();
            self.events.run(|| rung.load(Ordering::SeqCst)).unwrap();
        }
    }

    /// Whether nothing is ready: a level-triggered descriptor that nobody serves keeps a loop spinning.
    pub(crate) fn is_quiet(&mut self) -> bool {
        self.settle();
        self.calls.store(0, Ordering::SeqCst);
        self.settle();
        self.calls.load(Ordering::SeqCst) == 0
    }
}
