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
use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;

use crate::arch::x86_64::{cpu, cpuid, layout};
use crate::boot::{self, BootError, CmdlineError, Image};
use crate::control::{ControlError, ControlSocket};
use crate::devices::virtio::activator::Activator;
use crate::devices::virtio::balloon::Gauge;
use crate::devices::virtio::mem::Plug;
use crate::devices::virtio::mmio::TransportState;
use crate::devices::virtio::net::{NetPorts, Workers};
use crate::devices::virtio::vsock::Ports;
use crate::event_loop::EventLoop;
use crate::lending::lender::{Lender, LenderError};
use crate::log::{Log, chain};
use crate::memory::{Memory, MemoryError};
use crate::metrics::{KvmStats, KvmStatsOfAll};
use crate::ramoops;
use crate::reports::{Ending, Reports, monotonic_ns};
use crate::seccomp::{self, SeccompError};
use crate::spec::VmSpec;
use crate::supervisor::{self, Outcome, Supervisor};
use crate::template::{BoardState, Learner, Saver, TemplateError};
use crate::vcpu::{Buses, VcpuError, Vcpus};

mod bare;
mod board;
mod resting;

use bare::{Bare, Start};
use board::Board;
pub use board::BoardError;
use resting::Resting;

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
    /// The fs process.
    #[error(transparent)]
    Lender(#[from] LenderError),
    /// A template that does not fit, or cannot be made.
    #[error("the template cannot be used")]
    Template(#[from] TemplateError),
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
    vm: Arc<VmFd>,
    memory: Memory,
    resting: Resting,
    saver: Option<Saver>,
    lender: Option<Lender>,
    learner: Option<Learner>,
    template_refused: Option<String>,
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
        let (bare, template) = bare::start(&mut spec, &supported, memory)?;
        let Bare { memory, vm, vcpus } = bare;
        let stats: KvmStatsOfAll = Arc::new(vcpus.iter().map(KvmStats::open).collect());
        let reports = Reports::new(stats.clone(), log.clone())?;

        let mut events = EventLoop::new()?;
        let board = board::build(&mut spec, &vm, &memory, &mut events, &reports, &log)?;
        let saver = spec
            .save
            .take()
            .map(|files| Saver::new(files, &spec.kvm, &vcpus[0], &memory));
        let saver = saver.transpose()?;
        let (lender, learner) = lend(&mut spec, &template, (&memory, &vcpus[0]), &board)?;
        match &template {
            Start::Template { rested, .. } => board.resting.resume(rested)?,
            _ => load(&mut spec, &memory, &vcpus[0], &board.pins, &log)?,
        }
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
            vm,
            memory,
            resting: board.resting,
            saver,
            lender,
            learner,
            template_refused: template.refused(),
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
        let reports = self.reports.clone();
        let on_end = Arc::new(move |end| reports.vcpu_ended(end));
        seccomp::report_blocked()?;
        self.activator.start()?;
        self.net_workers.start()?;
        let vcpus = Vcpus::start(self.vcpus, self.stats, self.buses, on_end)?;
        let poller = self.events.next_poller();
        supervisor::watch(&poller, &control, &self.reports, self.lender.as_ref())?;
        let supervisor = Arc::new(Mutex::new(Supervisor::new(
            control,
            self.reports.clone(),
            vcpus,
            (self.ports, self.net, self.balloon, self.plug),
            poller,
            (self.lender, self.log.clone(), self.saver.is_some()),
        )));
        self.events.attach(supervisor.clone());
        let lock = || supervisor.lock().expect("the supervisor does not panic");
        let saves = self.saver.is_some();
        seccomp::lock_down(if saves { Role::Template } else { Role::Vmm })?;

        self.reports.reached(Phase::VmmStart, started_ns);
        let now = monotonic_ns();
        self.reports.reached(Phase::FirstInstruction, now);
        if let Some(reason) = self.template_refused.take() {
            lock().send(&Event::TemplateRefused { reason });
        }
        lock().start(landlock)?;
        self.events.run(|| lock().outcome().is_some())?;
        let vcpus = lock().stop();
        // Nothing feeds the queues any more, so one quiet turn means that they are empty.
        let limit = Instant::now() + Duration::from_millis(200);
        self.events.drain(limit)?;

        learn(self.learner.as_ref(), &self.memory, &self.log);
        let mut supervisor = lock();
        supervisor.pass_reports();
        let words = ramoops::parse(&self.memory.ramoops());
        let guest = match supervisor.outcome() {
            Some(Outcome::Failed(reason)) => return Err(VmError::Lost(reason.clone())),
            Some(Outcome::Guest(ending)) => guest_end(ending, words.panicked),
            Some(Outcome::Save) => {
                self.resting
                    .save(&self.saver, (&self.vm, &vcpus), &self.memory)?
            }
            Some(Outcome::Stopped) | None => GuestEnd::Stopped,
        };
        supervisor.tell_end(guest, words.lines);
        Ok(guest)
    }
}

/// Has the machine's own processes know what a template lends, before the share's device starts, and what the guest touches of it
/// at hand.
fn lend(
    spec: &mut VmSpec,
    template: &Start,
    (memory, vcpu): (&Memory, &VcpuFd),
    board: &Board,
) -> Result<(Option<Lender>, Option<Learner>), VmError> {
    let mut learner = None;
    if let Start::Template { rested, touched } = template {
        own_rings(memory, rested);
        // What was given at once would be learned for good.
        if let Some(to) = spec.learn.take() {
            learner = Some(Learner::new(to, memory)?);
        } else if let Some(touched) = touched {
            touched.prepare(memory, vcpu);
        }
    }
    let pairs = board.net_workers.all();
    let lender = spec.lender.take();
    let lender = lender.map(|socket| Lender::new(socket, memory.loan().clone(), pairs));
    Ok((lender.transpose()?, learner))
}

/// Writes down what the guest has touched of its template, where somebody wants to know.
fn learn(learner: Option<&Learner>, memory: &Memory, log: &Log) {
    if let Some(Err(error)) = learner.map(|learner| learner.finish(memory)) {
        log.error(&format!("nothing was learned: {}", chain(&error)));
    }
}

/// Makes the rings of a template's devices the pod's own: the fs process looks at its own before this process can answer.
fn own_rings(memory: &Memory, rested: &BoardState) {
    let mut lent = memory.loan().lock();
    for (start, length) in rested.transports.iter().flat_map(TransportState::rings) {
        lent.own(start..start.saturating_add(length));
    }
}

/// Makes the machine one that boots.
fn load(
    spec: &mut VmSpec,
    memory: &Memory,
    boot_processor: &VcpuFd,
    pins: &[u32],
    log: &Log,
) -> Result<(), VmError> {
    for word in &spec.extra_cmdline {
        spec.cmdline.push(word)?;
    }
    log.info(&format!("kernel command line: {}", spec.cmdline.as_str()));
    let image = Image {
        kernel: &spec.kernel,
        initrd: &mut spec.initrd,
        cmdline: &spec.cmdline,
        vcpus: spec.possible_vcpus,
        pins,
    };
    let entry = boot::load(memory, image)?;
    cpu::write_tables(memory.ram())?;
    Ok(cpu::set_boot_registers(boot_processor, entry)?)
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
