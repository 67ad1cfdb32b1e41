//! A VMM that lends a template's pages, and every way to a page that is not the pod's own yet.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bulkhead_vmm_config::CachePolicy;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::{Whence, lseek};
use vhost::vhost_user::VhostUserBackendReqHandlerMut as _;
use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserVringAddrFlags};
use virtio_queue::desc::split::Descriptor;
use vm_memory::mmap::MmapRegion;
use vm_memory::{ByteValued, Bytes, FileOffset, GuestMemory as _};

use super::super::parts::{Data, Parts};
use super::super::{Backend, FEATURES, Servers, VIRTIO_RING_F_EVENT_IDX};
use super::*;
use crate::fs::guard::HEADER;
use crate::fs::tree::{Engine, Limits, Payload};
use crate::fs::wire::{InHeader, InitIn, Opcode};

const RAM: u64 = 1 << 20;
const NO_MORE: usize = usize::MAX;

/// Memory that nobody lends.
pub fn memory(ranges: &[(u64, usize)]) -> GuestMemory {
    let region = |&(start, size)| {
        let mapped = GuestRegionMmap::from_range(GuestAddress(start), size, None).unwrap();
        Region::new(mapped, None)
    };
    GuestMemory::from_regions(ranges.iter().map(region).collect()).unwrap()
}

fn file() -> File {
    let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(RAM).unwrap();
    file
}

fn pair() -> (OwnedFd, OwnedFd) {
    linux::packet::pair().unwrap()
}

fn say(socket: &OwnedFd, packet: &[u8]) {
    send(socket.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL).unwrap();
}

fn page_addresses(&(start, length): &(u64, u64)) -> impl Iterator<Item = u64> {
    (start..start + length).step_by(PAGE as usize)
}

/// Whether the pod's memory file has nothing there: neither a read nor a write has reached it by a
/// mapping.
fn is_hole(ram: &File, page: u64) -> bool {
    match lseek(ram, page as i64, Whence::SeekData) {
        Ok(data) => data as u64 >= page + PAGE,
        Err(error) => error == Errno::ENXIO,
    }
}

fn copy_page(template: &File, ram: &File, page: u64) {
    let mut contents = [0; PAGE as usize];
    template.read_exact_at(&mut contents, page).unwrap();
    ram.write_all_at(&contents, page).unwrap();
}

/// A template, and the memory file of a pod that goes on from it.
struct Pod {
    template: Arc<File>,
    ram: Arc<File>,
    runs: Vec<(u64, u64)>,
}

/// The VMM's thread that answers, until the fs process has gone; it returns the pages that it was
/// asked for and had lent. A page that is touched too early, or asked for in vain, is its panic.
type Vmm = JoinHandle<Vec<u64>>;

impl Pod {
    fn new(runs: &[(u64, u64)]) -> Pod {
        Pod {
            template: Arc::new(file()),
            ram: Arc::new(file()),
            runs: runs.to_vec(),
        }
    }

    fn write(&self, bytes: &[u8], at: u64) {
        self.template.write_all_at(bytes, at).unwrap();
    }

