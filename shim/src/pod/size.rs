//! How large a pod's machine is, and what its cgroup on the host may take.
//!
//! ```text
//! vCPUs    limits ──► quota / period, rounded up; at most as many as the list of processors has
//!          none   ──► `vcpus` of the configuration
//! memory   limits ──► the limit + `overhead_mib` + 1/64 of it (the guest kernel's page array)
//!                     + 1 MiB for each further vCPU
//!          none   ──► `memory_mib`
//! host     memory ──► the machine's + `host_overhead_mib` + 1/8 of it
//!          time   ──► the quota of a container that is alone + 1/4 of a processor
//! ```
//!
//! So a container comes to its own limit first, which the guest's kernel keeps, then to the end of
//! the machine, where the guest's kernel chooses what it kills, and only a machine that has been
//! taken over comes to the host's ceiling.

use std::{collections::BTreeSet, fs};

use crate::{
    config::{self, Config},
    oci::limits::{Field, Limits, Wrong, cpu_list},
};

const MIB: u64 = 1 << 20;
/// The guest kernel's page array takes 64 bytes of each page of 4 KiB.
const PAGE_ARRAY: u64 = 64;
/// What the host may need for a MiB of a machine: tables of pages in KVM, the VMM and the fs
/// process, inodes and files that the guest holds, and room for the page cache of what it reads.
const HOST_SHARE: u64 = 8;

/// Why a machine of the wanted size is not made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// It would not boot.
    #[error(
        "{field} is {bytes}: with it the machine would have {mib} MiB, and it does not boot with less than {least}; at least {needed} bytes are needed, or a larger overhead_mib in the configuration"
    )]
    Small {
        /// The limit's name.
        field: String,
        /// The limit.
        bytes: u64,
        /// The machine.
        mib: u64,
        /// The smallest that boots.
        least: u64,
        /// The least limit that works.
        needed: u64,
    },
    /// More than the operator or any machine allows.
    #[error("{field} asks for a machine of {asked} {unit}; {bound} is the most{reason}")]
    Large {
        /// The limit's name.
        field: String,
        /// What it comes to.
        asked: u64,
        /// MiB or vCPUs.
        unit: &'static str,
        /// The most.
        bound: u64,
        /// Whose word that is.
        reason: &'static str,
    },
    /// More than a machine that runs can come to.
    #[error(
        "the containers of the pod ask for a machine of {asked} {unit}; {bound} is the most that it can come to: it was booted with less, and with {key} of the configuration to spare"
    )]
    Grown {
        /// What it comes to.
        asked: u64,
        /// MiB or vCPUs.
        unit: &'static str,
        /// The most.
        bound: u64,
        /// The key.
        key: &'static str,
    },
    /// A number that cannot be meant.
    #[error("{} {}", .0.field, .0.reason)]
    Wrong(Wrong),
    /// A processor that is not there.
    #[error("{field} names processor {cpu}, which this host does not have (it has {here})")]
    Processor {
        /// The limit's name.
        field: String,
        /// The first that is missing.
        cpu: u32,
        /// How many there are.
        here: usize,
    },
}

/// What the host has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Processors that are online, whichever of them this process may use.
    pub cpus: BTreeSet<u32>,
    /// Bytes.
    pub memory: u64,
}

impl Host {
    /// This one.
    pub fn here() -> Host {
        let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        Host {
            cpus: cpu_list(online.trim()).unwrap_or_else(|_| [0].into()),
            memory: nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |host| host.ram_total()),
        }
    }
}

impl From<Wrong> for Error {
    fn from(wrong: Wrong) -> Error {
        Error::Wrong(wrong)
    }
}

/// A machine's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// 1 to [`config::MAX_VCPUS`].
    pub vcpus: u32,
    /// MiB.
    pub memory_mib: u64,
}

impl Size {
    /// Of the machine of a pod with these limits on this host.
    pub fn of(limits: &Limits, config: &Config) -> Result<Size, Error> {
        Size::on(&Host::here(), limits, config)
    }

    /// For who counts in bytes.
    pub fn memory_bytes(self) -> u64 {
        self.memory_mib.saturating_mul(MIB)
    }

    /// What a machine of this size may get beside while it runs.
    pub fn spare(self, config: &Config) -> Size {
        self.spare_on(&Host::here(), config)
    }

