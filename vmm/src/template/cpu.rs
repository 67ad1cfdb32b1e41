//! A vCPU that stands still, as numbers: taken from KVM, and given to another vCPU.

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A part of a vCPU cannot be moved.
#[derive(Debug, Error)]
pub enum CpuStateError {
    /// KVM refuses a part.
    #[error("KVM does not {verb} the {what} of a vCPU")]
    Kvm {
        /// Give or take.
        verb: &'static str,
        /// Which part.
        what: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refuses an MSR.
    #[error("KVM does not take MSR {0:#x}")]
    Msr(u32),
    /// More MSRs than one call takes.
    #[error("{0} MSRs are more than KVM takes at once")]
    Msrs(usize),
    /// The processor has registers that KVM_GET_XSAVE leaves out.
    #[error("the processor's extended state has {0} bytes, {XSAVE_BYTES} can be saved")]
    Xsave(i32),
}

/// Of KVM_GET_XSAVE.
const XSAVE_BYTES: i32 = 4096;

/// Linux' names. The deadline is told when the counter that it is compared with has its value.
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Of the type of a task's segment (AMD APM volume 2 §4.8.3).
const TSS_BUSY: u8 = 2;
/// kvm-clock (kernel documentation, virt/kvm/x86/msr.rst), which KVM leaves out of its list on some
/// hosts.
const KVM_CLOCK: [u32; 4] = [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01];

/// All that a vCPU is.
#[derive(Debug, Serialize, Deserialize)]
pub struct CpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    msrs: Vec<kvm_msr_entry>,
}

/// Checks that [`CpuState`] has room for all that a vCPU of this host is.
///
/// # Errors
/// It has not.
pub fn fits(kvm: &Kvm) -> Result<(), CpuStateError> {
    match kvm.check_extension_int(Cap::Xsave2) {
        bytes if bytes > XSAVE_BYTES => Err(CpuStateError::Xsave(bytes)),
        _ => Ok(()),
    }
}

/// The numbers of the MSRs that make a vCPU's state on this host.
///
/// # Errors
/// KVM's.
pub fn msrs(kvm: &Kvm) -> Result<Vec<u32>, CpuStateError> {
    let list = kvm.get_msr_index_list().map_err(|source| {
        let (verb, what) = ("tell", "list of MSRs");
        CpuStateError::Kvm { verb, what, source }
    })?;
    let mut list = list.as_slice().to_vec();
    list.extend(KVM_CLOCK);
    list.sort_unstable();
    list.dedup();
    Ok(list)
}

