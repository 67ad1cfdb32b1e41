//! What a container uses, in containerd's terms for cgroup v2, from the files of its cgroup in the guest.
//!
//! The guest is asked, but not waited for: what it said last is the answer then. Only when it has not said anything yet, the answer
//! waits for it, and is an error in the end: numbers that nobody has counted would be believed. Its text is untrusted; a number that
//! does not parse is 0.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_protocol::{CGROUP_STATS, agent::CgroupFile};
use containerd_shim_protos::{
    cgroups_v2::metrics::{
        CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData,
        PSIStats, PidsStat, RdmaStat,
    },
    protobuf::MessageField,
};
use tokio::sync::watch;

use super::{Error, Pod};
use crate::machine::agent;

/// How long the guest may take to be heard in the same answer; containerd is promised one within 100 ms.
const FRESH: Duration = Duration::from_millis(60);
/// The same when it has never been heard: a little less than the 2 s after which CRI gives up.
const FIRST: Duration = Duration::from_millis(1500);
/// Block devices of one container at most.
const MAX_DEVICES: usize = 256;
/// Files without which an answer is none: of a cgroup that has gone, or has not come, nothing is there.
const NEEDED: &[&str] = &["cpu.stat", "memory.current", "pids.current"];
/// Sizes of huge pages, by their names in these files.
const HUGE_PAGES: [&str; 2] = ["2MB", "1GB"];
/// What containerd 2 has beside the fields that the crate's messages know (cgroups v3.1,
/// `MemoryStat`), by field number.
const LATER_FIELDS: [(u32, &str); 4] = [
    (39, "workingset_refault_anon"),
    (40, "workingset_refault_file"),
    (41, "workingset_activate_anon"),
    (42, "workingset_activate_file"),
];

/// A container's last known use.
#[derive(Debug)]
pub struct Usage {
    last: watch::Sender<Option<Metrics>>,
    out_of_memory: AtomicBool,
    asking: Arc<AtomicBool>,
}

impl Default for Usage {
    fn default() -> Usage {
        Usage {
            last: watch::Sender::new(None),
            out_of_memory: AtomicBool::default(),
            asking: Arc::default(),
        }
    }
}

impl Usage {
    /// Remembers that the kernel has killed for memory, which the guest may not live to count.
    pub fn note_out_of_memory(&self) {
        self.out_of_memory.store(true, Ordering::Relaxed);
    }

    /// Asks the guest, waits a moment, and answers with what is known then. Of a container that is
    /// `alone` in its pod the host knows the block devices, which the guest does not have.
    ///
    /// # Errors
    /// The guest has not said anything yet.
    pub async fn metrics(&self, pod: &Pod, container: &str, alone: bool) -> Result<Metrics, Error> {
        let agent = pod.agent().clone();
        let id = container.to_string();
        let question = async move { agent.stats(&id).await };
        let told = self.ask_and_wait(question, pod.size().memory_bytes()).await;
        let Some(mut metrics) = told else {
            let text = format!("the guest has not told yet what container {container:?} uses");
            return Err(Error::Unavailable(text));
        };
        if alone && let Ok(text) = std::fs::read_to_string(pod.cgroup.join("io.stat")) {
            let io = metrics.io.mut_or_insert_default();
            io.usage.extend(devices(&text));
        }
        Ok(metrics)
    }

    async fn ask_and_wait(
        &self,
        question: impl Future<Output = Result<Vec<CgroupFile>, agent::Error>> + Send + 'static,
        memory_bytes: u64,
    ) -> Option<Metrics> {
        let mut told = self.last.subscribe();
        // One question at a time, however many ask us while the guest hangs. Later it is still heard, for the next time.
        if !self.asking.swap(true, Ordering::Relaxed) {
            let (last, asking) = (self.last.clone(), self.asking.clone());
            tokio::spawn(async move {
                let answer = question.await;
                asking.store(false, Ordering::Relaxed);
                take(&last, answer, memory_bytes);
            });
        }
        let patience = match self.known(memory_bytes) {
            Some(_) => FRESH,
            None => FIRST,
        };
        let _ = tokio::time::timeout(patience, told.changed()).await;
        self.known(memory_bytes)
    }

