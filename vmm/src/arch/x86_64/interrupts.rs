//! Interrupts: a split irqchip. KVM has the local APICs, the IOAPIC is ours, and there is no PIC and no PIT.
//!
//! ```text
//! device ──irqfd(GSI = pin)──► KVM ──route of the GSI: a message──► local APIC
//!                                        ▲ KVM_SET_GSI_ROUTING
//! guest ──registers──► devices::ioapic ──┘
//! ```

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;

use crate::devices::ioapic::{Message, Router};

/// KVM listens for the end of level-triggered interrupts on this many GSIs; it wants to know how many pins there are.
const RESERVED_ROUTES: u64 = 24;

/// Makes KVM emulate local APICs, and nothing else of an interrupt controller.
///
/// # Errors
/// KVM's; Linux has had the capability since 4.5.
pub fn split_irqchip(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    cap.args[0] = RESERVED_ROUTES;
    vm.enable_cap(&cap)
}

/// Routes of KVM, one a pin.
pub struct KvmRouter {
    vm: Arc<VmFd>,
    on_error: Box<dyn Fn(kvm_ioctls::Error) + Send>,
}

impl KvmRouter {
    /// Routes GSIs of `vm`; failures go to `on_error`.
    pub fn new(vm: Arc<VmFd>, on_error: Box<dyn Fn(kvm_ioctls::Error) + Send>) -> KvmRouter {
        KvmRouter { vm, on_error }
    }
}

impl Router for KvmRouter {
    fn set_routes(&mut self, messages: &[Option<Message>]) {
        let entries: Vec<kvm_irq_routing_entry> = (0..)
            .zip(messages)
            .filter_map(|(gsi, message)| message.map(|message| entry(gsi, message)))
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).expect("a machine has few pins");
        if let Err(error) = self.vm.set_gsi_routing(&table) {
            (self.on_error)(error);
        }
    }
}

fn entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: message.address,
                address_hi: 0,
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}