    /// Starts the VMM; it answers as often as it is said, then closes.
    fn start(&self, answers: usize) -> (Lending, Vmm) {
        let (ours, theirs) = pair();
        let lent: BTreeSet<u64> = self.runs.iter().flat_map(page_addresses).collect();
        for page in page_addresses(&(0, RAM)).filter(|page| !lent.contains(page)) {
            copy_page(&self.template, &self.ram, page);
        }
        say(&ours, &lending::encode_runs(&self.runs));
        let (template, ram) = (self.template.clone(), self.ram.clone());
        let vmm = thread::spawn(move || {
            let mut given = Vec::new();
            let mut packet = [0; 64];
            for nth in 0.. {
                let length = nix::unistd::read(&ours, &mut packet).unwrap();
                if length == 0 || nth == answers {
                    break;
                }
                let question = lending::decode_question(&packet[..length]).unwrap();
                let pages: Vec<u64> = page_addresses(&question).collect();
                for edge in [pages[0], pages[pages.len() - 1]] {
                    assert!(lent.contains(&edge) && !given.contains(&edge), "{edge:#x}");
                }
                for page in pages {
                    if lent.contains(&page) && !given.contains(&page) {
                        assert!(is_hole(&ram, page), "{page:#x} was touched");
                        copy_page(&template, &ram, page);
                        given.push(page);
                    }
                }
                say(&ours, &[ANSWER]);
            }
            drop(ours);
            for page in lent.iter().filter(|page| !given.contains(page)) {
                assert!(is_hole(&ram, *page), "{page:#x} was touched, not asked for");
            }
            given.sort_unstable();
            given
        });
        (Lending::new(Some(theirs)), vmm)
    }

    fn map(&self, lent: Option<Arc<Lent>>) -> GuestMemory {
        let file = FileOffset::new(self.ram.try_clone().unwrap(), 0);
        let mapping = MmapRegion::from_file(file, RAM as usize).unwrap();
        let mapped = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
        GuestMemory::from_regions(vec![Region::new(mapped, lent)]).unwrap()
    }

    fn memory(&self, answers: usize) -> (GuestMemory, Vmm) {
        let (mut lending, vmm) = self.start(answers);
        (self.map(lending.lent().unwrap()), vmm)
    }
}

#[test]
fn every_access_asks_first_and_once() {
    let pod = Pod::new(&[(0x1000, 0x4000), (0x8000, 0x1000), (0x9000, 0x1000)]);
    pod.write(b"template", 0x1ffc);
    pod.write(&7_u16.to_ne_bytes(), 0x3000);
    let (memory, vmm) = pod.memory(NO_MORE);
    for _ in 0..2 {
        let mut bytes = [0; 8];
        memory.read_slice(&mut bytes, GuestAddress(0x1ffc)).unwrap();
        assert_eq!(&bytes, b"template");
        let number: u16 = memory
            .load(GuestAddress(0x3000), Ordering::Acquire)
            .unwrap();
        assert_eq!(number, 7);
        memory
            .store(1_u16, GuestAddress(0x4ffe), Ordering::Release)
            .unwrap();
        // From a page that was always own to one, over two that touch.
        memory
            .write_slice(&[1; 0x3002], GuestAddress(0x7fff))
            .unwrap();
    }
    drop(memory);
    let given = [0x1000, 0x2000, 0x3000, 0x4000, 0x8000, 0x9000];
    assert_eq!(vmm.join().unwrap(), given);
    let mut number = [0; 2];
    pod.ram.read_exact_at(&mut number, 0x4ffe).unwrap();
    assert_eq!(u16::from_ne_bytes(number), 1);
}

#[test]
fn a_question_reaches_from_the_first_lent_page_to_the_last() {
    let pod = Pod::new(&[(0x2000, 0x1000), (0x4000, 0x1000)]);
    let (ours, theirs) = pair();
    say(&ours, &lending::encode_runs(&pod.runs));
    say(&ours, &[ANSWER]);
    let memory = pod.map(Lending::new(Some(theirs)).lent().unwrap());
    memory.get_slice(GuestAddress(0xfff), 0x8000).unwrap();
    let mut packet = [0; 64];
    let length = nix::unistd::read(&ours, &mut packet).unwrap();
    assert_eq!(
        lending::decode_question(&packet[..length]),
        Some((0x2000, 0x3000))
    );
}

#[test]
fn the_lent_pages_of_a_block_come_with_the_first() {
    let (memory, vmm) = Pod::new(&[(0xf000, 0x3000), (0x1f000, 0x2000)]).memory(1);
    for address in [0x11000, 0x10000, 0x1f000] {
        memory.read_obj::<u8>(GuestAddress(address)).unwrap();
    }
    drop(memory);
    assert_eq!(vmm.join().unwrap(), [0x10000, 0x11000, 0x1f000]);
}

