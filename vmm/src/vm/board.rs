//! What is wired to what: devices to their windows, ports, interrupt pins and kicks.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use bulkhead_vmm_config::{ANNOUNCE_PORT, CLOCK_PORT};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::resting::Resting;
use crate::arch::x86_64::interrupts::KvmRouter;
use crate::arch::x86_64::layout::{self, SpareRange};
use crate::boot::CmdlineError;
use crate::bus::BadRange;
use crate::devices::announce::AnnouncePort;
use crate::devices::clock::{self, ClockPort};
use crate::devices::ioapic::Ioapic;
use crate::devices::serial::SerialConsole;
use crate::devices::virtio::activator::{Activator, Attended};
use crate::devices::virtio::balloon::{Balloon, Gauge};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::fs::{Fs, FsError};
use crate::devices::virtio::mem::{self, Mem, Plug, Region, Unwired};
use crate::devices::virtio::mmio::{INTERRUPT_ACK, MmioTransport, QUEUE_NOTIFY, lock};
use crate::devices::virtio::net::{self, Counters, Net, NetPorts, Pairs, Slot, Workers};
use crate::devices::virtio::registers::{self, Registers};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::signal::USED_BUFFER;
use crate::devices::virtio::vsock::{OfferError, Ports, Vsock};
use crate::event_loop::EventLoop;
use crate::irq::IrqFd;
use crate::log::{Log, set_nonblocking};
use crate::memory::{FIRST_SPARE_SLOT, GuestMemory, Memory};
use crate::reports::{Reports, routing_failed};
use crate::spec::VmSpec;
use crate::vcpu::Buses;

