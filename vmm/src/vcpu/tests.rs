use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

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
    buses.ports.insert(0x8900, 4, device()).unwrap();
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