    /// Asks at a moment after which the guest may not be able to answer.
    pub async fn refresh(&self, pod: &Pod, container: &str) {
        let answer = pod.agent().stats(container).await;
        take(&self.last, answer, pod.size().memory_bytes());
    }

    /// The same of a container that has just ended, before that is told: whoever hears of the end
    /// may ask what it has used, and is answered with this until it is deleted. A guest that is
    /// slow holds the end up for no longer than an answer, and is heard later.
    pub async fn settle(&self, pod: &Arc<Pod>, container: &str) {
        let (last, pod, id) = (self.last.clone(), pod.clone(), container.to_string());
        let asked = tokio::spawn(async move {
            let answer = pod.agent().stats(&id).await;
            take(&last, answer, pod.size().memory_bytes());
        });
        let _ = tokio::time::timeout(FRESH, asked).await;
    }

    /// The same of a pod's own container, which only the host counts.
    ///
    /// # Errors
    /// The pod has ended, and nobody has asked before.
    pub fn metrics_of_pod(&self, pod: &Pod) -> Result<Metrics, Error> {
        if let Some(metrics) = of_pod(pod) {
            self.last.send_replace(Some(metrics));
        }
        self.known(pod.size().memory_bytes())
            .ok_or_else(|| Error::Unavailable(format!("the pod {:?} has ended, uncounted", pod.id)))
    }

    fn known(&self, memory_bytes: u64) -> Option<Metrics> {
        let known = self.last.borrow().clone();
        if !self.out_of_memory.load(Ordering::Relaxed) {
            return known;
        }
        // Whoever ran out of memory has ended: what it uses now is nothing.
        let mut metrics = known.unwrap_or_else(|| convert(&[], memory_bytes));
        let events = metrics.memory_events.mut_or_insert_default();
        events.oom_kill = events.oom_kill.max(1);
        Some(metrics)
    }
}

/// Keeps an answer; of one that is none, only that it has come.
fn take(
    last: &watch::Sender<Option<Metrics>>,
    answer: Result<Vec<CgroupFile>, agent::Error>,
    memory_bytes: u64,
) {
    match answer {
        Ok(files) if is_whole(&files) => {
            drop(last.send_replace(Some(convert(&files, memory_bytes))))
        }
        Ok(_) => last.send_modify(|_| tracing::debug!("the guest has no such cgroup")),
        Err(error) => last.send_modify(|_| tracing::debug!(%error, "no fresh metrics")),
    }
}

fn is_whole(files: &[CgroupFile]) -> bool {
    let has = |name: &&str| files.iter().any(|file| file.name == **name);
    NEEDED.iter().all(has)
}

/// What a pod uses as the host sees it: its machine, with all that is in it. `None`: it has ended.
pub fn of_pod(pod: &Pod) -> Option<Metrics> {
    of_cgroup(&pod.cgroup, pod.size().memory_bytes())
}

fn of_cgroup(cgroup: &Path, memory_bytes: u64) -> Option<Metrics> {
    let files = CGROUP_STATS.iter().filter_map(|name| {
        let value = std::fs::read_to_string(cgroup.join(name)).ok()?;
        Some(CgroupFile {
            name: (*name).into(),
            value,
            ..CgroupFile::default()
        })
    });
    let files: Vec<CgroupFile> = files.collect();
    // A pod whose cgroup lacks a controller is still counted by the others.
    let is_there = files.iter().any(|file| file.name == "cpu.stat");
    is_there.then(|| convert(&files, memory_bytes))
}

