//! Processors and memory, without a device.

use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::{VmError, refused};
use crate::arch::x86_64::{cpu, cpuid, interrupts, layout};
use crate::log::chain;
use crate::memory::Memory;
use crate::spec::VmSpec;
use crate::template::{self, BoardState, Touched};

/// What a machine has before its devices. Whoever has it drops `memory` last, and joins the vCPUs'
/// threads before it drops anything.
pub struct Bare {
    pub vcpus: Vec<VcpuFd>,
    pub vm: Arc<VmFd>,
    pub memory: Memory,
}

/// From where the guest starts.
pub enum Start {
    /// A kernel's entry point.
    Boot,
    /// The same, for this reason.
    Refused(String),
    /// Where a template was saved.
    Template {
        /// What its devices were.
        rested: BoardState,
        /// What machines touch of it first, if that is known.
        touched: Option<Touched>,
    },
}

impl Start {
    /// Why it is not a template.
    pub fn refused(self) -> Option<String> {
        match self {
            Start::Refused(reason) => Some(reason),
            Start::Boot | Start::Template { .. } => None,
        }
    }
}

/// Makes processors, and has them and the memory go on from the spec's template where there is one
/// that can be used.
///
/// # Errors
/// The host has no machine for us.
pub fn start(
    spec: &mut VmSpec,
    supported: &CpuId,
    memory: Memory,
) -> Result<(Bare, Start), VmError> {
    let bare = Bare::new(spec, supported, memory)?;
    let Some(files) = spec.template.take() else {
        return Ok((bare, Start::Boot));
    };
    let Bare { vcpus, vm, memory } = &bare;
    let resumed = match spec.serial {
        // Its registers are in no template.
        Some(_) => Err("a machine with a serial console has none".to_owned()),
        None => template::resume(&files, (&spec.kvm, supported), (vm, vcpus), memory)
            .map_err(|error| chain(&error)),
    };
    match resumed {
        Ok(rested) => {
            let touched = files.touched.as_ref().map(Touched::read);
            // It is advice: without it the guest is slower.
            let touched = touched.and_then(Result::ok);
            Ok((bare, Start::Template { rested, touched }))
        }
        Err(reason) => {
            // Memory and vCPUs may have a part of it.
            bare.memory.clear()?;
            let bare = Bare::new(spec, supported, bare.memory)?;
            Ok((bare, Start::Refused(reason)))
        }
    }
}

impl Bare {
    fn new(spec: &VmSpec, supported: &CpuId, memory: Memory) -> Result<Bare, VmError> {
        let vm = Arc::new(create_vm(&spec.kvm)?);
        // SAFETY: see `Bare`.
        unsafe { memory.register(&vm)? };
        let vcpus = create_vcpus(supported, &vm, &memory, spec.possible_vcpus)?;
        Ok(Bare { vcpus, vm, memory })
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, VmError> {
    for (cap, name) in [
        (Cap::UserMemory, "user memory"),
        (Cap::SplitIrqchip, "the split irqchip"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::ImmediateExit, "immediate_exit"),
        (Cap::TscDeadlineTimer, "the TSC-deadline timer"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(VmError::Missing(name));
        }
    }
    let vm = kvm.create_vm().map_err(refused("create a machine"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(refused("place its identity map"))?;
    let tss = usize::try_from(layout::KVM_TSS).expect("x86-64 has 64-bit addresses");
    vm.set_tss_address(tss).map_err(refused("place its TSS"))?;
    interrupts::split_irqchip(&vm).map_err(refused("split the interrupt controller"))?;
    let mut no_pmu = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        ..Default::default()
    };
    no_pmu.args[0] = u64::from(KVM_PMU_CAP_DISABLE);
    // Older than 5.18: CPUID hides the counters all the same.
    let _ = vm.enable_cap(&no_pmu);
    Ok(vm)
}

fn create_vcpus(
    supported: &CpuId,
    vm: &VmFd,
    memory: &Memory,
    count: u8,
) -> Result<Vec<VcpuFd>, VmError> {
    let bits = cpuid::physical_bits(supported);
    let end = memory.end();
    if bits < 64 && end > 1 << bits {
        return Err(VmError::AddressBits { end, bits });
    }
    let mut vcpus = Vec::new();
    for id in 0..count {
        let vcpu = vm
            .create_vcpu(u64::from(id))
            .map_err(refused("create a vCPU"))?;
        let machine = cpuid::Machine {
            vcpus: count,
            // It fails on hosts whose TSC is unstable.
            tsc_khz: vcpu.get_tsc_khz().ok().filter(|&khz| khz > 0),
        };
        vcpu.set_cpuid2(&cpuid::table(supported, machine, id))
            .map_err(refused("take a vCPU's CPUID"))?;
        cpu::set_common_state(&vcpu)?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}
