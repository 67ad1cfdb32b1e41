use super::*;
use bulkhead_vmm_config::{Fd, FsDevice, NetDevice, PortOffer, RateLimit, SerialConsole};
use nix::sys::socket::{SockFlag, socketpair};

/// A configuration and what is beside it, valid but for what a test changes.
struct Packet {
    config: VmConfig,
    fds: Vec<OwnedFd>,
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn socket(kind: SockType) -> OwnedFd {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)
        .unwrap()
        .0
}

/// `None` where there is no /dev/kvm to open, said loudly.
fn packet() -> Option<Packet> {
    crate::test_kvm::open()?;
    let kvm = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    let file = || OwnedFd::from(tempfile::tempfile().unwrap());
    Some(Packet {
        config: VmConfig {
            version: WIRE_VERSION,
            sandbox_id: "test".into(),
            vcpus: 1,
            spare_vcpus: 0,
            memory_mib: 128,
            spare_memory_mib: 0,
            kvm: Fd(0),
            kernel: Fd(1),
            initrd: Fd(2),
            extra_cmdline: vec!["a=1".into()],
            ports: vec![PortOffer {
                port: 1024,
                fd: Fd(4),
            }],
            fs: vec![FsDevice {
                tag: "share".into(),
                socket: Fd(5),
                queues: 1,
            }],
            net: Vec::new(),
            net_slots: 0,
            balloon: false,
            serial: Some(SerialConsole { output: Fd(6) }),
            log: Fd(3),
            uid: 1000,
            gid: 1000,
            accept_missing: Vec::new(),
            template: None,
            lender: None,
            learn: None,
            save: None,
        },
        fds: vec![
            kvm.into(),
            file(),
            file(),
            null(),
            socket(SockType::Stream),
            socket(SockType::Stream),
            null(),
        ],
    })
}

fn add(p: &mut Packet, fd: OwnedFd) -> Fd {
    p.fds.push(fd);
    Fd(p.fds.len() as u32 - 1)
}

fn check(change: impl FnOnce(&mut Packet)) -> Option<Result<VmSpec, SpecError>> {
    let mut packet = packet()?;
    change(&mut packet);
    Some(VmSpec::new(packet.config, packet.fds))
}

macro_rules! refused {
    ($pattern:pat, $change:expr) => {
        if let Some(result) = check($change) {
            match result.map(|_| ()) {
                Err($pattern) => {}
                other => panic!("{other:?} instead of {}", stringify!($pattern)),
            }
        }
    };
}

#[test]
fn a_good_configuration_passes() {
    let Some(spec) = check(|_| {}) else { return };
    let spec = spec.unwrap();
    assert_eq!((spec.vcpus, spec.memory), (1, 128 << 20));
    assert_eq!(spec.fs[0].tag, "share");
    assert_eq!(spec.ports[0].0, 1024);
    assert!(spec.cmdline.as_str().contains("console=ttyS0"));
}

#[test]
fn a_machine_with_a_serial_console_is_not_saved() {
    let files = |p: &mut Packet| {
        let file = || tempfile::tempfile().unwrap().into();
        TemplateFiles {
            state: add(p, file()),
            memory: add(p, file()),
            touched: None,
        }
    };
    refused!(SpecError::SavedSerial, |p| p.config.save = Some(files(p)));
    // One that goes on is refused its template when it starts, and boots.
    let Some(spec) = check(|p| {
        p.config.template = Some(files(p));
        p.config.lender = Some(add(p, socket(SockType::SeqPacket)));
    }) else {
        return;
    };
    assert!(spec.unwrap().template.is_some());
    refused!(SpecError::Kind { .. }, |p| {
        let file = files(p);
        p.config.template = Some(TemplateFiles {
            state: Fd(6),
            ..file
        });
        p.config.lender = Some(add(p, socket(SockType::SeqPacket)));
        p.config.serial = None;
    });
    refused!(SpecError::SavedAgain, |p| {
        p.config.template = Some(files(p));
        p.config.save = Some(files(p));
    });
}