    fn spare_on(self, host: &Host, config: &Config) -> Size {
        let memory = match config.max_memory_mib {
            0 => with_overhead(host.memory, self.vcpus, config).min(config::MAX_MEMORY_MIB),
            most => most,
        };
        let room = |most: u64, has| most.saturating_sub(has);
        let vcpus = room(most_vcpus(host, config), self.vcpus.into()) as u32;
        Size {
            vcpus: config.spare_vcpus.min(vcpus),
            memory_mib: config.spare_memory_mib.min(room(memory, self.memory_mib)),
        }
    }

    /// Itself, if it is not more than `most`.
    pub(super) fn within(self, most: Size) -> Result<Size, Error> {
        for (asked, bound, unit, key) in [
            (self.vcpus.into(), most.vcpus.into(), "vCPUs", "spare_vcpus"),
            (self.memory_mib, most.memory_mib, "MiB", "spare_memory_mib"),
        ] {
            if asked > bound {
                return Err(Error::Grown {
                    asked,
                    unit,
                    bound,
                    key,
                });
            }
        }
        Ok(self)
    }

    fn on(host: &Host, limits: &Limits, config: &Config) -> Result<Size, Error> {
        let vcpus = vcpus(host, limits, config)?;
        Ok(Size {
            vcpus,
            memory_mib: memory_mib(host, limits, vcpus, config)?,
        })
    }

    /// Of a machine that was booted with `boot` and can come to `most`, whose containers have these
    /// limits together. A vCPU more takes what it needs of the overhead.
    pub(super) fn grown(
        host: &Host,
        limits: &Limits,
        (boot, most): (Size, Size),
        config: &Config,
    ) -> Result<Size, Error> {
        let mut size = boot;
        match (limits.quota, &limits.cpus) {
            (Some(_), _) => size.vcpus = boot.vcpus.max(vcpus(host, limits, config)?),
            // A list restricts: it asks for nothing.
            (None, Some(_)) => {
                let wanted = vcpus(host, limits, config)?;
                size.vcpus = boot.vcpus.max(wanted.min(most.vcpus));
            }
            (None, None) => {}
        }
        if let Some((_, mib)) = for_limit(host, limits, boot.vcpus, config)? {
            size.memory_mib = boot.memory_mib.max(mib);
        }
        size.within(most)
    }
}

fn most_vcpus(host: &Host, config: &Config) -> u64 {
    match config.max_vcpus {
        0 => (host.cpus.len() as u64).clamp(1, config::MAX_VCPUS.into()),
        most => most.into(),
    }
}

/// A limit that the operator does not allow is refused. One that only the host cannot reach is
/// none to Kubernetes, whose limits may be more than a node has: the machine has what the host has.
fn vcpus(host: &Host, limits: &Limits, config: &Config) -> Result<u32, Error> {
    let named = limits.cpus.as_ref();
    if let Some(cpu) = named.and_then(|cpus| cpus.difference(&host.cpus).next()) {
        return Err(Error::Processor {
            field: limits.source.name(Field::Cpus),
            cpu: *cpu,
            here: host.cpus.len(),
        });
    }
    let named = named.map_or(u64::MAX, |cpus| cpus.len() as u64);
    let most = most_vcpus(host, config);
    let requested = limits.requested.unwrap_or(1).min(most);
    let wanted = match (limits.quota, named) {
        (None, u64::MAX) => u64::from(config.vcpus),
        (None, named) => named,
        (Some(quota), _) => quota.processors(),
    };
    let wanted = wanted.max(requested).min(named);
    if wanted > most && config.max_vcpus > 0 {
        let field = match limits.quota {
            Some(_) => Field::Quota,
            None => Field::Cpus,
        };
        return Err(Error::Large {
            field: limits.source.name(field),
            asked: wanted,
            unit: "vCPUs",
            bound: most,
            reason: ", by max_vcpus of the configuration",
        });
    }
    // The configured number is the operator's word, whatever the host has.
    let most = most.max(config.vcpus.into());
    if wanted > most {
        tracing::info!(wanted, most, "the pod has as many vCPUs as there may be");
    }
    Ok(wanted.min(most) as u32)
}

/// MiB that a guest with so many vCPUs needs to boot and to run something small: each takes a MiB
/// of its kernel (measured in the lab).
pub fn least_memory_mib(vcpus: u32) -> u64 {
    config::MIN_MEMORY_MIB + u64::from(vcpus.saturating_sub(1))
}

