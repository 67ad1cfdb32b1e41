//! The front end against a back end on a thread of its own, which speaks the real protocol and maps
//! the real memory.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::super::test_driver::{BUFFERS, Driver, HIGH_RAM, Loop, Notices, RAM_SIZE, WRITE, reg};
use super::super::tests::{Direction, Subject};
use super::{Fs, FsError, WANTED};

const ALL: u64 = WANTED | 1 << 30;

#[derive(Default)]
struct Record {
    log: Vec<String>,
    offered: u64,
    features: u64,
    regions: Vec<(u64, u64, u64, u64)>,
    memory: Vec<File>,
    /// Descriptor table, used and available ring by queue.
    addresses: Vec<(u32, [u64; 3])>,
    kicks: Vec<Option<File>>,
    calls: Vec<Option<File>>,
    refuse_addresses: bool,
}

struct BackEnd(Arc<Mutex<Record>>);

impl BackEnd {
    fn log(&self, what: impl Into<String>) {
        self.0.lock().unwrap().log.push(what.into());
    }
}

fn unasked<T>() -> Result<T> {
    Err(Error::InvalidOperation("was not negotiated"))
}

impl VhostUserBackendReqHandlerMut for BackEnd {
    fn set_owner(&mut self) -> Result<()> {
        self.log("owner");
        Ok(())
    }
    fn get_features(&mut self) -> Result<u64> {
        Ok(self.0.lock().unwrap().offered)
    }
    fn set_features(&mut self, features: u64) -> Result<()> {
        self.log("features");
        self.0.lock().unwrap().features = features;
        Ok(())
    }
    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::all())
    }
    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let wanted = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ;
        assert_eq!(features, wanted.bits());
        Ok(())
    }
    fn set_mem_table(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        self.log("memory");
        let mut record = self.0.lock().unwrap();
        record.regions = regions
            .iter()
            .map(|r| (r.guest_phys_addr, r.memory_size, r.user_addr, r.mmap_offset))
            .collect();
        record.memory = files;
        Ok(())
    }
    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.log(format!("num {index} {num}"));
        Ok(())
    }
    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        assert!(flags.is_empty());
        let mut record = self.0.lock().unwrap();
        if record.refuse_addresses {
            return Err(Error::InvalidParam);
        }
        record
            .addresses
            .push((index, [descriptor, used, available]));
        Ok(())
    }
    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.log(format!("base {index} {base}"));
        Ok(())
    }
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.log(format!("stop {index}"));
        Ok(VhostUserVringState::new(index, 0))
    }
    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.log(format!("kick {index}"));
        self.0.lock().unwrap().kicks.push(fd);
        Ok(())
    }
    fn set_vring_call(&mut self, _index: u8, fd: Option<File>) -> Result<()> {
        self.0.lock().unwrap().calls.push(fd);
        Ok(())
    }
    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.log(format!("enable {index} {enable}"));
        Ok(())
    }
    fn reset_owner(&mut self) -> Result<()> {
        unasked()
    }
    fn reset_device(&mut self) -> Result<()> {
        unasked()
    }
    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Result<()> {
        unasked()
    }
    fn get_queue_num(&mut self) -> Result<u64> {
        unasked()
    }
    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        unasked()
    }
    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        unasked()
    }
    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        unasked()
    }
    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        unasked()
    }
    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unasked()
    }
    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        unasked()
    }
    fn get_max_mem_slots(&mut self) -> Result<u64> {
        unasked()
    }
    fn add_mem_region(&mut self, _: &VhostUserSingleMemoryRegion, _: File) -> Result<()> {
        unasked()
    }
    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        unasked()
    }
    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        unasked()
    }
    fn check_device_state(&mut self) -> Result<()> {
        unasked()
    }
    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unasked()
    }
    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        unasked()
    }
}

/// A back end that serves until its socket closes.
fn back_end(offered: u64) -> (OwnedFd, UnixStream, Arc<Mutex<Record>>, JoinHandle<()>) {
    let (front, back) = UnixStream::pair().unwrap();
    let record = Arc::new(Mutex::new(Record {
        offered,
        ..Record::default()
    }));
    let killer = back.try_clone().unwrap();
    let backend = Arc::new(Mutex::new(BackEnd(record.clone())));
    let thread = std::thread::spawn(move || {
        let mut handler = BackendReqHandler::from_stream(back, backend);
        while let Ok(()) | Err(Error::InvalidParam) = handler.handle_request() {}
    });
    (front.into(), killer, record, thread)
}

/// RAM as the machine has it: one memfd, two regions.
fn shared_memory() -> GuestMemoryMmap {
    let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(2 * RAM_SIZE).unwrap();
    let range = |start, offset| {
        let file = FileOffset::new(file.try_clone().unwrap(), offset);
        (GuestAddress(start), RAM_SIZE as usize, Some(file))
    };
    GuestMemoryMmap::from_ranges_with_files([range(0, 0), range(HIGH_RAM, RAM_SIZE)]).unwrap()
}

