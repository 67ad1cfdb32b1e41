//! What a vCPU says of itself: KVM's list of what the host can do, less what a pod has no use for, with our topology and the
//! frequencies that save the guest from measuring.

use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX as INDEXED;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// APIC timer frequency of KVM's local APICs in kHz: one cycle a nanosecond (APIC_BUS_CYCLE_NS of arch/x86/kvm/lapic.h).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Leaves of Intel SDM volume 2 "CPUID", AMD APM volume 3 appendix E and Documentation/virt/kvm/x86/cpuid.rst.
mod leaf {
    pub const VENDOR: u32 = 0;
    pub const FEATURES: u32 = 1;
    pub const CACHES: u32 = 4;
    pub const EXTENDED_FEATURES: u32 = 7;
    pub const PERFORMANCE: u32 = 0xa;
    pub const TOPOLOGY: u32 = 0xb;
    pub const SGX: u32 = 0x12;
    pub const PROCESSOR_TRACE: u32 = 0x14;
    pub const TSC: u32 = 0x15;
    pub const FREQUENCY: u32 = 0x16;
    pub const TOPOLOGY_V2: u32 = 0x1f;
    pub const HYPERVISOR: u32 = 0x4000_0000;
    pub const HYPERVISOR_TIMING: u32 = 0x4000_0010;
    pub const AMD_FEATURES: u32 = 0x8000_0001;
    pub const AMD_SIZES: u32 = 0x8000_0008;
    pub const AMD_SVM: u32 = 0x8000_000a;
    pub const AMD_CACHES: u32 = 0x8000_001d;
    pub const AMD_TOPOLOGY: u32 = 0x8000_001e;
    pub const AMD_PERFORMANCE: u32 = 0x8000_0022;
    pub const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;
}

/// Bits that are set or cleared, by leaf and register.
mod bit {
    /// 1.ecx
    pub const VMX: u32 = 5;
    pub const PDCM: u32 = 15;
    pub const X2APIC: u32 = 21;
    pub const TSC_DEADLINE: u32 = 24;
    pub const HYPERVISOR: u32 = 31;
    /// 1.edx
    pub const MTRR: u32 = 12;
    pub const HTT: u32 = 28;
    /// 7.ebx
    pub const SGX: u32 = 2;
    pub const PROCESSOR_TRACE: u32 = 25;
    /// 0x80000001.ecx
    pub const SVM: u32 = 2;
    pub const PERFCTR_CORE: u32 = 23;
    pub const PERFCTR_NB: u32 = 24;
    pub const PERFCTR_LLC: u32 = 28;
}

/// One machine's answer, apart from the parts that differ between its vCPUs.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Number of vCPUs: cores of one package, one thread each.
    pub vcpus: u8,
    /// TSC frequency; `None` when the host's is unstable.
    pub tsc_khz: Option<u32>,
}

impl Machine {
    /// Bits of an APIC id that count the core: the smallest that hold all.
    fn core_bits(self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }
}

/// The CPUID table of the vCPU with APIC id `id`, from what KVM supports.
pub fn table(supported: &CpuId, machine: Machine, id: u8) -> CpuId {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| keep(entry.function))
        .copied()
        .collect();
    for entry in &mut entries {
        adjust(entry, machine, id);
    }
    let has_topology = supported
        .as_slice()
        .iter()
        .any(|entry| entry.function == leaf::TOPOLOGY);
    if has_topology {
        entries.extend(topology(machine, id));
    }
    if let Some(khz) = machine.tsc_khz {
        entries.push(kvm_cpuid_entry2 {
            function: leaf::HYPERVISOR_TIMING,
            eax: khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        });
    }
    CpuId::from_entries(&entries).expect("a few more entries than KVM's own fit its limit of 256")
}

/// Physical address bits that the guest may use.
pub fn physical_bits(supported: &CpuId) -> u32 {
    supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == leaf::AMD_SIZES)
        .map_or(36, |entry| entry.eax & 0xff)
}

