//! From what the shim sent to what a machine is made of: every check of the configuration, once.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_vmm_config::{
    Layer, MAX_DEVICES, SerialConsole, TemplateFiles, VmConfig, WIRE_VERSION,
};
use kvm_ioctls::Kvm;
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, UnixAddr, getsockname, getsockopt, sockopt,
};
use nix::sys::stat::{SFlag, fstat};
use thiserror::Error;

use crate::arch::x86_64::layout;
use crate::boot::{Cmdline, CmdlineError};
use crate::control::{DescriptorError, Descriptors};
use crate::devices::virtio::net::{Backend, Tap, TapError};

/// Most vCPUs.
pub const MAX_VCPUS: u32 = 32;
/// Most request queues of a virtio-fs device.
const MAX_FS_QUEUES: u32 = 16;
/// VIRTIO 1.2 §5.11.4: the tag's field.
const MAX_TAG: usize = 36;
/// Beside them there are vsock, the random number generator, the balloon and memory to be plugged.
const _: () = assert!(MAX_DEVICES + 4 == layout::MAX_VIRTIO_DEVICES);

/// What is wrong with a configuration.
#[derive(Debug, Error)]
pub enum SpecError {
    /// What a template lends is in no file of its own.
    #[error("a machine that goes on from a template cannot be saved to another")]
    SavedAgain,
    /// The fs process could not see what the template lends.
    #[error("a machine with a template and a share needs the socket `lender`")]
    NoLender,
    /// Only one process asks.
    #[error("a machine with the socket `lender` has one share at most, not {0}")]
    OneBorrower(usize),
    /// Another version of the wire types.
    #[error(
        "the configuration has version {0}, this VMM knows {WIRE_VERSION}; install shim and VMM together"
    )]
    Version(u32),
    /// See [`MAX_VCPUS`].
    #[error("{0} vCPUs are not possible, 1 to {MAX_VCPUS} are")]
    Vcpus(u32),
    /// Too little or too much.
    #[error("{0} MiB of memory are not possible, {min} to {max} are", min = layout::MIN_MEMORY >> 20, max = layout::MAX_MEMORY >> 20)]
    Memory(u64),
    /// Too much together.
    #[error("{spare} MiB cannot be plugged into a machine of {memory} MiB, {max} MiB are possible together", max = layout::MAX_MEMORY >> 20)]
    SpareMemory {
        /// What it starts with.
        memory: u64,
        /// What may be plugged.
        spare: u64,
    },
    /// Root, or the number that means "unchanged" to setresuid(2).
    #[error("{what} {id} is no unprivileged one")]
    Identity {
        /// uid or gid.
        what: &'static str,
        /// Its number.
        id: u32,
    },
    /// A descriptor is not beside the packet.
    #[error("bad configuration packet")]
    Descriptor(#[from] DescriptorError),
    /// A descriptor is open on something else.
    #[error("the descriptor for {what} is not {expected}")]
    Kind {
        /// The field.
        what: &'static str,
        /// What it must be.
        expected: &'static str,
    },
    /// `/dev/kvm` is something else or too old.
    #[error("the descriptor for kvm answers API version {0} and not 12; is it /dev/kvm?")]
    NotKvm(i32),
    /// A host port is offered twice.
    #[error("vsock port {0} is offered twice")]
    PortTwice(u32),
    /// The tag of a virtio-fs device.
    #[error(
        "{0:?} cannot be a virtio-fs tag: it needs 1 to {MAX_TAG} bytes without NUL, and no other device may have it"
    )]
    Tag(String),
    /// Request queues of a virtio-fs device.
    #[error("{0} request queues are not possible, 1 to {MAX_FS_QUEUES} are")]
    Queues(u32),
    /// A serial console's registers are not saved.
    #[error("a machine with a serial console cannot be saved as a template")]
    SavedSerial,
    /// Too many devices.
    #[error("{0} virtio-fs and network devices are too many, {max} are possible", max = MAX_DEVICES)]
    Devices(usize),
    /// A network device has too few or too many queues.
    #[error("{0} taps for a network device are not possible, 1 to {max} are: one for each vCPU", max = .1)]
    Taps(usize, usize),
    /// A network device's address is no address of one station.
    #[error("{0:02x?} cannot be the address of a network device")]
    Mac([u8; 6]),
    /// IPv4 needs more.
    #[error("an MTU of {0} is not possible, 68 and more are")]
    Mtu(u16),
    /// A tap is none.
    #[error("the descriptor for net cannot be used")]
    Tap(#[from] TapError),
    /// The command line.
    #[error("bad kernel command line")]
    Cmdline(#[from] CmdlineError),
}

/// A virtio-fs device.
#[derive(Debug)]
pub struct FsSpec {
    /// 1 to 36 bytes without NUL, unlike any other device's.
    pub tag: String,
    /// Connected AF_UNIX stream socket to the back end.
    pub socket: OwnedFd,
    /// Request queues.
    pub queues: u16,
}

/// A machine that can be built.
pub struct VmSpec {
    /// For log lines.
    pub sandbox_id: String,
    /// Those that the guest starts by itself: 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Those and the ones that wait: at most [`MAX_VCPUS`].
    pub possible_vcpus: u8,
    /// Bytes of RAM.
    pub memory: u64,
    /// Bytes that may be plugged beyond that; 0 where there is no device for it.
    pub spare_memory: u64,
    /// `/dev/kvm`.
    pub kvm: Kvm,
    /// A regular file.
    pub kernel: File,
    /// A regular file.
    pub initrd: File,
    /// Complete but for the devices and [`VmSpec::extra_cmdline`].
    pub cmdline: Cmdline,
    /// Appended last, so that they win over what is said before.
    pub extra_cmdline: Vec<String>,
    /// Host ports and what a connection to them is joined to.
    pub ports: Vec<(u32, OwnedFd)>,
    /// virtio-fs devices.
    pub fs: Vec<FsSpec>,
    /// Network devices.
    pub net: Vec<Backend>,
    /// Places for more of them.
    pub net_slots: usize,
    /// Whether there is a balloon.
    pub balloon: bool,
    /// Output of the serial console.
    pub serial: Option<File>,
    /// Log lines.
    pub log: File,
    /// Not 0.
    pub uid: u32,
    /// Not 0.
    pub gid: u32,
    /// Layers of the jail that may be missing.
    pub accept_missing: Vec<Layer>,
    /// From what it goes on, in the place of booting.
    pub template: Option<TemplateSpec>,
    /// The fs process's questions for what the template lends.
    pub lender: Option<OwnedFd>,
    /// Where it is written what it has touched of its template.
    pub learn: Option<File>,
    /// Where it may be saved.
    pub save: Option<TemplateSpec>,
}

/// The files of a template.
pub struct TemplateSpec {
    /// Processors and devices: a regular file.
    pub state: File,
    /// RAM: a regular file.
    pub memory: File,
    /// What machines touch of it: a regular file.
    pub touched: Option<File>,
}

impl VmSpec {
    /// Checks a configuration and takes its descriptors.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn new(config: VmConfig, fds: Vec<OwnedFd>) -> Result<VmSpec, SpecError> {
        if config.version != WIRE_VERSION {
            return Err(SpecError::Version(config.version));
        }
        let vcpus = processors(config.vcpus)?;
        let possible_vcpus = processors(config.vcpus.saturating_add(config.spare_vcpus))?;
        let memory = config
            .memory_mib
            .checked_mul(1 << 20)
            .filter(|size| (layout::MIN_MEMORY..=layout::MAX_MEMORY).contains(size))
            .ok_or(SpecError::Memory(config.memory_mib))?;
        let spare_memory = spare_memory(&config, memory)?;
        let devices =
            (config.fs.len() + config.net.len()).saturating_add(config.net_slots as usize);
        if devices > MAX_DEVICES {
            return Err(SpecError::Devices(devices));
        }
        for (what, id) in [("uid", config.uid), ("gid", config.gid)] {
            if id == 0 || id == u32::MAX {
                return Err(SpecError::Identity { what, id });
            }
        }
        let mut cmdline = Cmdline::new(config.serial.is_some());
        if possible_vcpus > vcpus {
            cmdline.push_processors(vcpus)?;
        }
        let mut probe = cmdline.clone();
        for word in &config.extra_cmdline {
            probe.push(word)?;
        }
        let mut fds = Descriptors::new(fds);
        let spec = VmSpec {
            lender: lender(&config, &mut fds)?,
            vcpus,
            possible_vcpus,
            memory,
            spare_memory,
            kvm: kvm(fds.take(config.kvm, "kvm")?)?,
            kernel: regular_file(fds.take(config.kernel, "kernel")?, "kernel")?,
            initrd: regular_file(fds.take(config.initrd, "initrd")?, "initrd")?,
            cmdline,
            extra_cmdline: config.extra_cmdline,
            ports: ports(&config.ports, &mut fds)?,
            fs: fs_devices(&config.fs, &mut fds)?,
            net: net_devices(&config.net, vcpus.into(), &mut fds)?,
            net_slots: config.net_slots as usize,
            balloon: config.balloon,
            serial: serial(config.serial, &mut fds)?,
            log: fds.take(config.log, "log")?.into(),
            uid: config.uid,
            gid: config.gid,
            accept_missing: config.accept_missing,
            template: template(config.template, &mut fds)?,
            learn: config.learn.map(|fd| learn(fd, &mut fds)).transpose()?,
            save: template(config.save, &mut fds)?,
            sandbox_id: config.sandbox_id,
        };
        fds.finish()?;
        spec.savable()
    }
}

