//! What a pod's containers may use together, in the words of whoever says it. The size of the
//! pod's machine follows from it (`pod/size.rs`).
//!
//! | who says it | where |
//! | --- | --- |
//! | a container that is alone | `linux.resources` of config.json |
//! | containerd's CRI | annotations `io.kubernetes.cri.sandbox-*` of the pause container |
//! | CRI-O | one annotation of the pause container, with CRI's message as JSON |
//! | containerd 2's sandbox service | `PodSandboxConfig.linux.resources` ([`super::cri`]) |

use std::{
    collections::{BTreeSet, HashMap},
    str::FromStr,
};

use bulkhead_agent_protocol::agent;
use serde::Deserialize;

use super::{Bundle, Error, Plan, invalid};

/// Most processors that a Linux machine of this architecture can have (CONFIG_NR_CPUS).
const MOST_PROCESSORS: u64 = 8192;
/// From here on a limit of memory means "none": engines and kernels write the largest number
/// that they have, in pages or in bytes.
const NO_LIMIT: i64 = 1 << 60;
/// Bounds of a period and the least quota, in microseconds (cgroup-v2.rst, cpu.max; the kernel's
/// `min_cfs_quota_period` and `max_cfs_quota_period`).
pub(super) const PERIODS: std::ops::RangeInclusive<u64> = 1_000..=1_000_000;
const DEFAULT_PERIOD: u64 = 100_000;
/// Shares that stand for the time of one processor in Kubernetes.
const SHARES_OF_PROCESSOR: u64 = 1024;

/// Who has said it, for errors that name the field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// `linux.resources` of config.json.
    #[default]
    Config,
    /// containerd's annotations.
    Containerd,
    /// CRI-O's annotation.
    CriO,
    /// The sandbox service.
    SandboxApi,
}

/// One of the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Microseconds of processors' time in each period.
    Quota,
    /// Microseconds.
    Period,
    /// Weight.
    Shares,
    /// List of processors.
    Cpus,
    /// Bytes.
    Memory,
}

impl Source {
    /// The name that its author knows.
    pub fn name(self, field: Field) -> String {
        let (prefix, words) = match self {
            Source::Config => (
                "linux.resources.",
                [
                    "cpu.quota",
                    "cpu.period",
                    "cpu.shares",
                    "cpu.cpus",
                    "memory.limit",
                ],
            ),
            Source::Containerd => (
                "annotation io.kubernetes.cri.sandbox-",
                ["cpu-quota", "cpu-period", "cpu-shares", "cpuset", "memory"],
            ),
            Source::CriO => ("annotation io.kubernetes.cri-o.PodLinuxResources: ", CRI),
            Source::SandboxApi => ("linux.resources.", CRI),
        };
        format!("{prefix}{}", words[field as usize])
    }
}

/// Names of the fields of CRI's `LinuxContainerResources`.
const CRI: [&str; 5] = [
    "cpu_quota",
    "cpu_period",
    "cpu_shares",
    "cpuset_cpus",
    "memory_limit_in_bytes",
];

/// So much time in each period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Microseconds of all processors together.
    pub quota_us: u64,
    /// Microseconds.
    pub period_us: u64,
}

impl Quota {
    /// How many processors can be busy all the time, rounded up.
    pub fn processors(self) -> u64 {
        self.quota_us.div_ceil(self.period_us)
    }
}

/// What a pod may use. `None`: there is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Who has said it.
    pub source: Source,
    /// Processors' time.
    pub quota: Option<Quota>,
    /// The processors of the host that it may run on.
    pub cpus: Option<BTreeSet<u32>>,
    /// Processors that Kubernetes has reserved for it, rounded up: a request and no limit.
    pub requested: Option<u64>,
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Bytes that Kubernetes has reserved beside its containers' (a RuntimeClass' overhead).
    pub overhead: Option<u64>,
}

/// A number that cannot be meant: the field, and what is wrong.
#[derive(Debug, PartialEq, Eq)]
pub struct Wrong {
    /// As its author knows it.
    pub field: String,
    /// What is wrong, and what is allowed.
    pub reason: String,
}

