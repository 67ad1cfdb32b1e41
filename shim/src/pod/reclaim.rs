//! A pod that stands idle, or whose cgroup is short of memory, gives up page cache of its
//! containers.
//!
//! ```text
//!  busy ── a stretch with next to no processor time: asks the agent, once ──► quiet
//!    ▲                                                                          │
//!    └───────────── a stretch with more than that ◄─────────────────────────────┘
//!  either ── the cgroup's processes wait for memory (PSI) ──► asks for a part
//! ```
//!
//! What becomes free in the guest goes to the host by the balloon, which needs no word from here.
//! To notice idleness costs the host one read of cpu.stat a stretch, and the guest nothing: nobody
//! wakes it, and a pod that stays quiet is not asked again.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::io::Interest;

use super::background::Background;
use crate::{cgroup::processor_time, config::Config, error::line, machine::agent::Agent, sys};

/// A pod is idle that takes at most this part of one processor: the timers of a JVM or of Node are
/// a few hundredths of one.
const IDLE_SHARE: u32 = 20;
/// Under pressure the agent is asked for this much.
const PART: u64 = 256 << 20;
/// And not again before this has passed: what was freed takes two seconds until the guest reports
/// it.
const REST: Duration = Duration::from_secs(10);
/// 150 ms in 2 s in which somebody has waited for memory (Documentation/accounting/psi.rst).
const TRIGGER: &[u8] = b"some 150000 2000000\0";

/// When a pod is asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// How long a pod must be idle; `None`: idleness is no reason.
    idle: Option<Duration>,
}

impl Rules {
    /// What the operator says; `None`: memory does not return.
    pub(super) fn of(config: &Config) -> Option<Rules> {
        let idle = Duration::from_secs(config.reclaim_idle_secs);
        config.return_memory.then_some(Rules {
            idle: Some(idle).filter(|idle| !idle.is_zero()),
        })
    }
}

/// Watches the pod whose cgroup is at `cgroup` until it is dropped.
pub(super) fn start(cgroup: &Path, agent: Agent, rules: Rules) -> Background {
    let cgroup = cgroup.to_path_buf();
    Background::start(async move {
        let idleness = async {
            if let Some(stretch) = rules.idle {
                let error = watch_idleness(&cgroup, &agent, stretch).await;
                tracing::debug!(%error, "the pod's idleness is not noticed");
            }
        };
        let pressure = async {
            let Err(error) = watch_pressure(&cgroup, &agent).await;
            tracing::debug!(%error, "the pod's memory pressure is not noticed: has this host PSI (psi=1)?");
        };
        tokio::join!(idleness, pressure);
    })
}

/// Whether a pod was idle, from one look to the next.
struct Idleness {
    /// Processor time that an idle pod takes between two looks.
    limit: Duration,
    used: Duration,
    quiet: bool,
}

impl Idleness {
    /// A pod that is busy: it has just booted.
    fn new(stretch: Duration, used: Duration) -> Idleness {
        Idleness {
            limit: stretch / IDLE_SHARE,
            used,
            quiet: false,
        }
    }

    /// Looks at what was used until now. True when the pod has become idle.
    fn look(&mut self, used: Duration) -> bool {
        let since = used.saturating_sub(self.used);
        self.used = used;
        let was_quiet = std::mem::replace(&mut self.quiet, since <= self.limit);
        self.quiet && !was_quiet
    }
}

async fn watch_idleness(cgroup: &Path, agent: &Agent, stretch: Duration) -> io::Error {
    let mut looked = match processor_time(cgroup) {
        Ok(used) => Idleness::new(stretch, used),
        Err(error) => return error,
    };
    loop {
        tokio::time::sleep(stretch).await;
        let used = match processor_time(cgroup) {
            Ok(used) => used,
            Err(error) => return error,
        };
        if looked.look(used) {
            ask(agent, u64::MAX, "idle").await;
            // What that took is no work of the pod's.
            looked.used = processor_time(cgroup).unwrap_or(used);
        }
    }
}

async fn watch_pressure(cgroup: &Path, agent: &Agent) -> io::Result<std::convert::Infallible> {
    let pressure = trigger(cgroup.join("memory.pressure"))?;
    let pressure = sys::watch(pressure, Interest::PRIORITY)?;
    loop {
        let mut ready = pressure.ready(Interest::PRIORITY).await?;
        ask(agent, PART, "memory pressure").await;
        tokio::time::sleep(REST).await;
        // What came meanwhile was the same shortage.
        ready.clear_ready();
    }
}

/// Has the kernel tell of pressure by the descriptor, for as long as it is open.
fn trigger(file: PathBuf) -> io::Result<OwnedFd> {
    let mut pressure = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(file)?;
    pressure.write_all(TRIGGER)?;
    Ok(pressure.into())
}

async fn ask(agent: &Agent, bytes: u64, why: &str) {
    match agent.reclaim_memory(bytes).await {
        Ok(freed) => tracing::debug!(freed, why, "page cache of the containers was freed"),
        // Nobody has asked for it: a guest that is stopped does not answer, and is asked the next
        // time.
        Err(error) => tracing::debug!(error = %line(&error), why, "no page cache was freed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_becomes_idle_once_until_it_has_worked() {
        let ms = Duration::from_millis;
        let mut looked = Idleness::new(Duration::from_secs(60), ms(5000));
        assert!(!looked.look(ms(9000)), "it works");
        assert!(looked.look(ms(12_000)), "a twentieth");
        for used in [12_100, 13_000, 16_000] {
            assert!(!looked.look(ms(used)), "it was asked");
        }
        assert!(!looked.look(ms(20_000)), "it works again");
        assert!(looked.look(ms(20_000)));
        // A clock that goes backwards is no work.
        assert!(!looked.look(ms(10)));
    }

    #[test]
    fn the_operator_decides() {
        let config = |idle, returns| Config {
            reclaim_idle_secs: idle,
            return_memory: returns,
            ..Config::default()
        };
        assert!(Rules::of(&config(60, false)).is_none());
        assert!(Rules::of(&config(0, true)).unwrap().idle.is_none());
        let rules = Rules::of(&Config::default()).unwrap();
        assert_eq!(rules.idle, Some(Duration::from_secs(60)));
    }

    #[test]
    fn a_host_without_psi_is_told_by_an_error() {
        let dir = tempfile::TempDir::new().unwrap();
        assert!(trigger(dir.path().join("memory.pressure")).is_err());
    }
}
