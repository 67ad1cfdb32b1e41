//! vCPU threads: KVM_RUN, and what its exits mean.
//!
//! ```text
//!            start()                    kick: signal + immediate_exit
//!  parked ────────────► KVM_RUN ──exit──► bus access ──► KVM_RUN …
//!    ▲                     │ EINTR: look at the order
//!    └── Order::Pause ─────┤
//!                          ├── Order::Stop ──► thread ends, its descriptor is joined
//!                          └── the guest ended ──► told to the listener, then parked until Order::Stop
//! ```
//!
//! Beside the order the gate can be held for a moment, whatever the order is: then no vCPU is in the guest. It is not waited
//! for what a vCPU does outside, so that it may wait for whoever holds the gate.

use std::collections::BTreeMap;
use std::slice;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use bulkhead_vmm_config::Role;
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::metrics::{KvmStatsOfAll, UserExit, UserExits};
use crate::seccomp::{self, SeccompError};

/// What a port or an address without a device reads, as on a PC's bus that nobody drives.
const NOBODY: u8 = 0xff;

/// The vCPUs cannot run.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// The signal that interrupts KVM_RUN.
    #[error("installing the signal handler of the vCPU threads failed")]
    Signal(#[source] vmm_sys_util::errno::Error),
    /// The threads.
    #[error(transparent)]
    Thread(#[from] SeccompError),
}

/// Why a vCPU stopped by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuEnd {
    /// A triple fault: a reset, wanted or not.
    Shutdown,
    /// KVM cannot go on; the text says why.
    Failed(String),
}

/// Hears of it, on the vCPU's thread.
pub type EndListener = Arc<dyn Fn(VcpuEnd) + Send + Sync>;

/// What a machine answers to exits.
#[derive(Default)]
pub struct Buses {
    /// Ports.
    pub ports: Bus,
    /// Guest physical addresses without memory.
    pub mmio: Bus,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Run,
    Pause,
    Stop,
}

/// Where vCPU threads wait for an order.
struct Gate {
    order: Mutex<Order>,
    changed: Condvar,
    /// Nobody goes in.
    held: AtomicBool,
}

impl Gate {
    /// Before KVM_RUN: marks the vCPU as being in the guest, as soon as the gate is not held.
    fn enter(&self, inside: &AtomicBool) {
        loop {
            inside.store(true, Ordering::SeqCst);
            if !self.held.load(Ordering::SeqCst) {
                return;
            }
            inside.store(false, Ordering::SeqCst);
            let mut order = self.lock();
            self.changed.notify_all();
            while self.held.load(Ordering::SeqCst) {
                order = self
                    .changed
                    .wait(order)
                    .expect("no thread panics at the gate");
            }
        }
    }

    /// After KVM_RUN.
    fn leave(&self, inside: &AtomicBool) {
        inside.store(false, Ordering::SeqCst);
        if self.held.load(Ordering::SeqCst) {
            // Who holds the gate looks and waits with it locked.
            let _order = self.lock();
            self.changed.notify_all();
        }
    }

    fn wait_until_outside(&self, runners: &[Runner]) {
        let mut order = self.lock();
        let inside = |runner: &Runner| runner.inside.load(Ordering::SeqCst);
        while runners.iter().any(inside) {
            order = self
                .changed
                .wait(order)
                .expect("no thread panics at the gate");
        }
    }

