//! `linux.resources` → control files of cgroup v2.
//!
//! Limits on what the container's processes use are set in the guest. Limits on block devices are set on the pod's cgroup on
//! the host: the device numbers are the host's, and it is the fs process that reads and writes there.
//!
//! | config.json | file | conversion |
//! | --- | --- | --- |
//! | memory.limit, reservation | memory.max, memory.low | -1 = max |
//! | memory.swap | memory.swap.max | v1 counts memory and swap together: less memory.limit; max with an unlimited memory.limit |
//! | memory.checkBeforeUpdate | | a limit that is not above what is in use is refused |
//! | cpu.shares | cpu.weight | 10^(log2(s)²/612 + 125·log2(s)/612 − 7/34), so that 2, 1024, 262144 → 1, 100, 10000 |
//! | cpu.quota, period | cpu.max | of an update that has one of them, the other stays |
//! | cpu.burst, idle | cpu.max.burst, cpu.idle | |
//! | cpu.cpus, mems | cpuset.cpus, cpuset.mems | |
//! | pids.limit | pids.max | |
//! | hugepageLimits | hugetlb.SIZE.max, hugetlb.SIZE.rsvd.max | the agent reserves the pages |
//! | unified | as named | last, so that it wins |
//! | blockIO, io.* of unified (host) | io.weight, io.max | weight 10..1000 → 1..10000 |
//!
//! Refused by name: what v2 has not (memory.kernel, kernelTCP, swappiness, disableOOMKiller,
//! useHierarchy = false, cpu.realtime*, network, leaf weights), and rdma.

use std::collections::HashMap;

use bulkhead_agent_protocol::agent::{self, CgroupFile};
use oci_spec::runtime as spec;

use super::{Error, devices, invalid, limits::PERIODS, unsupported};

/// Files of the pod's cgroup on the host.
type HostFiles = Vec<(String, String)>;

/// For which moment limits are converted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    /// A new container: what is not named has no limit.
    Create,
    /// One that has limits already: what is not named stays.
    Update,
}

/// Files for the agent, and files for the pod's cgroup on the host.
pub(super) fn convert(
    resources: Option<&spec::LinuxResources>,
    moment: Moment,
) -> Result<(agent::Resources, HostFiles), Error> {
    let empty = spec::LinuxResources::default();
    let resources = resources.unwrap_or(&empty);
    let mut guest = agent::Resources::default();
    if let Some(memory) = resources.memory() {
        refuse_memory(memory)?;
        memory_files(memory, moment, &mut guest)?;
    }
    if let Some(cpu) = resources.cpu() {
        cpu_files(cpu, moment, &mut guest)?;
    }
    if let Some(pids) = resources.pids() {
        let limit = limit_or_max("linux.resources.pids.limit", Some(pids.limit()))?;
        guest.set("pids.max", limit, "linux.resources.pids.limit");
    }
    huge_page_files(resources, &mut guest)?;
    refuse_others(resources)?;
    let mut host = HostFiles::new();
    if let Some(block) = resources.block_io() {
        block_files(block, &mut host)?;
    }
    unified_files(resources, &mut guest, &mut host)?;
    guest.devices = devices::rules(resources.devices().as_deref().unwrap_or_default())?;
    guest.set_devices = true;
    Ok((guest, host))
}

/// A list of files in which a name is once.
trait Files {
    /// Sets a file, in the place of the one that has the name; `None`: the field was absent.
    fn set(&mut self, name: &str, value: Option<String>, field: &str);
}

impl Files for agent::Resources {
    fn set(&mut self, name: &str, value: Option<String>, field: &str) {
        let Some(value) = value else { return };
        self.files.retain(|file| file.name != name);
        self.files.push(CgroupFile {
            name: name.into(),
            value,
            field: field.into(),
            ..CgroupFile::default()
        });
    }
}

/// -1: no limit. 0 is the zero value of an absent field, as runc has it.
fn limit_or_max(field: &str, limit: Option<i64>) -> Result<Option<String>, Error> {
    match limit {
        None | Some(0) => Ok(None),
        Some(-1) => Ok(Some("max".into())),
        Some(limit) if limit > 0 => Ok(Some(limit.to_string())),
        Some(limit) => Err(invalid(
            field,
            format!("is {limit}; a limit is positive, and -1 is none"),
        )),
    }
}