impl From<Wrong> for Error {
    fn from(wrong: Wrong) -> Error {
        invalid(wrong.field, wrong.reason)
    }
}

/// The numbers as they stand; 0 is an absent one, as in CRI's messages and in Go's JSON.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Raw {
    #[serde(rename = "cpu_quota")]
    pub quota: i64,
    #[serde(rename = "cpu_period")]
    pub period: i64,
    #[serde(rename = "cpu_shares")]
    pub shares: i64,
    #[serde(rename = "cpuset_cpus")]
    pub cpus: String,
    #[serde(rename = "memory_limit_in_bytes")]
    pub memory: i64,
}

impl Raw {
    pub(super) fn read(&self, source: Source) -> Result<Limits, Wrong> {
        let wrong = |field, reason: String| Wrong {
            field: source.name(field),
            reason,
        };
        let quota = self
            .quota()
            .map_err(|(field, reason)| wrong(field, reason))?;
        let cpus = match self.cpus.trim() {
            "" => None,
            text => Some(cpu_list(text).map_err(|reason| wrong(Field::Cpus, reason))?),
        };
        let shares = u64::try_from(self.shares).map_err(|_| {
            let reason = format!("is {}; a weight of 2 to 262144 is possible", self.shares);
            wrong(Field::Shares, reason)
        })?;
        let memory = match self.memory {
            -1 | 0 | NO_LIMIT.. => None,
            bytes => Some(u64::try_from(bytes).map_err(|_| {
                let reason = format!("is {bytes}; a number of bytes is possible, or -1 for none");
                wrong(Field::Memory, reason)
            })?),
        };
        Ok(Limits {
            source,
            quota,
            cpus,
            // Of a container that is alone they say nothing about a number of processors.
            requested: (source != Source::Config && shares > 0)
                .then(|| shares.div_ceil(SHARES_OF_PROCESSOR).min(MOST_PROCESSORS)),
            memory,
            overhead: None,
        })
    }

    fn quota(&self) -> Result<Option<Quota>, (Field, String)> {
        let period_us = match u64::try_from(self.period) {
            Ok(0) => DEFAULT_PERIOD,
            Ok(period) if PERIODS.contains(&period) => period,
            _ => {
                let reason = format!("is {}; 1000 to 1000000 are possible", self.period);
                return Err((Field::Period, reason));
            }
        };
        let quota_us = match self.quota {
            -1 | 0 => return Ok(None),
            quota => u64::try_from(quota)
                .ok()
                .filter(|quota| quota >= PERIODS.start()),
        };
        let Some(quota_us) = quota_us else {
            let reason = format!(
                "is {}; 1000 and more is possible, or -1 for none",
                self.quota
            );
            return Err((Field::Quota, reason));
        };
        let quota = Quota {
            quota_us,
            period_us,
        };
        match quota.processors() {
            ..=MOST_PROCESSORS => Ok(Some(quota)),
            count => {
                let reason = format!(
                    "is {quota_us} of {period_us}, the time of {count} processors, which no machine has"
                );
                Err((Field::Quota, reason))
            }
        }
    }
}

/// Reads "0-2,7" (the list format of cpuset(7)).
pub fn cpu_list(text: &str) -> Result<BTreeSet<u32>, String> {
    let number = |word: &str| {
        let number: Option<u32> = word.trim().parse().ok();
        number.filter(|cpu| u64::from(*cpu) < MOST_PROCESSORS)
    };
    let mut cpus = BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => cpus.extend(first..=last),
            _ => return Err(format!("is {text:?}, which is not a list of processors")),
        }
    }
    Ok(cpus)
}

/// Of a container that is alone in its pod.
pub fn of_container(bundle: &Bundle) -> Result<Limits, Error> {
    let Asked(raw) = Asked::of(bundle)?;
    Ok(raw.read(Source::Config)?)
}

/// What a container says that it may use, as it says it: a machine that runs follows it.
#[derive(Clone, Debug, Default)]
pub struct Asked(Raw);