#[test]
fn a_machine_with_a_template_and_a_share_needs_a_lender() {
    let template = |p: &mut Packet| {
        let file = || OwnedFd::from(tempfile::tempfile().unwrap());
        p.config.template = Some(TemplateFiles {
            state: add(p, file()),
            memory: add(p, file()),
            touched: None,
        });
    };
    refused!(SpecError::NoLender, template);
    refused!(SpecError::Kind { what: "lender", .. }, |p| {
        template(p);
        p.config.lender = Some(add(p, socket(SockType::Stream)));
    });
    refused!(SpecError::OneBorrower(2), |p| {
        template(p);
        p.config.lender = Some(add(p, socket(SockType::SeqPacket)));
        let socket = add(p, socket(SockType::Stream));
        p.config.fs.push(FsDevice {
            tag: "other".into(),
            socket,
            queues: 1,
        });
    });
}

#[test]
fn sizes_out_of_range_are_refused() {
    refused!(SpecError::Version(9), |p| p.config.version = 9);
    for vcpus in [0, 33, 256, 257, u32::MAX] {
        refused!(SpecError::Vcpus(_), |p| p.config.vcpus = vcpus);
    }
    for spare in [32, 255, 256, u32::MAX] {
        refused!(SpecError::Vcpus(_), |p| p.config.spare_vcpus = spare);
    }
    for memory in [0, 47, (layout::MAX_MEMORY >> 20) + 1, u64::MAX, 1 << 44] {
        refused!(SpecError::Memory(_), |p| p.config.memory_mib = memory);
    }
}

#[test]
fn vcpus_that_wait_are_told_to_the_guest_by_the_number_of_the_others() {
    let with = |spare| check(|p| p.config.spare_vcpus = spare).map(Result::unwrap);
    let (Some(none), Some(three)) = (with(0), with(3)) else {
        return;
    };
    assert_eq!((three.vcpus, three.possible_vcpus), (1, 4));
    assert!(three.cmdline.as_str().ends_with(" maxcpus=1"));
    assert!(!none.cmdline.as_str().contains("maxcpus"));
    assert_eq!(three.thread_limit(), none.thread_limit() + 3);
}

#[test]
fn memory_to_be_plugged_stays_within_the_machines_maximum() {
    let most = (layout::MAX_MEMORY >> 20) - 128;
    for spare in [0, 1, 3, most] {
        let Some(spec) = check(|p| p.config.spare_memory_mib = spare) else {
            return;
        };
        assert_eq!(spec.unwrap().spare_memory, spare << 20);
    }
    for spare in [most + 1, u64::MAX, 1 << 44] {
        refused!(SpecError::SpareMemory { memory: 128, .. }, |p| {
            p.config.spare_memory_mib = spare;
        });
    }
}

#[test]
fn privileged_identities_are_refused() {
    for id in [0, u32::MAX] {
        refused!(SpecError::Identity { what: "uid", .. }, |p| p.config.uid =
            id);
        refused!(SpecError::Identity { what: "gid", .. }, |p| p.config.gid =
            id);
    }
}

#[test]
fn descriptors_are_named_once_and_of_their_kind() {
    refused!(
        SpecError::Descriptor(DescriptorError::Missing { .. }),
        |p| {
            p.config.log = Fd(1);
        }
    );
    refused!(
        SpecError::Descriptor(DescriptorError::Missing { .. }),
        |p| {
            p.config.kernel = Fd(7);
        }
    );
    refused!(
        SpecError::Descriptor(DescriptorError::Unnamed { count: 1 }),
        |p| {
            p.fds.push(null());
        }
    );
    refused!(SpecError::Kind { what: "kernel", .. }, |p| p.fds[1] =
        null());
    refused!(SpecError::Kind { what: "initrd", .. }, |p| {
        p.fds[2] = File::open("/").unwrap().into();
    });
    refused!(SpecError::NotKvm(_), |p| p.fds[0] = null());
    refused!(SpecError::NotKvm(_), |p| p.fds[0] =
        socket(SockType::Stream));
    refused!(SpecError::Kind { what: "ports", .. }, |p| p.fds[4] = null());
    refused!(SpecError::Kind { what: "ports", .. }, |p| {
        p.fds[4] = socket(SockType::SeqPacket);
    });
    refused!(SpecError::Kind { what: "fs", .. }, |p| {
        p.fds[5] = std::net::TcpListener::bind("127.0.0.1:0").unwrap().into();
    });
}