/// Bytes that containers with these limits may use on this host, and the MiB that their machine
/// needs for it. None without a limit.
fn for_limit(
    host: &Host,
    limits: &Limits,
    vcpus: u32,
    config: &Config,
) -> Result<Option<(u64, u64)>, Error> {
    let Some(limit) = limits.memory else {
        return Ok(None);
    };
    let bytes = match config.max_memory_mib {
        0 => limit.min(host.memory),
        _ => limit,
    };
    let mib = with_overhead(bytes, vcpus, config);
    let bound = config.most_memory_mib();
    let reason = match config.max_memory_mib {
        0 => "",
        _ => ", by max_memory_mib of the configuration",
    };
    if mib > bound {
        return Err(Error::Large {
            field: limits.source.name(Field::Memory),
            asked: mib,
            unit: "MiB",
            bound,
            reason,
        });
    }
    Ok(Some((bytes, mib)))
}

fn memory_mib(host: &Host, limits: &Limits, vcpus: u32, config: &Config) -> Result<u64, Error> {
    let Some((bytes, mib)) = for_limit(host, limits, vcpus, config)? else {
        return Ok(config.memory_mib);
    };
    let least = least_memory_mib(vcpus);
    if mib < least {
        let more = least - mib;
        return Err(Error::Small {
            field: limits.source.name(Field::Memory),
            bytes,
            mib,
            least,
            needed: (bytes.div_ceil(MIB) + more) * MIB,
        });
    }
    if let Some(reserved) = limits.overhead.map(|bytes| bytes / MIB) {
        // What is touched of it, when all of the limit is.
        let needed = config.overhead_mib + bytes / MIB / 32;
        if reserved < needed {
            tracing::warn!(
                reserved,
                needed,
                "the RuntimeClass' overhead (MiB) is small: the host may end the machine before its containers come to their limits"
            );
        }
    }
    Ok(mib)
}

/// MiB of a machine whose containers may use so many bytes.
fn with_overhead(bytes: u64, vcpus: u32, config: &Config) -> u64 {
    let own = bytes.div_ceil(PAGE_ARRAY).div_ceil(MIB) + u64::from(vcpus.saturating_sub(1));
    bytes
        .div_ceil(MIB)
        .saturating_add(own)
        .saturating_add(config.overhead_mib)
}

/// Most bytes of the host's memory that a pod takes whose machine has so many MiB: with all that
/// its processes and the kernel keep for it, and the page cache of the files that it uses.
pub fn host_ceiling(memory_mib: u64, config: &Config) -> u64 {
    let mib = memory_mib
        .saturating_add(memory_mib / HOST_SHARE)
        .saturating_add(config.host_overhead_mib);
    mib.saturating_mul(MIB)
}

/// `cpu.max` of a pod's cgroup on the host, where its only container has `asked` for this `cpu.max`
/// in the guest and the pod's is `now`: with something for the guest's kernel and the devices, so
/// that the guest's kernel comes to the container's quota first. The pods of Kubernetes have such
/// a ceiling above them.
pub fn cpu_ceiling(asked: &str, now: &str) -> String {
    let number = |word: Option<&str>| word.and_then(|word| word.parse::<u64>().ok());
    let mut words = asked.split_ascii_whitespace();
    let quota = number(words.next());
    // A period that is not named stays.
    let period = number(words.next())
        .or_else(|| number(now.split_ascii_whitespace().nth(1)))
        .unwrap_or(100_000);
    match quota {
        Some(quota) => format!("{} {period}", quota.saturating_add(period / 4)),
        None => format!("max {period}"),
    }
}

