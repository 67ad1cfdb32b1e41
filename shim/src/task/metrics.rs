//! What a container uses, in containerd's terms for cgroup v2, from the files of its cgroup in the guest.
//!
//! The guest is asked, but never waited for: what it said last is the answer then. Its text is untrusted; a number that does not
//! parse is 0.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_protocol::agent::CgroupFile;
use containerd_shim_protos::{
    cgroups_v2::metrics::{
        CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
    },
    protobuf::MessageField,
};

use crate::agent::Agent;

/// How long the guest may take to be heard in the same answer; containerd is promised one within 100 ms.
const FRESH: Duration = Duration::from_millis(60);
/// Block devices of one container at most.
const MAX_DEVICES: usize = 256;
/// What is read of a pod's cgroup on the host.
const POD_FILES: &[&str] = &[
    "cpu.stat",
    "memory.current",
    "memory.events",
    "memory.max",
    "memory.peak",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.max",
    "io.stat",
    "pids.current",
    "pids.max",
];

/// A container's last known use.
#[derive(Debug, Default)]
pub struct Usage {
    last: Arc<Mutex<Metrics>>,
    out_of_memory: AtomicBool,
    asking: Arc<AtomicBool>,
}

impl Usage {
    /// Remembers that the kernel has killed for memory, which the guest may not live to count.
    pub fn note_out_of_memory(&self) {
        self.out_of_memory.store(true, Ordering::Relaxed);
    }

    /// Asks the guest, waits a moment, and answers with what is known then.
    pub async fn metrics(&self, agent: &Agent, container: &str) -> Metrics {
        // One question at a time, however many ask us while the guest hangs.
        if !self.asking.swap(true, Ordering::Relaxed) {
            let (last, asking) = (self.last.clone(), self.asking.clone());
            let (agent, container) = (agent.clone(), container.to_string());
            let question = tokio::spawn(async move {
                ask(&agent, &container, &last).await;
                asking.store(false, Ordering::Relaxed);
            });
            // Later it is still heard, for the next time.
            let _ = tokio::time::timeout(FRESH, question).await;
        }
        self.known()
    }

    /// Asks for the last time, when the container has ended and its cgroup is still there.
    pub async fn refresh(&self, agent: &Agent, container: &str) {
        ask(agent, container, &self.last).await;
    }

    fn known(&self) -> Metrics {
        let mut metrics = self.last.lock().expect("no panic while it is held").clone();
        if self.out_of_memory.load(Ordering::Relaxed) {
            let events = metrics.memory_events.mut_or_insert_default();
            events.oom_kill = events.oom_kill.max(1);
        }
        metrics
    }
}

async fn ask(agent: &Agent, container: &str, last: &Mutex<Metrics>) {
    match agent.stats(container).await {
        Ok(files) => *last.lock().expect("no panic while it is held") = convert(&files),
        Err(error) => tracing::debug!(container, %error, "no fresh metrics"),
    }
}

/// What a pod uses as the host sees it: its machine, with all that is in it.
pub fn of_pod(cgroup: &Path) -> Metrics {
    let files = POD_FILES.iter().filter_map(|name| {
        let value = std::fs::read_to_string(cgroup.join(name)).ok()?;
        Some(CgroupFile {
            name: (*name).into(),
            value,
            ..CgroupFile::default()
        })
    });
    convert(&files.collect::<Vec<_>>())
}

/// The files by their names.
fn convert(files: &[CgroupFile]) -> Metrics {
    let text = |name: &str| {
        let mut found = files.iter().filter(|file| file.name == name);
        found.next().map_or("", |file| file.value.as_str())
    };
    let number = |name: &str| limit(text(name));
    Metrics {
        pids: MessageField::some(PidsStat {
            current: number("pids.current"),
            limit: number("pids.max"),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(cpu(text("cpu.stat"), text("cpu.pressure"))),
        memory: MessageField::some(MemoryStat {
            usage: number("memory.current"),
            usage_limit: number("memory.max"),
            max_usage: number("memory.peak"),
            swap_usage: number("memory.swap.current"),
            swap_limit: number("memory.swap.max"),
            psi: pressure(text("memory.pressure")),
            ..memory(text("memory.stat"))
        }),
        memory_events: MessageField::some(memory_events(text("memory.events"))),
        io: MessageField::some(IOStat {
            usage: devices(text("io.stat")),
            ..IOStat::default()
        }),
        ..Metrics::default()
    }
}

/// "max" is the largest number, as containerd has it.
fn limit(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

/// Lines of a name and a number.
fn table(text: &str) -> impl Fn(&str) -> u64 + '_ {
    let pairs: HashMap<&str, u64> = text
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name, value.trim().parse().ok()?))
        })
        .collect();
    move |name| pairs.get(name).copied().unwrap_or(0)
}

fn cpu(text: &str, psi: &str) -> CPUStat {
    let get = table(text);
    CPUStat {
        usage_usec: get("usage_usec"),
        user_usec: get("user_usec"),
        system_usec: get("system_usec"),
        nr_periods: get("nr_periods"),
        nr_throttled: get("nr_throttled"),
        throttled_usec: get("throttled_usec"),
        nr_bursts: get("nr_bursts"),
        burst_usec: get("burst_usec"),
        psi: pressure(psi),
        ..CPUStat::default()
    }
}

