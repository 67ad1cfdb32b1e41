//! `bulkhead-vmm fs` as the shim starts it, and a driver that speaks vhost-user to it. Needs root.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_vmm::control::ControlSocket;
use bulkhead_vmm::fs::guard::{HEADER, REPLY_HEADER};
use bulkhead_vmm::fs::wire::*;
use bulkhead_vmm_config::{
    CONTROL_FD, CachePolicy, Fd, FsConfig, FsEvent, FsRequest, WIRE_VERSION,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(60);
const RAM: usize = 8 << 20;
const QUEUE_SIZE: u16 = 16;
const EVENT_IDX: u64 = 1 << 29;

/// Waits until there is something to read.
fn comes(what: &str, from: BorrowedFd<'_>) {
    let mut polled = [PollFd::new(from, PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(PATIENCE).unwrap();
    let came = poll(&mut polled, patience).unwrap();
    assert_eq!(came, 1, "waited {PATIENCE:?} in vain for {what}");
}

fn seqpacket() -> (OwnedFd, OwnedFd) {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap()
}

/// The process in namespaces of its own, with descriptor 3 and nothing else.
struct FsProcess {
    pid: Pid,
    control: Option<ControlSocket>,
    log: File,
}

impl FsProcess {
    fn start(share: &Path, socket: OwnedFd) -> FsProcess {
        let (ours, theirs) = seqpacket();
        let (log, log_end) = nix::unistd::pipe().unwrap();
        let program = std::ffi::CString::new(env!("CARGO_BIN_EXE_bulkhead-vmm")).unwrap();
        let arguments = [program.as_ptr(), c"fs".as_ptr(), std::ptr::null()];
        let namespaces = libc::CLONE_NEWNS
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNET
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWCGROUP;
        // SAFETY: fork(2) by clone(2) without a new stack; the child calls nothing but dup2, execv and _exit.
        let pid = unsafe {
            let pid = libc::syscall(libc::SYS_clone, namespaces | libc::SIGCHLD, 0, 0, 0, 0);
            if pid == 0 {
                libc::dup2(theirs.as_raw_fd(), CONTROL_FD);
                libc::execv(program.as_ptr(), arguments.as_ptr());
                libc::_exit(99);
            }
            Pid::from_raw(i32::try_from(pid).unwrap())
        };
        assert!(pid.as_raw() > 0, "namespaces need root");
        let control = ControlSocket::new(ours);
        let config = FsConfig {
            version: WIRE_VERSION,
            sandbox_id: "test".to_owned(),
            share: share.to_str().unwrap().to_owned(),
            socket: Fd(0),
            queues: 1,
            cache: CachePolicy {
                entry_ms: 1000,
                attr_ms: 1000,
                keep_data: true,
            },
            max_inodes: 10_000,
            max_handles: 2_000,
            log: Fd(1),
        };
        control
            .send_with(&config, &[socket.as_fd(), log_end.as_fd()])
            .unwrap();
        FsProcess {
            pid,
            control: Some(control),
            log: File::from(log),
        }
    }

    fn event(&self) -> FsEvent {
        let control = self.control.as_ref().unwrap();
        comes("an event", control.as_fd());
        control.receive().unwrap().0
    }

    fn ask(&self, request: &FsRequest) -> FsEvent {
        self.control.as_ref().unwrap().send(request).unwrap();
        self.event()
    }

    fn detach(&self, tree: &str) -> (u64, u64) {
        match self.ask(&FsRequest::Detach {
            tree: tree.to_owned(),
        }) {
            FsEvent::Detached { inodes, handles } => (inodes, handles),
            other => panic!("{other:?}"),
        }
    }

    fn status(&self, field: &str) -> String {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = text.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    }

    /// Lets go of the control socket; the exit code.
    fn end(&mut self) -> i32 {
        self.control = None;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Ok(WaitStatus::Exited(_, code)) =
                waitpid(self.pid, Some(nix::sys::wait::WaitPidFlag::WNOHANG))
            {
                return code;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the process outlives its control socket by {PATIENCE:?}");
    }
}

/// A mount of its own that is shared, as the shim makes the share.
struct Share(tempfile::TempDir);

impl Share {
    fn new() -> Share {
        let dir = tempfile::tempdir().unwrap();
        mount(
            Some("share"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        mount(
            None::<&str>,
            dir.path(),
            None::<&str>,
            MsFlags::MS_SHARED,
            None::<&str>,
        )
        .unwrap();
        Share(dir)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// The smallest driver: one request at a time, on the first request queue.
struct Driver {
    frontend: Frontend,
    memory: GuestMemoryMmap,
    kick: EventFd,
    call: EventFd,
    sent: u16,
}

const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x40_0000;

impl Driver {
    fn new(socket: OwnedFd) -> Driver {
        // SAFETY: the name is NUL-terminated and the descriptor returned is new.
        let file =
            unsafe { File::from_raw_fd(libc::memfd_create(c"ram".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(RAM as u64).unwrap();
        let region =
            MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), RAM).unwrap();
        let region = vm_memory::GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        let socket = UnixStream::from(socket);
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut frontend = Frontend::from_stream(socket, 2);
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        let wanted = 1 << 32 | EVENT_IDX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_eq!(offered & wanted, wanted);
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), 2);
        frontend.set_features(wanted).unwrap();
        let table = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: RAM as u64,
            userspace_addr: 0x7000_0000,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        frontend.set_mem_table(&[table]).unwrap();
        // The VMM's eventfds are non-blocking.
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let call = EventFd::new(0).unwrap();
        let mut driver = Driver {
            frontend,
            memory,
            kick,
            call,
            sent: 0,
        };
        driver.start();
        driver
    }

    fn start(&mut self) {
        self.memory
            .write_slice(&[0; 0x3000], GuestAddress(TABLE))
            .unwrap();
        self.sent = 0;
        let address = |guest: u64| 0x7000_0000 + guest;
        let rings = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: address(TABLE),
            used_ring_addr: address(USED),
            avail_ring_addr: address(AVAILABLE),
            log_addr: None,
        };
        let frontend = &mut self.frontend;
        frontend.set_vring_num(1, QUEUE_SIZE).unwrap();
        frontend.set_vring_addr(1, &rings).unwrap();
        frontend.set_vring_base(1, 0).unwrap();
        frontend.set_vring_call(1, &self.call).unwrap();
        frontend.set_vring_kick(1, &self.kick).unwrap();
        frontend.set_vring_enable(1, true).unwrap();
    }

    /// Makes raw descriptors available; the used length of the first.
    fn submit(&mut self, descriptors: &[(u64, u32, u16)]) -> u32 {
        for (index, (address, length, flags)) in descriptors.iter().enumerate() {
            let last = index + 1 == descriptors.len();
            let flags = flags | if last { 0 } else { 1 };
            let at = GuestAddress(TABLE + index as u64 * 16);
            let next = index as u16 + 1;
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&length.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
            self.memory.write_slice(&bytes, at).unwrap();
        }
        let memory = &self.memory;
        let slot = u64::from(self.sent % QUEUE_SIZE);
        memory
            .write_obj(0_u16, GuestAddress(AVAILABLE + 4 + slot * 2))
            .unwrap();
        // used_event: interrupt for this one.
        memory
            .write_obj(
                self.sent,
                GuestAddress(AVAILABLE + 4 + u64::from(QUEUE_SIZE) * 2),
            )
            .unwrap();
        self.sent = self.sent.wrapping_add(1);
        memory
            .store(
                self.sent,
                GuestAddress(AVAILABLE + 2),
                std::sync::atomic::Ordering::SeqCst,
            )
            .unwrap();
        self.kick.write(1).unwrap();
        // SAFETY: `self.call` is open as long as this.
        comes("a call", unsafe {
            BorrowedFd::borrow_raw(self.call.as_raw_fd())
        });
        self.call.read().unwrap();
        let used: u16 = memory
            .load(GuestAddress(USED + 2), std::sync::atomic::Ordering::SeqCst)
            .unwrap();
        assert_eq!(used, self.sent);
        memory
            .read_obj(GuestAddress(USED + 4 + slot * 8 + 4))
            .unwrap()
    }

    fn request(
        &mut self,
        opcode: u32,
        node: u64,
        args: &[&[u8]],
        data: &[u8],
        room: u32,
    ) -> Result<Vec<u8>, i32> {
        let args = args.concat();
        let header = InHeader {
            len: (HEADER + args.len() + data.len()) as u32,
            opcode,
            unique: 5,
            nodeid: node,
            ..Default::default()
        };
        let head = [header.as_slice(), &args].concat();
        self.memory
            .write_slice(&head, GuestAddress(REQUEST))
            .unwrap();
        self.memory
            .write_slice(data, GuestAddress(REQUEST + 0x1000))
            .unwrap();
        let used = self.submit(&[
            (REQUEST, head.len() as u32, 0),
            (REQUEST + 0x1000, data.len() as u32, 0),
            (REPLY, REPLY_HEADER as u32, 2),
            (REPLY + 0x1000, room, 2),
        ]);
        let out: OutHeader = self.memory.read_obj(GuestAddress(REPLY)).unwrap();
        assert_eq!(
            (out.len, out.unique),
            (used, 5),
            "the used length is that of the reply"
        );
        let mut bytes = vec![0; used as usize - REPLY_HEADER];
        self.memory
            .read_slice(&mut bytes, GuestAddress(REPLY + 0x1000))
            .unwrap();
        if out.error == 0 {
            Ok(bytes)
        } else {
            Err(-out.error)
        }
    }

    fn init(&mut self) {
        let init = InitIn {
            major: 7,
            minor: 38,
            max_readahead: 0,
            flags: init::SUBMOUNTS as u32,
        };
        self.request(Opcode::Init as u32, 0, &[init.as_slice()], b"", 4096)
            .unwrap();
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        let bytes = self.request(
            Opcode::Lookup as u32,
            parent,
            &[name.as_bytes(), b"\0"],
            b"",
            4096,
        )?;
        Ok(take(&mut &bytes[..]).unwrap())
    }

    fn open(&mut self, node: u64, flags: i32) -> u64 {
        let open = OpenIn {
            flags: flags as u32,
            fuse_flags: 0,
        };
        let bytes = self
            .request(Opcode::Open as u32, node, &[open.as_slice()], b"", 4096)
            .unwrap();
        take::<OpenOut>(&mut &bytes[..]).unwrap().fh
    }

    fn read(&mut self, fh: u64, size: u32) -> Result<Vec<u8>, i32> {
        let read = ReadIn {
            fh,
            size,
            ..Default::default()
        };
        self.request(Opcode::Read as u32, ROOT_ID, &[read.as_slice()], b"", size)
    }
}

fn started(share: &Share) -> (FsProcess, Driver) {
    let (front, back) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    let process = FsProcess::start(share.0.path(), back);
    assert_eq!(process.event(), FsEvent::Serving);
    let mut driver = Driver::new(front);
    driver.init();
    (process, driver)
}

#[test]
fn it_serves_from_a_jail_and_lets_go_of_trees() {
    let share = Share::new();
    fs::write(share.at("f"), "from the host").unwrap();
    let (mut process, mut driver) = started(&share);

    // What the process may still do.
    assert_eq!(process.status("NoNewPrivs"), "1");
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(process.status(set), "00000000800000db", "{set}");
    }
    assert_eq!(process.status("CapInh"), "0000000000000000");
    // proc_pid_smaps(5): "dd", guest memory is in no core dump.
    let maps = fs::read_to_string(format!("/proc/{}/smaps", process.pid)).unwrap();
    let mut lines = maps.lines().skip_while(|line| !line.contains("memfd:ram"));
    let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
    assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
    let mut root: Vec<_> = fs::read_dir(format!("/proc/{}/root", process.pid))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    root.sort();
    assert_eq!(root, ["proc", "share"]);
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", process.pid)).unwrap();
    assert_eq!(mounts.lines().count(), 3, "{mounts}");

    let entry = driver.lookup(ROOT_ID, "f").unwrap();
    let fh = driver.open(entry.nodeid, libc::O_RDWR);
    assert_eq!(driver.read(fh, 100).unwrap(), b"from the host");
    let write = WriteIn {
        fh,
        size: 4,
        ..Default::default()
    };
    driver
        .request(
            Opcode::Write as u32,
            entry.nodeid,
            &[write.as_slice()],
            b"FROM",
            64,
        )
        .unwrap();
    assert_eq!(fs::read(share.at("f")).unwrap(), b"FROM the host");

    // What the shim mounts later appears, and goes with a plain umount after a detach, 300 times.
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("hostname"), "guest").unwrap();
    fs::create_dir(share.at("rootfs")).unwrap();
    let point = share.at("rootfs");
    for cycle in 0..300 {
        mount(
            Some(source.path()),
            &point,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .unwrap();
        let root = driver.lookup(ROOT_ID, "rootfs").unwrap();
        let file = driver.lookup(root.nodeid, "hostname").unwrap();
        assert_eq!(
            file.attr.ino,
            fs::metadata(source.path().join("hostname")).unwrap().ino()
        );
        let fh = driver.open(file.nodeid, libc::O_RDWR);
        assert_eq!(driver.read(fh, 10).unwrap(), b"guest");
        assert_eq!(process.detach("rootfs"), (2, 1), "cycle {cycle}");
        assert_eq!(driver.lookup(ROOT_ID, "rootfs").err(), Some(libc::ESTALE));
        umount2(&point, MntFlags::empty()).unwrap();
        assert_eq!(driver.read(fh, 10), Err(libc::ESTALE));
    }
    let refused = process.ask(&FsRequest::Detach {
        tree: "../etc".to_owned(),
    });
    assert!(matches!(refused, FsEvent::Refused { .. }));
    let FsEvent::Stats {
        handles, requests, ..
    } = process.ask(&FsRequest::Stats)
    else {
        panic!("no stats");
    };
    assert_eq!((handles, requests["read"]), (1, 601));
    assert_eq!(process.end(), 0);
    let mut log = String::new();
    process.log.read_to_string(&mut log).unwrap();
    assert!(log.lines().last().unwrap().contains("requests"), "{log}");
}

#[test]
fn chains_that_are_no_requests_are_counted_and_the_ring_goes_on() {
    let share = Share::new();
    fs::write(share.at("f"), "x").unwrap();
    let (mut process, mut driver) = started(&share);
    // Past RAM, wrapping, readable behind writable, empty, without room, much too long.
    assert_eq!(
        driver.submit(&[(RAM as u64 - 10, 40, 0), (REPLY, 4096, 2)]),
        0
    );
    assert_eq!(
        driver.submit(&[(u64::MAX - 10, 40, 0), (REPLY, 4096, 2)]),
        0
    );
    assert_eq!(
        driver.submit(&[(REQUEST, 40, 0), (0xffff_ffff_0000, 16, 2)]),
        0
    );
    assert_eq!(driver.submit(&[(REPLY, 4096, 2), (REQUEST, 40, 0)]), 0);
    assert_eq!(driver.submit(&[(REQUEST, 0, 0)]), 0);
    assert_eq!(driver.submit(&[(REQUEST, 10, 0), (REPLY, 16, 2)]), 16);
    assert_eq!(driver.submit(&[(REQUEST, 40, 0), (REPLY, 8, 2)]), 0);
    assert_eq!(driver.submit(&[(0, 4 << 20, 0), (REPLY, 4096, 2)]), 16);
    let entry = driver.lookup(ROOT_ID, "f").unwrap();
    assert_eq!(entry.attr.size, 1);
    let FsEvent::Stats { guest_faults, .. } = process.ask(&FsRequest::Stats) else {
        panic!("no stats");
    };
    assert_eq!(guest_faults["chain"], 4);
    assert!(guest_faults.values().sum::<u64>() >= 8, "{guest_faults:?}");

    // A ring index from nowhere stops the ring, not the process; a reset starts it again.
    driver
        .memory
        .store(
            12345_u16,
            GuestAddress(AVAILABLE + 2),
            std::sync::atomic::Ordering::SeqCst,
        )
        .unwrap();
    driver.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    driver.frontend.get_vring_base(1).unwrap();
    driver.start();
    driver.init();
    assert_eq!(driver.lookup(ROOT_ID, "f").unwrap().attr.size, 1);
    assert_eq!(process.end(), 0);
}

#[test]
fn a_config_that_cannot_be_served_is_refused_with_the_reason() {
    let (_front, back) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    let mut process = FsProcess::start(Path::new("/does/not/exist"), back);
    let FsEvent::Failed { reason } = process.event() else {
        panic!("it serves");
    };
    assert!(
        reason.contains("/does/not/exist") && reason.contains("No such file"),
        "{reason}"
    );
    assert_eq!(process.end(), 1);
    let _ = std::io::stdout().flush();
}