struct Setup {
    driver: Driver,
    events: Loop,
    record: Arc<Mutex<Record>>,
    killer: UnixStream,
    thread: JoinHandle<()>,
}

fn setup() -> Setup {
    let (front, killer, record, thread) = back_end(ALL);
    let notices = Notices::default();
    let mut events = Loop::new();
    let fs = Fs::new("rootfs", front, 2, events.poller(), notices.observer()).unwrap();
    events.attach(fs.handler());
    Setup {
        driver: Driver::with_notices(fs, shared_memory(), notices),
        events,
        record,
        killer,
        thread,
    }
}

impl Subject for Setup {
    fn driver(&mut self) -> &mut Driver {
        &mut self.driver
    }

    fn events(&mut self) -> &mut Loop {
        &mut self.events
    }

    /// Another process has them.
    fn queues(&self) -> &'static [Direction] {
        &[]
    }

    fn assert_works(&mut self) {
        self.driver.notify(1);
        assert!(!self.driver.needs_reset());
        let record = self.record.lock().unwrap();
        let queues = &self.driver.queues;
        let last = record.addresses.len() - queues.len();
        for (index, queue) in (0..).zip(queues) {
            let rings = [queue.table, queue.used, queue.available];
            assert_eq!(record.addresses[last + index as usize], (index, rings));
        }
        let last = record.kicks.len() - queues.len();
        let mut count = [0; 8];
        let mut kick = record.kicks[last + 1].as_ref().unwrap();
        std::io::Read::read_exact(&mut kick, &mut count).unwrap();
        assert_ne!(u64::from_ne_bytes(count), 0);
    }
}

pub(in super::super) fn subject() -> Box<dyn Subject> {
    Box::new(setup())
}

#[test]
fn the_configuration_space_has_the_tag_and_the_queues() {
    let mut setup = setup();
    let mut config = [0xff; 40];
    crate::bus::BusDevice::read(&mut setup.driver.transport, 0x100, &mut config);
    assert_eq!(&config[..7], b"rootfs\0");
    assert_eq!(config[36..], [2, 0, 0, 0]);
    assert_eq!(setup.driver.offered(), WANTED);
}

#[test]
fn an_activation_hands_over_memory_rings_and_events() {
    let mut setup = setup();
    setup.driver.start();
    let record = setup.record.lock().unwrap();
    assert_eq!(record.features, ALL);
    // Guest addresses as user addresses: nothing of ours is told.
    let regions = [
        (0, RAM_SIZE, 0, 0),
        (HIGH_RAM, RAM_SIZE, HIGH_RAM, RAM_SIZE),
    ];
    assert_eq!(record.regions, regions);
    for (index, queue) in setup.driver.queues.iter().enumerate() {
        let rings = [queue.table, queue.used, queue.available];
        assert_eq!(record.addresses[index], (index as u32, rings));
    }
    let order: Vec<&str> = record.log.iter().map(String::as_str).collect();
    assert_eq!(
        order[..7],
        [
            "owner",
            "features",
            "memory",
            "num 0 128",
            "base 0 0",
            "kick 0",
            "enable 0 true"
        ]
    );
    assert_eq!(record.log.len(), 3 + 3 * 4);
}

#[test]
fn a_request_goes_through_shared_memory_and_both_events() {
    let mut setup = setup();
    setup.driver.start();
    setup.driver.queues[1].add(&[(BUFFERS, 8, WRITE)]);
    setup.driver.notify(1);
    let record = setup.record.lock().unwrap();
    let mut count = [0; 8];
    std::io::Read::read_exact(&mut record.kicks[1].as_ref().unwrap(), &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
    let (_, [table, used, _]) = record.addresses[1];
    let mut address = [0; 8];
    record.memory[0].read_exact_at(&mut address, table).unwrap();
    assert_eq!(u64::from_le_bytes(address), BUFFERS);
    record.memory[0]
        .write_all_at(&[0, 0, 1, 0, 0, 0, 0, 0, 5, 0, 0, 0], used)
        .unwrap();
    std::io::Write::write_all(&mut record.calls[1].as_ref().unwrap(), &1u64.to_ne_bytes()).unwrap();
    drop(record);
    assert_eq!(setup.driver.queues[1].take_used(), Some((0, 5)));
    assert_eq!(setup.driver.interrupts(), 1);
    // The driver must find the bit, although only the back end knew.
    assert_eq!(setup.driver.read(reg::INTERRUPT_STATUS), 1);
    setup.driver.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(setup.driver.read(reg::INTERRUPT_STATUS), 1);
}

#[test]
fn a_reset_stops_every_queue_and_a_second_driver_starts_anew() {
    let mut setup = setup();
    setup.driver.start();
    setup.record.lock().unwrap().log.clear();
    setup.driver.write(reg::STATUS, 0);
    assert_eq!(setup.driver.read(reg::INTERRUPT_STATUS), 0);
    let stops = |index: u32| [format!("enable {index} false"), format!("stop {index}")];
    assert_eq!(
        setup.record.lock().unwrap().log,
        [0, 1, 2].map(stops).concat()
    );
    setup.driver.start();
    assert_eq!(setup.record.lock().unwrap().addresses.len(), 6);
    assert!(!setup.driver.needs_reset());
}

/// The back end has the kicks too: a full one must hold up neither the thread that resets nor a
/// vCPU's.
#[test]
fn a_back_end_that_fills_the_kicks_holds_up_neither_a_kick_nor_a_reset() {
    let (done, waited) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut setup = setup();
        for _ in 0..2 {
            setup.driver.start();
            for kick in setup.record.lock().unwrap().kicks.drain(..) {
                let most = (u64::MAX - 1).to_ne_bytes();
                std::io::Write::write_all(&mut kick.unwrap(), &most).unwrap();
            }
            setup.driver.notify(1);
            setup.driver.write(reg::STATUS, 0);
        }
        setup.driver.start();
        done.send(setup.driver.needs_reset()).unwrap();
    });
    let limit = std::time::Duration::from_secs(20);
    assert_eq!(waited.recv_timeout(limit), Ok(false), "it waits for ever");
}

