//! `linux.resources` → control files of cgroup v2.
//!
//! Limits on what the container's processes use are set in the guest. Limits on block devices are set on the pod's cgroup on
//! the host: the device numbers are the host's, and it is the fs process that reads and writes there.
//!
//! | config.json | file | conversion |
//! | --- | --- | --- |
//! | memory.limit, reservation | memory.max, memory.low | -1 = max |
//! | memory.swap | memory.swap.max | v1 counts memory and swap together: less memory.limit |
//! | cpu.shares | cpu.weight | 10^(log2(s)²/612 + 125·log2(s)/612 − 7/34), so that 2, 1024, 262144 → 1, 100, 10000 |
//! | cpu.quota, period | cpu.max | |
//! | cpu.burst, idle | cpu.max.burst, cpu.idle | |
//! | cpu.cpus, mems | cpuset.cpus, cpuset.mems | |
//! | pids.limit | pids.max | |
//! | hugepageLimits | hugetlb.SIZE.max | |
//! | rdma | rdma.max | |
//! | unified | as named | last, so that it wins |
//! | blockIO (host) | io.weight, io.max | weight 10..1000 → 1..10000 |

use bulkhead_agent_protocol::agent;
use oci_spec::runtime as spec;

use super::{Error, devices, invalid, unsupported};

type Files = Vec<(String, String)>;

/// Files for the agent, and files for the pod's cgroup on the host.
pub(super) fn convert(
    resources: Option<&spec::LinuxResources>,
) -> Result<(agent::Resources, Files), Error> {
    let empty = spec::LinuxResources::default();
    let resources = resources.unwrap_or(&empty);
    let mut files = Files::new();
    if let Some(memory) = resources.memory() {
        memory_files(memory, &mut files)?;
    }
    if let Some(cpu) = resources.cpu() {
        cpu_files(cpu, &mut files)?;
    }
    if let Some(pids) = resources.pids() {
        match pids.limit() {
            // The zero value of an absent field, as runc has it.
            0 => {}
            limit => files.push(("pids.max".into(), limit_or_max(limit))),
        }
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        if !huge.page_size().chars().all(|c| c.is_ascii_alphanumeric()) {
            let reason = format!("has the page size {:?}", huge.page_size());
            return Err(invalid("linux.resources.hugepageLimits", reason));
        }
        let name = format!("hugetlb.{}.max", huge.page_size());
        files.push((name, limit_or_max(huge.limit())));
    }
    rdma_files(resources, &mut files);
    if let Some(network) = resources.network()
        && (network.class_id().is_some_and(|id| id != 0)
            || network
                .priorities()
                .as_ref()
                .is_some_and(|list| !list.is_empty()))
    {
        return Err(unsupported(
            "linux.resources.network",
            "cgroup v2 has no classes and priorities of packets",
        ));
    }
    unified_files(resources, &mut files)?;
    let rules = devices::rules(resources.devices().as_deref().unwrap_or_default())?;
    let mut host = Files::new();
    if let Some(block) = resources.block_io() {
        block_files(block, &mut host)?;
    }
    let file = |(name, value): (String, String)| agent::CgroupFile {
        name,
        value,
        ..agent::CgroupFile::default()
    };
    let converted = agent::Resources {
        files: files.into_iter().map(file).collect(),
        devices: rules,
        set_devices: true,
        ..agent::Resources::default()
    };
    Ok((converted, host))
}

/// Negative: no limit.
fn limit_or_max(limit: i64) -> String {
    match u64::try_from(limit) {
        Ok(limit) => limit.to_string(),
        Err(_) => "max".into(),
    }
}

fn memory_files(memory: &spec::LinuxMemory, files: &mut Files) -> Result<(), Error> {
    let field = "linux.resources.memory";
    let refused = [
        (
            "kernel",
            memory.kernel().is_some_and(|limit| limit > 0),
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
    ];
    if let Some((name, _, reason)) = refused.iter().find(|(_, present, _)| *present) {
        return Err(unsupported(format!("{field}.{name}"), *reason));
    }
    // 0 is the zero value of an absent field.
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(limit) = limit {
        files.push(("memory.max".into(), limit_or_max(limit)));
    }
    if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
        files.push(("memory.low".into(), limit_or_max(reservation)));
    }
    match (memory.swap().filter(|swap| *swap != 0), limit) {
        (None, _) => {}
        (Some(swap), _) if swap < 0 => files.push(("memory.swap.max".into(), "max".into())),
        (Some(swap), Some(limit)) if limit > 0 && swap >= limit => {
            files.push(("memory.swap.max".into(), (swap - limit).to_string()));
        }
        (Some(swap), _) => {
            let reason = format!(
                "is {swap}: it is the sum of memory and swap, and needs a memory.limit that is not larger"
            );
            return Err(invalid(format!("{field}.swap"), reason));
        }
    }
    Ok(())
}