#[test]
fn what_is_outside_of_memory_asks_nothing() {
    let (memory, vmm) = Pod::new(&[(0, RAM)]).memory(NO_MORE);
    for (address, length) in [
        (RAM - 4, 8),
        (RAM, 1),
        (u64::MAX, 1),
        (u64::MAX, usize::MAX),
        (0, RAM as usize + 1),
        (0, usize::MAX),
    ] {
        assert!(memory.get_slice(GuestAddress(address), length).is_err());
    }
    assert_eq!(memory.get_slice(GuestAddress(0), 0).unwrap().len(), 0);
    drop(memory);
    assert!(vmm.join().unwrap().is_empty());
}

#[test]
fn there_is_no_way_around_the_question() {
    let (memory, vmm) = Pod::new(&[(0, RAM)]).memory(NO_MORE);
    let region = memory.iter().next().unwrap();
    let start = MemoryRegionAddress(0);
    assert!(region.as_volatile_slice().is_err());
    assert!(region.get_host_address(start).is_err());
    assert!(memory.get_host_address(GuestAddress(0)).is_err());
    assert!(region.file_offset().is_none());
    assert!(region.read_obj::<u16>(start).is_err());
    assert!(region.write_obj(1_u16, start).is_err());
    assert!(region.load::<u16>(start, Ordering::Acquire).is_err());
    assert!(region.store(1_u16, start, Ordering::Release).is_err());
    drop(memory);
    assert!(vmm.join().unwrap().is_empty());
}

#[test]
fn a_wrong_answer_leaves_the_page_lent() {
    let pod = Pod::new(&[(0x1000, 0x1000)]);
    let (ours, theirs) = pair();
    say(&ours, &lending::encode_runs(&pod.runs));
    let memory = pod.map(Lending::new(Some(theirs)).lent().unwrap());
    let get = || memory.get_slice(GuestAddress(0x1000), 1).map(drop);
    for wrong in [&[0][..], &[2], &[ANSWER, ANSWER], &[ANSWER; 100], &[]] {
        say(&ours, wrong);
        assert!(
            matches!(get(), Err(GuestMemoryError::IOError(_))),
            "{wrong:?}"
        );
    }
    say(&ours, &[ANSWER]);
    get().unwrap();
    // Nobody is asked any more.
    drop(ours);
    get().unwrap();
}

#[test]
fn a_vmm_that_has_gone_gives_nothing() {
    let pod = Pod::new(&[(0x1000, 0x1000)]);
    let (memory, vmm) = pod.memory(0);
    for _ in 0..3 {
        assert!(memory.read_obj::<u8>(GuestAddress(0x1000)).is_err());
    }
    memory.read_obj::<u8>(GuestAddress(0x2000)).unwrap();
    vmm.join().unwrap();
    assert!(is_hole(&pod.ram, 0x1000));
}

#[test]
fn without_a_list_no_memory_is_shared() {
    let list = |runs: &[(u64, u64)]| lending::encode_runs(runs);
    let longest: Vec<_> = (0..=lending::MAX_RUNS as u64)
        .map(|at| (at * PAGE, PAGE))
        .collect();
    for packet in [
        list(&[(0x2000, 0x1000), (0x1000, 0x1000)]),
        list(&[(0x1000, 0x2000), (0x2000, 0x1000)]),
        list(&[(0x1001, 0x1000)]),
        list(&[(0x1000, 0xfff)]),
        list(&[(0_u64.wrapping_sub(PAGE), 2 * PAGE)]),
        list(&[(0, MAX_MEMORY + PAGE)]),
        list(&[(0, 1 << 63)]),
        list(&longest),
        [list(&longest[1..]), vec![0; 100]].concat(),
        vec![0xff; 8],
        Vec::new(),
    ] {
        let (ours, theirs) = pair();
        let mut lending = Lending::new(Some(theirs));
        say(&ours, &packet);
        assert!(lending.lent().is_err());
        drop(ours);
        // What was not said is not nothing.
        assert!(lending.lent().is_err());
    }
    let (ours, theirs) = pair();
    let mut lending = Lending::new(Some(theirs));
    say(&ours, &list(&[]));
    drop(ours);
    assert!(lending.lent().unwrap().is_none());
    assert!(lending.lent().unwrap().is_none());
    assert!(Lending::new(None).lent().unwrap().is_none());
}