/// What v1 had and v2 has not. runc ignores it there; here nobody believes in a limit that is none.
fn refuse_memory(memory: &spec::LinuxMemory) -> Result<(), Error> {
    #[allow(deprecated)] // read to be refused
    let kernel = memory.kernel();
    let refused = [
        (
            "kernel",
            kernel.is_some_and(|limit| limit > 0),
            "cgroup v2 counts kernel memory in memory.limit",
        ),
        (
            "kernelTCP",
            memory.kernel_tcp().is_some_and(|limit| limit > 0),
            "cgroup v2 counts it in memory.limit",
        ),
        (
            "swappiness",
            memory.swappiness().is_some(),
            "cgroup v2 has no swappiness of a group",
        ),
        (
            "disableOOMKiller",
            memory.disable_oom_killer() == Some(true),
            "cgroup v2 cannot disable it",
        ),
        (
            "useHierarchy",
            memory.use_hierarchy() == Some(false),
            "cgroup v2 always counts what is beneath",
        ),
    ];
    match refused.iter().find(|(_, present, _)| *present) {
        Some((name, _, reason)) => Err(unsupported(
            format!("linux.resources.memory.{name}"),
            *reason,
        )),
        None => Ok(()),
    }
}

fn memory_files(
    memory: &spec::LinuxMemory,
    moment: Moment,
    guest: &mut agent::Resources,
) -> Result<(), Error> {
    let [limit_field, low_field, swap_field] =
        ["limit", "reservation", "swap"].map(|name| format!("linux.resources.memory.{name}"));
    let limit = limit_or_max(&limit_field, memory.limit())?;
    let swap = limit_or_max(&swap_field, memory.swap())?;
    let swap = match (swap.as_deref(), memory.limit().filter(|limit| *limit != 0)) {
        // As under v1, where the limit of both together would have been in the way.
        (None, Some(-1)) => Some("max".into()),
        (None | Some("max"), _) | (Some(_), Some(-1)) => swap,
        (Some(_), Some(limit)) => Some(swap_alone(memory.swap().unwrap_or(0), limit)?),
        (Some(_), None) if moment == Moment::Create => {
            let reason = "is the sum of memory and swap, and needs a memory.limit";
            return Err(invalid(swap_field, reason));
        }
        (Some(_), None) => {
            guest.memory_and_swap = memory
                .swap()
                .and_then(|sum| sum.try_into().ok())
                .unwrap_or(0);
            None
        }
    };
    guest.set("memory.swap.max", swap, &swap_field);
    guest.set("memory.max", limit, &limit_field);
    let low = limit_or_max(&low_field, memory.reservation())?;
    guest.set("memory.low", low, &low_field);
    guest.check_memory = memory.check_before_update() == Some(true);
    Ok(())
}

/// v1 counts memory and swap together, v2 apart.
fn swap_alone(sum: i64, limit: i64) -> Result<String, Error> {
    match sum.checked_sub(limit).filter(|swap| *swap >= 0) {
        Some(swap) => Ok(swap.to_string()),
        None => Err(invalid(
            "linux.resources.memory.swap",
            format!(
                "is {sum}: it is the sum of memory and swap, and less than memory.limit, {limit}"
            ),
        )),
    }
}

fn cpu_files(
    cpu: &spec::LinuxCpu,
    moment: Moment,
    guest: &mut agent::Resources,
) -> Result<(), Error> {
    let field = |name: &str| format!("linux.resources.cpu.{name}");
    let real_time = cpu.realtime_runtime().is_some_and(|value| value != 0)
        || cpu.realtime_period().is_some_and(|value| value != 0);
    if real_time {
        return Err(unsupported(
            field("realtimeRuntime"),
            "cgroup v2 does not divide real-time",
        ));
    }
    let idle = cpu.idle().map(|idle| match idle {
        0 | 1 => Ok(idle.to_string()),
        _ => Err(invalid(field("idle"), format!("is {idle}; it is 0 or 1"))),
    });
    guest.set("cpu.idle", idle.transpose()?, &field("idle"));
    // An idle group has no weight (cpu.weight is refused then).
    let shares = cpu.shares().filter(|shares| *shares != 0);
    let shares = shares.filter(|_| cpu.idle() != Some(1));
    let weight = shares.map(|shares| weight(shares).to_string());
    guest.set("cpu.weight", weight, &field("shares"));
    cpu_time(cpu, moment, guest)?;
    for (name, list) in [("cpus", cpu.cpus()), ("mems", cpu.mems())] {
        let list = list.clone().filter(|list| !list.is_empty());
        guest.set(&format!("cpuset.{name}"), list, &field(name));
    }
    Ok(())
}