/// A device could not be wired.
#[derive(Debug, Error)]
pub enum BoardError {
    /// Two devices at one place: a mistake in the layout.
    #[error(transparent)]
    Range(#[from] BadRange),
    /// The command line has no room for a device.
    #[error("a device does not fit the kernel command line")]
    Cmdline(#[from] CmdlineError),
    /// A descriptor of a device.
    #[error("making a device's descriptors failed; check RLIMIT_NOFILE")]
    Descriptor(#[from] io::Error),
    /// KVM refuses an eventfd.
    #[error("KVM refuses the {0} of a device")]
    EventFd(&'static str, #[source] kvm_ioctls::Error),
    /// KVM refuses the page of registers that the guest may read.
    #[error("KVM refuses a device's registers as read-only memory")]
    Registers(#[source] kvm_ioctls::Error),
    /// A vsock port.
    #[error("a vsock port cannot be offered")]
    Offer(#[from] OfferError),
    /// A virtio-fs device.
    #[error("the virtio-fs device {tag:?} cannot be made")]
    Fs {
        /// Its tag.
        tag: String,
        /// Why.
        #[source]
        source: FsError,
    },
}

/// The wired devices.
pub struct Board {
    /// Who answers exits.
    pub buses: Buses,
    /// Interrupt pins in use.
    pub pins: Vec<u32>,
    /// The vsock device's ports.
    pub ports: Ports,
    /// The network devices and places for them.
    pub net: NetPorts,
    /// The balloon's counters, where there is one.
    pub balloon: Option<Gauge>,
    /// By which memory is plugged, where any may be.
    pub plug: Option<Plug>,
    /// Threads of the network devices, to be started.
    pub net_workers: Workers,
    /// The thread on which devices start, to be started.
    pub activator: Activator,
    /// What a template has of them.
    pub resting: Resting,
}

/// Makes the devices of `spec`, taking their descriptors out of it and announcing them on its command line.
///
/// # Errors
/// The host's, or a back end's.
pub fn build(
    spec: &mut VmSpec,
    vm: &Arc<VmFd>,
    memory: &Memory,
    events: &mut EventLoop,
    reports: &Arc<Reports>,
    log: &Log,
) -> Result<Board, BoardError> {
    let Devices {
        devices,
        ports,
        counters,
        spare,
        net_workers,
        balloon,
        plug: mut unwired,
    } = virtio_devices(spec, memory, events, reports)?;
    let mut plug = None;
    let mut net = NetPorts::new(counters, spare, spec.vcpus.into());
    let activator = Activator::default();
    let mut pins = layout::virtio_pins(devices.len(), spec.serial.is_some());
    let mut buses = Buses::default();
    let mut transports = Vec::new();
    for (index, device) in devices.into_iter().enumerate() {
        let seat = Seat {
            window: layout::virtio_window(index),
            pin: pins[index],
            registers: FIRST_REGISTERS_SLOT + index as u32,
        };
        let name = device.name();
        let transport = attach_virtio(device, seat, vm, memory.all(), reports)?;
        transports.push(transport.clone());
        let attended = Attended::new(transport.clone(), activator.clone());
        let size = layout::VIRTIO_MMIO_SIZE;
        buses.mmio.insert(seat.window, size, shared(attended))?;
        if name == net::NAME {
            net.add(transport);
        } else if name == mem::NAME {
            let unwired = unwired.take();
            plug = unwired.and_then(|unwired| wire(unwired, memory, vm, &transport));
        }
        spec.cmdline.push_virtio(seat.window, seat.pin)?;
    }
    if let Some(output) = spec.serial.take() {
        serial_console(output, &mut buses, vm)?;
        pins.push(layout::SERIAL_PIN);
    }
    let ioapic = fixed_devices(&mut buses, &pins, spec.possible_vcpus, vm, (reports, log))?;
    Ok(Board {
        buses,
        pins,
        resting: Resting::new(ioapic, transports, ports.clone()),
        ports,
        net,
        balloon,
        plug,
        net_workers,
        activator,
    })
}

fn serial_console(output: File, buses: &mut Buses, vm: &VmFd) -> Result<(), BoardError> {
    set_nonblocking(&output);
    let console = SerialConsole::new(output, line(vm, layout::SERIAL_PIN)?);
    let (port, ports) = (u64::from(layout::SERIAL_PORT), layout::SERIAL_PORTS);
    Ok(buses.ports.insert(port, ports, shared(console))?)
}

/// The devices that every machine has and no driver looks for: the agent's ports and the IOAPIC.
fn fixed_devices(
    buses: &mut Buses,
    pins: &[u32],
    vcpus: u8,
    vm: &Arc<VmFd>,
    (reports, log): (&Arc<Reports>, &Log),
) -> Result<Arc<Mutex<Ioapic<KvmRouter>>>, BoardError> {
    let reports = reports.clone();
    let announce = AnnouncePort::new(Arc::new(move |what| reports.announced(what)));
    buses
        .ports
        .insert(u64::from(ANNOUNCE_PORT), 1, shared(announce))?;
    buses
        .ports
        .insert(u64::from(CLOCK_PORT), clock::SIZE, shared(ClockPort))?;

    let count = pins.iter().max().map_or(1, |last| *last as u8 + 1);
    let router = KvmRouter::new(vm.clone(), routing_failed(log.clone()));
    let ioapic = shared(Ioapic::new(vcpus, count, router));
    buses
        .mmio
        .insert(layout::IOAPIC, layout::IOAPIC_SIZE, ioapic.clone())?;
    Ok(ioapic)
}

fn shared<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

struct Devices {
    devices: Vec<Box<dyn VirtioDevice>>,
    ports: Ports,
    /// Of the network devices.
    counters: Vec<Counters>,
    /// Of the places for network devices.
    spare: Vec<Pairs>,
    net_workers: Workers,
    balloon: Option<Gauge>,
    plug: Option<Unwired>,
}

/// vsock first: the agent's first words go there.
fn virtio_devices(
    spec: &mut VmSpec,
    memory: &Memory,
    events: &mut EventLoop,
    reports: &Arc<Reports>,
) -> Result<Devices, BoardError> {
    let vsock = Vsock::new(events.next_poller());
    events.attach(vsock.handler());
    let ports = vsock.ports();
    for (port, socket) in spec.ports.drain(..) {
        ports.offer(port, socket)?;
    }
    let mut devices: Vec<Box<dyn VirtioDevice>> = vec![Box::new(vsock)];
    for fs in spec.fs.drain(..) {
        let socket: OwnedFd = fs.socket;
        let device = Fs::new(
            &fs.tag,
            socket,
            u32::from(fs.queues),
            events.next_poller(),
            reports.observer(),
        )
        .map_err(|source| BoardError::Fs {
            tag: fs.tag,
            source,
        })?;
        events.attach(device.handler());
        devices.push(Box::new(device));
    }
    let (mut counters, mut spare) = (Vec::new(), Vec::new());
    let mut net_workers = Workers::default();
    for backend in spec.net.drain(..) {
        let pairs = net_workers.pairs(backend.taps.len())?;
        let device = Net::new(backend, pairs);
        counters.push(device.counters());
        devices.push(Box::new(device));
    }
    for _ in 0..spec.net_slots {
        devices.push(Box::new(Slot::new(spec.vcpus.into())));
        spare.push(net_workers.pairs(spec.vcpus.into())?);
    }
    let rng = Rng::new(events.next_poller());
    events.attach(rng.handler());
    devices.push(Box::new(rng));
    let (balloon, plug) = memory_devices(spec, memory, events, &mut devices)?;
    Ok(Devices {
        devices,
        ports,
        counters,
        spare,
        net_workers,
        balloon,
        plug,
    })
}

/// By which a guest gives memory back, and gets more.
fn memory_devices(
    spec: &mut VmSpec,
    memory: &Memory,
    events: &mut EventLoop,
    devices: &mut Vec<Box<dyn VirtioDevice>>,
) -> Result<(Option<Gauge>, Option<Unwired>), BoardError> {
    let (mut gauge, mut plug) = (None, None);
    if spec.balloon {
        let loan = memory.loan().clone();
        let forget = Arc::new(move |range| loan.lock().forget(range));
        let balloon = Balloon::new(events.next_poller(), forget);
        events.attach(balloon.handler());
        gauge = Some(balloon.gauge());
        devices.push(Box::new(balloon));
        spec.cmdline.push_page_reporting()?;
    }
    if let Some(spare) = memory.spare() {
        let SpareRange { start, size, unit } = spare.range();
        let mem = Mem::new(Region { start, size, unit }, events.next_poller());
        events.attach(mem.handler());
        plug = Some(mem.unwired());
        devices.push(Box::new(mem));
        spec.cmdline.push_plugging()?;
    }
    Ok((gauge, plug))
}

/// The machine's access to the device that plugs memory.
fn wire(
    unwired: Unwired,
    memory: &Memory,
    vm: &Arc<VmFd>,
    transport: &Mutex<MmioTransport>,
) -> Option<Plug> {
    let (mut spare, vm) = (memory.spare()?, vm.clone());
    let signal = lock(transport).signal();
    let show = Box::new(move |size| spare.show(&vm, size).map_err(Into::into));
    Some(unwired.wire(signal, show))
}

#[derive(Clone, Copy)]
struct Seat {
    window: u64,
    pin: u32,
    /// KVM's memory slot for what a driver reads.
    registers: u32,
}

/// Guest RAM has the slots below.
const FIRST_REGISTERS_SLOT: u32 = 16;

const _: () = assert!(
    FIRST_REGISTERS_SLOT as usize + layout::MAX_VIRTIO_DEVICES <= FIRST_SPARE_SLOT as usize
);

fn attach_virtio(
    device: Box<dyn VirtioDevice>,
    seat: Seat,
    vm: &VmFd,
    memory: &GuestMemory,
    reports: &Arc<Reports>,
) -> Result<Arc<Mutex<MmioTransport>>, BoardError> {
    let irq = line(vm, seat.pin)?;
    let transport = MmioTransport::new(device, memory.clone(), irq, reports.observer())?;
    for (index, kick) in (0_u32..).zip(transport.queue_events()?) {
        let address = IoEventAddress::Mmio(seat.window + QUEUE_NOTIFY);
        vm.register_ioevent(&kick, &address, index)
            .map_err(|error| BoardError::EventFd("kick", error))?;
    }
    // An exit less for each interrupt. KVM keeps the eventfd; nobody reads it.
    let unread = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let address = IoEventAddress::Mmio(seat.window + INTERRUPT_ACK);
    vm.register_ioevent(&unread, &address, USED_BUFFER)
        .map_err(|error| BoardError::EventFd("acknowledgement", error))?;
    show(transport.registers(), seat, vm)?;
    Ok(shared(transport))
}

/// Lets the guest read a transport's registers without an exit. A host that cannot gets the exits.
fn show(registers: Registers, seat: Seat, vm: &VmFd) -> Result<(), BoardError> {
    if !vm.check_extension(Cap::ReadonlyMem) {
        return Ok(());
    }
    let region = kvm_userspace_memory_region {
        slot: seat.registers,
        flags: KVM_MEM_READONLY,
        guest_phys_addr: seat.window,
        memory_size: layout::VIRTIO_MMIO_SIZE,
        userspace_addr: registers.host_address(),
    };
    // SAFETY: the page has this size (asserted below) and is never freed; the guest cannot write to it, and what we store is
    // atomic.
    unsafe { vm.set_user_memory_region(region) }.map_err(BoardError::Registers)
}

const _: () = assert!(layout::VIRTIO_MMIO_SIZE == registers::PAGE as u64);

/// An interrupt line to `pin`, whose GSI has the same number.
fn line(vm: &VmFd, pin: u32) -> Result<IrqFd, BoardError> {
    let fd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    vm.register_irqfd(&fd, pin)
        .map_err(|error| BoardError::EventFd("interrupt", error))?;
    Ok(IrqFd::new(fd))
}