/// Whole leaves that are not passed on: made anew below, or belonging to a feature that is not offered.
/// Whether the processor is one of AMD's, or of those that are made after them, whose
/// virtualization is SVM.
pub fn is_amd(supported: &CpuId) -> bool {
    const NAMES: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];
    let leaf = |entry: &&kvm_cpuid_entry2| entry.function == leaf::VENDOR;
    let vendor = supported.as_slice().iter().find(leaf);
    vendor.is_some_and(|entry| NAMES.contains(&entry.ebx))
}

fn keep(function: u32) -> bool {
    !matches!(
        function,
        leaf::TOPOLOGY
            | leaf::TOPOLOGY_V2
            | leaf::AMD_TOPOLOGY_V2
            | leaf::HYPERVISOR_TIMING
            | leaf::PERFORMANCE
            | leaf::SGX
            | leaf::PROCESSOR_TRACE
            | leaf::AMD_SVM
            | leaf::AMD_PERFORMANCE
    )
}

fn adjust(entry: &mut kvm_cpuid_entry2, machine: Machine, id: u8) {
    let cores = u32::from(machine.vcpus);
    match entry.function {
        leaf::FEATURES => {
            let logical = 1 << machine.core_bits();
            entry.ebx = entry.ebx & 0xffff | logical << 16 | u32::from(id) << 24;
            set(
                &mut entry.ecx,
                &[bit::X2APIC, bit::TSC_DEADLINE, bit::HYPERVISOR],
            );
            // No nested virtualization, no performance counters (guest-driven MSR traffic to the host's PMU).
            clear(&mut entry.ecx, &[bit::VMX, bit::PDCM]);
            // Memory types come from the PAT; without MTRRs nobody reads their thirty MSRs.
            clear(&mut entry.edx, &[bit::MTRR]);
            clear(&mut entry.edx, &[bit::HTT]);
            if cores > 1 {
                set(&mut entry.edx, &[bit::HTT]);
            }
        }
        leaf::CACHES if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { cores } else { 1 };
            let ids = |count: u32| count.next_power_of_two() - 1;
            entry.eax = entry.eax & 0x3fff | ids(sharing) << 14 | ids(cores).min(63) << 26;
        }
        leaf::EXTENDED_FEATURES if entry.index == 0 => {
            clear(&mut entry.ebx, &[bit::SGX, bit::PROCESSOR_TRACE]);
        }
        leaf::TSC => {
            // ebx / eax of a crystal of ecx Hz. A crystal of 1 GHz also is the APIC timer's frequency for Linux.
            (entry.eax, entry.ebx, entry.ecx) = match machine.tsc_khz {
                Some(khz) => (APIC_BUS_KHZ, khz, APIC_BUS_KHZ * 1000),
                None => (0, 0, 0),
            };
        }
        leaf::FREQUENCY => {
            if let Some(khz) = machine.tsc_khz {
                (entry.eax, entry.ebx) = (khz / 1000, khz / 1000);
            }
        }
        leaf::HYPERVISOR if machine.tsc_khz.is_some() => {
            entry.eax = entry.eax.max(leaf::HYPERVISOR_TIMING);
        }
        leaf::AMD_FEATURES => clear(
            &mut entry.ecx,
            &[
                bit::SVM,
                bit::PERFCTR_CORE,
                bit::PERFCTR_NB,
                bit::PERFCTR_LLC,
            ],
        ),
        leaf::AMD_SIZES => entry.ecx = machine.core_bits() << 12 | (cores - 1),
        leaf::AMD_CACHES if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { cores } else { 1 };
            entry.eax = entry.eax & 0x3fff | (sharing - 1) << 14;
        }
        leaf::AMD_TOPOLOGY => {
            // Extended APIC id; compute unit id with one thread; node 0 of one.
            (entry.eax, entry.ebx, entry.ecx) = (u32::from(id), u32::from(id), 0);
        }
        _ => {}
    }
}

