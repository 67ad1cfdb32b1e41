//! `process` and what else describes the process itself.

use bulkhead_agent_protocol::agent;
use oci_spec::runtime::{self as spec, LinuxPersonalityDomain};

use super::{Error, invalid, numbers, unsupported};

/// `PER_LINUX32` (linux/personality.h).
const PER_LINUX32: u64 = 0x0008;

pub(super) fn convert(process: &spec::Process) -> Result<agent::Process, Error> {
    let args = process.args().clone().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(invalid("process.args", "is empty"));
    }
    let cwd = process.cwd().to_string_lossy().into_owned();
    if !cwd.starts_with('/') {
        return Err(invalid(
            "process.cwd",
            format!("is {cwd:?}, which is not absolute"),
        ));
    }
    let env = process.env().clone().unwrap_or_default();
    for word in args.iter().chain(&env).chain([&cwd]) {
        if word.contains('\0') {
            return Err(invalid("process", format!("has {word:?} with a zero byte")));
        }
    }
    if let Some(score) = process.oom_score_adj()
        && !(-1000..=1000).contains(&score)
    {
        let reason = format!("is {score}, which is not in -1000 to 1000");
        return Err(invalid("process.oomScoreAdj", reason));
    }
    let user = process.user();
    let size = |side: u64| u32::try_from(side).unwrap_or(0).min(u16::MAX.into());
    let console = process.console_size();
    Ok(agent::Process {
        terminal: process.terminal().unwrap_or(false),
        rows: console.map_or(0, |size_| size(size_.height())),
        columns: console.map_or(0, |size_| size(size_.width())),
        args,
        env,
        cwd,
        uid: user.uid(),
        gid: user.gid(),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
        umask: match user.umask() {
            Some(mask) => (mask & 0o777) as i32,
            None => -1,
        },
        capabilities: capabilities(process.capabilities().as_ref())?.into(),
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        rlimits: rlimits(process.rlimits().as_deref().unwrap_or_default())?,
        oom_score_adj: process.oom_score_adj(),
        scheduler: scheduler(process.scheduler().as_ref())?.into(),
        io_priority: io_priority(process.io_priority().as_ref())?.into(),
        exec_cpu_affinity: affinity(process.exec_cpu_affinity().as_ref()),
        ..agent::Process::default()
    })
}

fn capabilities(
    sets: Option<&spec::LinuxCapabilities>,
) -> Result<Option<agent::Capabilities>, Error> {
    let Some(sets) = sets else {
        return Ok(None);
    };
    let mask = |set| {
        numbers::capability_mask(set).map_err(|name| {
            invalid(
                "process.capabilities",
                format!("has {name}, which Linux does not know"),
            )
        })
    };
    Ok(Some(agent::Capabilities {
        bounding: mask(sets.bounding())?,
        effective: mask(sets.effective())?,
        inheritable: mask(sets.inheritable())?,
        permitted: mask(sets.permitted())?,
        ambient: mask(sets.ambient())?,
        ..agent::Capabilities::default()
    }))
}

fn rlimits(list: &[spec::PosixRlimit]) -> Result<Vec<agent::Rlimit>, Error> {
    let mut limits: Vec<agent::Rlimit> = Vec::new();
    for limit in list {
        let resource = numbers::rlimit(limit.typ());
        let name = limit.typ();
        // OCI config.md#posix-process: duplicates MUST be an error.
        if limits.iter().any(|other| other.resource == resource) {
            return Err(invalid("process.rlimits", format!("lists {name} twice")));
        }
        if limit.soft() > limit.hard() {
            let reason = format!(
                "has {name} with a soft limit of {} above the hard limit of {}",
                limit.soft(),
                limit.hard()
            );
            return Err(invalid("process.rlimits", reason));
        }
        limits.push(agent::Rlimit {
            resource,
            soft: limit.soft(),
            hard: limit.hard(),
            ..agent::Rlimit::default()
        });
    }
    Ok(limits)
}

fn scheduler(scheduler: Option<&spec::Scheduler>) -> Result<Option<agent::Scheduler>, Error> {
    let Some(scheduler) = scheduler else {
        return Ok(None);
    };
    let priority = scheduler.priority().unwrap_or(0);
    let priority = u32::try_from(priority)
        .map_err(|_| invalid("process.scheduler.priority", format!("is {priority}")))?;
    let flags = scheduler.flags().iter().flatten();
    Ok(Some(agent::Scheduler {
        policy: numbers::scheduler_policy(*scheduler.policy()),
        nice: scheduler.nice().unwrap_or(0),
        priority,
        flags: flags.fold(0, |bits, flag| bits | numbers::scheduler_flag(*flag)),
        runtime_ns: scheduler.runtime().unwrap_or(0),
        deadline_ns: scheduler.deadline().unwrap_or(0),
        period_ns: scheduler.period().unwrap_or(0),
        ..agent::Scheduler::default()
    }))
}

fn io_priority(asked: Option<&spec::LinuxIOPriority>) -> Result<Option<agent::IoPriority>, Error> {
    let Some(asked) = asked else {
        return Ok(None);
    };
    let priority = u32::try_from(asked.priority())
        .ok()
        .filter(|level| *level <= 7);
    Ok(Some(agent::IoPriority {
        class: numbers::io_class(asked.class()),
        priority: priority.ok_or_else(|| {
            invalid(
                "process.ioPriority.priority",
                format!("is {}; 0 to 7 are allowed", asked.priority()),
            )
        })?,
        ..agent::IoPriority::default()
    }))
}

/// OCI asks for one list before and one after the process enters its cgroup; the agent applies one, at the end.
fn affinity(affinity: Option<&spec::ExecCPUAffinity>) -> String {
    let list = affinity.and_then(|lists| {
        lists
            .cpu_affinity_final()
            .clone()
            .or(lists.initial().clone())
    });
    list.unwrap_or_default()
}

/// `linux.personality`.
pub(super) fn personality(linux: &spec::Linux) -> Result<Option<u64>, Error> {
    let Some(personality) = linux.personality() else {
        return Ok(None);
    };
    if personality
        .flags()
        .as_ref()
        .is_some_and(|flags| !flags.is_empty())
    {
        return Err(unsupported(
            "linux.personality.flags",
            "only the domain can be chosen",
        ));
    }
    Ok(Some(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
    }))
}
