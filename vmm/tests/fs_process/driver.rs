//! The process as the shim starts it, and a driver that speaks vhost-user to it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
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
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

/// How long a test waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(60);
pub const RAM: usize = 8 << 20;
/// More of it behind a hole.
pub const HIGH: u64 = 16 << 20;
pub const HIGH_SIZE: usize = 1 << 20;
pub const QUEUE_SIZE: u16 = 16;
pub const MAX_INODES: u64 = 5_000;
pub const MAX_HANDLES: u64 = 2_000;
pub const EVENT_IDX: u64 = 1 << 29;

/// Waits until there is something to read.
pub fn comes(what: &str, from: BorrowedFd<'_>) {
    let mut polled = [PollFd::new(from, PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(PATIENCE).unwrap();
    let came = poll(&mut polled, patience).unwrap();
    assert_eq!(came, 1, "waited {PATIENCE:?} in vain for {what}");
}

pub fn seqpacket() -> (OwnedFd, OwnedFd) {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap()
}

/// The process in namespaces of its own, with descriptor 3 and nothing else.
pub struct FsProcess {
    pub pid: Pid,
    control: Option<ControlSocket>,
    pub log: File,
}

impl FsProcess {
    pub fn start(share: &Path, socket: OwnedFd, lender: Option<OwnedFd>) -> FsProcess {
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
        // SAFETY: fork(2) by clone(2) without a new stack; the child calls nothing but dup2, execv
        // and _exit.
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
            lender: lender.as_ref().map(|_| Fd(2)),
            queues: 1,
            cache: CachePolicy {
                entry_ms: 1000,
                attr_ms: 1000,
                keep_data: true,
            },
            max_inodes: MAX_INODES,
            max_handles: MAX_HANDLES,
            log: Fd(1),
            accept_missing: Vec::new(),
        };
        let mut fds = vec![socket.as_fd(), log_end.as_fd()];
        fds.extend(lender.as_ref().map(OwnedFd::as_fd));
        control.send_with(&config, &fds).unwrap();
        FsProcess {
            pid,
            control: Some(control),
            log: File::from(log),
        }
    }

    pub fn event(&self) -> FsEvent {
        let control = self.control.as_ref().unwrap();
        comes("an event", control.as_fd());
        control.receive().unwrap().0
    }

    pub fn ask(&self, request: &FsRequest) -> FsEvent {
        self.control.as_ref().unwrap().send(request).unwrap();
        self.event()
    }

    /// Refusals so far, by rule.
    pub fn faults(&self) -> BTreeMap<String, u64> {
        match self.ask(&FsRequest::Stats) {
            FsEvent::Stats { guest_faults, .. } => guest_faults,
            other => panic!("{other:?}"),
        }
    }

    /// Most memory that it had until now, in KiB.
    pub fn peak(&self) -> u64 {
        let peak = self.status("VmHWM");
        peak.trim_end_matches(" kB").parse().unwrap()
    }

    /// Descriptors that are open.
    pub fn open_files(&self) -> usize {
        let list = fs::read_dir(format!("/proc/{}/fd", self.pid));
        list.unwrap().count()
    }

    pub fn detach(&self, tree: &str) -> (u64, u64) {
        match self.ask(&FsRequest::Detach {
            tree: tree.to_owned(),
        }) {
            FsEvent::Detached { inodes, handles } => (inodes, handles),
            other => panic!("{other:?}"),
        }
    }

    pub fn status(&self, field: &str) -> String {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = text.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    }

    /// Lets go of the control socket; the exit code.
    pub fn end(&mut self) -> i32 {
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
pub struct Share(pub tempfile::TempDir);

impl Share {
    pub fn new() -> Share {
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

    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// The smallest driver: one request at a time, on the first request queue.
pub struct Driver {
    pub frontend: Frontend,
    pub memory: GuestMemoryMmap,
    pub kick: EventFd,
    pub call: EventFd,
    pub sent: u16,
}

pub const TABLE: u64 = 0x1000;
pub const AVAILABLE: u64 = 0x2000;
pub const USED: u64 = 0x3000;
pub const REQUEST: u64 = 0x10_0000;
pub const REQUEST_DATA: u64 = 0x20_0000;
pub const REPLY: u64 = 0x40_0000;
pub const REPLY_DATA: u64 = 0x40_1000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

impl Driver {
    pub fn new(socket: OwnedFd) -> Driver {
        // SAFETY: the name is NUL-terminated and the descriptor returned is new.
        let file =
            unsafe { File::from_raw_fd(libc::memfd_create(c"ram".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len((RAM + HIGH_SIZE) as u64).unwrap();
        let region = |start: u64, offset: u64, size: usize| {
            let file = FileOffset::new(file.try_clone().unwrap(), offset);
            let region = MmapRegion::from_file(file, size).unwrap();
            vm_memory::GuestRegionMmap::new(region, GuestAddress(start)).unwrap()
        };
        let regions = vec![region(0, 0, RAM), region(HIGH, RAM as u64, HIGH_SIZE)];
        let memory = GuestMemoryMmap::from_regions(regions).unwrap();
        let socket = UnixStream::from(socket);
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut frontend = Frontend::from_stream(socket, 2);
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        let wanted = 1 << 32 | EVENT_IDX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_eq!(offered & wanted, wanted);
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        // As the VMM: a refused request is told.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(frontend.get_queue_num().unwrap(), 2);
        frontend.set_features(wanted).unwrap();
        let table = |start: u64, mmap_offset: u64, memory_size: usize| VhostUserMemoryRegionInfo {
            guest_phys_addr: start,
            memory_size: memory_size as u64,
            userspace_addr: 0x7000_0000 + start,
            mmap_offset,
            mmap_handle: file.as_raw_fd(),
        };
        let tables = [table(0, 0, RAM), table(HIGH, RAM as u64, HIGH_SIZE)];
        frontend.set_mem_table(&tables).unwrap();
        // As the VMM's.
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let call = EventFd::new(libc::EFD_NONBLOCK).unwrap();
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

    pub fn start(&mut self) {
        self.try_start().unwrap();
    }

    /// Starts the queue anew, with rings of zeros.
    pub fn try_start(&mut self) -> vhost::Result<()> {
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
        frontend.set_vring_num(1, QUEUE_SIZE)?;
        frontend.set_vring_addr(1, &rings)?;
        frontend.set_vring_base(1, 0)?;
        frontend.set_vring_call(1, &self.call)?;
        frontend.set_vring_kick(1, &self.kick)?;
        frontend.set_vring_enable(1, true)
    }

    /// Writes a descriptor of the table.
    pub fn descriptor(&self, index: u16, piece: (u64, u32, u16), next: u16) {
        self.descriptor_at(TABLE, index, piece, next);
    }

    /// Writes a descriptor of another table.
    pub fn descriptor_at(&self, table: u64, index: u16, piece: (u64, u32, u16), next: u16) {
        let descriptor = Descriptor::new(piece.0, piece.1, piece.2, next);
        let at = GuestAddress(table + u64::from(index) * 16);
        self.memory.write_obj(descriptor, at).unwrap();
    }

    /// Makes a chain available.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.sent % QUEUE_SIZE) * 2;
        let put = |word: u16, at: u64| {
            let at = GuestAddress(AVAILABLE + at);
            self.memory.store(word, at, Ordering::SeqCst).unwrap();
        };
        put(head, 4 + slot);
        // used_event: interrupt for this one.
        put(self.sent, 4 + u64::from(QUEUE_SIZE) * 2);
        put(self.sent.wrapping_add(1), 2);
        self.sent = self.sent.wrapping_add(1);
    }

    fn chain(&mut self, descriptors: &[(u64, u32, u16)]) {
        for (index, &(address, length, flags)) in (0..).zip(descriptors) {
            let last = usize::from(index) + 1 == descriptors.len();
            let flags = flags | if last { 0 } else { NEXT };
            self.descriptor(index, (address, length, flags), index + 1);
        }
        self.publish(0);
    }

    fn used(&self) -> u16 {
        let at = GuestAddress(USED + 2);
        self.memory.load(at, Ordering::SeqCst).unwrap()
    }

    /// Makes a chain of these available in the first descriptors; its used length.
    pub fn submit(&mut self, descriptors: &[(u64, u32, u16)]) -> u32 {
        self.chain(descriptors);
        self.kick_and_hear()
    }

    /// Kicks, and waits for the interrupt of what was published last; its used length.
    pub fn kick_and_hear(&mut self) -> u32 {
        self.kick.write(1).unwrap();
        // An interrupt may be of a request before, of which nobody wanted to hear.
        loop {
            // SAFETY: `self.call` is open as long as this.
            comes("a call", unsafe {
                BorrowedFd::borrow_raw(self.call.as_raw_fd())
            });
            self.call.read().unwrap();
            if self.used() == self.sent {
                break;
            }
        }
        let slot = u64::from(self.sent.wrapping_sub(1) % QUEUE_SIZE);
        let at = GuestAddress(USED + 4 + slot * 8 + 4);
        self.memory.read_obj(at).unwrap()
    }

    /// Has a request served of which no interrupt tells.
    pub fn request_unheard(&mut self, opcode: Opcode, node: u64, args: &[&[u8]]) {
        let chain = self.message(opcode as u32, node, args, b"", 4096);
        self.chain(&chain);
        self.kick.write(1).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while self.used() != self.sent {
            assert!(Instant::now() < deadline, "the request is not served");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Writes a request to memory; its chain.
    pub fn message(
        &self,
        opcode: u32,
        node: u64,
        args: &[&[u8]],
        data: &[u8],
        room: u32,
    ) -> [(u64, u32, u16); 4] {
        let args = args.concat();
        let header = InHeader {
            len: (HEADER + args.len() + data.len()) as u32,
            opcode,
            unique: 5,
            nodeid: node,
            ..Default::default()
        };
        let head = [header.as_slice(), &args].concat();
        let put = |bytes: &[u8], at| self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        put(&head, REQUEST);
        put(data, REQUEST_DATA);
        [
            (REQUEST, head.len() as u32, 0),
            (REQUEST_DATA, data.len() as u32, 0),
            (REPLY, REPLY_HEADER as u32, WRITE),
            (REPLY_DATA, room, WRITE),
        ]
    }

    pub fn request(
        &mut self,
        opcode: u32,
        node: u64,
        args: &[&[u8]],
        data: &[u8],
        room: u32,
    ) -> Result<Vec<u8>, i32> {
        let chain = self.message(opcode, node, args, data, room);
        let used = self.submit(&chain);
        self.reply(used)
    }

    /// The reply to the last request.
    pub fn reply(&self, used: u32) -> Result<Vec<u8>, i32> {
        let out: OutHeader = self.memory.read_obj(GuestAddress(REPLY)).unwrap();
        let expected = (used, 5);
        assert_eq!(
            (out.len, out.unique),
            expected,
            "the used length is the reply's"
        );
        let mut bytes = vec![0; used as usize - REPLY_HEADER];
        let at = GuestAddress(REPLY_DATA);
        self.memory.read_slice(&mut bytes, at).unwrap();
        match out.error {
            0 => Ok(bytes),
            error => Err(-error),
        }
    }

    /// The same for what must succeed and whose answer says nothing.
    pub fn ask(&mut self, opcode: u32, node: u64, body: &[u8], data: &[u8]) {
        let answer = self.request(opcode, node, &[body], data, 256);
        answer.unwrap_or_else(|errno| panic!("{opcode}: errno {errno}"));
    }

    pub fn init(&mut self) {
        let init = InitIn {
            major: 7,
            minor: 38,
            max_readahead: 0,
            flags: init::SUBMOUNTS as u32,
        };
        self.request(Opcode::Init as u32, 0, &[init.as_slice()], b"", 4096)
            .unwrap();
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        let bytes = self.request(
            Opcode::Lookup as u32,
            parent,
            &[name.as_bytes(), b"\0"],
            b"",
            4096,
        )?;
        Ok(take(&mut &bytes[..]).unwrap())
    }

    pub fn open(&mut self, node: u64, flags: i32) -> u64 {
        self.open_and(node, flags, 0)
    }

    pub fn open_and(&mut self, node: u64, flags: i32, fuse_flags: u32) -> u64 {
        let open = OpenIn {
            flags: flags as u32,
            fuse_flags,
        };
        let bytes = self
            .request(Opcode::Open as u32, node, &[open.as_slice()], b"", 4096)
            .unwrap();
        take::<OpenOut>(&mut &bytes[..]).unwrap().fh
    }

    pub fn read(&mut self, fh: u64, size: u32) -> Result<Vec<u8>, i32> {
        let read = ReadIn {
            fh,
            size,
            ..Default::default()
        };
        self.request(Opcode::Read as u32, ROOT_ID, &[read.as_slice()], b"", size)
    }
}

pub fn started(share: &Share) -> (FsProcess, Driver) {
    started_with(share, None)
}

/// By `lender` the process asks for lent pages.
pub fn started_with(share: &Share, lender: Option<OwnedFd>) -> (FsProcess, Driver) {
    let (front, back) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    let process = FsProcess::start(share.0.path(), back, lender);
    assert!(matches!(process.event(), FsEvent::Serving { .. }));
    let mut driver = Driver::new(front);
    driver.init();
    (process, driver)
}