/// The files by their names. Who has no limit has that of the machine with its `memory_bytes`.
fn convert(files: &[CgroupFile], memory_bytes: u64) -> Metrics {
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
            usage_limit: match text("memory.max") {
                "" => memory_bytes,
                text => limit(text).min(memory_bytes),
            },
            max_usage: number("memory.peak"),
            swap_usage: number("memory.swap.current"),
            swap_limit: number("memory.swap.max"),
            swap_max_usage: number("memory.swap.peak"),
            psi: pressure(text("memory.pressure")),
            ..memory(text("memory.stat"))
        }),
        memory_events: MessageField::some(memory_events(text("memory.events"))),
        io: MessageField::some(IOStat {
            usage: devices(text("io.stat")),
            psi: pressure(text("io.pressure")),
            ..IOStat::default()
        }),
        hugetlb: HUGE_PAGES
            .into_iter()
            .filter_map(|size| huge_pages(size, text))
            .collect(),
        // Present, as runc has it, and empty: no such device comes into a guest.
        rdma: MessageField::some(RdmaStat::default()),
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
    // The guest's numbers: any.
    let sum =
        |name: &str| get(&format!("{name}_anon")).saturating_add(get(&format!("{name}_file")));
    let mut stat = MemoryStat {
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
        workingset_refault: sum("workingset_refault"),
        workingset_activate: sum("workingset_activate"),
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
    };
    let later = stat.special_fields.mut_unknown_fields();
    for (field, name) in LATER_FIELDS {
        later.add_varint(field, get(name));
    }
    stat
}

/// Of `hugetlb.SIZE.*`, where the kernel has this size.
fn huge_pages<'a>(size: &str, text: impl Fn(&str) -> &'a str) -> Option<HugeTlbStat> {
    let text = |name: &str| text(&format!("hugetlb.{size}.{name}"));
    let current = text("current");
    (!current.is_empty()).then(|| HugeTlbStat {
        current: limit(current),
        max: limit(text("max")),
        pagesize: size.into(),
        failcnt: table(text("events"))("max"),
        ..HugeTlbStat::default()
    })
}