/// The same ceiling, where only the period changes: the quota is the one that it was made for.
pub fn cpu_ceiling_over(period: u64, now: &str) -> String {
    let mut words = now.split_ascii_whitespace().map(str::parse::<u64>);
    match (words.next(), words.next()) {
        (Some(Ok(ceiling)), Some(Ok(old))) => {
            let quota = ceiling.saturating_sub(old / 4);
            cpu_ceiling(&format!("{quota} {period}"), now)
        }
        _ => format!("max {period}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::limits::{Quota, Source};

    #[test]
    fn a_new_period_keeps_the_quota_of_the_ceiling() {
        let now = cpu_ceiling("50000 100000", "max 100000");
        assert_eq!(now, "75000 100000");
        assert_eq!(cpu_ceiling_over(50_000, &now), "62500 50000");
        assert_eq!(cpu_ceiling_over(50_000, "max 100000"), "max 50000");
        assert_eq!(cpu_ceiling_over(50_000, ""), "max 50000");
    }

    fn host() -> Host {
        Host {
            cpus: (0..8).collect(),
            memory: 16 << 30,
        }
    }

    fn size(limits: Limits, config: Config) -> Result<(u32, u64), Error> {
        Size::on(&host(), &limits, &config).map(|size| (size.vcpus, size.memory_mib))
    }

    fn quota(quota_us: u64) -> Option<Quota> {
        let period_us = 100_000;
        Some(Quota {
            quota_us,
            period_us,
        })
    }

    fn limits(quota_us: u64, memory_mib: u64) -> Limits {
        Limits {
            quota: (quota_us > 0).then(|| quota(quota_us)).flatten(),
            memory: (memory_mib > 0).then_some(memory_mib * MIB),
            ..Limits::default()
        }
    }

    #[test]
    fn a_machine_may_grow_to_what_operator_and_host_have() {
        let boot = Size {
            vcpus: 2,
            memory_mib: 512,
        };
        let of = |vcpus, memory_mib| Size { vcpus, memory_mib };
        let config = Config::default();
        let host_mib = (16 << 10) + (16 << 10) / 64 + 1 + config.overhead_mib;
        assert_eq!(boot.spare_on(&host(), &config), of(1, host_mib - 512));
        let small = Host {
            cpus: [0].into(),
            ..host()
        };
        assert_eq!(boot.spare_on(&small, &config).vcpus, 0);
        let bounded = Config {
            max_vcpus: 4,
            max_memory_mib: 600,
            spare_vcpus: 9,
            ..config.clone()
        };
        assert_eq!(boot.spare_on(&small, &bounded), of(2, 88));
        let none = Config {
            spare_vcpus: 0,
            spare_memory_mib: 0,
            ..config
        };
        assert_eq!(boot.spare_on(&host(), &none), Size::default());
        assert_eq!(boot.within(of(2, 512)), Ok(boot));
        for (most, words) in [
            (of(1, 512), ["2 vCPUs; 1 is", "spare_vcpus"]),
            (of(2, 511), ["512 MiB; 511 is", "spare_memory_mib"]),
        ] {
            let error = boot.within(most).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }

    #[test]
    fn a_machine_grows_by_limits_and_never_below_its_boot() {
        let (boot, most) = (
            Size {
                vcpus: 2,
                memory_mib: 77,
            },
            Size {
                vcpus: 3,
                memory_mib: 2000,
            },
        );
        let of = |limits: Limits| {
            let grown = Size::grown(&host(), &limits, (boot, most), &Config::default());
            grown.map(|size| (size.vcpus, size.memory_mib))
        };
        assert_eq!(of(Limits::default()), Ok((2, 77)));
        // Too little to boot with is no matter here.
        assert_eq!(of(limits(1_000, 1)), Ok((2, 77)));
        // The memory is that of a machine with the vCPUs of the boot.
        assert_eq!(of(limits(250_000, 256)), Ok((3, 256 + 4 + 64 + 1)));
        assert!(of(limits(350_000, 0)).is_err());
        let listed = |count| Limits {
            cpus: Some((0..count).collect()),
            ..Limits::default()
        };
        assert_eq!(
            [of(listed(1)), of(listed(3)), of(listed(8))],
            [Ok((2, 77)), Ok((3, 77)), Ok((3, 77))]
        );
    }

    #[test]
    fn without_limits_it_is_the_configurations() {
        let config = Config {
            vcpus: 3,
            memory_mib: 700,
            ..Config::default()
        };
        assert_eq!(size(Limits::default(), config), Ok((3, 700)));
    }

    #[test]
    fn limits_are_rounded_up_and_get_an_overhead() {
        let of = |limits| size(limits, Config::default()).unwrap();
        assert_eq!(of(limits(1_000, 0)).0, 1);
        assert_eq!(of(limits(100_000, 0)).0, 1);
        assert_eq!(of(limits(100_001, 0)).0, 2);
        assert_eq!(of(limits(250_000, 0)).0, 3);
        assert_eq!(of(limits(0, 1)).1, 1 + 1 + 64);
        assert_eq!(of(limits(0, 512)).1, 512 + 8 + 64);
        let odd = Limits {
            memory: Some(100 * MIB + 1),
            ..Limits::default()
        };
        assert_eq!(of(odd).1, 101 + 2 + 64);
    }

    #[test]
    fn a_list_of_processors_counts_and_a_request_is_a_least_number() {
        let of = |limits| size(limits, Config::default()).unwrap().0;
        let cpus = |list: &[u32]| Some(list.iter().copied().collect::<BTreeSet<u32>>());
        let named = Limits {
            cpus: cpus(&[2, 3, 5]),
            ..Limits::default()
        };
        assert_eq!(of(named.clone()), 3);
        let less = Limits {
            quota: quota(200_000),
            ..named.clone()
        };
        assert_eq!(of(less), 2);
        let more = Limits {
            quota: quota(700_000),
            ..named
        };
        assert_eq!(of(more), 3);
        // Of two containers one has no limit and asks for more than the other one's.
        let burstable = Limits {
            quota: quota(50_000),
            requested: Some(3),
            ..Limits::default()
        };
        assert_eq!(of(burstable), 3);
        let absent = Limits {
            cpus: cpus(&[7, 8]),
            ..Limits::default()
        };
        let error = size(absent, Config::default()).unwrap_err().to_string();
        assert!(error.contains("cpu.cpus names processor 8"), "{error}");
    }

    #[test]
    fn the_host_bounds_quietly_and_the_operator_by_name() {
        let of = |limits, config| size(limits, config);
        assert_eq!(of(limits(99_900_000, 0), Config::default()), Ok((8, 512)));
        // 64 GiB on a host of 16.
        let most = (16 << 10) + (16 << 10) / 64 + 64;
        assert_eq!(of(limits(0, 64 << 10), Config::default()), Ok((1, most)));
        let bounded = Config {
            max_vcpus: 4,
            max_memory_mib: 1024,
            ..Config::default()
        };
        assert_eq!(of(limits(400_000, 900), bounded.clone()), Ok((4, 982)));
        for (limits, words) in [
            (
                limits(400_001, 0),
                ["cpu.quota", "5 vCPUs", "4 is", "max_vcpus"],
            ),
            (
                limits(0, 1000),
                ["memory.limit", "1080 MiB", "1024 is", "max_memory_mib"],
            ),
        ] {
            let error = of(limits, bounded.clone()).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        let requested = Limits {
            requested: Some(100),
            ..Limits::default()
        };
        assert_eq!(of(requested, bounded), Ok((4, 512)));
    }

    #[test]
    fn more_vcpus_than_processors_are_given_to_who_configures_them() {
        let config = Config {
            max_vcpus: 16,
            ..Config::default()
        };
        assert_eq!(size(limits(1_600_000, 0), config), Ok((16, 512)));
        let config = Config {
            vcpus: 12,
            ..Config::default()
        };
        assert_eq!(size(Limits::default(), config), Ok((12, 512)));
    }

    #[test]
    fn too_little_to_boot_is_told_with_what_would_do() {
        let config = Config {
            overhead_mib: 0,
            ..Config::default()
        };
        let small = Limits {
            source: Source::Containerd,
            ..limits(0, 20)
        };
        let error = size(small, config.clone()).unwrap_err().to_string();
        let needed = (config::MIN_MEMORY_MIB - 1) * MIB;
        for word in [
            "sandbox-memory",
            "20971520",
            "21 MiB",
            &needed.to_string(),
            "overhead_mib",
        ] {
            assert!(error.contains(word), "{word}: {error}");
        }
        let enough = limits(0, config::MIN_MEMORY_MIB - 1);
        assert!(size(enough, config).is_ok());
    }

    #[test]
    fn the_hosts_ceiling_is_above_the_machine() {
        let config = Config::default();
        assert_eq!(host_ceiling(512, &config), (512 + 64 + 64) * MIB);
        assert_eq!(host_ceiling(u64::MAX, &config), u64::MAX);
    }

    #[test]
    fn the_hosts_processors_are_there_for_a_quarter_more() {
        for (asked, now, ceiling) in [
            ("50000 100000", "max 100000", "75000 100000"),
            ("max 50000", "75000 100000", "max 50000"),
            ("20000", "max 10000", "22500 10000"),
            ("20000", "", "45000 100000"),
            ("max", "75000 100000", "max 100000"),
        ] {
            assert_eq!(cpu_ceiling(asked, now), ceiling, "{asked} {now}");
        }
    }

    #[test]
    fn this_host_has_something() {
        let host = Host::here();
        assert!(!host.cpus.is_empty() && host.memory > 64 * MIB);
    }
}