/// Leaf 0xb: threads (one a core), then cores.
fn topology(machine: Machine, id: u8) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let level = |index: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
        function: leaf::TOPOLOGY,
        index,
        flags: INDEXED,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        edx: u32::from(id),
        ..Default::default()
    };
    [
        level(0, THREADS, 0, 1),
        level(1, CORES, machine.core_bits(), u32::from(machine.vcpus)),
        level(2, 0, 0, 0),
    ]
}

fn set(register: &mut u32, bits: &[u32]) {
    for bit in bits {
        *register |= 1 << bit;
    }
}

fn clear(register: &mut u32, bits: &[u32]) {
    for bit in bits {
        *register &= !(1 << bit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, value: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: value,
            ebx: value,
            ecx: value,
            edx: value,
            ..Default::default()
        }
    }

    fn find(table: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        table
            .as_slice()
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .copied()
    }

    fn sample() -> CpuId {
        CpuId::from_entries(&[
            entry(0, 0, 0x16),
            entry(1, 0, u32::MAX),
            entry(4, 0, 0xfc00_4121),
            entry(4, 3, 0xffff_c163),
            entry(7, 0, u32::MAX),
            entry(0xa, 0, 7),
            entry(0xb, 0, 9),
            entry(0x12, 0, 9),
            entry(0x15, 0, 0),
            entry(0x4000_0000, 0, 0x4000_0001),
            entry(0x8000_0001, 0, u32::MAX),
            entry(0x8000_0008, 0, 0x3030),
            entry(0x8000_000a, 0, 1),
        ])
        .unwrap()
    }

    #[test]
    fn each_vcpu_is_a_core_of_one_package() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (17, 5), (32, 5)] {
            let machine = Machine {
                vcpus,
                tsc_khz: None,
            };
            let id = vcpus - 1;
            let table = table(&sample(), machine, id);
            let features = find(&table, 1, 0).unwrap();
            assert_eq!(features.ebx >> 24, u32::from(id));
            assert_eq!(features.ebx >> 16 & 0xff, 1 << bits);
            assert_eq!(features.edx >> 28 & 1, u32::from(vcpus > 1));
            let cores = find(&table, 0xb, 1).unwrap();
            assert_eq!(
                (cores.eax, cores.ebx, cores.edx),
                (bits, u32::from(vcpus), u32::from(id))
            );
            assert!(u32::from(id) >> cores.eax == 0, "one package");
            assert_eq!(
                find(&table, 0x8000_0008, 0).unwrap().ecx & 0xff,
                u32::from(id)
            );
        }
    }

    #[test]
    fn the_guest_need_not_measure_frequencies() {
        let machine = Machine {
            vcpus: 1,
            tsc_khz: Some(2_400_001),
        };
        let table = table(&sample(), machine, 0);
        assert!(find(&table, 0x4000_0000, 0).unwrap().eax >= 0x4000_0010);
        let timing = find(&table, 0x4000_0010, 0).unwrap();
        assert_eq!((timing.eax, timing.ebx), (2_400_001, 1_000_000));
        let tsc = find(&table, 0x15, 0).unwrap();
        let hertz = u64::from(tsc.ecx) * u64::from(tsc.ebx) / u64::from(tsc.eax);
        assert_eq!(hertz, 2_400_001_000);
    }

    #[test]
    fn what_a_pod_has_no_use_for_is_gone() {
        let machine = Machine {
            vcpus: 2,
            tsc_khz: None,
        };
        let table = table(&sample(), machine, 0);
        for function in [0xa, 0x12, 0x8000_000a] {
            assert!(find(&table, function, 0).is_none());
        }
        let features = find(&table, 1, 0).unwrap();
        assert_eq!(features.ecx >> bit::VMX & 1, 0);
        assert_eq!(features.edx >> bit::MTRR & 1, 0);
        assert_eq!(find(&table, 0x8000_0001, 0).unwrap().ecx >> bit::SVM & 1, 0);
        assert_eq!(physical_bits(&sample()), 0x30);
    }
}