/// Quota, period and burst.
fn cpu_time(
    cpu: &spec::LinuxCpu,
    moment: Moment,
    guest: &mut agent::Resources,
) -> Result<(), Error> {
    let field = |name: &str| format!("linux.resources.cpu.{name}");
    // Before the quota: a smaller one may not be below the old burst.
    let burst = cpu.burst().map(|burst| burst.to_string());
    guest.set("cpu.max.burst", burst, &field("burst"));
    let period = cpu.period().filter(|period| *period != 0);
    in_range(&field("period"), period, PERIODS)?;
    let quota = limit_or_max(&field("quota"), cpu.quota())?;
    let time = cpu.quota().and_then(|quota| u64::try_from(quota).ok());
    in_range(
        &field("quota"),
        time.filter(|time| *time != 0),
        *PERIODS.start()..=u64::MAX,
    )?;
    if let (Some(time), Some(burst)) = (time.filter(|time| *time != 0), cpu.burst())
        && burst > time
    {
        let reason = format!("is {burst}, and more than the quota, {time}");
        return Err(invalid(field("burst"), reason));
    }
    match (quota, period) {
        (Some(quota), Some(period)) => {
            guest.set(
                "cpu.max",
                Some(format!("{quota} {period}")),
                &field("quota"),
            );
        }
        // The kernel keeps the period; that of a new group is 100 ms.
        (quota @ Some(_), None) => guest.set("cpu.max", quota, &field("quota")),
        (None, Some(period)) if moment == Moment::Update => guest.cpu_period = period,
        (None, Some(period)) => {
            guest.set("cpu.max", Some(format!("max {period}")), &field("period"));
        }
        (None, None) => {}
    }
    Ok(())
}

/// What the kernel would refuse without a word about the field.
fn in_range(
    field: &str,
    microseconds: Option<u64>,
    range: std::ops::RangeInclusive<u64>,
) -> Result<(), Error> {
    match microseconds.filter(|value| !range.contains(value)) {
        None => Ok(()),
        Some(value) => {
            let most = match *range.end() {
                u64::MAX => String::new(),
                end => format!(" and at most {end}"),
            };
            let reason = format!(
                "is {value} microseconds; at least {}{most} are needed",
                range.start()
            );
            Err(invalid(field, reason))
        }
    }
}