impl Asked {
    /// In config.json.
    pub fn of(bundle: &Bundle) -> Result<Asked, Error> {
        let linux = bundle.spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let asked = resources.map_or(Ok(Raw::default()), raw)?;
        asked.read(Source::Config)?;
        Ok(Asked(asked))
    }

    /// In the resources of an update, which name what changes.
    pub fn anew(json: &[u8]) -> Result<Asked, Error> {
        let asked = raw(&super::parse_resources(json)?)?;
        asked.read(Source::Config)?;
        Ok(Asked(asked))
    }

    /// The list of processors that it names.
    pub fn processors(&self) -> Option<String> {
        let Asked(Raw { cpus, .. }) = self;
        (!cpus.trim().is_empty()).then(|| cpus.clone())
    }

    /// What stands after an update.
    pub fn updated(&self, new: Asked) -> Asked {
        let (Asked(old), Asked(new)) = (self, new);
        let or = |new, old| if new == 0 { old } else { new };
        Asked(Raw {
            quota: or(new.quota, old.quota),
            period: or(new.period, old.period),
            shares: or(new.shares, old.shares),
            memory: or(new.memory, old.memory),
            cpus: match new.cpus.is_empty() {
                true => old.cpus.clone(),
                false => new.cpus,
            },
        })
    }
}

/// Bytes of memory, and microseconds of processors' time in [`DEFAULT_PERIOD`]; 0 where there is no
/// limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amounts {
    memory: i128,
    time: i128,
}

impl Amounts {
    fn of(limits: &Limits) -> Amounts {
        Amounts {
            memory: limits.memory.unwrap_or(0).into(),
            time: limits.quota.map_or(0, Quota::in_default_period).into(),
        }
    }

    /// With the difference of a container's limits.
    pub fn changed(self, old: &Asked, new: &Asked) -> Amounts {
        let [old, new] = [old, new].map(|Asked(raw)| raw.read(Source::Config).unwrap_or_default());
        let (old, new) = (Amounts::of(&old), Amounts::of(&new));
        Amounts {
            memory: self.memory + new.memory - old.memory,
            time: self.time + new.time - old.time,
        }
    }
}

impl Quota {
    /// Microseconds.
    fn in_default_period(self) -> u64 {
        let us = u128::from(self.quota_us) * u128::from(DEFAULT_PERIOD);
        u64::try_from(us.div_ceil(self.period_us.into())).unwrap_or(u64::MAX)
    }
}

/// So much time in each default period.
fn quota(us: u64) -> Quota {
    Quota {
        quota_us: us,
        period_us: DEFAULT_PERIOD,
    }
}

impl Limits {
    /// Those of a pod whose containers have these: what was announced and then changed by updates,
    /// where anything was announced.
    pub fn announced(self, announced: &Limits, updates: Amounts) -> Limits {
        let with = |announced: u64, change: i128| {
            u64::try_from((i128::from(announced) + change).max(0)).unwrap_or(u64::MAX)
        };
        let time = announced.quota.map(Quota::in_default_period);
        Limits {
            memory: announced
                .memory
                .map_or(self.memory, |memory| Some(with(memory, updates.memory))),
            quota: time.map_or(self.quota, |time| Some(quota(with(time, updates.time)))),
            ..self
        }
    }
}

/// What several containers of a pod may use together. The list of processors of a container that
/// has the machine `alone` counts, which is the host's; another one's is the machine's.
pub fn together(all: &[&Asked], alone: bool) -> Result<Limits, Wrong> {
    let mut total = Limits::default();
    for Asked(raw) in all {
        let one = raw.read(Source::Config)?;
        let sum = |total: Option<u64>, one: Option<u64>| match (total, one) {
            (Some(total), Some(one)) => Some(total.saturating_add(one)),
            (total, one) => total.or(one),
        };
        let time = [total.quota, one.quota].map(|quota| quota.map(Quota::in_default_period));
        total.quota = sum(time[0], time[1]).map(quota);
        total.memory = sum(total.memory, one.memory);
        total.cpus = one.cpus.filter(|_| alone);
    }
    Ok(total)
}