fn cpu_files(cpu: &spec::LinuxCpu, files: &mut Files) -> Result<(), Error> {
    let real_time = cpu.realtime_runtime().is_some_and(|value| value != 0)
        || cpu.realtime_period().is_some_and(|value| value != 0);
    if real_time {
        return Err(unsupported(
            "linux.resources.cpu.realtimeRuntime",
            "cgroup v2 does not divide real-time",
        ));
    }
    let mut push = |name: &str, value: String| files.push((name.into(), value));
    if let Some(idle) = cpu.idle() {
        push("cpu.idle", idle.to_string());
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        // An idle group has no weight (cpu.weight is refused then).
        if cpu.idle() != Some(1) {
            push("cpu.weight", weight(shares).to_string());
        }
    }
    let period = cpu.period().filter(|period| *period != 0);
    let quota = cpu.quota().filter(|quota| *quota != 0);
    if period.is_some() || quota.is_some() {
        let quota = limit_or_max(quota.unwrap_or(-1));
        // 100 ms is the kernel's own default (cgroup-v2.rst, cpu.max).
        push("cpu.max", format!("{quota} {}", period.unwrap_or(100_000)));
    }
    if let Some(burst) = cpu.burst() {
        push("cpu.max.burst", burst.to_string());
    }
    for (name, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            push(name, list.clone());
        }
    }
    Ok(())
}

/// See the module's table: a curve through (2, 1), (1024, 100) and (262144, 10000), so that v1's default becomes v2's.
fn weight(shares: u64) -> u64 {
    let log = (shares.clamp(2, 262_144) as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    // 10^2 must not become 101 by a rounding error.
    (10f64.powf(exponent) - 1e-6).ceil() as u64
}

fn rdma_files(resources: &spec::LinuxResources, files: &mut Files) {
    let mut devices: Vec<_> = resources.rdma().iter().flatten().collect();
    devices.sort_by_key(|(name, _)| name.as_str());
    for (device, limit) in devices {
        let mut line = device.clone();
        if let Some(handles) = limit.hca_handles() {
            line += &format!(" hca_handle={handles}");
        }
        if let Some(objects) = limit.hca_objects() {
            line += &format!(" hca_object={objects}");
        }
        files.push(("rdma.max".into(), line));
    }
}

fn unified_files(resources: &spec::LinuxResources, files: &mut Files) -> Result<(), Error> {
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (name, value) in unified {
        // OCI config-linux.md#unified: a file in the container's cgroup, which cgroup.* files of the runtime are not.
        let plain = name.contains('.') && !name.contains(['/', '\0']) && !name.starts_with('.');
        if !plain || name.starts_with("cgroup.") {
            return Err(invalid(
                "linux.resources.unified",
                format!("has the name {name:?}"),
            ));
        }
        files.push((name.clone(), value.clone()));
    }
    Ok(())
}

fn block_files(block: &spec::LinuxBlockIo, files: &mut Files) -> Result<(), Error> {
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
        let (guest, host) = convert(Some(&resources)).map_err(|error| error.to_string())?;
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
                "rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10000}},
                "unified": {"memory.high": "900", "memory.max": "950"},
                "blockIO": {"weight": 500, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}]}}"#,
        )
        .unwrap();
        assert_eq!(
            guest,
            [
                "memory.max=1000",
                "memory.low=500",
                "memory.swap.max=2000",
                "cpu.weight=100",
                "cpu.max=50000 100000",
                "cpu.max.burst=10",
                "cpuset.cpus=0-1",
                "cpuset.mems=0",
                "pids.max=42",
                "hugetlb.2MB.max=4096",
                "rdma.max=mlx5_1 hca_handle=3 hca_object=10000",
                "memory.high=900",
                "memory.max=950",
            ]
        );
        assert_eq!(host, ["io.weight=default 4950", "io.max=8:0 rbps=600"]);
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
                "memory.max=max",
                "memory.swap.max=max",
                "cpu.max=max 100000",
                "pids.max=max"
            ]
        );
        let (guest, _) =
            from_json(r#"{"memory": {"limit": 0, "swap": 0}, "pids": {"limit": 0}}"#).unwrap();
        assert!(guest.is_empty());
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
            (r#"{"unified": {"cgroup.procs": "1"}}"#, "unified"),
        ] {
            let error = from_json(text).unwrap_err();
            assert!(error.contains(name), "{text}: {error}");
        }
    }
}
