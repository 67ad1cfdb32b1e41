//! Counters: KVM's own (KVM_GET_STATS_FD), exits that reached this process, and guests' faults.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::ioctl::ioctl;

mod request {
    // The macro makes a public function without a comment.
    #![allow(missing_docs)]
    vmm_sys_util::ioctl_io_nr!(KVM_GET_STATS_FD, kvm_bindings::KVMIO, 0xce);
}

/// Bytes of struct kvm_stats_header and of struct kvm_stats_desc without its name (Documentation/virt/kvm/api.rst §4.133).
const HEADER: usize = 24;
const DESCRIPTOR: usize = 16;
/// No kernel has anywhere near as many.
const MAX_DESCRIPTORS: usize = 1024;
const MAX_NAME: usize = 256;

/// One vCPU's or VM's binary statistics.
pub struct KvmStats {
    file: File,
    /// Name and place of each statistic that is one number.
    counters: Vec<(String, u64)>,
}

/// Of all vCPUs of a machine, in order.
pub type KvmStatsOfAll = Arc<Vec<Option<KvmStats>>>;

impl KvmStats {
    /// Asks KVM for the statistics of a vCPU or a VM; `None` where the host's kernel is older than 5.14.
    pub fn open(kvm: &impl AsRawFd) -> Option<KvmStats> {
        // SAFETY: the ioctl takes no argument and returns a new descriptor or -1.
        let fd = unsafe { ioctl(kvm, request::KVM_GET_STATS_FD()) };
        if fd < 0 {
            return None;
        }
        // SAFETY: the kernel has just made it for us alone.
        let file = unsafe { File::from_raw_fd(fd) };
        let counters = read_counters(&file)?;
        Some(KvmStats { file, counters })
    }

    /// Adds all counters to `totals`.
    pub fn add_to(&self, totals: &mut BTreeMap<String, u64>) {
        for (name, offset) in &self.counters {
            let total = totals.entry(name.clone()).or_default();
            *total = total.saturating_add(self.value(*offset));
        }
    }

    /// One counter; 0 where there is none of this name.
    pub fn get(&self, name: &str) -> u64 {
        let counter = self.counters.iter().find(|(known, _)| known == name);
        counter.map_or(0, |(_, offset)| self.value(*offset))
    }

    fn value(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        match self.file.read_exact_at(&mut bytes, offset) {
            Ok(()) => u64::from_le_bytes(bytes),
            Err(_) => 0,
        }
    }
}

fn read_counters(file: &File) -> Option<Vec<(String, u64)>> {
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0).ok()?;
    let field = |at: usize| -> usize {
        let bytes = header[at..at + 4].try_into().expect("four bytes");
        u32::from_le_bytes(bytes) as usize
    };
    let (name_size, count) = (field(4), field(8));
    let (descriptors, data) = (field(16), field(20));
    if name_size > MAX_NAME || count > MAX_DESCRIPTORS {
        return None;
    }
    let mut counters = Vec::new();
    let mut entry = vec![0; DESCRIPTOR + name_size];
    for index in 0..count {
        let at = descriptors + index * entry.len();
        file.read_exact_at(&mut entry, at as u64).ok()?;
        let size = u16::from_le_bytes([entry[6], entry[7]]);
        let offset = u32::from_le_bytes(entry[8..12].try_into().expect("four bytes"));
        // Histograms have more than one.
        if size == 1 {
            let name = entry[DESCRIPTOR..].split(|&byte| byte == 0).next()?;
            let name = String::from_utf8_lossy(name).into_owned();
            counters.push((name, data as u64 + u64::from(offset)));
        }
    }
    Some(counters)
}

/// Why KVM_RUN returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserExit {
    /// A port was read.
    IoIn,
    /// A port was written.
    IoOut,
    /// An address without memory was read.
    MmioRead,
    /// An address without memory was written.
    MmioWrite,
    /// A signal of ours.
    Interrupted,
    /// The end of a level-triggered interrupt, which no device of ours waits for.
    IoapicEoi,
    /// Anything else; the machine ends.
    Other,
}

/// Exits of one vCPU, by reason; written by its thread, read by any.
#[derive(Default)]
pub struct UserExits([AtomicU64; 7]);

impl UserExits {
    const NAMES: [&str; 7] = [
        "io_in",
        "io_out",
        "mmio_read",
        "mmio_write",
        "interrupted",
        "ioapic_eoi",
        "other",
    ];

    /// Adds one.
    pub fn count(&self, exit: UserExit) {
        self.0[exit as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Adds all counters to `totals`.
    pub fn add_to(&self, totals: &mut BTreeMap<String, u64>) {
        for (name, count) in Self::NAMES.iter().zip(&self.0) {
            *totals.entry((*name).to_owned()).or_default() += count.load(Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_summed_over_vcpus() {
        let (one, other) = (UserExits::default(), UserExits::default());
        one.count(UserExit::IoOut);
        other.count(UserExit::IoOut);
        other.count(UserExit::Other);
        let mut totals = BTreeMap::new();
        one.add_to(&mut totals);
        other.add_to(&mut totals);
        assert_eq!(
            (totals["io_out"], totals["other"], totals["io_in"]),
            (2, 1, 0)
        );
    }

    #[test]
    fn kvm_tells_its_counters() {
        let Some(kvm) = crate::test_kvm::open() else {
            return;
        };
        let vm = kvm.create_vm().unwrap();
        crate::arch::x86_64::interrupts::split_irqchip(&vm).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let Some(stats) = KvmStats::open(&vcpu) else {
            eprintln!("SKIPPED: this kernel has no KVM_GET_STATS_FD");
            return;
        };
        let mut totals = BTreeMap::new();
        stats.add_to(&mut totals);
        for name in ["exits", "irq_exits", "io_exits", "mmio_exits", "halt_exits"] {
            assert!(totals.contains_key(name), "{name} in {totals:?}");
        }
        assert_eq!(stats.get("exits"), 0);
        assert_eq!(stats.get("no such counter"), 0);
    }
}
