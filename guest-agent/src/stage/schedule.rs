//! How a process is scheduled: policy, I/O priority, CPUs and personality.
#![forbid(unsafe_code)]

use bulkhead_agent_protocol::agent;
use linux::process::set_personality;
use linux::schedule;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::message::Failure;
use super::step::Step;

/// ioprio_set(2): the class stands above the priority.
const IOPRIO_CLASS_SHIFT: u32 = 13;

/// Applies everything that the spec sets; needs privileges (real-time policies, negative nice).
pub fn apply(process: &agent::Process) -> Result<(), Failure> {
    if let Some(scheduler) = process.scheduler.as_ref() {
        let attr = schedule::Attributes {
            policy: scheduler.policy,
            flags: scheduler.flags,
            nice: scheduler.nice,
            priority: scheduler.priority,
            runtime: scheduler.runtime_ns,
            deadline: scheduler.deadline_ns,
            period: scheduler.period_ns,
            ..schedule::Attributes::default()
        };
        schedule::set_attributes(attr).step(|| format!("cannot set the scheduler {attr:?}"))?;
    }
    if let Some(io) = process.io_priority.as_ref() {
        if io.class > 3 || io.priority > 7 {
            return Err(Failure::invalid(format!(
                "no such I/O priority: class {}, priority {}",
                io.class, io.priority
            )));
        }
        schedule::set_io_priority(io.class << IOPRIO_CLASS_SHIFT | io.priority).step(|| {
            format!(
                "cannot set I/O priority {} of class {}",
                io.priority, io.class
            )
        })?;
    }
    if !process.exec_cpu_affinity.is_empty() {
        let list = &process.exec_cpu_affinity;
        let cpus = parse_cpu_list(list)
            .ok_or_else(|| Failure::invalid(format!("not a list of CPUs: \"{list}\"")))?;
        sched_setaffinity(Pid::from_raw(0), &cpus).step(|| format!("cannot run on CPUs {list}"))?;
    }
    if let Some(personality) = process.personality {
        set_personality(personality).step(|| format!("cannot set personality {personality:#x}"))?;
    }
    Ok(())
}

/// Parses "0-1,3" (the list format of cpuset(7)).
fn parse_cpu_list(list: &str) -> Option<CpuSet> {
    let mut cpus = CpuSet::new();
    for range in list.split(',').map(str::trim) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= CpuSet::count() {
            return None;
        }
        for cpu in first..=last {
            cpus.set(cpu).ok()?;
        }
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_read_as_cpuset_writes_them() {
        let cpus = parse_cpu_list("0-1,3").unwrap();
        let set: Vec<usize> = (0..8).filter(|&cpu| cpus.is_set(cpu).unwrap()).collect();
        assert_eq!(set, [0, 1, 3]);
    }

    #[test]
    fn broken_cpu_lists_are_refused() {
        for list in ["", "a", "3-1", "0-99999999", "1,", "-"] {
            assert!(parse_cpu_list(list).is_none(), "{list}");
        }
    }
}