    fn release(&self) {
        let _order = self.lock();
        self.held.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Order> {
        self.order.lock().expect("no thread panics at the gate")
    }

    fn set(&self, order: Order) {
        *self.lock() = order;
        self.changed.notify_all();
    }

    /// Waits while the order is to pause, or for good when `ended`. Returns whether to run.
    fn pass(&self, ended: bool) -> bool {
        let mut order = self.lock();
        while *order == Order::Pause || ended && *order == Order::Run {
            order = self
                .changed
                .wait(order)
                .expect("no thread panics at the gate");
        }
        *order == Order::Run
    }
}

struct Runner {
    thread: Option<JoinHandle<Option<VcpuFd>>>,
    /// `kvm_run.immediate_exit` of the vCPU, in the page that its descriptor has mapped.
    immediate_exit: *const AtomicU8,
    /// Whether the vCPU is in the guest.
    inside: Arc<AtomicBool>,
}

// SAFETY: the pointer is only used as an atomic, by whoever holds the runner.
unsafe impl Send for Runner {}

impl Runner {
    /// Makes KVM_RUN return, now or at its next start.
    fn kick(&self) {
        let Some(thread) = &self.thread else { return };
        // SAFETY: the page stays mapped as long as the VcpuFd lives, and the thread gives that up only by being joined,
        // which takes `self.thread`. The kernel reads the byte; everybody else uses it as this atomic.
        let immediate_exit = unsafe { &*self.immediate_exit };
        // Before the signal: a thread that was about to enter KVM_RUN when the signal came returns at once.
        immediate_exit.store(1, Ordering::SeqCst);
        // The only failure is a thread that has ended, and that needs no kick.
        let _ = thread.kill(SIGRTMIN());
    }
}

/// All vCPUs of a machine. Dropping stops and joins them.
pub struct Vcpus {
    gate: Arc<Gate>,
    runners: Vec<Runner>,
    exits: Vec<Arc<UserExits>>,
    stats: KvmStatsOfAll,
    /// So that no vCPU's thread is the last to hold them: devices end by system calls that it may
    /// not make.
    _buses: Arc<Buses>,
}

impl Vcpus {
    /// Starts a thread for each of `fds`, all parked until [`Vcpus::resume`]. `stats` are KVM's, one a vCPU.
    ///
    /// # Errors
    /// The host refuses threads.
    pub fn start(
        fds: Vec<VcpuFd>,
        stats: KvmStatsOfAll,
        buses: Arc<Buses>,
        on_end: EndListener,
    ) -> Result<Vcpus, VcpuError> {
        register_signal_handler(SIGRTMIN(), ignore).map_err(VcpuError::Signal)?;
        let gate = Arc::new(Gate {
            order: Mutex::new(Order::Pause),
            changed: Condvar::new(),
            held: AtomicBool::new(false),
        });
        let mut vcpus = Vcpus {
            gate,
            runners: Vec::new(),
            exits: Vec::new(),
            stats,
            _buses: buses.clone(),
        };
        for (id, mut fd) in fds.into_iter().enumerate() {
            let immediate_exit: *mut u8 = &raw mut fd.get_kvm_run().immediate_exit;
            let vcpu = Vcpu {
                fd,
                immediate_exit: immediate_exit.cast(),
                buses: buses.clone(),
                exits: Arc::default(),
                gate: vcpus.gate.clone(),
                inside: Arc::default(),
                on_end: on_end.clone(),
            };
            vcpus.exits.push(vcpu.exits.clone());
            let inside = vcpu.inside.clone();
            let work = move |()| vcpu.thread();
            let thread = seccomp::spawn(format!("vcpu{id}"), Role::Vcpu, || Ok(()), work)?;
            vcpus.runners.push(Runner {
                thread: Some(thread),
                immediate_exit: immediate_exit.cast(),
                inside,
            });
        }
        Ok(vcpus)
    }

    /// Lets the vCPUs run.
    pub fn resume(&self) {
        self.gate.set(Order::Run);
    }

    /// Keeps the vCPUs out of the guest until [`Vcpus::resume`]; returns when none is there. One that waits for a device is not
    /// waited for: the device may wait for whoever calls this.
    pub fn pause(&self) {
        self.gate.set(Order::Pause);
        // Who goes in after that comes out at once: it was kicked.
        self.hold(|| ());
    }

    /// Does `work` while no vCPU is in the guest, whatever their order is.
    pub fn hold<T>(&self, work: impl FnOnce() -> T) -> T {
        self.gate.held.store(true, Ordering::SeqCst);
        self.kick_all();
        self.gate.wait_until_outside(&self.runners);
        let done = work();
        self.gate.release();
        done
    }

    /// Stops the vCPUs for good and joins their threads. Returns the vCPUs, the first time.
    pub fn stop(&mut self) -> Vec<VcpuFd> {
        self.gate.set(Order::Stop);
        self.kick_all();
        let threads = self.runners.iter_mut().filter_map(|one| one.thread.take());
        // A thread that panicked has ended the process by the hook.
        threads.filter_map(|thread| thread.join().ok()?).collect()
    }

    /// Adds the counters of all vCPUs: KVM's, then this process's.
    pub fn add_stats(&self, kvm: &mut BTreeMap<String, u64>, user: &mut BTreeMap<String, u64>) {
        for stats in self.stats.iter().flatten() {
            stats.add_to(kvm);
        }
        for exits in &self.exits {
            exits.add_to(user);
        }
    }