#[test]
fn threads_that_want_the_same_pages_ask_once() {
    let pod = Pod::new(&[(0, RAM)]);
    let (memory, vmm) = pod.memory(NO_MORE);
    thread::scope(|scope| {
        for nth in 0..4 {
            let memory = &memory;
            scope.spawn(move || {
                for page in 0..RAM / PAGE {
                    let page = if nth % 2 == 0 {
                        page
                    } else {
                        RAM / PAGE - 1 - page
                    };
                    memory
                        .read_obj::<u8>(GuestAddress(page * PAGE + nth))
                        .unwrap();
                }
            });
        }
    });
    drop(memory);
    assert_eq!(vmm.join().unwrap().len() as u64, RAM / PAGE);
}

#[test]
fn data_over_the_border_of_lent_and_own_is_the_templates() {
    let pod = Pod::new(&[(0x2000, 0x1000), (0x5000, 0x1000)]);
    let data: Vec<u8> = (0..0x6000_u32).map(|at| (at % 251) as u8).collect();
    pod.write(&data, 0x1000);
    let (memory, vmm) = pod.memory(NO_MORE);
    let mut file = tempfile::tempfile().unwrap();
    let mut readable = Parts::new(&memory);
    readable.push(GuestAddress(0x1000), 0x6000).unwrap();
    let mut writable = Parts::new(&memory);
    writable.push(GuestAddress(0x5800), 0x1000).unwrap();
    let mut parts = Data {
        readable: &readable,
        writable: &writable,
        head: 0x10,
        reply_head: 0,
        window: &mut Vec::new(),
    };
    parts.write_to(file.as_fd(), 0, 0x5ff0, false).unwrap();
    let mut written = Vec::new();
    file.read_to_end(&mut written).unwrap();
    assert!(written == data[0x10..]);
    parts.read_from(file.as_fd(), 0, 0x1000).unwrap();
    let mut back = [0; 0x1000];
    pod.ram.read_exact_at(&mut back, 0x5800).unwrap();
    assert!(back == data[0x10..0x1010]);
    drop(memory);
    assert_eq!(vmm.join().unwrap(), [0x2000, 0x5000]);
}

/// Where a queue's parts lie behind its base; a request and a reply lie over a border of pages.
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT: u64 = 0x4000;
const REQUEST: u64 = 0x6000 - HEADER as u64 / 2;
const REPLY: u64 = 0x9000 - 8;
/// All pages of these.
const PLACES: [u64; 8] = [
    TABLE, AVAILABLE, USED, INDIRECT, 0x5000, 0x6000, 0x8000, 0x9000,
];
/// Of the VMM, to which vhost-user's messages refer.
const USER: u64 = 1 << 40;

/// A queue with a request of INIT that waits for the device, by a table of its own.
fn put_request(pod: &Pod, base: u64, request: u64) {
    let init = InitIn {
        major: 7,
        minor: 38,
        ..InitIn::default()
    };
    let header = InHeader {
        len: (HEADER + size_of::<InitIn>()) as u32,
        opcode: Opcode::Init as u32,
        unique: 1,
        ..InHeader::default()
    };
    let bytes = [header.as_slice(), init.as_slice()].concat();
    pod.write(&bytes, request);
    let indirect = Descriptor::new(base + INDIRECT, 32, 4, 0);
    pod.write(indirect.as_slice(), base + TABLE);
    let read = Descriptor::new(request, bytes.len() as u32, 1, 1);
    let write = Descriptor::new(base + REPLY, 256, 2, 0);
    pod.write(read.as_slice(), base + INDIRECT);
    pod.write(write.as_slice(), base + INDIRECT + 16);
    pod.write(&1_u16.to_ne_bytes(), base + AVAILABLE + 2);
}