impl VmSpec {
    fn savable(self) -> Result<VmSpec, SpecError> {
        match (&self.save, &self.serial) {
            (Some(_), Some(_)) => Err(SpecError::SavedSerial),
            _ => Ok(self),
        }
    }

    /// Most threads that the machine comes to: one for each vCPU and for each pair of queues that a
    /// network device may have, our own, and what KVM starts in the name of its user.
    pub fn thread_limit(&self) -> u64 {
        const ROOM: u64 = 16;
        u64::from(self.vcpus) + u64::from(self.possible_vcpus) + ROOM
    }

    /// The longest that a regular file may become: nothing, unless the shim wants log or console in
    /// one, or a template.
    pub fn file_limit(&self) -> u64 {
        const ROOM: u64 = 64 << 20;
        if self.save.is_some() {
            return self.memory + ROOM;
        }
        if self.learn.is_some() {
            return ROOM;
        }
        let regular = |file: &File| file.metadata().is_ok_and(|metadata| metadata.is_file());
        let wanted = [Some(&self.log), self.serial.as_ref()];
        if wanted.into_iter().flatten().any(regular) {
            ROOM
        } else {
            0
        }
    }
}

fn processors(count: u32) -> Result<u8, SpecError> {
    let possible = (1..=MAX_VCPUS).contains(&count).then_some(count);
    let number = possible.and_then(|count| u8::try_from(count).ok());
    number.ok_or(SpecError::Vcpus(count))
}