    fn kick_all(&self) {
        for runner in &self.runners {
            runner.kick();
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The handler of the kick: only its side effect, an interrupted KVM_RUN, is wanted.
extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

struct Vcpu {
    fd: VcpuFd,
    immediate_exit: *const AtomicU8,
    buses: Arc<Buses>,
    exits: Arc<UserExits>,
    gate: Arc<Gate>,
    inside: Arc<AtomicBool>,
    on_end: EndListener,
}

// SAFETY: the pointer is into the mapping that `fd` owns and is only used as an atomic.
unsafe impl Send for Vcpu {}

/// What to do after an exit.
enum Next {
    Run,
    AskOrder,
    End(VcpuEnd),
}

/// A port access as KVM reports it: `length / width` accesses of `width` bytes (string instructions make several).
struct PortAccess {
    port: u16,
    write: bool,
    data: *mut u8,
    length: usize,
}

impl Vcpu {
    fn thread(mut self) -> VcpuFd {
        let mut ended = false;
        while self.gate.pass(ended) {
            loop {
                match self.step() {
                    Next::Run => {}
                    Next::AskOrder => break,
                    Next::End(end) => {
                        (self.on_end)(end);
                        ended = true;
                        break;
                    }
                }
            }
        }
        self.fd
    }

    /// One KVM_RUN.
    fn step(&mut self) -> Next {
        self.gate.enter(&self.inside);
        let exit = self.fd.run();
        self.gate.leave(&self.inside);
        let access = match exit {
            Ok(VcpuExit::IoIn(port, data)) => PortAccess {
                port,
                write: false,
                data: data.as_mut_ptr(),
                length: data.len(),
            },
            Ok(VcpuExit::IoOut(port, data)) => PortAccess {
                port,
                write: true,
                data: data.as_ptr().cast_mut(),
                length: data.len(),
            },
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.exits.count(UserExit::MmioRead);
                if !self.buses.mmio.read(address, data) {
                    data.fill(NOBODY);
                }
                return Next::Run;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.exits.count(UserExit::MmioWrite);
                self.buses.mmio.write(address, data);
                return Next::Run;
            }
            Ok(VcpuExit::IoapicEoi(_)) => {
                self.exits.count(UserExit::IoapicEoi);
                return Next::Run;
            }
            Ok(VcpuExit::Intr) => return self.interrupted(),
            Err(error) if error.errno() == libc::EINTR => return self.interrupted(),
            // A processor that waits to be started was woken without being started.
            Err(error) if error.errno() == libc::EAGAIN => return Next::Run,
            Ok(VcpuExit::Shutdown) => return self.end(VcpuEnd::Shutdown),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                let text = format!(
                    "the processor refused to enter the guest: hardware reason {reason:#x} on CPU {cpu}"
                );
                return self.end(VcpuEnd::Failed(text));
            }
            Ok(VcpuExit::InternalError) => {
                let text = self.internal_error();
                return self.end(VcpuEnd::Failed(text));
            }
            Ok(other) => {
                let text = format!("KVM_RUN ended for a reason that nobody handles: {other:?}");
                return self.end(VcpuEnd::Failed(text));
            }
            Err(error) => {
                let text = format!("KVM_RUN failed: {error}");
                return self.end(VcpuEnd::Failed(text));
            }
        };
        self.port_access(access);
        Next::Run
    }

    fn port_access(&mut self, access: PortAccess) {
        // SAFETY: the last exit was KVM_EXIT_IO, so `io` is the valid member of the union.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        // SAFETY: KVM put the data at this place of the kvm_run mapping, which `self.fd` keeps; nobody else looks at it
        // until the next KVM_RUN.
        let data = unsafe { slice::from_raw_parts_mut(access.data, access.length) };
        let port = u64::from(access.port);
        self.exits.count(if access.write {
            UserExit::IoOut
        } else {
            UserExit::IoIn
        });
        for item in data.chunks_mut(usize::from(io.size).max(1)) {
            if access.write {
                self.buses.ports.write(port, item);
            } else if !self.buses.ports.read(port, item) {
                item.fill(NOBODY);
            }
        }
    }

    fn interrupted(&self) -> Next {
        self.exits.count(UserExit::Interrupted);
        // SAFETY: as in Runner::kick; `self.fd` keeps the page.
        let immediate_exit = unsafe { &*self.immediate_exit };
        // Before the order is read: one given after that comes with a new kick.
        immediate_exit.store(0, Ordering::SeqCst);
        Next::AskOrder
    }

    fn end(&self, end: VcpuEnd) -> Next {
        self.exits.count(UserExit::Other);
        Next::End(end)
    }

    fn internal_error(&mut self) -> String {
        // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, so `internal` is the valid member of the union.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        // api.rst, KVM_EXIT_INTERNAL_ERROR: 1 is an instruction that KVM cannot emulate.
        let count = (internal.ndata as usize).min(internal.data.len());
        let place = self.fd.get_regs().map_or(0, |regs| regs.rip);
        format!(
            "KVM gave the guest up at {place:#x}: internal error {}, data {:x?}",
            internal.suberror,
            &internal.data[..count]
        )
    }
}

#[cfg(test)]
mod tests;