/// Of a cgroup's `memory.events`.
fn memory_events(text: &str) -> MemoryEvents {
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

    const MACHINE: u64 = 256 << 20;

    fn convert_here(files: &[CgroupFile]) -> Metrics {
        convert(files, MACHINE)
    }

    #[test]
    fn the_kernels_text_becomes_containerds_numbers() {
        let metrics = convert_here(&[
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
            (4096, MACHINE)
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
    fn huge_pages_and_later_fields_are_told() {
        let metrics = convert_here(&[
            file("hugetlb.2MB.current", "4194304\n"),
            file("hugetlb.2MB.max", "max\n"),
            file("hugetlb.2MB.events", "max 3\n"),
            file("memory.stat", "workingset_refault_file 300\n"),
        ]);
        let huge = &metrics.hugetlb[0];
        assert_eq!(metrics.hugetlb.len(), 1, "the guest has one size");
        assert_eq!((huge.pagesize.as_str(), huge.current), ("2MB", 4_194_304));
        assert_eq!((huge.max, huge.failcnt), (u64::MAX, 3));
        // Field 40 as a varint: (40 << 3) is 0xc0 0x02, 300 is 0xac 0x02.
        let bytes = protobuf::Message::write_to_bytes(&*metrics.memory).unwrap();
        let later = [0xc0, 0x02, 0xac, 0x02];
        assert!(bytes.windows(4).any(|window| window == later), "{bytes:x?}");
    }

    #[test]
    fn nonsense_from_the_guest_is_zero() {
        let metrics = convert_here(&[
            file("cpu.stat", "usage_usec -1\n\u{0}"),
            file("memory.current", "99999999999999999999999"),
            file("io.stat", &"1:1 \n".repeat(10_000)),
        ]);
        assert_eq!((metrics.cpu.usage_usec, metrics.memory.usage), (0, 0));
        assert_eq!(metrics.io.usage.len(), MAX_DEVICES);
    }

    #[test]
    fn a_limit_is_the_containers_or_the_machines() {
        let limit = |text: &str| {
            let files = [file("memory.max", text)];
            convert_here(&files).memory.usage_limit
        };
        assert_eq!(limit("4096\n"), 4096);
        for none in ["max\n", "", "18446744073709551615"] {
            assert_eq!(limit(none), MACHINE, "{none:?}");
        }
        assert_eq!(convert_here(&[]).memory.usage_limit, MACHINE);
    }

    #[test]
    fn sums_of_the_guests_numbers_do_not_wrap() {
        let most = format!(
            "workingset_refault_anon {0}\nworkingset_refault_file {0}\n",
            u64::MAX
        );
        let metrics = convert_here(&[file("memory.stat", &most)]);
        assert_eq!(metrics.memory.workingset_refault, u64::MAX);
    }

    fn whole(current: &str) -> Vec<CgroupFile> {
        vec![
            file("cpu.stat", "usage_usec 7\n"),
            file("memory.current", current),
            file("pids.current", "5\n"),
        ]
    }

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(work)
    }

    fn lost() -> agent::Error {
        agent::Error::Lost {
            call: "ContainerStats",
            reason: "gone".into(),
        }
    }

    #[test]
    fn nothing_is_answered_before_the_guest_has_told() {
        block_on(async {
            let usage = Usage::default();
            let since = std::time::Instant::now();
            let silent = usage.ask_and_wait(std::future::pending(), MACHINE).await;
            assert!(silent.is_none());
            // In the time that CRI gives.
            let waited = since.elapsed();
            assert!(
                waited >= FIRST && waited < Duration::from_secs(2),
                "{waited:?}"
            );
        });
        // A guest that refuses, that has gone, and one that has no such cgroup.
        block_on(async {
            for answer in [Err(lost()), Ok(Vec::new()), Ok(whole("1\n")[..2].to_vec())] {
                let usage = Usage::default();
                let told = usage.ask_and_wait(async { answer }, MACHINE).await;
                assert!(told.is_none());
            }
        });
    }

    #[test]
    fn a_slow_first_answer_is_waited_for_by_all_who_ask() {
        block_on(async {
            let usage = Usage::default();
            let slow = async {
                tokio::time::sleep(5 * FRESH).await;
                Ok(whole("4096\n"))
            };
            let (first, second) = tokio::join!(
                usage.ask_and_wait(slow, MACHINE),
                usage.ask_and_wait(std::future::pending(), MACHINE),
            );
            for metrics in [first, second] {
                let metrics = metrics.expect("told");
                assert_eq!((metrics.memory.usage, metrics.pids.current), (4096, 5));
                assert!(metrics.cpu.is_some() && metrics.memory_events.is_some());
            }
        });
    }

    #[test]
    fn what_was_told_last_stays() {
        block_on(async {
            let usage = Usage::default();
            let ask = async |answer| usage.ask_and_wait(async { answer }, MACHINE).await;
            let memory = |metrics: Option<Metrics>| metrics.expect("told").memory.usage;
            assert_eq!(memory(ask(Ok(whole("1\n"))).await), 1);
            assert_eq!(memory(ask(Ok(whole("2\n"))).await), 2);
            assert_eq!(memory(ask(Err(lost())).await), 2);
            assert_eq!(memory(ask(Ok(Vec::new())).await), 2);
            let since = std::time::Instant::now();
            let hangs = usage.ask_and_wait(std::future::pending(), MACHINE).await;
            assert_eq!(memory(hangs), 2);
            assert!(since.elapsed() < FIRST);
        });
    }

    #[test]
    fn a_cgroup_that_is_gone_is_not_counted() {
        let directory = tempfile::tempdir().unwrap();
        assert!(of_cgroup(directory.path(), MACHINE).is_none());
        std::fs::write(directory.path().join("cpu.stat"), "usage_usec 3\n").unwrap();
        let metrics = of_cgroup(directory.path(), MACHINE).expect("there");
        assert_eq!(metrics.cpu.usage_usec, 3);
    }

    #[test]
    fn running_out_of_memory_is_not_forgotten() {
        let usage = Usage::default();
        assert!(usage.known(MACHINE).is_none());
        usage.note_out_of_memory();
        // Who has never been counted has ended all the same.
        let metrics = usage.known(MACHINE).expect("known");
        assert_eq!(metrics.memory_events.oom_kill, 1);
        assert!(metrics.cpu.is_some() && metrics.memory.is_some() && metrics.pids.is_some());
        usage.last.send_replace(Some(convert_here(&whole("1\n"))));
        assert_eq!(
            usage.known(MACHINE).expect("known").memory_events.oom_kill,
            1
        );
    }
}