/// See the module's table: a curve through (2, 1), (1024, 100) and (262144, 10000), so that v1's default becomes v2's.
fn weight(shares: u64) -> u64 {
    let log = (shares.clamp(2, 262_144) as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    // 10^2 must not become 101 by a rounding error.
    (10f64.powf(exponent) - 1e-6).ceil() as u64
}

/// A limit of what may be used, and one of what may be set aside by mmap(2), without which what is
/// too much is not refused there but ends in SIGBUS.
fn huge_page_files(
    resources: &spec::LinuxResources,
    guest: &mut agent::Resources,
) -> Result<(), Error> {
    let field = "linux.resources.hugepageLimits";
    for huge in resources.hugepage_limits().iter().flatten() {
        let size = huge.page_size();
        let number = size.trim_end_matches(|c: char| !c.is_ascii_digit());
        let plain = number.bytes().all(|c| c.is_ascii_digit()) && !number.is_empty();
        if !plain || !["KB", "MB", "GB"].contains(&&size[number.len()..]) {
            let reason =
                format!("has the page size {size:?}, which is no number with KB, MB or GB");
            return Err(invalid(field, reason));
        }
        let limit = huge.limit();
        if limit < 0 {
            let reason = format!("has the limit {limit} for {size}; it is a number of bytes");
            return Err(invalid(field, reason));
        }
        for name in ["max", "rsvd.max"] {
            let name = format!("hugetlb.{size}.{name}");
            guest.set(&name, Some(limit.to_string()), field);
        }
    }
    Ok(())
}

/// What a machine or cgroup v2 has not.
fn refuse_others(resources: &spec::LinuxResources) -> Result<(), Error> {
    if resources
        .rdma()
        .as_ref()
        .is_some_and(|rdma| !rdma.is_empty())
    {
        return Err(unsupported(
            "linux.resources.rdma",
            "no RDMA device comes into the virtual machine",
        ));
    }
    let Some(network) = resources.network() else {
        return Ok(());
    };
    let priorities = network.priorities().as_ref();
    if network.class_id().is_some_and(|id| id != 0)
        || priorities.is_some_and(|list| !list.is_empty())
    {
        return Err(unsupported(
            "linux.resources.network",
            "cgroup v2 has no classes and priorities of packets",
        ));
    }
    Ok(())
}

/// Last, so that it wins. Files of block devices go where those of blockIO go.
fn unified_files(
    resources: &spec::LinuxResources,
    guest: &mut agent::Resources,
    host: &mut HostFiles,
) -> Result<(), Error> {
    /// The others would end, move or hide the container's processes, or take away what is counted.
    const OF_THE_CORE: [&str; 2] = ["cgroup.max.depth", "cgroup.max.descendants"];
    let field = "linux.resources.unified";
    let empty = HashMap::new();
    let unified = resources.unified().as_ref().unwrap_or(&empty);
    let mut unified: Vec<_> = unified.iter().collect();
    unified.sort();
    for (name, value) in unified {
        // OCI config-linux.md#unified: a file in the container's cgroup.
        let controller = name
            .split_once('.')
            .map_or("", |(controller, _)| controller);
        if controller.is_empty() || name.contains(['/', '\0']) {
            let reason = format!("has the name {name:?}, which is no CONTROLLER.PARAMETER");
            return Err(invalid(field, reason));
        }
        match controller {
            "cgroup" if !OF_THE_CORE.contains(&name.as_str()) => {
                return Err(unsupported(
                    field,
                    format!(
                        "has {name}, which is the runtime's; {} can be set",
                        OF_THE_CORE.join(" and ")
                    ),
                ));
            }
            "rdma" => {
                let reason = format!("has {name}: no RDMA device comes into the virtual machine");
                return Err(unsupported(field, reason));
            }
            "io" => {
                let lines = value.lines().filter(|line| !line.is_empty());
                host.extend(lines.map(|line| (name.clone(), line.into())));
            }
            _ => guest.set(name, Some(value.clone()), field),
        }
    }
    Ok(())
}

fn block_files(block: &spec::LinuxBlockIo, files: &mut HostFiles) -> Result<(), Error> {
    let field = "linux.resources.blockIO";
    let leaf = block.leaf_weight().is_some_and(|weight| weight != 0);
    let devices = block.weight_device().as_deref().unwrap_or_default();
    if leaf
        || devices
            .iter()
            .any(|device| device.leaf_weight().is_some_and(|w| w != 0))
    {
        return Err(unsupported(
            format!("{field}.leafWeight"),
            "cgroup v2 has no weight of leaves",
        ));
    }
    if let Some(weight) = block.weight().filter(|weight| *weight != 0) {
        files.push((
            "io.weight".into(),
            format!("default {}", io_weight(weight)?),
        ));
    }
    for device in devices {
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            let line = format!(
                "{}:{} {}",
                device.major(),
                device.minor(),
                io_weight(weight)?
            );
            files.push(("io.weight".into(), line));
        }
    }
    let throttles = [
        ("rbps", block.throttle_read_bps_device()),
        ("wbps", block.throttle_write_bps_device()),
        ("riops", block.throttle_read_iops_device()),
        ("wiops", block.throttle_write_iops_device()),
    ];
    for (word, list) in throttles {
        for device in list.iter().flatten() {
            let rate = match device.rate() {
                0 => "max".to_string(),
                rate => rate.to_string(),
            };
            let line = format!("{}:{} {word}={rate}", device.major(), device.minor());
            files.push(("io.max".into(), line));
        }
    }
    Ok(())
}

