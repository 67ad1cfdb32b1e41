//! A machine that stands still, in two files, and machines that go on from it.
//!
//! ```text
//! builder: boot ──► agent has dialled, nobody has said anything ──► Save ──► vCPUs joined, queues
//!                   served ──► at rest? ──► memory file: pages that are not zero
//!                                           state file: vCPUs, clock, IOAPIC, drivers, connections
//! clone:   memory, KVM ──► pages lent, vCPUs given their state ──► devices ──► drivers and
//!          connections go on ──► KVM_RUN
//! ```
//!
//! A device is at rest when it holds no chain: then the used ring's index says where each of its
//! queues goes on, and nothing of a device is saved but what its driver has chosen. The exception
//! is one that holds a single chain until somebody asks (the balloon's statistics): it has not been
//! given back, so that the device takes it again.
//!
//! Time stands still with the machine: kvm-clock, the counters of the vCPUs and their deadlines go
//! on together. What must differ between two clones is the agent's to change when it hears of its
//! pod (docs/adr/0020-templates.md).

use std::fs::File;

use kvm_bindings::{CpuId, kvm_clock_data, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::arch::x86_64::cpuid;
use crate::build_id::build_id;
use crate::devices::ioapic::{IoapicState, OtherPins};
use crate::devices::virtio::mmio::{self, TransportState};
use crate::devices::virtio::vsock::{self, ConnectionState};
use crate::memory::Memory;
use crate::spec::TemplateSpec;

mod cpu;
mod file;
mod memory;
mod touched;

use cpu::{CpuState, CpuStateError};
pub use file::FileError;
use memory::{Run, RunError, Target};
pub use touched::{Learner, Touched};

/// A machine cannot be saved, or cannot go on.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// The state's file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] RunError),
    /// A vCPU.
    #[error(transparent)]
    Cpu(#[from] CpuStateError),
    /// The number of vCPUs.
    #[error("it has {0} vCPUs and this machine {1}")]
    Cpus(usize, usize),
    /// kvm-clock.
    #[error("KVM does not {0} the clock of the machine")]
    Clock(&'static str, #[source] kvm_ioctls::Error),
    /// A connection carries something, or a packet waits.
    #[error("a vsock connection is not at rest")]
    Busy,
    /// A device that its driver has not finished to start, or that needs a reset.
    #[error("device {0} is not at rest")]
    Restless(usize),
    /// The host's processor has changed.
    #[error("its vCPUs have other features than those of this machine")]
    Features,
    /// The number of devices.
    #[error("it has {0} devices and this machine {1}")]
    Devices(usize, usize),
    /// A device.
    #[error("device {0} cannot go on")]
    Device(usize, #[source] mmio::ResumeError),
    /// The interrupt controller.
    #[error(transparent)]
    Ioapic(#[from] OtherPins),
    /// The connections.
    #[error(transparent)]
    Vsock(#[from] vsock::ResumeError),
}

/// What devices are to a guest at rest.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardState {
    /// The interrupt controller.
    pub ioapic: IoapicState,
    /// Of each virtio device, in the order of their windows.
    pub transports: Vec<TransportState>,
    /// vsock connections.
    pub connections: Vec<ConnectionState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// What the first vCPU said of itself before it ran: the guest has made itself fit that.
    cpuid: Vec<kvm_cpuid_entry2>,
    cpus: Vec<CpuState>,
    clock: kvm_clock_data,
    board: BoardState,
    runs: Vec<Run>,
}

/// By which a machine can be saved when it has been locked down.
pub struct Saver {
    state: File,
    memory: Target,
    msrs: Vec<u32>,
    build: String,
    cpuid: Vec<kvm_cpuid_entry2>,
}

impl Saver {
    /// Asks the host what there is to be saved of machines with this memory whose first vCPU, which
    /// has not run, is this.
    ///
    /// # Errors
    /// It is more than a template can have.
    pub fn new(
        files: TemplateSpec,
        kvm: &Kvm,
        first: &VcpuFd,
        memory: &Memory,
    ) -> Result<Saver, TemplateError> {
        cpu::fits(kvm)?;
        let msrs = cpu::msrs(kvm)?;
        Ok(Saver {
            state: files.state,
            memory: Target::new(files.memory, memory).map_err(RunError::Io)?,
            msrs,
            build: build_id(),
            cpuid: cpu::cpuid(first)?,
        })
    }

    /// Writes a machine whose vCPUs and devices stand still.
    ///
    /// # Errors
    /// KVM's and the files'.
    pub fn save(
        &self,
        vm: &VmFd,
        vcpus: &[VcpuFd],
        memory: &Memory,
        board: BoardState,
    ) -> Result<(), TemplateError> {
        let clock = vm
            .get_clock()
            .map_err(|error| TemplateError::Clock("give", error))?;
        let cpus = vcpus
            .iter()
            .map(|vcpu| CpuState::of(vcpu, &self.msrs))
            .collect::<Result<_, _>>()?;
        let runs = self.memory.save(memory)?;
        let state = State {
            cpuid: self.cpuid.clone(),
            cpus,
            clock,
            board,
            runs,
        };
        Ok(file::write(&self.state, &self.build, &state)?)
    }
}

/// Has a new machine go on from a template, but for its devices: those are left to whoever has made
/// them.
///
/// # Errors
/// The template is not one of such a machine. What the machine has got of it is of no use.
pub fn resume(
    files: &TemplateSpec,
    (kvm, supported): (&Kvm, &CpuId),
    (vm, vcpus): (&VmFd, &[VcpuFd]),
    memory: &Memory,
) -> Result<BoardState, TemplateError> {
    cpu::fits(kvm)?;
    let state: State = file::read(&files.state, &build_id())?;
    if state.cpus.len() != vcpus.len() {
        return Err(TemplateError::Cpus(state.cpus.len(), vcpus.len()));
    }
    let first = vcpus.first().map(cpu::cpuid).transpose()?;
    if first.as_ref() != Some(&state.cpuid) {
        return Err(TemplateError::Features);
    }
    memory::lend(memory, &files.memory, &state.runs)?;
    let amd = cpuid::is_amd(supported);
    for (state, vcpu) in state.cpus.iter().zip(vcpus) {
        state.give_to(vcpu, amd)?;
    }
    // When the vCPUs' counters, which it is told by, have their values.
    let clock = kvm_clock_data {
        clock: state.clock.clock,
        ..Default::default()
    };
    vm.set_clock(&clock)
        .map_err(|error| TemplateError::Clock("take", error))?;
    Ok(state.board)
}