/// Bytes that may be plugged into a machine with so many bytes of RAM.
fn spare_memory(config: &VmConfig, memory: u64) -> Result<u64, SpecError> {
    config
        .spare_memory_mib
        .checked_mul(1 << 20)
        .filter(|&size| size <= layout::MAX_MEMORY - memory)
        .ok_or(SpecError::SpareMemory {
            memory: config.memory_mib,
            spare: config.spare_memory_mib,
        })
}

fn kvm(fd: OwnedFd) -> Result<Kvm, SpecError> {
    const API_VERSION: i32 = 12;
    // Any other device might take the ioctl for one of its own.
    let stat = fstat(&fd).map_err(|_| SpecError::NotKvm(-1))?;
    if SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFCHR {
        return Err(SpecError::NotKvm(-1));
    }
    // SAFETY: the descriptor is ours, and the version is checked before anything else is done with it.
    let kvm = unsafe {
        <Kvm as std::os::fd::FromRawFd>::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(fd))
    };
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        other => Err(SpecError::NotKvm(other)),
    }
}

fn regular_file(fd: OwnedFd, what: &'static str) -> Result<File, SpecError> {
    let wrong = SpecError::Kind {
        what,
        expected: "a regular file",
    };
    match fstat(&fd) {
        Ok(stat) if stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits() => Ok(fd.into()),
        _ => Err(wrong),
    }
}

fn serial(
    console: Option<SerialConsole>,
    fds: &mut Descriptors,
) -> Result<Option<File>, DescriptorError> {
    let output = console.map(|console| fds.take(console.output, "serial"));
    Ok(output.transpose()?.map(File::from))
}

fn template(
    files: Option<TemplateFiles>,
    fds: &mut Descriptors,
) -> Result<Option<TemplateSpec>, SpecError> {
    let Some(files) = files else { return Ok(None) };
    let mut file = |fd, what| regular_file(fds.take(fd, what)?, what);
    Ok(Some(TemplateSpec {
        state: file(files.state, "template state")?,
        memory: file(files.memory, "template memory")?,
        touched: files
            .touched
            .map(|fd| file(fd, "template touched"))
            .transpose()?,
    }))
}

fn learn(fd: bulkhead_vmm_config::Fd, fds: &mut Descriptors) -> Result<File, SpecError> {
    regular_file(fds.take(fd, "learn")?, "learn")
}

