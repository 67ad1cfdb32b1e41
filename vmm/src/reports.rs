//! What vCPU threads and devices have to say, for the thread that talks to the shim.
//!
//! Speakers put a word down and ring; they never wait and never touch the control socket.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use bulkhead_vmm_config::{MAX_RESETS, Phase, Stamp, port};
use nix::time::{ClockId, clock_gettime};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::announce::Announcement;
use crate::devices::virtio::fault::{FaultCounters, Notice, Observer};
use crate::log::{Log, chain};
use crate::metrics::KvmStatsOfAll;
use crate::vcpu::VcpuEnd;

/// How the guest stopped, before the ramoops region has been read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The agent announced power-off. Nothing else of it would be seen: the kernel then halts,
    /// which is no exit.
    PowerOff,
    /// A reset.
    Reset {
        /// The agent announced it.
        announced: bool,
    },
    /// KVM cannot go on.
    KvmError(String),
}

/// A device that needs a reset, and why.
pub type Reset = (&'static str, &'static str);

#[derive(Default)]
struct State {
    stamps: Vec<Stamp>,
    resets: Vec<Reset>,
    /// Those that have been said, too.
    known_resets: Vec<Reset>,
    seen: Vec<Phase>,
    reboot_announced: bool,
    ending: Option<Ending>,
}

/// The place where words are put down.
pub struct Reports {
    state: Mutex<State>,
    bell: EventFd,
    /// KVM's counters of every vCPU, for stamps.
    stats: KvmStatsOfAll,
    faults: FaultCounters,
    announce_faults: Mutex<u64>,
    log: Log,
}

impl Reports {
    /// Nothing said yet.
    ///
    /// # Errors
    /// eventfd(2)'s.
    pub fn new(stats: KvmStatsOfAll, log: Log) -> io::Result<Arc<Reports>> {
        Ok(Arc::new(Reports {
            state: Mutex::default(),
            bell: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            stats,
            faults: FaultCounters::default(),
            announce_faults: Mutex::new(0),
            log,
        }))
    }

    /// Rings when there is something to take.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// Takes the stamps and the resets since the last call and, once it is known, the guest's
    /// ending.
    pub fn take(&self) -> (Vec<Stamp>, Vec<Reset>, Option<Ending>) {
        // It may have been taken with an earlier ring.
        let _ = self.bell.read();
        let mut state = self.lock();
        (
            std::mem::take(&mut state.stamps),
            std::mem::take(&mut state.resets),
            state.ending.clone(),
        )
    }

    /// Guests' faults by `device.fault`.
    pub fn guest_faults(&self) -> std::collections::BTreeMap<String, u64> {
        let mut faults = self.faults.snapshot();
        let announce = *self
            .announce_faults
            .lock()
            .expect("counting does not panic");
        if announce > 0 {
            faults.insert("announce.unknown".to_owned(), announce);
        }
        faults
    }

    /// Notes that a phase was reached, once: later calls for it do nothing.
    pub fn reached(&self, phase: Phase, at_ns: u64) {
        let mut state = self.lock();
        if state.seen.contains(&phase) {
            return;
        }
        state.seen.push(phase);
        let sum = |name: &str| {
            self.stats
                .iter()
                .flatten()
                .map(|stats| stats.get(name))
                .sum()
        };
        let stamp = Stamp {
            phase,
            at_ns,
            exits: sum("exits"),
            irq_exits: sum("irq_exits"),
        };
        state.stamps.push(stamp);
        self.ring();
    }

    /// Hears the agent's announcements.
    pub fn announced(&self, announcement: Announcement) {
        match announcement {
            Announcement::Init => self.reached(Phase::Init, monotonic_ns()),
            Announcement::PowerOff => self.ended(Ending::PowerOff),
            Announcement::Reboot => self.lock().reboot_announced = true,
            Announcement::Unknown => {
                let mut count = self
                    .announce_faults
                    .lock()
                    .expect("counting does not panic");
                *count = count.saturating_add(1);
            }
        }
    }

    /// Hears of a vCPU that stopped by itself.
    pub fn vcpu_ended(&self, end: VcpuEnd) {
        let ending = match end {
            VcpuEnd::Shutdown => Ending::Reset {
                announced: self.lock().reboot_announced,
            },
            VcpuEnd::Failed(text) => {
                self.log.error(&text);
                Ending::KvmError(text)
            }
        };
        self.ended(ending);
    }

