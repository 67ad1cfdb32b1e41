//! A vCPU before its first instruction: registers for the 64-bit boot protocol, and the few MSRs that reset leaves wrong.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::layout;

/// What may fail when a vCPU is prepared.
#[derive(Debug, Error)]
pub enum CpuError {
    /// KVM refuses a part of the state.
    #[error("KVM refuses the {what} of a vCPU")]
    Kvm {
        /// Which part.
        what: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM does not know an MSR.
    #[error("KVM does not take MSR {0:#x}")]
    Msr(u32),
    /// The boot tables do not fit into memory: a bug in the layout.
    #[error("writing the boot page tables failed")]
    Tables(#[source] vm_memory::GuestMemoryError),
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CpuError {
    move |source| CpuError::Kvm { what, source }
}

// Intel SDM volume 3 §2.5 and volume 4; the names are Linux's.
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;
const APIC_BASE_X2APIC: u64 = 1 << 10;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;

/// boot.rst, "64-bit boot protocol": __BOOT_CS and __BOOT_DS.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
/// Flat 64-bit code, execute and read, accessed.
const CODE: u64 = 0x00af_9b00_0000_ffff;
/// Flat data, read and write, accessed.
const DATA: u64 = 0x00cf_9300_0000_ffff;

/// Writes what the boot processor needs in memory: GDT and identity page tables for the first GiB.
///
/// # Errors
/// The layout is wrong.
pub fn write_tables(memory: &GuestMemoryMmap) -> Result<(), CpuError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let table = |level: u64| layout::PAGE_TABLES + level * layout::PAGE;
    let write = |value: u64, address: u64| {
        memory
            .write_obj(value, GuestAddress(address))
            .map_err(CpuError::Tables)
    };
    for (index, descriptor) in (0..).zip([0, 0, CODE, DATA]) {
        write(descriptor, layout::GDT + index * 8)?;
    }
    write(table(1) | PRESENT_WRITABLE, table(0))?;
    write(table(2) | PRESENT_WRITABLE, table(1))?;
    for index in 0..512 {
        write(index << 21 | PRESENT_WRITABLE | LARGE, table(2) + index * 8)?;
    }
    Ok(())
}

/// Prepares the boot processor to run the kernel's 64-bit entry point. Its CPUID is set already.
///
/// # Errors
/// KVM's.
pub fn set_boot_registers(vcpu: &VcpuFd, entry: u64) -> Result<(), CpuError> {
    let mut sregs = vcpu.get_sregs().map_err(kvm("special registers"))?;
    enter_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(kvm("special registers"))?;
    let regs = kvm_regs {
        rip: entry,
        rsi: layout::ZERO_PAGE,
        rsp: layout::BOOT_STACK,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(kvm("registers"))
}

/// What every vCPU gets before it runs, the boot processor or not. Its CPUID is set already.
///
/// # Errors
/// KVM's.
pub fn set_common_state(vcpu: &VcpuFd) -> Result<(), CpuError> {
    // Linux would switch to x2APIC mode anyway; until then each access of a register would be an MMIO exit to emulate.
    let mut sregs = vcpu.get_sregs().map_err(kvm("special registers"))?;
    sregs.apic_base |= APIC_BASE_X2APIC;
    vcpu.set_sregs(&sregs).map_err(kvm("local APIC mode"))?;
    let entry = kvm_msr_entry {
        index: MSR_MISC_ENABLE,
        data: MISC_ENABLE_FAST_STRING,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[entry]).expect("one entry fits");
    match vcpu.set_msrs(&msrs).map_err(kvm("MSRs"))? {
        1 => Ok(()),
        _ => Err(CpuError::Msr(MSR_MISC_ENABLE)),
    }
}

fn enter_long_mode(sregs: &mut kvm_sregs) {
    let code = segment(BOOT_CS, CODE);
    let data = segment(BOOT_DS, DATA);
    sregs.cs = code;
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// A segment register that holds the descriptor (Intel SDM volume 3 §3.4.5).
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bit = |at: u32| (descriptor >> at & 1) as u8;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: (descriptor >> 40 & 0xf) as u8,
        s: bit(44),
        dpl: (descriptor >> 45 & 3) as u8,
        present: bit(47),
        avl: bit(52),
        l: bit(53),
        db: bit(54),
        g: bit(55),
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_gibibyte_is_mapped_onto_itself() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        write_tables(&memory).unwrap();
        let entry = |table: u64, index: u64| -> u64 {
            memory.read_obj(GuestAddress(table + index * 8)).unwrap()
        };
        for address in [0, 0x100_0000, (1_u64 << 30) - 1] {
            let upper = entry(layout::PAGE_TABLES, address >> 39) & !0xfff;
            let middle = entry(upper, address >> 30) & !0xfff;
            let leaf = entry(middle, address >> 21 & 511);
            assert_eq!(leaf & !0xfff, address & !0x1f_ffff);
            assert_eq!(leaf & 0x83, 0x83);
        }
    }

    #[test]
    fn segments_say_what_their_descriptors_say() {
        let code = segment(BOOT_CS, CODE);
        assert_eq!(
            (code.l, code.db, code.g, code.s, code.present),
            (1, 0, 1, 1, 1)
        );
        assert_eq!(code.type_, 0xb);
        let data = segment(BOOT_DS, DATA);
        assert_eq!((data.l, data.db, data.type_), (0, 1, 3));
    }
}