/// Adds a list of processors to the limits that a container is given, if they have none.
pub fn name_processors(resources: &mut agent::Resources, list: String) {
    let name = "cpuset.cpus";
    if resources.files.iter().all(|file| file.name != name) {
        resources.files.push(agent::CgroupFile {
            name: name.into(),
            value: list,
            field: Source::Config.name(Field::Cpus),
            ..Default::default()
        });
    }
}

fn raw(resources: &oci_spec::runtime::LinuxResources) -> Result<Raw, Wrong> {
    let mut raw = Raw::default();
    if let Some(memory) = resources.memory() {
        raw.memory = memory.limit().unwrap_or(0);
    }
    if let Some(cpu) = resources.cpu() {
        raw.quota = cpu.quota().unwrap_or(0);
        raw.period = signed(Field::Period, cpu.period())?;
        raw.shares = signed(Field::Shares, cpu.shares())?;
        raw.cpus = cpu.cpus().clone().unwrap_or_default();
    }
    // They are written last, and win. What is no number is refused by the guest's kernel.
    let unified = |name: &str| resources.unified().as_ref()?.get(name);
    let number = |word: Option<&str>| match word {
        Some("max") => -1,
        word => word.and_then(|word| word.parse().ok()).unwrap_or(0),
    };
    if let Some(text) = unified("memory.max") {
        raw.memory = number(Some(text.trim()));
    }
    if let Some(text) = unified("cpu.max") {
        let mut words = text.split_ascii_whitespace();
        (raw.quota, raw.period) = (number(words.next()), number(words.next()));
    }
    Ok(raw)
}

fn signed(field: Field, number: Option<u64>) -> Result<i64, Wrong> {
    let number = number.unwrap_or(0);
    i64::try_from(number).map_err(|_| Wrong {
        field: Source::Config.name(field),
        reason: format!("is {number}, which is too much"),
    })
}

/// Of a pod, by the annotations of its pause container.
pub fn of_sandbox(bundle: &Bundle) -> Result<Limits, Error> {
    let empty = HashMap::new();
    let annotations = bundle.spec.annotations().as_ref().unwrap_or(&empty);
    Ok(match first(annotations, CRIO_RESOURCES) {
        Some(text) => of_crio(text, first(annotations, CRIO_OVERHEAD))?,
        None => of_containerd(annotations)?,
    })
}

/// containerd's `internal/cri/annotations`.
const CONTAINERD: &str = "io.kubernetes.cri.sandbox-";
/// CRI-O's `pkg/annotations`: the name since version 1.34 and the one before.
const CRIO_RESOURCES: [&str; 2] = [
    "pod-linux-resources.crio.io",
    "io.kubernetes.cri-o.PodLinuxResources",
];
const CRIO_OVERHEAD: [&str; 2] = [
    "pod-linux-overhead.crio.io",
    "io.kubernetes.cri-o.PodLinuxOverhead",
];

fn first<'a>(annotations: &'a HashMap<String, String>, names: [&str; 2]) -> Option<&'a str> {
    let found = names.into_iter().find_map(|name| annotations.get(name));
    // "null" is what CRI-O writes of a message that it was not given.
    found
        .map(String::as_str)
        .filter(|text| !["", "null"].contains(text))
}

fn of_containerd(annotations: &HashMap<String, String>) -> Result<Limits, Wrong> {
    let number = |field, word: &str| match annotations.get(&format!("{CONTAINERD}{word}")) {
        None => Ok(0),
        Some(text) => i64::from_str(text).map_err(|_| Wrong {
            field: Source::Containerd.name(field),
            reason: format!("is {text:?}, which is no number"),
        }),
    };
    let raw = Raw {
        quota: number(Field::Quota, "cpu-quota")?,
        period: number(Field::Period, "cpu-period")?,
        shares: number(Field::Shares, "cpu-shares")?,
        cpus: String::new(),
        memory: number(Field::Memory, "memory")?,
    };
    raw.read(Source::Containerd)
}

