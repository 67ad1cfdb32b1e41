//! A machine: memory, vCPUs and devices, from a checked spec to the guest's end.
//!
//! ```text
//!  VmSpec ──► Vm::build ──────► jail ──► Vm::run ─────────────────────────────► End
//!             memory, KVM,               all threads, each with its filter; vCPUs parked
//!             devices, kernel            Event::Running, vCPUs run ◄──┐
//!                                        event loop ── Pause ──► parked, Resume
//!                                           │ guest ended, Stop, shim gone
//!                                        vCPUs joined, queues drained once, ramoops read
//! ```
//!
//! Order of stopping: vCPUs first, so that nothing changes any more; then what the guest had queued for the host is served
//! once, because its last words on a vsock connection were sent before it announced its end; memory goes last, behind
//! everything that holds a pointer to it.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bulkhead_vmm_config::{Event, GuestEnd, Phase, Role};
use kvm_bindings::{CpuId, KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vmm_sys_util::epoll::EventSet;

use crate::arch::x86_64::{cpu, cpuid, interrupts, layout};
use crate::boot::{self, BootError, CmdlineError, Image};
use crate::control::{ControlError, ControlSocket};
use crate::devices::virtio::activator::Activator;
use crate::devices::virtio::balloon::Gauge;
use crate::devices::virtio::mem::Plug;
use crate::devices::virtio::net::{NetPorts, Workers};
use crate::devices::virtio::vsock::Ports;
use crate::event_loop::EventLoop;
use crate::log::Log;
use crate::memory::{Memory, MemoryError};
use crate::metrics::{KvmStats, KvmStatsOfAll};
use crate::ramoops;
use crate::reports::{Ending, Reports, monotonic_ns};
use crate::seccomp::{self, SeccompError};
use crate::spec::VmSpec;
use crate::supervisor::{self, Outcome, Supervisor};
use crate::vcpu::{Buses, VcpuError, Vcpus};

mod board;

pub use board::BoardError;

/// Why a machine cannot be built or run.
#[derive(Debug, Error)]
pub enum VmError {
    /// The host's KVM lacks something.
    #[error("this host's KVM lacks {0}; Linux 5.14 or newer is needed")]
    Missing(&'static str),
    /// KVM refuses a step.
    #[error("KVM refuses to {step}")]
    Kvm {
        /// Which.
        step: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// More memory than the processor addresses.
    #[error("memory up to {end:#x} is past the {bits} address bits of this host's processor")]
    AddressBits {
        /// End of memory.
        end: u64,
        /// What the host has.
        bits: u32,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A vCPU's state.
    #[error(transparent)]
    Cpu(#[from] cpu::CpuError),
    /// A device.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The command line.
    #[error("the kernel command line cannot be made")]
    Cmdline(#[from] CmdlineError),
    /// Kernel and initrd.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The threads.
    #[error(transparent)]
    Vcpus(#[from] VcpuError),
    /// Their filters.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// The shim.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The shim and we do not understand each other any more.
    #[error("the control socket cannot be used any more: {0}")]
    Lost(String),
    /// The event loop.
    #[error("the event loop failed")]
    EventLoop(#[from] io::Error),
}

fn refused(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { step, source }
}

/// A machine that has not run yet. Fields are dropped in this order: what points to memory before the memory.
pub struct Vm {
    vcpus: Vec<VcpuFd>,
    stats: KvmStatsOfAll,
    buses: Arc<Buses>,
    events: EventLoop,
    ports: Ports,
    net: NetPorts,
    balloon: Option<Gauge>,
    plug: Option<Plug>,
    net_workers: Workers,
    activator: Activator,
    reports: Arc<Reports>,
    log: Log,
    _vm: Arc<VmFd>,
    memory: Memory,
}

impl Vm {
    /// Builds the machine and loads the guest.
    ///
    /// # Errors
    /// Anything that the host or the configuration makes impossible.
    pub fn build(mut spec: VmSpec, log: Log) -> Result<Vm, VmError> {
        let supported = spec
            .kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("tell its CPUID"))?;
        let bits = cpuid::physical_bits(&supported);
        let spare = layout::spare_within(spec.memory, spec.spare_memory, bits);
        if spare < spec.spare_memory {
            log.info(&format!(
                "{} MiB can be plugged: the processor has {bits} address bits",
                spare >> 20
            ));
        }
        let memory = Memory::with_spare(spec.memory, spare)?;
        let vm = Arc::new(create_vm(&spec.kvm)?);
        // SAFETY: `Vm` drops `memory` last, and `run` joins the vCPUs before it drops anything.
        unsafe { memory.register(&vm)? };
        let vcpus = create_vcpus(&supported, &vm, &memory, spec.possible_vcpus)?;
        let stats: KvmStatsOfAll = Arc::new(vcpus.iter().map(KvmStats::open).collect());
        let reports = Reports::new(stats.clone(), log.clone())?;

        let mut events = EventLoop::new()?;
        let board = board::build(&mut spec, &vm, &memory, &mut events, &reports, &log)?;
        for word in &spec.extra_cmdline {
            spec.cmdline.push(word)?;
        }
        log.info(&format!("kernel command line: {}", spec.cmdline.as_str()));
        let image = Image {
            kernel: &spec.kernel,
            initrd: &mut spec.initrd,
            cmdline: &spec.cmdline,
            vcpus: spec.possible_vcpus,
            pins: &board.pins,
        };
        let entry = boot::load(&memory, image)?;
        cpu::write_tables(memory.ram())?;
        cpu::set_boot_registers(&vcpus[0], entry)?;
        Ok(Vm {
            stats,
            vcpus,
            buses: Arc::new(board.buses),
            events,
            ports: board.ports,
            net: board.net,
            balloon: board.balloon,
            plug: board.plug,
            net_workers: board.net_workers,
            activator: board.activator,
            reports,
            log,
            _vm: vm,
            memory,
        })
    }

    /// Runs the guest to its end, answering the shim on `control`, which hears of the end last. `started_ns` is when `main`
    /// began, `landlock` what the jail has of it.
    ///
    /// # Errors
    /// The host's; the guest's faults end the guest.
    pub fn run(
        mut self,
        control: ControlSocket,
        started_ns: u64,
        landlock: Option<u32>,
    ) -> Result<GuestEnd, VmError> {
        let on_end = {
            let reports = self.reports.clone();
            Arc::new(move |end| reports.vcpu_ended(end))
        };
        seccomp::report_blocked()?;
        self.activator.start()?;
        self.net_workers.start()?;
        let vcpus = Vcpus::start(self.vcpus, self.stats, self.buses, on_end)?;
        let poller = self.events.next_poller();
        poller.add(&control, supervisor::CONTROL, EventSet::IN)?;
        poller.add(self.reports.bell(), supervisor::BELL, EventSet::IN)?;
        let supervisor = Arc::new(Mutex::new(Supervisor::new(
            control,
            self.reports.clone(),
            vcpus,
            (self.ports, self.net, self.balloon, self.plug),
            poller,
            self.log.clone(),
        )));
        self.events.attach(supervisor.clone());
        let lock = || supervisor.lock().expect("the supervisor does not panic");
        seccomp::lock_down(Role::Vmm)?;

        self.reports.reached(Phase::VmmStart, started_ns);
        self.reports
            .reached(Phase::FirstInstruction, monotonic_ns());
        lock().start(landlock)?;
        self.events.run(|| lock().outcome().is_some())?;
        lock().stop();
        // Nothing feeds the queues any more, so one quiet turn means that they are empty.
        let limit = Instant::now() + Duration::from_millis(200);
        self.events.drain(limit)?;

        let mut supervisor = lock();
        supervisor.pass_reports();
        let words = ramoops::parse(&self.memory.ramoops());
        let guest = match supervisor.outcome() {
            Some(Outcome::Failed(reason)) => return Err(VmError::Lost(reason.clone())),
            Some(Outcome::Guest(ending)) => guest_end(ending, words.panicked),
            Some(Outcome::Save | Outcome::Stopped) | None => GuestEnd::Stopped,
        };
        let stats = supervisor.stats();
        supervisor.send(&Event::Ended {
            end: guest,
            console: words.lines,
            stats,
        });
        Ok(guest)
    }
}

fn guest_end(ending: &Ending, panicked: bool) -> GuestEnd {
    match ending {
        Ending::PowerOff => GuestEnd::PowerOff,
        Ending::Reset { .. } if panicked => GuestEnd::Panic,
        Ending::Reset { announced: true } => GuestEnd::Reboot,
        Ending::Reset { announced: false } => GuestEnd::TripleFault,
        Ending::KvmError(_) => GuestEnd::KvmError,
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
