use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use super::*;
use crate::arch::x86_64::{cpu, interrupts, layout};
use crate::bus::BusDevice;
use crate::memory::Memory;
use crate::metrics::KvmStats;
use crate::test_kvm;

/// A device that tells of writes and answers reads with a constant.
struct Tell(mpsc::Sender<(u64, Vec<u8>)>);

impl BusDevice for Tell {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0x40 + offset as u8);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.send((offset, data.to_vec())).unwrap();
    }
}

struct Guest {
    vcpus: Vcpus,
    written: mpsc::Receiver<(u64, Vec<u8>)>,
    ended: mpsc::Receiver<VcpuEnd>,
    _memory: Memory,
    _vm: kvm_ioctls::VmFd,
}

/// A machine that runs real-mode `code`.
fn guest(code: &[u8]) -> Option<Guest> {
    guest_in(code, false)
}

fn guest_in(code: &[u8], long_mode: bool) -> Option<Guest> {
    guest_with(code, long_mode, None)
}

fn guest_with(
    code: &[u8],
    long_mode: bool,
    ports: Option<Arc<Mutex<dyn BusDevice>>>,
) -> Option<Guest> {
    const START: u64 = 0x1000;
    let kvm = test_kvm::open()?;
    let vm = kvm.create_vm().unwrap();
    interrupts::split_irqchip(&vm).unwrap();
    let memory = Memory::new(layout::MIN_MEMORY).unwrap();
    // SAFETY: `Guest` drops its vCPUs before its memory.
    unsafe { memory.register(&vm) }.unwrap();
    memory.ram().write_slice(code, GuestAddress(START)).unwrap();
    let fd = vm.create_vcpu(0).unwrap();
    let mut sregs = fd.get_sregs().unwrap();
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    fd.set_sregs(&sregs).unwrap();
    let mut regs = fd.get_regs().unwrap();
    regs.rip = START;
    regs.rflags = 2;
    regs.rsp = 0x8000;
    fd.set_regs(&regs).unwrap();
    if long_mode {
        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .unwrap();
        fd.set_cpuid2(&supported).unwrap();
        cpu::write_tables(memory.ram()).unwrap();
        cpu::set_boot_registers(&fd, START).unwrap();
    }

    let (writes, written) = mpsc::channel();
    let mut buses = Buses::default();
    let device = || Arc::new(Mutex::new(Tell(writes.clone())));
    let ports = ports.unwrap_or_else(|| device());
    buses.ports.insert(0x8900, 4, ports).unwrap();
    buses.mmio.insert(0xd000_0000, 0x1000, device()).unwrap();
    let (ends, ended) = mpsc::channel();
    let stats = Arc::new(vec![KvmStats::open(&fd)]);
    let on_end = Arc::new(move |end| ends.send(end).unwrap());
    let vcpus = Vcpus::start(vec![fd], stats, Arc::new(buses), on_end).unwrap();
    Some(Guest {
        vcpus,
        written,
        ended,
        _memory: memory,
        _vm: vm,
    })
}

const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_port_is_written_and_read() {
    // mov dx, 0x8900; mov al, 1; out dx, al; inc dx; in al, dx; out dx, al; mov dx, 0x77; in ax, dx; mov dx, 0x8900;
    // out dx, ax; jmp $
    let code = [
        0xba, 0x00, 0x89, 0xb0, 0x01, 0xee, 0x42, 0xec, 0xee, 0xba, 0x77, 0x00, 0xed, 0xba, 0x00,
        0x89, 0xef, 0xeb, 0xfe,
    ];
    let Some(guest) = guest(&code) else { return };
    assert!(
        guest
            .written
            .recv_timeout(Duration::from_millis(50))
            .is_err(),
        "parked at first"
    );
    guest.vcpus.resume();
    let write = || guest.written.recv_timeout(SOON).unwrap();
    assert_eq!(write(), (0, vec![1]));
    assert_eq!(write(), (1, vec![0x41]));
    assert_eq!(write(), (0, vec![0xff, 0xff]));
    let (mut kvm, mut user) = (BTreeMap::new(), BTreeMap::new());
    guest.vcpus.add_stats(&mut kvm, &mut user);
    assert_eq!((user["io_out"], user["io_in"]), (3, 2));
}

#[test]
fn a_running_vcpu_pauses_resumes_and_stops() {
    // mov dx, 0x8900; loop: out dx, al; jmp loop
    let Some(mut guest) = guest(&[0xba, 0x00, 0x89, 0xee, 0xeb, 0xfd]) else {
        return;
    };
    for _ in 0..20 {
        guest.vcpus.resume();
        guest.written.recv_timeout(SOON).unwrap();
        guest.vcpus.pause();
        while guest.written.try_recv().is_ok() {}
        thread::sleep(Duration::from_millis(1));
        assert!(
            guest.written.try_recv().is_err(),
            "it runs while it is paused"
        );
    }
    guest.vcpus.stop();
    guest.vcpus.stop();
}

#[test]
fn a_vcpu_that_spins_or_halts_is_stopped() {
    for code in [&[0xeb, 0xfe][..], &[0xfa, 0xf4]] {
        let Some(mut guest) = guest(code) else { return };
        guest.vcpus.resume();
        thread::sleep(Duration::from_millis(20));
        guest.vcpus.stop();
        assert!(guest.ended.try_recv().is_err());
    }
}

