//! How fast KVM executes a guest's kernel mode, against this processor itself.
//!
//! A /dev/kvm can exist and interpret the guest instruction by instruction: every kernel then "boots" for minutes. The same
//! small loop runs once in a guest (32-bit protected mode, ring 0) and once here.

use std::{
    arch::asm,
    path::Path,
    time::{Duration, Instant},
};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

/// Loop rounds of the first, short measurement, and of the second when the first shows that it will not take long.
const ROUNDS: [u32; 2] = [5_000, 5_000_000];
/// A guest slower than this, relative to the host, is interpreted. Real ones are within a few percent, one in an emulated
/// processor within a factor of three, interpreted ones hundreds of times slower.
const SLOWEST: f64 = 20.0;

const CODE: u64 = 0x1000;
const MEMORY: usize = 0x4000;

/// dec ecx; jnz back; hlt. The counter comes in ECX.
const LOOP: [u8; 4] = [0x49, 0x75, 0xfd, 0xf4];

/// What was measured.
pub struct Speed {
    /// Rounds a second in a guest's kernel mode.
    pub guest: f64,
    /// Rounds a second here.
    pub host: f64,
}

impl Speed {
    /// Whether the guest runs on the processor itself.
    pub fn is_native(&self) -> bool {
        self.host / self.guest < SLOWEST
    }
}

/// Measures, in at most a few seconds even when KVM interprets.
pub fn measure(device: &Path) -> Result<Speed, String> {
    let mut guest = Guest::new(device).map_err(|error| error.to_string())?;
    let mut took = guest.run(ROUNDS[0])?;
    let mut rounds = ROUNDS[0];
    if took < Duration::from_millis(5) {
        rounds = ROUNDS[1];
        took = guest.run(rounds)?;
    }
    let rate = |took: Duration, rounds: u32| f64::from(rounds) / took.as_secs_f64().max(1e-9);
    Ok(Speed {
        guest: rate(took, rounds),
        host: rate(here(ROUNDS[1]), ROUNDS[1]),
    })
}

/// The same instructions on this processor.
fn here(rounds: u32) -> Duration {
    let start = Instant::now();
    // SAFETY: the loop changes one register, which is declared, and the flags.
    unsafe {
        asm!("2:", "dec {0:e}", "jnz 2b", inout(reg) rounds => _, options(nomem, nostack));
    }
    start.elapsed()
}

struct Guest {
    vcpu: VcpuFd,
    // The VM's descriptor and its memory live as long as the vCPU.
    _vm: kvm_ioctls::VmFd,
    _memory: Memory,
}

/// Anonymous memory at a fixed place until dropped.
struct Memory(*mut libc::c_void);

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this address and length; the VM is closed before (field order of `Guest`).
        unsafe { libc::munmap(self.0, MEMORY) };
    }
}

impl Guest {
    fn new(device: &Path) -> Result<Guest, kvm_ioctls::Error> {
        let path = std::ffi::CString::new(device.as_os_str().as_encoded_bytes())
            .map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))?;
        let kvm = Kvm::new_with_path(&path)?;
        let vm = kvm.create_vm()?;
        // SAFETY: a fresh anonymous mapping, not at an address that we choose.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MEMORY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(kvm_ioctls::Error::last());
        }
        let memory = Memory(memory);
        // SAFETY: CODE and the loop lie inside the mapping of MEMORY bytes, which nobody else uses yet.
        unsafe {
            let target = memory.0.cast::<u8>().add(CODE as usize);
            std::ptr::copy_nonoverlapping(LOOP.as_ptr(), target, LOOP.len());
        }
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.0 as u64,
        };
        // SAFETY: the region is the mapping above, which outlives the VM.
        unsafe { vm.set_user_memory_region(region)? };
        let vcpu = vm.create_vcpu(0)?;
        let mut registers = vcpu.get_sregs()?;
        // CR0.PE: protected mode, without paging.
        registers.cr0 |= 1;
        registers.cs = flat(registers.cs, 11, 1);
        for segment in [&mut registers.ds, &mut registers.es, &mut registers.ss] {
            *segment = flat(*segment, 3, 2);
        }
        vcpu.set_sregs(&registers)?;
        Ok(Guest {
            vcpu,
            _vm: vm,
            _memory: memory,
        })
    }

    fn run(&mut self, rounds: u32) -> Result<Duration, String> {
        let registers = kvm_regs {
            rip: CODE,
            rcx: u64::from(rounds),
            rflags: 2,
            ..kvm_regs::default()
        };
        self.vcpu
            .set_regs(&registers)
            .map_err(|error| error.to_string())?;
        let start = Instant::now();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok(start.elapsed()),
                Ok(other) => {
                    return Err(format!("a loop of three instructions ended with {other:?}"));
                }
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }
}

/// A flat 32-bit segment.
fn flat(mut segment: kvm_segment, kind: u8, index: u16) -> kvm_segment {
    segment.base = 0;
    segment.limit = u32::MAX;
    segment.selector = index << 3;
    segment.type_ = kind;
    segment.present = 1;
    segment.dpl = 0;
    segment.db = 1;
    segment.s = 1;
    segment.l = 0;
    segment.g = 1;
    segment
}