/// What a vCPU that has not run says of itself.
///
/// # Errors
/// KVM's.
pub fn cpuid(vcpu: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>, CpuStateError> {
    let table = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(gives("CPUID"))?;
    Ok(table.as_slice().to_vec())
}

fn gives(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CpuStateError {
    let verb = "give";
    move |source| CpuStateError::Kvm { verb, what, source }
}

fn takes(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CpuStateError {
    let verb = "take";
    move |source| CpuStateError::Kvm { verb, what, source }
}

impl CpuState {
    /// The state of a vCPU that does not run, with those of the MSRs `numbers` that it has.
    ///
    /// # Errors
    /// KVM's.
    pub fn of(vcpu: &VcpuFd, numbers: &[u32]) -> Result<CpuState, CpuStateError> {
        Ok(CpuState {
            // First: KVM lets what is due to a local APIC happen here.
            mp_state: vcpu.get_mp_state().map_err(gives("activity"))?,
            regs: vcpu.get_regs().map_err(gives("registers"))?,
            sregs: vcpu.get_sregs().map_err(gives("special registers"))?,
            xsave: vcpu.get_xsave().map_err(gives("extended state"))?,
            xcrs: vcpu.get_xcrs().map_err(gives("control registers"))?,
            debugregs: vcpu.get_debug_regs().map_err(gives("debug registers"))?,
            lapic: vcpu.get_lapic().map_err(gives("local APIC"))?,
            msrs: read_msrs(vcpu, numbers)?,
            events: vcpu.get_vcpu_events().map_err(gives("events"))?,
        })
    }

    /// Gives the state to a vCPU that has its CPUID and has not run, on a host that [`fits`] has
    /// passed; `amd`: its processor's virtualization is SVM.
    ///
    /// # Errors
    /// KVM's: the vCPU is good for nothing then.
    pub fn give_to(&self, vcpu: &VcpuFd, amd: bool) -> Result<(), CpuStateError> {
        let mut sregs = self.sregs;
        if amd {
            // Linux says "busy" in the place of the processor, which keeps that elsewhere
            // (arch/x86/kvm/svm/svm.c, svm_get_segment): some take it for another kind of segment.
            sregs.tr.type_ &= !TSS_BUSY;
        }
        vcpu.set_mp_state(self.mp_state)
            .map_err(takes("activity"))?;
        vcpu.set_regs(&self.regs).map_err(takes("registers"))?;
        vcpu.set_sregs(&sregs).map_err(takes("special registers"))?;
        // SAFETY: the kernel reads no more than the struct has: `fits` has asked it.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(takes("extended state"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(takes("control registers"))?;
        vcpu.set_debug_regs(&self.debugregs)
            .map_err(takes("debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(takes("local APIC"))?;
        write_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(takes("events"))
    }
}

fn read_msrs(vcpu: &VcpuFd, numbers: &[u32]) -> Result<Vec<kvm_msr_entry>, CpuStateError> {
    let entry = |&index: &u32| kvm_msr_entry {
        index,
        ..Default::default()
    };
    let mut read = Vec::new();
    let mut rest = numbers;
    while !rest.is_empty() {
        let entries: Vec<kvm_msr_entry> = rest.iter().map(entry).collect();
        let mut msrs =
            Msrs::from_entries(&entries).map_err(|_| CpuStateError::Msrs(entries.len()))?;
        let count = vcpu.get_msrs(&mut msrs).map_err(gives("MSRs"))?;
        read.extend_from_slice(&msrs.as_slice()[..count.min(entries.len())]);
        // KVM stops at one that this guest does not have: it has no state.
        rest = &rest[(count + 1).min(rest.len())..];
    }
    read.sort_by_key(|entry| entry.index == MSR_IA32_TSC_DEADLINE);
    Ok(read)
}

fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), CpuStateError> {
    let msrs = Msrs::from_entries(entries).map_err(|_| CpuStateError::Msrs(entries.len()))?;
    let count = vcpu.set_msrs(&msrs).map_err(takes("MSRs"))?;
    match entries.get(count) {
        None => Ok(()),
        Some(refused) => Err(CpuStateError::Msr(refused.index)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::cpu;

    #[test]
    fn a_vcpu_goes_on_as_another_one() {
        let Some(kvm) = crate::test_kvm::open() else {
            return;
        };
        fits(&kvm).unwrap();
        let numbers = msrs(&kvm).unwrap();
        let vcpu = || {
            let vm = kvm.create_vm().unwrap();
            crate::arch::x86_64::interrupts::split_irqchip(&vm).unwrap();
            let vcpu = vm.create_vcpu(0).unwrap();
            let cpuid = kvm
                .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
                .unwrap();
            vcpu.set_cpuid2(&cpuid).unwrap();
            (vm, vcpu)
        };
        let (_vm, first) = vcpu();
        cpu::set_common_state(&first).unwrap();
        cpu::set_boot_registers(&first, 0x10_0000).unwrap();
        let state = CpuState::of(&first, &numbers).unwrap();
        let bytes = postcard::to_allocvec(&state).unwrap();
        let state: CpuState = postcard::from_bytes(&bytes).unwrap();
        let (_vm, second) = vcpu();
        state.give_to(&second, false).unwrap();
        let again = CpuState::of(&second, &numbers).unwrap();
        assert_eq!(again.regs, state.regs);
        assert_eq!(again.sregs, state.sregs);
        assert_eq!(again.mp_state, state.mp_state);
        assert_eq!(again.lapic.regs, state.lapic.regs);
        let index = |entry: &kvm_msr_entry| entry.index;
        let numbers = |state: &CpuState| state.msrs.iter().map(index).collect::<Vec<_>>();
        assert_eq!(numbers(&again), numbers(&state));
    }
}