    /// What devices call.
    pub fn observer(self: &Arc<Reports>) -> Observer {
        let reports = self.clone();
        Arc::new(move |notice| reports.noticed(&notice))
    }

    fn noticed(&self, notice: &Notice<'_>) {
        match notice {
            Notice::Fault { device, fault } => self.faults.count(device, fault),
            Notice::Failed { device, error } => {
                // An error that borrows has no 'static causes to follow.
                self.log.error(&format!("device {device} failed: {error}"));
            }
            Notice::NeedsReset { device, reason } => self.needs_reset((device, reason)),
            Notice::Connected { port: port::AGENT } => {
                self.reached(Phase::AgentDialled, monotonic_ns());
            }
            Notice::Connected { .. } => {}
        }
    }

    /// A guest resets its devices as often as it wants: each reason is said once, and not too many.
    fn needs_reset(&self, reset: Reset) {
        let mut state = self.lock();
        if state.known_resets.len() < MAX_RESETS && !state.known_resets.contains(&reset) {
            state.known_resets.push(reset);
            state.resets.push(reset);
            self.ring();
        }
    }

    /// The first ending counts.
    fn ended(&self, ending: Ending) {
        self.lock().ending.get_or_insert(ending);
        self.ring();
    }

    fn ring(&self) {
        // It fails only when 2^64 - 2 rings were not heard.
        let _ = self.bell.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no speaker panics")
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// A failure of KVM's interrupt routing, which a guest can do nothing about.
pub fn routing_failed(log: Log) -> Box<dyn Fn(kvm_ioctls::Error) + Send> {
    Box::new(move |error| log.error(&format!("KVM refuses interrupt routes: {}", chain(&error))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::fault::Fault;

    fn reports() -> Arc<Reports> {
        let null = std::fs::File::create("/dev/null").unwrap();
        Reports::new(Arc::new(vec![None]), Log::new(null.into(), "vmm", "test")).unwrap()
    }

    #[test]
    fn a_phase_is_stamped_once() {
        let reports = reports();
        for _ in 0..3 {
            reports.announced(Announcement::Init);
        }
        reports.observer()(Notice::Connected { port: 1024 });
        reports.observer()(Notice::Connected { port: 1026 });
        assert!(reports.bell().read().is_ok());
        let (stamps, _, ending) = reports.take();
        let phases: Vec<Phase> = stamps.iter().map(|stamp| stamp.phase).collect();
        assert_eq!(phases, [Phase::Init, Phase::AgentDialled]);
        assert!(stamps[0].at_ns <= stamps[1].at_ns);
        assert_eq!(ending, None);
        assert!(reports.take().0.is_empty());
    }

    #[test]
    fn the_first_ending_counts() {
        let reports = reports();
        reports.announced(Announcement::Reboot);
        assert_eq!(reports.take().2, None);
        reports.vcpu_ended(VcpuEnd::Shutdown);
        reports.announced(Announcement::PowerOff);
        assert_eq!(reports.take().2, Some(Ending::Reset { announced: true }));
    }

    #[test]
    fn a_guest_does_not_choose_how_often_it_is_told_of() {
        let reports = reports();
        let names: Vec<&'static str> = (0..100).map(|n| &*n.to_string().leak()).collect();
        for _ in 0..1000 {
            reports.observer()(Notice::NeedsReset {
                device: "net",
                reason: "ring",
            });
        }
        assert_eq!(reports.take().1, [("net", "ring")]);
        for reason in names {
            reports.observer()(Notice::NeedsReset {
                device: "rng",
                reason,
            });
        }
        assert_eq!(reports.take().1.len(), MAX_RESETS - 1);
        assert!(reports.take().1.is_empty());
    }

    #[test]
    fn faults_are_counted_by_device() {
        let reports = reports();
        let fault = Fault::ChainLoop;
        for _ in 0..2 {
            reports.observer()(Notice::Fault {
                device: "rng",
                fault,
            });
        }
        reports.announced(Announcement::Unknown);
        let faults = reports.guest_faults();
        assert_eq!(faults["rng.chain_loop"], 2);
        assert_eq!(faults["announce.unknown"], 1);
    }
}
