//! What a pod's containers may use together, in the words of whoever says it. The size of the
//! pod's machine follows from it (`pod/size.rs`).
//!
//! | who says it | where |
//! | --- | --- |
//! | a container that is alone | `linux.resources` of config.json ([`super::asked`]) |
//! | containerd's CRI | annotations `io.kubernetes.cri.sandbox-*` of the pause container |
//! | CRI-O | one annotation of the pause container, with CRI's message as JSON |
//! | containerd 2's sandbox service | `PodSandboxConfig.linux.resources` ([`super::cri`]) |

use std::{
    collections::{BTreeSet, HashMap},
    str::FromStr,
};

use serde::Deserialize;

use super::{Bundle, Error, invalid};

/// Most processors that a Linux machine of this architecture can have (CONFIG_NR_CPUS).
const MOST_PROCESSORS: u64 = 8192;
/// From here on a limit of memory means "none": engines and kernels write the largest number
/// that they have, in pages or in bytes.
const NO_LIMIT: i64 = 1 << 60;
/// Bounds of a period and the least quota, in microseconds (cgroup-v2.rst, cpu.max; the kernel's
/// `min_cfs_quota_period` and `max_cfs_quota_period`).
pub(super) const PERIODS: std::ops::RangeInclusive<u64> = 1_000..=1_000_000;
pub(super) const DEFAULT_PERIOD: u64 = 100_000;
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

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

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