#[test]
fn a_triple_fault_is_an_end() {
    // ud2, without an interrupt table
    let Some(mut guest) = guest_in(&[0x0f, 0x0b], true) else {
        return;
    };
    guest.vcpus.resume();
    assert_eq!(guest.ended.recv_timeout(SOON), Ok(VcpuEnd::Shutdown));
    guest.vcpus.pause();
    guest.vcpus.resume();
    assert!(
        guest.ended.try_recv().is_err(),
        "an ended vCPU does not run again"
    );
    guest.vcpus.stop();
}

#[test]
fn a_string_instruction_is_several_accesses() {
    // mov si, 0x1000; mov cx, 3; mov dx, 0x8900; cld; rep outsb; jmp $
    let code = [
        0xbe, 0x00, 0x10, 0xb9, 0x03, 0x00, 0xba, 0x00, 0x89, 0xfc, 0xf3, 0x6e, 0xeb, 0xfe,
    ];
    let Some(guest) = guest(&code) else { return };
    guest.vcpus.resume();
    for byte in [0xbe, 0x00, 0x10] {
        assert_eq!(guest.written.recv_timeout(SOON).unwrap(), (0, vec![byte]));
    }
}

/// Counts in each of eight pages, 0x4000 to 0xb000, and writes to 0x8900 when one has another
/// count than it.
const COUNT: &[u8] = &[
    0x31, 0xdb, // xor bx, bx
    0x43, // 1: inc bx
    0xbf, 0x00, 0x40, // mov di, 0x4000
    0x8b, 0x05, // 2: mov ax, [di]
    0x40, // inc ax
    0x39, 0xd8, // cmp ax, bx
    0x75, 0x0e, // jne 3
    0x89, 0x05, // mov [di], ax
    0x81, 0xc7, 0x00, 0x10, // add di, 0x1000
    0x81, 0xff, 0x00, 0xc0, // cmp di, 0xc000
    0x75, 0xed, // jne 2
    0xeb, 0xe7, // jmp 1
    0xba, 0x00, 0x89, // 3: mov dx, 0x8900
    0xee, // out dx, al
    0xf4, // hlt
];

#[test]
fn nothing_that_the_guest_writes_is_lost_while_pages_become_its_own() {
    let Some(guest) = guest(COUNT) else { return };
    let ram = guest._memory.ram();
    let region = ram.iter().next().unwrap();
    let template = tempfile::tempfile().unwrap();
    template.set_len(1 << 20).unwrap();
    let loan = guest._memory.loan();
    let pages = || (0x4000_u64..0xc000).step_by(0x1000);
    let lend = |page| loan.lock().lend(region, (page, 0x1000), &template, page);
    pages().for_each(|page| lend(page).unwrap());
    guest.vcpus.resume();
    let count = |page| ram.read_obj::<u16>(GuestAddress(page)).unwrap();
    for page in pages() {
        let before = count(page);
        while count(page) == before {
            thread::yield_now();
        }
        guest.vcpus.hold(|| {
            let held = count(page);
            loan.lock().own(page..page + 1);
            assert_eq!(count(page), held);
        });
    }
    let before = count(0x4000);
    while count(0x4000) == before {
        thread::yield_now();
    }
    assert!(guest.written.try_recv().is_err());
    assert!(loan.lock().runs().is_empty());
}

#[test]
fn no_vcpu_is_in_the_guest_while_it_is_held_whatever_its_order_is() {
    let Some(guest) = guest(COUNT) else { return };
    let ram = guest._memory.ram();
    let count = || ram.read_obj::<u16>(GuestAddress(0xb000)).unwrap();
    // Before it has ever run, while it runs, and while it is paused.
    guest.vcpus.hold(|| assert_eq!(count(), 0));
    guest.vcpus.resume();
    for _ in 0..100 {
        guest.vcpus.hold(|| {
            let held = count();
            thread::sleep(Duration::from_micros(100));
            assert_eq!(count(), held);
        });
    }
    guest.vcpus.pause();
    let paused = count();
    guest.vcpus.hold(|| ());
    thread::sleep(Duration::from_millis(5));
    assert_eq!(count(), paused);
}

/// A device whose answer takes until somebody lets it go.
struct Slow(mpsc::Sender<()>, mpsc::Receiver<()>);

impl BusDevice for Slow {
    fn read(&mut self, _: u64, _: &mut [u8]) {}
    fn write(&mut self, _: u64, _: &[u8]) {
        self.0.send(()).unwrap();
        self.1.recv().unwrap();
    }
}

#[test]
fn a_vcpu_that_waits_for_a_device_is_not_waited_for() {
    // out 0x8900, al; hlt
    let code = &[0xba, 0x00, 0x89, 0xee, 0xf4];
    let (told, waits) = mpsc::channel();
    let (go, goes) = mpsc::channel();
    let slow = Arc::new(Mutex::new(Slow(told, goes)));
    let Some(guest) = guest_with(code, false, Some(slow)) else {
        return;
    };
    guest.vcpus.resume();
    waits.recv().unwrap();
    guest.vcpus.hold(|| ());
    // It goes on only when the gate is free.
    guest.vcpus.hold(|| {
        go.send(()).unwrap();
        thread::sleep(Duration::from_millis(1));
    });
    guest.vcpus.pause();
}