fn of_crio(resources: &str, overhead: Option<&str>) -> Result<Limits, Wrong> {
    let json = |field: &str, text: &str| {
        serde_json::from_str::<Raw>(text).map_err(|error| Wrong {
            field: format!("annotation io.kubernetes.cri-o.{field}"),
            reason: format!("cannot be read: {error}"),
        })
    };
    let mut limits = json("PodLinuxResources", resources)?.read(Source::CriO)?;
    if let Some(text) = overhead {
        limits.overhead = reserved(json("PodLinuxOverhead", text)?.memory);
    }
    Ok(limits)
}

/// A RuntimeClass' overhead, which only warns: a number that is none is nobody's.
pub(super) fn reserved(bytes: i64) -> Option<u64> {
    u64::try_from(bytes).ok().filter(|bytes| *bytes > 0)
}

/// All limits of a container that is alone in its pod which are the pod's cgroup's.
pub fn of_host(plan: &mut Plan, vcpus: u32) -> Vec<(String, String)> {
    let resources = plan.container.resources.mut_or_insert_default();
    let mut files = host_files(resources, vcpus);
    files.append(&mut plan.host_limits);
    files
}

/// What the host keeps of the limits of a container that is alone in a machine with so many vCPUs,
/// as files of the pod's cgroup. Processors and memory nodes are the host's, and in the guest the
/// first ones stand for them; a weight means something beside other pods only.
pub fn host_files(resources: &mut agent::Resources, vcpus: u32) -> Vec<(String, String)> {
    let mut files = Vec::new();
    for file in &mut resources.files {
        let in_guest = match file.name.as_str() {
            "cpu.weight" | "cpu.idle" => None,
            "cpuset.mems" => Some("0".into()),
            // What is no list is refused by the guest's kernel, in its words.
            "cpuset.cpus" => match cpu_list(&file.value) {
                Ok(cpus) => Some(match cpus.len().min(vcpus as usize) {
                    0 | 1 => "0".into(),
                    count => format!("0-{}", count - 1),
                }),
                Err(_) => continue,
            },
            _ => continue,
        };
        files.push((file.name.clone(), file.value.clone()));
        if let Some(in_guest) = in_guest {
            file.value = in_guest;
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn container(resources: &str) -> Result<Limits, String> {
        let resources = serde_json::from_str(resources).unwrap();
        let read = raw(&resources).and_then(|raw| raw.read(Source::Config));
        read.map_err(|wrong| format!("{} {}", wrong.field, wrong.reason))
    }

    fn annotated(pairs: &[(&str, &str)]) -> Result<Limits, String> {
        let pairs = pairs.iter().map(|(name, value)| (*name, *value));
        let pairs: HashMap<&str, &str> = pairs.collect();
        let spec = serde_json::json!({"ociVersion": "1.2.0", "annotations": pairs});
        let bundle = Bundle {
            directory: "/b".into(),
            spec: serde_json::from_value(spec).unwrap(),
        };
        of_sandbox(&bundle).map_err(|error| error.to_string())
    }

    #[test]
    fn a_container_alone_says_it_in_config_json() {
        assert_eq!(container("{}").unwrap(), Limits::default());
        let limits = container(
            r#"{"cpu": {"quota": 150000, "period": 100000, "shares": 4096, "cpus": "0,2-3"},
                "memory": {"limit": 104857600}}"#,
        )
        .unwrap();
        assert_eq!(limits.quota.unwrap().processors(), 2);
        assert_eq!(limits.cpus, Some([0, 2, 3].into()));
        assert_eq!(limits.requested, None, "shares are a weight here");
        assert_eq!(limits.memory, Some(100 * MIB));
        // Without a period the kernel's own.
        let quota = container(r#"{"cpu": {"quota": 100001}}"#).unwrap().quota;
        assert_eq!(quota.unwrap().processors(), 2);
    }

    #[test]
    fn containers_of_a_pod_add_up_and_an_update_changes_what_it_names() {
        let asked = |json: &str| Asked::anew(json.as_bytes()).unwrap();
        let sum = |all: &[&Asked]| together(all, all.len() == 1).unwrap();
        let one = asked(
            r#"{"cpu": {"quota": 50000, "period": 100000, "cpus": "3"}, "memory": {"limit": 10}}"#,
        );
        let two = asked(r#"{"cpu": {"quota": 7500, "period": 10000}}"#);
        let none = asked("{}");
        let of = |all: &[&Asked]| {
            let total = sum(all);
            let time = total.quota.map(|quota| (quota.quota_us, quota.period_us));
            (time, total.memory, total.cpus.map(|cpus| cpus.len()))
        };
        assert_eq!(of(&[]), (None, None, None));
        assert_eq!(of(&[&none]), (None, None, None));
        assert_eq!(of(&[&one]), (Some((50_000, 100_000)), Some(10), Some(1)));
        let both = (Some((125_000, 100_000)), Some(10), None);
        assert_eq!(of(&[&one, &none, &two]), both);
        let more = one.updated(asked(r#"{"memory": {"limit": 30}}"#));
        assert_eq!(of(&[&more]), (Some((50_000, 100_000)), Some(30), Some(1)));
        let lifted = r#"{"cpu": {"quota": -1, "cpus": "0-3"}, "memory": {"limit": -1}}"#;
        assert_eq!(of(&[&more.updated(asked(lifted))]), (None, None, Some(4)));
        // Files by their names win.
        let unified =
            r#"{"memory": {"limit": 7}, "unified": {"memory.max": "9", "cpu.max": "max 10000"}}"#;
        assert_eq!(
            of(&[&one.updated(asked(unified))]),
            (None, Some(9), Some(1))
        );
        // Of what an engine has announced only updates change anything.
        let announced = Limits {
            memory: Some(12),
            quota: Some(quota(100_000)),
            ..Limits::default()
        };
        let with = |updates| {
            let limits = sum(&[&one, &two]).announced(&announced, updates);
            (limits.memory, limits.quota.map(|quota| quota.quota_us))
        };
        assert_eq!(with(Amounts::default()), (Some(12), Some(100_000)));
        let updates = Amounts::default().changed(&one, &more).changed(&two, &none);
        assert_eq!(with(updates), (Some(32), Some(25_000)));
        assert!(Asked::anew(br#"{"memory": {"limit": -5}}"#).is_err());
        assert!(Asked::anew(b"{").is_err());
    }

    #[test]
    fn none_is_written_in_several_ways() {
        for text in [
            r#"{"cpu": {"quota": -1, "period": 100000, "cpus": ""}, "memory": {"limit": -1}}"#,
            r#"{"cpu": {"quota": 0, "period": 0, "shares": 0}, "memory": {"limit": 0}}"#,
            r#"{"memory": {"limit": 9223372036854771712}}"#,
            r#"{"memory": {"limit": 9223372036854775807}}"#,
        ] {
            assert_eq!(container(text).unwrap(), Limits::default(), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_its_name() {
        for (text, name) in [
            (r#"{"cpu": {"quota": -2}}"#, "cpu.quota is -2"),
            (r#"{"cpu": {"quota": 999}}"#, "cpu.quota is 999"),
            (
                r#"{"cpu": {"quota": 9223372036854775807}}"#,
                "which no machine has",
            ),
            (r#"{"cpu": {"period": 999}}"#, "cpu.period is 999"),
            (r#"{"cpu": {"period": 1000001}}"#, "cpu.period is 1000001"),
            (
                r#"{"cpu": {"period": 18446744073709551615}}"#,
                "cpu.period is 18446744073709551615",
            ),
            (r#"{"cpu": {"shares": 18446744073709551615}}"#, "cpu.shares"),
            (r#"{"cpu": {"cpus": "1-"}}"#, "cpu.cpus is \"1-\""),
            (r#"{"cpu": {"cpus": "3-1"}}"#, "cpu.cpus"),
            (r#"{"cpu": {"cpus": "0-4294967295"}}"#, "cpu.cpus"),
            (r#"{"cpu": {"cpus": "0,,1"}}"#, "cpu.cpus"),
            (r#"{"memory": {"limit": -5}}"#, "memory.limit is -5"),
        ] {
            let error = container(text).unwrap_err();
            assert!(error.contains(name), "{text}: {error}");
        }
    }

    #[test]
    fn the_hosts_processors_are_the_guests_first_ones() {
        let file = |(name, value): (&str, &str)| agent::CgroupFile {
            name: name.into(),
            value: value.into(),
            ..Default::default()
        };
        let split = |pairs: &[(&str, &str)], vcpus| {
            let mut resources = agent::Resources {
                files: pairs.iter().copied().map(file).collect(),
                ..Default::default()
            };
            let host = host_files(&mut resources, vcpus);
            let join = |(name, value): (&String, &String)| format!("{name}={value}");
            let host: Vec<_> = host
                .iter()
                .map(|(name, value)| join((name, value)))
                .collect();
            let guest = resources.files.iter();
            let guest: Vec<_> = guest.map(|file| join((&file.name, &file.value))).collect();
            (host.join(" "), guest.join(" "))
        };
        let asked = [
            ("cpu.weight", "50"),
            ("cpuset.cpus", "4-5,7"),
            ("cpuset.mems", "1"),
            ("memory.max", "9"),
        ];
        let (host, guest) = split(&asked, 3);
        assert_eq!(host, "cpu.weight=50 cpuset.cpus=4-5,7 cpuset.mems=1");
        assert_eq!(
            guest,
            "cpu.weight=50 cpuset.cpus=0-2 cpuset.mems=0 memory.max=9"
        );
        assert_eq!(split(&[("cpuset.cpus", "4-5,7")], 2).1, "cpuset.cpus=0-1");
        assert_eq!(split(&[("cpuset.cpus", "6")], 2).1, "cpuset.cpus=0");
        let (host, guest) = split(&[("cpuset.cpus", "x")], 2);
        assert_eq!((host.as_str(), guest.as_str()), ("", "cpuset.cpus=x"));
    }

    #[test]
    fn containerd_annotates_its_pods() {
        let limits = annotated(&[
            ("io.kubernetes.cri.sandbox-cpu-quota", "250000"),
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
            ("io.kubernetes.cri.sandbox-cpu-shares", "3072"),
            ("io.kubernetes.cri.sandbox-memory", "209715200"),
        ])
        .unwrap();
        assert_eq!(limits.quota.unwrap().processors(), 3);
        assert_eq!(limits.requested, Some(3));
        assert_eq!(limits.memory, Some(200 * MIB));
        // A pod without limits: kubelet's least shares, which ask for nothing.
        let limits = annotated(&[
            ("io.kubernetes.cri.sandbox-cpu-quota", "0"),
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
            ("io.kubernetes.cri.sandbox-cpu-shares", "2"),
            ("io.kubernetes.cri.sandbox-memory", "0"),
        ])
        .unwrap();
        assert_eq!((limits.quota, limits.memory), (None, None));
        assert_eq!(limits.requested, Some(1));
        for (name, value) in [("memory", "-7"), ("memory", "1Gi"), ("cpu-quota", "-9")] {
            let name = format!("io.kubernetes.cri.sandbox-{name}");
            let error = annotated(&[(&name, value)]).unwrap_err();
            assert!(error.contains(&name) && error.contains(value), "{error}");
        }
    }

    #[test]
    fn cri_o_annotates_its_pods_by_one_of_two_names() {
        let json =
            r#"{"cpu_period":100000,"cpu_quota":150000,"memory_limit_in_bytes":104857600,"x":1}"#;
        for names in CRIO_RESOURCES.into_iter().zip(CRIO_OVERHEAD) {
            let overhead = (names.1, r#"{"memory_limit_in_bytes":1048576}"#);
            let limits = annotated(&[(names.0, json), overhead]).unwrap();
            assert_eq!(limits.quota.unwrap().processors(), 2);
            assert_eq!(limits.memory, Some(100 * MIB));
            assert_eq!(limits.overhead, Some(MIB));
        }
        for empty in ["{}", "null", ""] {
            let limits = annotated(&[(CRIO_RESOURCES[1], empty)]).unwrap();
            assert_eq!((limits.quota, limits.memory), (None, None));
        }
        for broken in ["[", r#"{"memory_limit_in_bytes":"many"}"#] {
            let error = annotated(&[(CRIO_RESOURCES[0], broken)]).unwrap_err();
            assert!(error.contains("PodLinuxResources"), "{error}");
        }
    }
}