#[test]
fn devices_that_a_guest_could_not_tell_apart_are_refused() {
    for tag in ["", "a\0b", "123456789012345678901234567890123456x"] {
        refused!(SpecError::Tag(_), |p| p.config.fs[0].tag = tag.into());
    }
    refused!(SpecError::Tag(_), |p| {
        let mut again = p.config.fs[0].clone();
        again.socket = Fd(7);
        p.config.fs.push(again);
        p.fds.push(socket(SockType::Stream));
    });
    refused!(SpecError::PortTwice(1024), |p| {
        p.config.ports.push(PortOffer {
            port: 1024,
            fd: Fd(7),
        });
        p.fds.push(socket(SockType::Stream));
    });
    for queues in [0, 17] {
        refused!(SpecError::Queues(_), |p| p.config.fs[0].queues = queues);
    }
    refused!(SpecError::Devices(_), |p| {
        let one = p.config.fs[0].clone();
        p.config.fs = vec![one; 15];
    });
    refused!(SpecError::Devices(_), |p| p.config.net_slots = 14);
    refused!(SpecError::Devices(_), |p| p.config.net_slots = u32::MAX);
}

#[test]
fn network_devices_are_checked() {
    let device = |taps: usize| NetDevice {
        taps: (0..taps).map(|nth| Fd(7 + nth as u32)).collect(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        receive_limit: RateLimit::default(),
        transmit_limit: RateLimit::default(),
    };
    for taps in [0, 2] {
        refused!(SpecError::Taps(_, 1), |p| p.config.net.push(device(taps)));
    }
    for mac in [[1, 0, 0, 0, 0, 1], [0; 6], [0xff; 6]] {
        refused!(SpecError::Mac(_), |p| {
            p.config.net.push(NetDevice { mac, ..device(1) });
        });
    }
    refused!(SpecError::Mtu(67), |p| {
        p.config.net.push(NetDevice {
            mtu: 67,
            ..device(1)
        });
    });
    refused!(SpecError::Descriptor(_), |p| p.config.net.push(device(1)));
    refused!(SpecError::Tap(TapError::NotATap(_)), |p| {
        p.config.net.push(device(1));
        p.fds.push(null());
    });
}

#[test]
fn command_line_words_are_checked() {
    refused!(SpecError::Cmdline(CmdlineError::BadWord(_)), |p| {
        p.config.extra_cmdline = vec!["a b".into()];
    });
    refused!(SpecError::Cmdline(CmdlineError::TooLong(_)), |p| {
        p.config.extra_cmdline = vec!["x".repeat(2048)];
    });
}

/// Packets of the shim's socket: a configuration that is taken is one that a machine can be.
fn packets(data: &[u8]) {
    let (left, right) = linux::packet::pair().unwrap();
    let socket = crate::control::ControlSocket::new(right);
    let (_, bytes) = data.split_first().unwrap_or((&0, data));
    linux::packet::send(left.as_fd(), bytes, &[]).unwrap();
    match data.first().copied().unwrap_or(0) % 4 {
        0 => drop(socket.receive::<bulkhead_vmm_config::Request>()),
        1 => drop(socket.receive::<bulkhead_vmm_config::FsConfig>()),
        2 => drop(socket.receive::<bulkhead_vmm_config::FsRequest>()),
        _ => {
            let Ok((config, _)) = socket.receive::<VmConfig>() else {
                return;
            };
            // Where there is no /dev/kvm the first descriptor is refused, said by `open`.
            let Some(packet) = packet() else { return };
            if let Ok(spec) = VmSpec::new(config, packet.fds) {
                assert!((1..=MAX_VCPUS).contains(&u32::from(spec.vcpus)));
                assert!((layout::MIN_MEMORY..=layout::MAX_MEMORY).contains(&spec.memory));
                assert!(spec.fs.len() + spec.net.len() + spec.net_slots <= MAX_DEVICES);
                assert!(spec.uid != 0 && spec.gid != 0);
                assert!(spec.thread_limit() < 100);
            }
        }
    }
}

#[test]
fn fuzz_shim_packets() {
    bulkhead_fuzz::run("shim_packets", packets);
}