/// Linux uses no more request queues than it has CPUs.
#[test]
fn queues_that_the_driver_leaves_out_are_left_out() {
    let mut setup = setup();
    let features = setup.driver.offered();
    setup.driver.negotiate(features);
    assert!(setup.driver.place(0) && setup.driver.place(1));
    setup.driver.write(reg::STATUS, 0xf);
    assert!(!setup.driver.needs_reset());
    assert_eq!(setup.record.lock().unwrap().addresses.len(), 2);
}

#[test]
fn a_back_end_that_dies_is_reported_once_and_the_driver_asked_to_reset() {
    let mut setup = setup();
    setup.driver.start();
    setup.killer.shutdown(std::net::Shutdown::Both).unwrap();
    setup.events.settle();
    assert!(setup.driver.needs_reset());
    assert_eq!(setup.driver.read(reg::INTERRUPT_STATUS) & 2, 2);
    assert_eq!(setup.driver.notices.failures.lock().unwrap().len(), 1);
    assert!(setup.events.is_quiet());
    setup.thread.join().unwrap();
    // Neither a reset nor a new activation waits for it.
    setup.driver.negotiate(WANTED);
    setup.driver.write(reg::STATUS, 0xf);
    assert!(setup.driver.needs_reset());
}

#[test]
fn a_back_end_that_refuses_leaves_a_device_that_needs_a_reset() {
    let mut setup = setup();
    setup.record.lock().unwrap().refuse_addresses = true;
    let features = setup.driver.offered();
    setup.driver.negotiate(features);
    setup.driver.place(0);
    setup.driver.write(reg::STATUS, 0xf);
    assert!(setup.driver.needs_reset());
    setup.record.lock().unwrap().refuse_addresses = false;
    setup.driver.start();
    assert!(!setup.driver.needs_reset());
}

#[test]
fn bad_parameters_and_back_ends_without_the_basics_are_refused() {
    let events = Loop::new();
    let observer = Notices::default().observer();
    let make = |tag: &str, offered: u64, queues: u32| {
        let (front, ..) = back_end(offered);
        Fs::new(tag, front, queues, events.poller(), observer.clone()).err()
    };
    for tag in ["", "a\0b", &"x".repeat(37)] {
        assert!(matches!(make(tag, ALL, 1), Some(FsError::Tag(_))));
    }
    assert!(matches!(make("a", ALL, 0), Some(FsError::Queues(0))));
    assert!(matches!(make("a", ALL, 33), Some(FsError::Queues(33))));
    assert!(matches!(make("a", 1 << 30, 1), Some(FsError::Features(_))));
    assert!(matches!(make("a", 1 << 32, 1), Some(FsError::Features(_))));
    assert!(make(&"x".repeat(36), ALL, 32).is_none());
}

/// An fs process that a guest has taken: its answers are any bytes, there before they are asked
/// for. The device refuses to be, or asks for a reset, and nothing waits.
fn answers(data: &[u8]) {
    let (front, mut back) = UnixStream::pair().unwrap();
    let front = OwnedFd::from(front);
    back.set_nonblocking(true).unwrap();
    std::io::Write::write_all(&mut back, data).unwrap();
    back.shutdown(std::net::Shutdown::Write).unwrap();
    let notices = Notices::default();
    let mut events = Loop::new();
    let Ok(fs) = Fs::new("share", front, 1, events.poller(), notices.observer()) else {
        return;
    };
    events.attach(fs.handler());
    let mut driver = Driver::with_notices(fs, shared_memory(), notices);
    let features = driver.offered();
    assert_eq!(
        features & !WANTED,
        0,
        "no more than what is known is passed on"
    );
    if driver.negotiate(features) == 0xb {
        driver.place(0);
        driver.place(1);
        driver.write(reg::STATUS, 0xf);
        events.settle();
    }
    driver.write(reg::STATUS, 0);
    assert_eq!(driver.read(reg::STATUS), 0);
}

#[test]
fn fuzz_vhost_answers() {
    bulkhead_fuzz::run("vhost_answers", answers);
}
