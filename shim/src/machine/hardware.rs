//! What a machine is made of.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use bulkhead_vmm_config::{
    Fd, FsDevice, Layer, NetDevice, PortOffer, RateLimit, SerialConsole, TemplateFiles, VmConfig,
    WIRE_VERSION,
};

use crate::{config, machine::peer::Peer, network::Device};

/// A network interface of the machine.
#[derive(Debug)]
pub struct Nic {
    /// Queues of its tap.
    pub taps: Vec<OwnedFd>,
    /// Its own address.
    pub mac: [u8; 6],
    /// Largest packet in bytes.
    pub mtu: u16,
    /// What the guest may receive.
    pub receive: RateLimit,
    /// What the guest may send.
    pub transmit: RateLimit,
}

impl Nic {
    /// On the taps of an interface of the pod's namespace.
    pub fn new(device: Device, limits: &config::Network) -> Nic {
        Nic {
            taps: device.taps,
            mac: device.mac,
            // 65535 is virtio's largest (VIRTIO 1.2 §5.1.4).
            mtu: device.mtu.try_into().unwrap_or(u16::MAX),
            receive: limits.receive.into(),
            transmit: limits.transmit.into(),
        }
    }

    pub(super) fn config(&self, mut index: impl FnMut(i32) -> Fd) -> NetDevice {
        NetDevice {
            taps: self.taps.iter().map(|tap| index(tap.as_raw_fd())).collect(),
            mac: self.mac,
            mtu: self.mtu,
            receive_limit: self.receive,
            transmit_limit: self.transmit,
        }
    }
}

/// What the machine is made of.
pub struct Hardware<'a> {
    /// 1 to 32.
    pub vcpus: u32,
    /// MiB.
    pub memory_mib: u64,
    /// vCPUs that wait beside.
    pub spare_vcpus: u32,
    /// MiB that may be plugged beside.
    pub spare_memory_mib: u64,
    /// `/dev/kvm`.
    pub kvm: BorrowedFd<'a>,
    /// vmlinux.
    pub kernel: BorrowedFd<'a>,
    /// The initial RAM file system.
    pub initrd: BorrowedFd<'a>,
    /// Appended to the kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// (port, end of a socketpair) that the guest may dial from the start.
    pub ports: Vec<(u32, OwnedFd)>,
    /// Front end of the share: (tag, vhost-user socket, request queues).
    pub share: (String, OwnedFd, u32),
    /// Network interfaces.
    pub net: Vec<Nic>,
    /// Places for more of them.
    pub net_slots: u32,
    /// Whether the guest can give memory back.
    pub balloon: bool,
    /// Where a debugging console goes.
    pub serial: Option<BorrowedFd<'a>>,
    /// The user and the group that the process becomes.
    pub uid: u32,
    /// Layers of its jail that may be missing.
    pub accept_missing: &'a [Layer],
    /// The files of a template from which it goes on; if it cannot, it boots.
    pub template: Option<[BorrowedFd<'a>; 3]>,
    /// Where the fs process asks for what the template lends.
    pub lender: Option<OwnedFd>,
    /// Where it says at its end what it has touched of that.
    pub learn: Option<BorrowedFd<'a>>,
    /// Where it is saved when [`super::vmm::Vm::save`] asks for it.
    pub save: Option<[BorrowedFd<'a>; 2]>,
}

/// Puts descriptors beside a packet, each of which gets an index.
pub(super) fn indices(fds: &mut Vec<i32>) -> impl FnMut(i32) -> Fd {
    |fd| {
        fds.push(fd);
        Fd(fds.len() as u32 - 1)
    }
}

fn template(
    [state, memory]: [BorrowedFd<'_>; 2],
    touched: Option<BorrowedFd<'_>>,
    mut index: impl FnMut(i32) -> Fd,
) -> TemplateFiles {
    TemplateFiles {
        state: index(state.as_raw_fd()),
        memory: index(memory.as_raw_fd()),
        touched: touched.map(|file| index(file.as_raw_fd())),
    }
}

/// Builds the configuration; the descriptors it names by index go to `fds`.
pub(super) fn config(
    sandbox: &str,
    hardware: &Hardware<'_>,
    peer: &Peer,
    fds: &mut Vec<i32>,
) -> VmConfig {
    let mut index = indices(fds);
    VmConfig {
        version: WIRE_VERSION,
        sandbox_id: sandbox.into(),
        vcpus: hardware.vcpus,
        spare_vcpus: hardware.spare_vcpus,
        memory_mib: hardware.memory_mib,
        spare_memory_mib: hardware.spare_memory_mib,
        kvm: index(hardware.kvm.as_raw_fd()),
        kernel: index(hardware.kernel.as_raw_fd()),
        initrd: index(hardware.initrd.as_raw_fd()),
        extra_cmdline: hardware.kernel_arguments.clone(),
        ports: hardware
            .ports
            .iter()
            .map(|(port, fd)| PortOffer {
                port: *port,
                fd: index(fd.as_raw_fd()),
            })
            .collect(),
        fs: vec![FsDevice {
            tag: hardware.share.0.clone(),
            socket: index(hardware.share.1.as_raw_fd()),
            queues: hardware.share.2,
        }],
        net: hardware
            .net
            .iter()
            .map(|nic| nic.config(&mut index))
            .collect(),
        net_slots: hardware.net_slots,
        balloon: hardware.balloon,
        serial: hardware.serial.map(|fd| SerialConsole {
            output: index(fd.as_raw_fd()),
        }),
        log: index(peer.log.as_raw_fd()),
        uid: hardware.uid,
        gid: hardware.uid,
        accept_missing: hardware.accept_missing.to_vec(),
        template: hardware
            .template
            .map(|[state, memory, touched]| template([state, memory], Some(touched), &mut index)),
        lender: hardware.lender.as_ref().map(|fd| index(fd.as_raw_fd())),
        learn: hardware.learn.map(|file| index(file.as_raw_fd())),
        save: hardware.save.map(|files| template(files, None, &mut index)),
    }
}