/// 10..=1000 of v1 to 1..=10000 of v2, linearly.
fn io_weight(weight: u16) -> Result<u64, Error> {
    if !(10..=1000).contains(&weight) {
        let reason = format!("is {weight}; 10 to 1000 are allowed");
        return Err(invalid("linux.resources.blockIO.weight", reason));
    }
    Ok(1 + (u64::from(weight) - 10) * 9999 / 990)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_weights_on_the_documented_curve() {
        for (shares, expected) in [
            (0, 1),
            (1, 1),
            (2, 1),
            (1024, 100),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ] {
            assert_eq!(weight(shares), expected, "{shares}");
        }
        assert!((1..4096).all(|shares| weight(shares) <= weight(shares + 1)));
    }

    fn from_json(text: &str) -> Result<(Vec<String>, Vec<String>), String> {
        let resources: spec::LinuxResources = serde_json::from_str(text).unwrap();
        let (guest, host) =
            convert(Some(&resources), Moment::Create).map_err(|error| error.to_string())?;
        let guest = guest
            .files
            .iter()
            .map(|file| format!("{}={}", file.name, file.value));
        let host = host.iter().map(|(name, value)| format!("{name}={value}"));
        Ok((guest.collect(), host.collect()))
    }

    #[test]
    fn terms_of_v1_become_files_of_v2() {
        let (guest, host) = from_json(
            r#"{"memory": {"limit": 1000, "reservation": 500, "swap": 3000, "kernel": -1, "disableOOMKiller": false},
                "cpu": {"shares": 1024, "quota": 50000, "burst": 10, "cpus": "0-1", "mems": "0"},
                "pids": {"limit": 42}, "hugepageLimits": [{"pageSize": "2MB", "limit": 4096}],
                "rdma": {}, "unified": {"memory.high": "900", "memory.max": "950", "io.max": "8:16 rbps=1\n8:32 wbps=2"},
                "blockIO": {"weight": 500, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}]}}"#,
        )
        .unwrap();
        assert_eq!(
            guest,
            [
                "memory.swap.max=2000",
                "memory.low=500",
                "cpu.weight=100",
                "cpu.max.burst=10",
                "cpu.max=50000",
                "cpuset.cpus=0-1",
                "cpuset.mems=0",
                "pids.max=42",
                "hugetlb.2MB.max=4096",
                "hugetlb.2MB.rsvd.max=4096",
                "memory.high=900",
                "memory.max=950",
            ]
        );
        assert_eq!(
            host,
            [
                "io.weight=default 4950",
                "io.max=8:0 rbps=600",
                "io.max=8:16 rbps=1",
                "io.max=8:32 wbps=2"
            ]
        );
    }

    #[test]
    fn no_limit_is_max_and_zero_is_absent() {
        let (guest, _) = from_json(
            r#"{"memory": {"limit": -1, "swap": -1}, "cpu": {"quota": -1, "period": 100000, "shares": 0}, "pids": {"limit": -1}}"#,
        )
        .unwrap();
        assert_eq!(
            guest,
            [
                "memory.swap.max=max",
                "memory.max=max",
                "cpu.max=max 100000",
                "pids.max=max"
            ]
        );
        // Unlimited memory takes swap along, and lets a limit of swap be one of swap.
        let (guest, _) = from_json(r#"{"memory": {"limit": -1}}"#).unwrap();
        assert_eq!(guest, ["memory.swap.max=max", "memory.max=max"]);
        let (guest, _) = from_json(r#"{"memory": {"limit": -1, "swap": 70}}"#).unwrap();
        assert_eq!(guest, ["memory.swap.max=70", "memory.max=max"]);
        let (guest, _) =
            from_json(r#"{"memory": {"limit": 0, "swap": 0}, "pids": {"limit": 0}}"#).unwrap();
        assert!(guest.is_empty());
    }

    #[test]
    fn an_update_leaves_what_it_does_not_name() {
        let update = |text: &str| {
            let resources: spec::LinuxResources = serde_json::from_str(text).unwrap();
            convert(Some(&resources), Moment::Update).unwrap().0
        };
        let lines = |guest: &agent::Resources| {
            let lines = guest.files.iter();
            let lines = lines.map(|file| format!("{}={}", file.name, file.value));
            lines.collect::<Vec<_>>()
        };
        let guest = update(r#"{"cpu": {"quota": 50000}}"#);
        assert_eq!(
            (lines(&guest), guest.cpu_period),
            (vec!["cpu.max=50000".into()], 0)
        );
        let guest = update(r#"{"cpu": {"period": 50000}}"#);
        assert_eq!((lines(&guest), guest.cpu_period), (vec![], 50_000));
        let guest = update(r#"{"memory": {"swap": 77, "checkBeforeUpdate": true}}"#);
        assert_eq!((lines(&guest), guest.memory_and_swap), (vec![], 77));
        assert!(guest.check_memory && !update("{}").check_memory);
        // What each comes from is named where it fails.
        let guest = update(r#"{"memory": {"limit": 77}, "unified": {"pids.max": "3"}}"#);
        let fields: Vec<_> = guest.files.iter().map(|file| file.field.as_str()).collect();
        assert_eq!(
            fields,
            ["linux.resources.memory.limit", "linux.resources.unified"]
        );
    }

    #[test]
    fn what_v2_lacks_is_refused_by_name() {
        for (text, name) in [
            (r#"{"memory": {"kernel": 1}}"#, "memory.kernel "),
            (r#"{"memory": {"swappiness": 60}}"#, "memory.swappiness"),
            (
                r#"{"memory": {"disableOOMKiller": true}}"#,
                "memory.disableOOMKiller",
            ),
            (r#"{"memory": {"swap": 10}}"#, "memory.swap"),
            (r#"{"memory": {"limit": 20, "swap": 10}}"#, "memory.swap"),
            (r#"{"cpu": {"realtimeRuntime": 1}}"#, "cpu.realtimeRuntime"),
            (r#"{"network": {"classID": 1}}"#, "network"),
            (r#"{"blockIO": {"leafWeight": 10}}"#, "blockIO.leafWeight"),
            (r#"{"blockIO": {"weight": 5}}"#, "blockIO.weight"),
            (r#"{"unified": {"../memory.max": "1"}}"#, "unified"),
            (r#"{"unified": {"cgroup.procs": "1"}}"#, "cgroup.procs"),
            (r#"{"unified": {"cgroup.kill": "1"}}"#, "cgroup.kill"),
            (r#"{"unified": {"memory": "1"}}"#, "CONTROLLER.PARAMETER"),
            (r#"{"unified": {".max": "1"}}"#, "CONTROLLER.PARAMETER"),
            (
                r#"{"unified": {"rdma.max": "mlx5_1 hca_handle=1"}}"#,
                "rdma",
            ),
            (
                r#"{"rdma": {"mlx5_1": {"hcaHandles": 3}}}"#,
                "linux.resources.rdma",
            ),
            (
                r#"{"memory": {"useHierarchy": false}}"#,
                "memory.useHierarchy",
            ),
            (r#"{"memory": {"limit": -5}}"#, "memory.limit is -5"),
            (
                r#"{"memory": {"limit": 5, "swap": -2}}"#,
                "memory.swap is -2",
            ),
            (
                r#"{"memory": {"reservation": -9223372036854775808}}"#,
                "memory.reservation",
            ),
            (r#"{"pids": {"limit": -2}}"#, "pids.limit"),
            (r#"{"cpu": {"quota": -2}}"#, "cpu.quota"),
            (r#"{"cpu": {"quota": 999}}"#, "cpu.quota is 999"),
            (r#"{"cpu": {"period": 999}}"#, "cpu.period is 999"),
            (r#"{"cpu": {"period": 1000001}}"#, "at most 1000000"),
            (
                r#"{"cpu": {"quota": 5000, "burst": 6000}}"#,
                "cpu.burst is 6000",
            ),
            (r#"{"cpu": {"idle": 2}}"#, "cpu.idle is 2"),
            (
                r#"{"hugepageLimits": [{"pageSize": "2MB", "limit": -1}]}"#,
                "hugepageLimits",
            ),
            (
                r#"{"hugepageLimits": [{"pageSize": "../MB", "limit": 1}]}"#,
                "hugepageLimits",
            ),
            (
                r#"{"hugepageLimits": [{"pageSize": "2", "limit": 1}]}"#,
                "hugepageLimits",
            ),
            (
                r#"{"hugepageLimits": [{"pageSize": "", "limit": 1}]}"#,
                "hugepageLimits",
            ),
        ] {
            let error = from_json(text).unwrap_err();
            assert!(error.contains(name), "{text}: {error}");
        }
    }
}
