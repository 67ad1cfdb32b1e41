//! The agent's side of adding a process to a container.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path};
use std::sync::Arc;

use bulkhead_agent_protocol::agent;
use linux::process::Child;
use tokio::sync::oneshot;

use super::Container;
use super::create::{CreateError, Newborn, finish, oom_killed, outside, set_oom_score, system};
use super::launcher::{Birth, Launcher};
use super::namespaces::Join;
use super::process::{Launch, Process, watch_exit};
use crate::reaper::Exit;
use crate::stage;
use crate::stdio::Ends;

/// Where the guest's cgroup hierarchy is mounted.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Adds a process to a container, up to the point before exec. On failure nothing of it is left.
pub(crate) async fn create(
    launcher: &Launcher,
    container: &Container,
    request: &agent::CreateExecRequest,
) -> Result<Process, CreateError> {
    if request.process.is_none() {
        return Err(CreateError::Invalid(
            "the request has no process".to_owned(),
        ));
    }
    if container.init.exited().is_some() {
        return Err(CreateError::NotRunning);
    }
    let process = &request.process;
    let owner = outside(&container.uid_mappings, container.plan, process.uid);
    let ends = Ends::new(&request.stdio, process.terminal, owner)?;
    let spec = stage::encode_spec(container.plan.exec_joins(), request)
        .map_err(|error| CreateError::Invalid(format!("the spec cannot be encoded: {error}")))?;
    let init = container.init.pidfd().as_fd();
    let launch = Launch::new(&ends.child, &spec, &[init]).map_err(system("prepare the process"))?;
    let (spawned, reaped) = spawn(launcher, container, &launch)?;
    let cgroup = Arc::clone(&container.cgroup);
    let exit = watch_exit(reaped, move || {
        oom_killed(
            &cgroup
                .read()
                .expect("no code panics while it holds this lock"),
        )
    });
    let prepared = set_oom_score(spawned.pid, process);
    let newborn = match (prepared, launch.into_channel()) {
        (Ok(()), Ok(channel)) => Newborn {
            spawned,
            channel,
            exit,
        },
        (Err(error), _) => return Err(error),
        (_, Err(error)) => return Err(system("hear the process")(error)),
    };
    finish(
        launcher,
        newborn,
        ends.into_agent(),
        &request.stdio,
        process,
    )
    .await
}

fn spawn(
    launcher: &Launcher,
    container: &Container,
    launch: &Launch,
) -> Result<(Child, oneshot::Receiver<Exit>), CreateError> {
    let pid_namespace = [Join {
        fd: container.init.pidfd().as_fd(),
        flag: libc::CLONE_NEWPID as u64,
    }];
    let joins = if container.plan.exec_pid() {
        &pid_namespace[..]
    } else {
        &[]
    };
    let cgroup = container
        .cgroup
        .read()
        .expect("no code panics while it holds this lock");
    let birth = Birth {
        joins,
        namespaces: 0,
        cgroup: Some(cgroup.open_fd()),
    };
    let result = match launcher.spawn(stage::EXEC, &birth, launch) {
        // The container has delegated controllers to cgroups of its own, and the kernel allows no process beside
        // them (cgroup-v2.rst, no internal process constraint): go where its init is.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let directory = cgroup_of_init(container, cgroup.path())
                .map_err(system("find the cgroup of the container's init"))?;
            let birth = Birth {
                joins,
                namespaces: 0,
                cgroup: Some(directory.as_fd()),
            };
            launcher.spawn(stage::EXEC, &birth, launch)
        }
        other => other,
    };
    result.map_err(|error| match error.raw_os_error() {
        // Its pid namespace is dead or dying (pid_namespaces(7)).
        Some(libc::ESRCH | libc::ENOMEM) if container.init.exited().is_some() => {
            CreateError::NotRunning
        }
        Some(libc::ESRCH) => CreateError::NotRunning,
        _ => system("make the process")(error),
    })
}

/// The directory of the cgroup that the container's init is in now, which must lie beneath the container's.
fn cgroup_of_init(container: &Container, top: &Path) -> io::Result<OwnedFd> {
    let lines = std::fs::read_to_string(format!("/proc/{}/cgroup", container.init.pid()))?;
    let path = lines
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap_or_default();
    let directory = Path::new(CGROUP_ROOT).join(path);
    let plain = directory
        .components()
        .all(|part| !matches!(part, Component::ParentDir));
    if !plain || !directory.starts_with(top) {
        return Err(io::Error::other(format!(
            "it is in {}, outside of {}",
            directory.display(),
            top.display()
        )));
    }
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    Ok(File::options()
        .read(true)
        .custom_flags(flags)
        .open(directory)?
        .into())
}
