//! `events ID`: what a container uses, in the form in which runc prints it.

use std::{io::Write, thread::sleep, time::Duration};

use bulkhead_shim::command_line::{Client, Room};
use containerd_shim_protos::{cgroups_v2::metrics::Metrics, protobuf::Message};
use serde_json::{Value, json};

use super::{Engine, status, wait_for};
use crate::failure::Failure;

/// Prints what it uses: once, or again at an interval for as long as it runs.
pub fn of_container(
    engine: &Engine<'_>,
    id: &str,
    interval: Option<Duration>,
) -> Result<u8, Failure> {
    let (room, _) = engine.made(id)?;
    let mut runs = wait_for(status(&room))? != "stopped";
    if !runs {
        return Err(Failure::new("container not running"));
    }
    while runs {
        let bytes = wait_for(stats(&room))?;
        let metrics = Metrics::parse_from_bytes(&bytes)?;
        let line = json!({"type": "stats", "id": room.id, "data": document(&metrics)});
        writeln!(std::io::stdout(), "{line}")?;
        let Some(interval) = interval else { break };
        sleep(interval);
        runs = wait_for(status(&room))? != "stopped";
    }
    Ok(0)
}

async fn stats(room: &Room) -> Result<Vec<u8>, Failure> {
    Ok(Client::connect(room)?.stats().await?)
}

fn document(metrics: &Metrics) -> Value {
    let (cpu, memory, pids) = (&metrics.cpu, &metrics.memory, &metrics.pids);
    let ns = |usec: u64| usec.saturating_mul(1000);
    json!({
        "cpu": {
            "usage": {
                "total": ns(cpu.usage_usec),
                "percpu": null,
                "kernel": ns(cpu.system_usec),
                "user": ns(cpu.user_usec),
            },
            "throttling": {
                "periods": cpu.nr_periods,
                "throttledPeriods": cpu.nr_throttled,
                "throttledTime": ns(cpu.throttled_usec),
            },
        },
        "memory": {
            "cache": memory.file,
            "usage": {"limit": memory.usage_limit, "usage": memory.usage, "failcnt": 0},
            "swap": {"limit": memory.swap_limit, "usage": memory.swap_usage, "failcnt": 0},
            "raw": {
                "anon": memory.anon,
                "file": memory.file,
                "inactive_file": memory.inactive_file,
                "active_file": memory.active_file,
            },
        },
        "pids": {"current": pids.current, "limit": pids.limit},
        "blkio": {},
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": null,
    })
}