/// The fs process with a share.
struct Process {
    backend: Backend,
    calls: Vec<EventFd>,
    _share: tempfile::TempDir,
}

impl Process {
    fn new(queues: usize, lending: Lending) -> Process {
        let share = tempfile::tempdir().unwrap();
        let root = OwnedFd::from(File::open(share.path()).unwrap());
        let cache = CachePolicy {
            entry_ms: 0,
            attr_ms: 0,
            keep_data: false,
        };
        let limits = Limits {
            inodes: 100,
            handles: 100,
        };
        let engine = Arc::new(Engine::new(root, cache, limits).unwrap());
        let servers = Servers::start(queues, &engine).expect("tests of the file system need root");
        let call = |_| EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
        Process {
            backend: Backend::new(servers, lending),
            calls: (0..queues).map(call).collect(),
            _share: share,
        }
    }

    /// What the VMM says first, and again after each reset.
    fn share_memory(&mut self, pod: &Pod) {
        self.backend.reset_device().unwrap();
        // An interrupt for each request.
        let features = FEATURES & !(1 << VIRTIO_RING_F_EVENT_IDX);
        self.backend.set_features(features).unwrap();
        let region = VhostUserMemoryRegion::new(0, RAM, USER, 0);
        let files = vec![pod.ram.try_clone().unwrap()];
        self.backend.set_mem_table(&[region], files).unwrap();
    }

    /// Starts a queue from its first request on.
    fn start(&mut self, index: u8, base: u64) -> vhost::vhost_user::Result<()> {
        let number = u32::from(index);
        let at = USER + base;
        let copy = |event: &EventFd| Some(File::from(event.as_fd().try_clone_to_owned().unwrap()));
        let flags = VhostUserVringAddrFlags::empty();
        let (backend, call) = (&mut self.backend, &self.calls[usize::from(index)]);
        backend.set_vring_num(number, 16)?;
        backend.set_vring_addr(number, flags, at + TABLE, at + USED, at + AVAILABLE, 0)?;
        backend.set_vring_base(number, 0)?;
        backend.set_vring_call(index, copy(call))?;
        let kick = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
        backend.set_vring_kick(index, copy(&kick))?;
        backend.set_vring_enable(number, true)
    }

    /// Waits for an interrupt.
    fn interrupted(&self, index: usize) {
        let call = &self.calls[index];
        let mut fds = [PollFd::new(call.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, 10_000_u16).unwrap(), 1, "no interrupt");
        call.read().unwrap();
    }
}

/// Stops all that is served; it does not hang.
fn stop(mut process: Process) -> Process {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        process.backend.stop_all();
        let _ = tell.send(process);
    });
    let stopped = told.recv_timeout(Duration::from_secs(10));
    stopped.expect("a queue does not stop")
}

/// Lets go of memory and of the lender; the queues' threads stay, and wait.
fn forget(process: Process) {
    drop(process.backend);
}