/// The socket of a machine whose memory two processes map, and a part of it only one.
fn lender(config: &VmConfig, fds: &mut Descriptors) -> Result<Option<OwnedFd>, SpecError> {
    if config.template.is_some() && config.save.is_some() {
        return Err(SpecError::SavedAgain);
    }
    if config.template.is_some() && !config.fs.is_empty() && config.lender.is_none() {
        return Err(SpecError::NoLender);
    }
    if config.fs.len() > 1 && config.lender.is_some() {
        return Err(SpecError::OneBorrower(config.fs.len()));
    }
    let Some(fd) = config.lender else {
        return Ok(None);
    };
    let socket = fds.take(fd, "lender")?;
    unix_socket(
        socket.as_fd(),
        SockType::SeqPacket,
        "lender",
        "an AF_UNIX socket of packets",
    )?;
    Ok(Some(socket))
}

/// Checks that a descriptor is a Unix stream socket.
///
/// # Errors
/// It is not.
pub fn unix_stream(fd: BorrowedFd<'_>, what: &'static str) -> Result<(), SpecError> {
    unix_socket(fd, SockType::Stream, what, "an AF_UNIX stream socket")
}

fn unix_socket(
    fd: BorrowedFd<'_>,
    kind: SockType,
    what: &'static str,
    expected: &'static str,
) -> Result<(), SpecError> {
    let is_unix = getsockname::<UnixAddr>(std::os::fd::AsRawFd::as_raw_fd(&fd))
        .is_ok_and(|address| address.family() == Some(AddressFamily::Unix));
    let is_such = getsockopt(&fd, sockopt::SockType).is_ok_and(|is| is == kind);
    (is_unix && is_such)
        .then_some(())
        .ok_or(SpecError::Kind { what, expected })
}

fn ports(
    offers: &[bulkhead_vmm_config::PortOffer],
    fds: &mut Descriptors,
) -> Result<Vec<(u32, OwnedFd)>, SpecError> {
    let mut seen = BTreeSet::new();
    let mut ports = Vec::new();
    for offer in offers {
        let socket = fds.take(offer.fd, "ports")?;
        unix_stream(socket.as_fd(), "ports")?;
        if !seen.insert(offer.port) {
            return Err(SpecError::PortTwice(offer.port));
        }
        ports.push((offer.port, socket));
    }
    Ok(ports)
}

fn fs_devices(
    devices: &[bulkhead_vmm_config::FsDevice],
    fds: &mut Descriptors,
) -> Result<Vec<FsSpec>, SpecError> {
    let mut tags = BTreeSet::new();
    let mut specs = Vec::new();
    for device in devices {
        let tag = &device.tag;
        let fits = (1..=MAX_TAG).contains(&tag.len()) && !tag.contains('\0');
        if !fits || !tags.insert(tag) {
            return Err(SpecError::Tag(tag.clone()));
        }
        if device.queues == 0 || device.queues > MAX_FS_QUEUES {
            return Err(SpecError::Queues(device.queues));
        }
        let socket = fds.take(device.socket, "fs")?;
        unix_stream(socket.as_fd(), "fs")?;
        specs.push(FsSpec {
            tag: tag.clone(),
            socket,
            queues: device.queues as u16,
        });
    }
    Ok(specs)
}

fn net_devices(
    devices: &[bulkhead_vmm_config::NetDevice],
    vcpus: usize,
    fds: &mut Descriptors,
) -> Result<Vec<Backend>, SpecError> {
    devices
        .iter()
        .map(|device| net_device(device, vcpus, fds))
        .collect()
}

/// Checks a network device of a machine with this many vCPUs and takes its descriptors.
///
/// # Errors
/// The first thing that is wrong.
pub fn net_device(
    device: &bulkhead_vmm_config::NetDevice,
    vcpus: usize,
    fds: &mut Descriptors,
) -> Result<Backend, SpecError> {
    const MULTICAST: u8 = 1;
    if !(1..=vcpus).contains(&device.taps.len()) {
        return Err(SpecError::Taps(device.taps.len(), vcpus));
    }
    if device.mac[0] & MULTICAST != 0 || device.mac == [0; 6] {
        return Err(SpecError::Mac(device.mac));
    }
    if device.mtu < 68 {
        return Err(SpecError::Mtu(device.mtu));
    }
    let mut taps = Vec::new();
    for tap in &device.taps {
        taps.push(Tap::new(fds.take(*tap, "net")?)?);
    }
    Ok(Backend {
        taps,
        mac: device.mac,
        mtu: device.mtu,
        receive_limit: device.receive_limit,
        transmit_limit: device.transmit_limit,
    })
}

#[cfg(test)]
mod tests;
