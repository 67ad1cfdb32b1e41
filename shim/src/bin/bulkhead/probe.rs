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

/// Loop rounds of a short measurement.
const SHORT_ROUNDS: u32 = 5_000;
/// Loop rounds of a long one.
const LONG_ROUNDS: u32 = 5_000_000;
/// Measurements of each length, of which the best counts: a guest's first entries are slow on a cold host, and others
/// interrupt any of them on a busy one. An interpreter is slow each time.
const TRIES: u32 = 8;
/// A short measurement below this lets the long ones begin. An interpreter needs longer each time.
const SHORT: Duration = Duration::from_millis(5);
/// After this no further measurement begins: an interpreter can need a second for a short one.
const PATIENCE: Duration = Duration::from_secs(4);
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

/// Opens the device and asks for the version of its interface; below 0: it is something else.
pub fn version(device: &Path) -> Result<i32, kvm_ioctls::Error> {
    Ok(open(device)?.get_api_version())
}

fn open(device: &Path) -> Result<Kvm, kvm_ioctls::Error> {
    let path = std::ffi::CString::new(device.as_os_str().as_encoded_bytes())
        .map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))?;
    Kvm::new_with_path(&path)
}

/// Measures. Takes a few seconds at most, even when KVM interprets.
pub fn measure(device: &Path) -> Result<Speed, String> {
    let mut guest = Guest::new(device).map_err(|error| error.to_string())?;
    Ok(Speed {
        guest: best_rate(|rounds| guest.run(rounds))?,
        host: best_rate(|rounds| Ok(here(rounds)))?,
    })
}

/// Rounds a second at best. A rate over a long time is the better figure, but an interpreter would take minutes for it.
fn best_rate(mut run: impl FnMut(u32) -> Result<Duration, String>) -> Result<f64, String> {
    let start = Instant::now();
    let mut best_of = |rounds, enough: Duration| -> Result<Duration, String> {
        let mut best = Duration::MAX;
        for _ in 0..TRIES {
            best = best.min(run(rounds)?);
            if best < enough || start.elapsed() > PATIENCE {
                break;
            }
        }
        Ok(best)
    };
    let rate = |rounds: u32, took: Duration| f64::from(rounds) / took.as_secs_f64().max(1e-9);
    let short = best_of(SHORT_ROUNDS, SHORT)?;
    if short >= SHORT {
        return Ok(rate(SHORT_ROUNDS, short));
    }
    Ok(rate(LONG_ROUNDS, best_of(LONG_ROUNDS, Duration::ZERO)?))
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
        let vm = open(device)?.create_vm()?;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// 100 M rounds a second, after so many calls that take a while longer.
    fn machine(slow: u32, more: Duration) -> impl FnMut(u32) -> Result<Duration, String> {
        let mut calls = 0;
        move |rounds| {
            calls += 1;
            let late = if calls <= slow { more } else { Duration::ZERO };
            Ok(Duration::from_nanos(u64::from(rounds) * 10) + late)
        }
    }

    fn is_native(guest: impl FnMut(u32) -> Result<Duration, String>) -> bool {
        let speed = Speed {
            guest: best_rate(guest).unwrap(),
            host: best_rate(machine(0, Duration::ZERO)).unwrap(),
        };
        speed.is_native()
    }

    #[test]
    fn a_guest_whose_first_entries_are_slow_is_native() {
        for slow in 0..8 {
            assert!(
                is_native(machine(slow, Duration::from_millis(16))),
                "{slow}"
            );
        }
    }

    #[test]
    fn a_guest_that_is_interrupted_in_a_long_measurement_is_native() {
        // The first, short one is quick; seven of the eight long ones lose a second to others.
        let mut calls = 0;
        assert!(is_native(move |rounds| {
            calls += 1;
            let late = Duration::from_secs(u64::from((2..=8).contains(&calls)));
            Ok(Duration::from_nanos(u64::from(rounds) * 10) + late)
        }));
    }

    #[test]
    fn a_guest_that_is_slow_each_time_is_interpreted_and_not_asked_for_much() {
        let mut asked = 0;
        assert!(!is_native(|rounds| {
            asked += rounds;
            Ok(Duration::from_micros(u64::from(rounds) * 3))
        }));
        assert_eq!(asked, TRIES * SHORT_ROUNDS);
    }

    #[test]
    fn a_measurement_that_fails_is_told() {
        assert_eq!(best_rate(|_| Err("no".into())).unwrap_err(), "no");
    }
}