/// How often the device used the ring, and the reply.
fn outcome(pod: &Pod, base: u64) -> (u16, Vec<u8>) {
    let mut index = [0; 2];
    pod.ram.read_exact_at(&mut index, base + USED + 2).unwrap();
    let mut length = [0; 4];
    pod.ram.read_exact_at(&mut length, base + USED + 8).unwrap();
    let mut reply = vec![0; u32::from_ne_bytes(length) as usize];
    pod.ram.read_exact_at(&mut reply, base + REPLY).unwrap();
    (u16::from_ne_bytes(index), reply)
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "std asserts by calls that no filter allows"
)]
fn every_page_of_a_request_is_asked_for_once() {
    let alone = PLACES.iter().map(|&page| vec![(page, PAGE)]);
    let all = PLACES.map(|page| (page, PAGE)).to_vec();
    let nothing = Vec::new();
    let mut expected = None;
    for runs in [nothing, all].into_iter().chain(alone) {
        let pod = Pod::new(&runs);
        put_request(&pod, 0, REQUEST);
        let (lending, vmm) = pod.start(NO_MORE);
        let mut process = Process::new(1, lending);
        process.share_memory(&pod);
        process.start(0, 0).unwrap();
        process.interrupted(0);
        let mut process = stop(process);
        let (used, reply) = outcome(&pod, 0);
        assert_eq!(used, 1, "{runs:x?}");
        assert!(reply.len() > 16, "{runs:x?}");
        assert_eq!(expected.get_or_insert(reply.clone()), &reply, "{runs:x?}");

        // The driver resets the device and begins again: what is the pod's own stays so.
        process.share_memory(&pod);
        process.start(0, 0).unwrap();
        process.interrupted(0);
        let process = stop(process);
        assert_eq!(outcome(&pod, 0).0, 2, "{runs:x?}");

        forget(process);
        let lent: BTreeSet<u64> = runs.iter().flat_map(page_addresses).collect();
        let expected = PLACES.into_iter().filter(|page| lent.contains(page));
        assert_eq!(vmm.join().unwrap(), expected.collect::<Vec<_>>());
    }
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "std asserts by calls that no filter allows"
)]
fn two_queues_ask_once_for_a_page_of_both() {
    for _ in 0..20 {
        let other = 0x2_0000;
        let others = [TABLE, AVAILABLE, USED, INDIRECT, 0x8000, 0x9000].map(|page| other + page);
        let pages: Vec<_> = PLACES.into_iter().chain(others).collect();
        let runs: Vec<_> = pages.iter().map(|&page| (page, PAGE)).collect();
        let pod = Pod::new(&runs);
        put_request(&pod, 0, REQUEST);
        put_request(&pod, other, REQUEST);
        let (lending, vmm) = pod.start(NO_MORE);
        let mut process = Process::new(2, lending);
        process.share_memory(&pod);
        process.start(0, 0).unwrap();
        process.start(1, other).unwrap();
        process.interrupted(0);
        process.interrupted(1);
        forget(stop(process));
        for base in [0, other] {
            let (used, reply) = outcome(&pod, base);
            assert_eq!(used, 1);
            assert!(reply.len() >= 16);
        }
        assert_eq!(vmm.join().unwrap(), pages);
    }
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "std asserts by calls that no filter allows"
)]
fn a_vmm_that_goes_ends_the_queue_and_no_request_is_told_as_done() {
    for page in PLACES {
        let pod = Pod::new(&[(page, PAGE)]);
        put_request(&pod, 0, REQUEST);
        let (lending, vmm) = pod.start(0);
        let mut process = Process::new(1, lending);
        process.share_memory(&pod);
        // The used ring is looked at when the queue starts.
        assert_eq!(process.start(0, 0).is_ok(), page != USED, "{page:#x}");
        vmm.join().unwrap();
        forget(stop(process));
        assert_eq!(outcome(&pod, 0), (0, Vec::new()), "{page:#x}");
    }
}

#[test]
fn memory_is_not_mapped_before_the_list_is_known() {
    let pod = Pod::new(&[]);
    let (ours, theirs) = pair();
    say(&ours, b"nonsense");
    drop(ours);
    let mut process = Process::new(1, Lending::new(Some(theirs)));
    for _ in 0..2 {
        let region = VhostUserMemoryRegion::new(0, RAM, USER, 0);
        let files = vec![pod.ram.try_clone().unwrap()];
        assert!(process.backend.set_mem_table(&[region], files).is_err());
        assert_eq!(process.backend.memory.num_regions(), 0);
    }
}