fn memory(text: &str) -> MemoryStat {
    let get = table(text);
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        workingset_refault: get("workingset_refault_anon")
            .saturating_add(get("workingset_refault_file")),
        workingset_activate: get("workingset_activate_anon")
            .saturating_add(get("workingset_activate_file")),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        ..MemoryStat::default()
    }
}

/// Of a cgroup's `memory.events`.
pub(super) fn memory_events(text: &str) -> MemoryEvents {
    let get = table(text);
    MemoryEvents {
        low: get("low"),
        high: get("high"),
        max: get("max"),
        oom: get("oom"),
        oom_kill: get("oom_kill"),
        oom_group_kill: get("oom_group_kill"),
        ..MemoryEvents::default()
    }
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 ...` for each device.
fn devices(text: &str) -> Vec<IOEntry> {
    let entry = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let get = |name: &str| {
            let mut words = rest.split(' ').filter_map(|word| word.split_once('='));
            let found = words.find(|(key, _)| *key == name);
            found.and_then(|(_, value)| value.parse().ok()).unwrap_or(0)
        };
        Some(IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: get("rbytes"),
            wbytes: get("wbytes"),
            rios: get("rios"),
            wios: get("wios"),
            ..IOEntry::default()
        })
    };
    text.lines().filter_map(entry).take(MAX_DEVICES).collect()
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` and the same for `full`.
fn pressure(text: &str) -> MessageField<PSIStats> {
    let data = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind));
        let get = |name: &str| {
            let words = line?.split(' ').filter_map(|word| word.split_once('='));
            words
                .filter(|(key, _)| *key == name)
                .map(|(_, value)| value)
                .next()
        };
        let float = |name: &str| {
            get(name)
                .and_then(|value| value.parse().ok())
                .unwrap_or(0.0)
        };
        MessageField::from_option(line.map(|_| {
            PSIData {
                avg10: float("avg10"),
                avg60: float("avg60"),
                avg300: float("avg300"),
                total: get("total")
                    .and_then(|value| value.parse().ok())
                    .unwrap_or(0),
                ..PSIData::default()
            }
        }))
    };
    MessageField::from_option((!text.is_empty()).then(|| PSIStats {
        some: data("some"),
        full: data("full"),
        ..PSIStats::default()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, value: &str) -> CgroupFile {
        CgroupFile {
            name: name.into(),
            value: value.into(),
            ..CgroupFile::default()
        }
    }

    #[test]
    fn the_kernels_text_becomes_containerds_numbers() {
        let metrics = convert(&[
            file("cpu.stat", "usage_usec 7\nuser_usec 4\nsystem_usec 3\n"),
            file("memory.current", "4096\n"),
            file("memory.max", "max\n"),
            file("memory.stat", "anon 1\ninactive_file 2\n"),
            file("memory.events", "low 0\noom_kill 3\n"),
            file("pids.current", "5\n"),
            file(
                "io.stat",
                "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0\nnonsense\n",
            ),
            file(
                "cpu.pressure",
                "some avg10=1.50 avg60=0.00 avg300=0.00 total=9\n",
            ),
        ]);
        assert_eq!(metrics.cpu.usage_usec, 7);
        assert_eq!(
            (metrics.cpu.psi.some.avg10, metrics.cpu.psi.some.total),
            (1.5, 9)
        );
        assert_eq!(
            (metrics.memory.usage, metrics.memory.usage_limit),
            (4096, u64::MAX)
        );
        assert_eq!(
            (metrics.memory.inactive_file, metrics.memory_events.oom_kill),
            (2, 3)
        );
        assert_eq!(metrics.pids.current, 5);
        assert_eq!(metrics.io.usage.len(), 1);
        assert_eq!(
            (metrics.io.usage[0].major, metrics.io.usage[0].wios),
            (8, 4)
        );
    }

    #[test]
    fn nonsense_from_the_guest_is_zero() {
        let metrics = convert(&[
            file("cpu.stat", "usage_usec -1\n\u{0}"),
            file("memory.current", "99999999999999999999999"),
            file("io.stat", &"1:1 \n".repeat(10_000)),
        ]);
        assert_eq!((metrics.cpu.usage_usec, metrics.memory.usage), (0, 0));
        let most = format!(
            "workingset_refault_anon {0}\nworkingset_refault_file {0}\n",
            u64::MAX
        );
        let metrics = convert(&[file("memory.stat", &most)]);
        assert_eq!(metrics.memory.workingset_refault, u64::MAX);
        let metrics = convert(&[file("io.stat", &"1:1 \n".repeat(10_000))]);
        assert_eq!(metrics.io.usage.len(), MAX_DEVICES);
    }

    #[test]
    fn running_out_of_memory_is_not_forgotten() {
        let usage = Usage::default();
        assert_eq!(usage.known().memory_events.oom_kill, 0);
        usage.note_out_of_memory();
        assert_eq!(usage.known().memory_events.oom_kill, 1);
    }
}
