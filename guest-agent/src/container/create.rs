//! The agent's side of making a container, up to the point before exec of its init.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, RwLock};

use bulkhead_agent_protocol::agent;
use linux::process::Child;
use tokio::sync::watch;

use super::cgroup::{Cgroup, CgroupError};
use super::launcher::{Birth, Launcher};
use super::process::{Channel, Launch, Process, watch_exit};
use super::{Container, SharedCgroup};
use crate::log;
use crate::reaper::Exit;
use crate::stage::message::Failure;
use crate::stage::mounts::{MountError, Sources};
use crate::stage::plan::{CGROUP, Plan};
use crate::stdio::{self, Ends, StdioError};
use crate::{idmap, stage};

/// Why a container or an exec process could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CreateError {
    /// The spec asks for something that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The container's init has exited, or is about to.
    #[error("the container is not running")]
    NotRunning,
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Its streams.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// Its id mappings.
    #[error(transparent)]
    IdMap(#[from] idmap::IdMapError),
    /// The sources of its mounts.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// Its stage gave up.
    #[error(transparent)]
    Stage(#[from] Failure),
    /// The system refused.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Adds what was tried to an error of the system.
pub(super) fn system(what: &'static str) -> impl FnOnce(io::Error) -> CreateError {
    move |source| CreateError::System { what, source }
}

/// A stage that runs but is not ready yet. Whatever fails from here on must end it.
pub(super) struct Newborn {
    pub(super) spawned: Child,
    pub(super) channel: Channel,
    pub(super) exit: watch::Receiver<Option<Exit>>,
}

/// Makes a container. On failure nothing of it is left.
pub(crate) async fn create(
    launcher: &Launcher,
    request: Arc<agent::CreateContainerRequest>,
) -> Result<Arc<Container>, CreateError> {
    if request.spec.is_none() || request.spec.process.is_none() {
        return Err(CreateError::Invalid(
            "the request has no container or no process".to_owned(),
        ));
    }
    let plan = Plan::new(&request.spec.namespaces).map_err(CreateError::Invalid)?;
    let resources = Arc::clone(&request);
    let cgroup =
        blocking(move || Cgroup::create(&resources.spec.cgroup, &resources.spec.resources)).await?;
    if plan.new_user() && runs_its_cgroups(&request.spec, plan) {
        let namespaces = &request.spec.namespaces;
        let root = |mappings| idmap::outside(mappings, 0).unwrap_or(0);
        let (uid, gid) = (
            root(&namespaces.uid_mappings),
            root(&namespaces.gid_mappings),
        );
        if let Err(error) = cgroup.give_to(uid, gid) {
            blocking(move || remove(&Arc::new(RwLock::new(cgroup)))).await;
            return Err(error.into());
        }
    }
    let cgroup: SharedCgroup = Arc::new(RwLock::new(cgroup));
    match create_in(launcher, &request, plan, Arc::clone(&cgroup)).await {
        Ok(init) => Ok(Arc::new(Container {
            id: request.container_id.clone(),
            init: Arc::new(init),
            cgroup,
            plan,
            uid_mappings: request.spec.namespaces.uid_mappings.clone(),
            execs: Mutex::new(HashMap::new()),
        })),
        Err(error) => {
            blocking(move || remove(&cgroup)).await;
            Err(error)
        }
    }
}

/// Whether it has a cgroup namespace of its own and can write to what it sees there.
fn runs_its_cgroups(spec: &agent::Container, plan: Plan) -> bool {
    let writable = |mount: &agent::Mount| {
        matches!(mount.fstype.as_str(), "cgroup" | "cgroup2") && mount.flags & libc::MS_RDONLY == 0
    };
    plan.is_new(CGROUP) && spec.mounts.iter().any(writable)
}

/// Empties and removes the cgroup of a container that never was.
fn remove(cgroup: &SharedCgroup) {
    let cgroup = cgroup
        .read()
        .expect("no code panics while it holds this lock");
    if let Err(error) = cgroup.kill_all().and_then(|()| cgroup.delete()) {
        log::warn(&format!("{error}"));
    }
}

async fn create_in(
    launcher: &Launcher,
    request: &Arc<agent::CreateContainerRequest>,
    plan: Plan,
    cgroup: SharedCgroup,
) -> Result<Process, CreateError> {
    let process = &request.spec.process;
    let owner = outside(&request.spec.namespaces.uid_mappings, plan, process.uid);
    let ends = Ends::new(&request.stdio, process.terminal, owner)?;
    let sources = match plan.new_user() {
        false => Vec::new(),
        // On another thread: a share that does not answer must stop nobody else.
        true => {
            let request = Arc::clone(request);
            blocking(move || Sources::open(&request.spec))
                .await?
                .into_fds()
        }
    };
    let passed: Vec<BorrowedFd<'_>> = sources.iter().map(AsFd::as_fd).collect();
    let spec = stage::encode_spec(passed.len() as u64, request.as_ref())
        .map_err(|error| CreateError::Invalid(format!("the spec cannot be encoded: {error}")))?;
    let launch =
        Launch::new(&ends.child, &spec, &passed).map_err(system("prepare the container's init"))?;
    let newborn = spawn_init(launcher, request, plan, &cgroup, launch)?;
    let agent_ends = ends.into_agent();
    finish(launcher, newborn, agent_ends, &request.stdio, process).await
}

fn spawn_init(
    launcher: &Launcher,
    request: &agent::CreateContainerRequest,
    plan: Plan,
    cgroup: &SharedCgroup,
    launch: Launch,
) -> Result<Newborn, CreateError> {
    let (spawned, reaped) = {
        let mut shared = launcher
            .shared
            .lock()
            .expect("no code panics while it holds this lock");
        shared
            .ensure(plan.sandbox, || launcher.spawn_pause())
            .map_err(system("make the pod's namespaces"))?;
        let joins = shared.joins(plan.sandbox);
        let directory = cgroup
            .read()
            .expect("no code panics while it holds this lock");
        let birth = Birth {
            joins: &joins,
            namespaces: plan.clone,
            cgroup: Some(directory.open_fd()),
        };
        launcher
            .spawn(stage::INIT, &birth, &launch)
            .map_err(system("make the container's init"))?
    };
    let at_end = Arc::clone(cgroup);
    let exit = watch_exit(reaped, move || {
        let cgroup = at_end
            .read()
            .expect("no code panics while it holds this lock");
        // What outlives init dies with it: in a pid namespace of its own by the kernel, else by this.
        if let Err(error) = cgroup.kill_all() {
            log::warn(&format!(
                "cannot end the processes that outlived a container's init: {error}"
            ));
        }
        oom_killed(&cgroup)
    });
    let prepared = prepare_init(request, plan, &spawned, &launch);
    // Without a channel the child sees end of file and ends by itself.
    prepared?;
    let channel = launch
        .into_channel()
        .map_err(system("hear the container's init"))?;
    Ok(Newborn {
        spawned,
        channel,
        exit,
    })
}

/// The guest's number of a user of the container. One that is not mapped is refused when the process becomes it.
pub(super) fn outside(mappings: &[agent::IdMapping], plan: Plan, uid: u32) -> u32 {
    if plan.new_user() {
        idmap::outside(mappings, uid).unwrap_or(0)
    } else {
        uid
    }
}

/// Read when a process has ended: later the cgroup may be gone, and earlier the kernel may not have counted yet. It counts
/// before it kills.
pub(super) fn oom_killed(cgroup: &Cgroup) -> bool {
    cgroup.memory_events_oom_kill().unwrap_or_else(|error| {
        log::warn(&format!("cannot tell whether memory ran out: {error}"));
        0
    }) > 0
}

/// What only the agent may do to a new init.
fn prepare_init(
    request: &agent::CreateContainerRequest,
    plan: Plan,
    spawned: &Child,
    launch: &Launch,
) -> Result<(), CreateError> {
    if plan.new_user() {
        let namespaces = &request.spec.namespaces;
        idmap::write_maps(
            spawned.pid,
            &namespaces.uid_mappings,
            &namespaces.gid_mappings,
        )?;
        launch
            .release()
            .map_err(system("let the container's init go on"))?;
    }
    set_oom_score(spawned.pid, &request.spec.process)
}

/// By the agent: lowering it needs a capability in the guest's own user namespace.
pub(super) fn set_oom_score(pid: i32, process: &agent::Process) -> Result<(), CreateError> {
    let Some(score) = process.oom_score_adj else {
        return Ok(());
    };
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
        .map_err(system("set oom_score_adj"))
}

/// Waits until a stage is ready, connects its streams meanwhile, and makes a process of it; a failure ends the stage.
pub(super) async fn finish(
    launcher: &Launcher,
    newborn: Newborn,
    ends: [Option<std::os::fd::OwnedFd>; 3],
    ports: &agent::Stdio,
    spec: &agent::Process,
) -> Result<Process, CreateError> {
    let Newborn {
        spawned,
        channel,
        exit,
    } = newborn;
    let (ready, dialled) = tokio::join!(channel.ready(), stdio::dial(&launcher.host, ports));
    let connected = match (ready, dialled) {
        (Err(failure), _) => Err(explain(failure, exit.clone()).await.into()),
        (_, Err(error)) => Err(error.into()),
        (Ok(None), Ok(streams)) => stdio::copy_pipes(ends, streams)
            .map(|output| (None, output))
            .map_err(system("connect the standard streams")),
        (Ok(Some(master)), Ok(streams)) => master
            .try_clone()
            .and_then(|copy| stdio::copy_terminal(copy, streams))
            .map(|output| (Some(master), output))
            .map_err(system("connect the terminal")),
    };
    match connected {
        Ok((terminal, output)) => Ok(Process::new(spawned, channel, spec, terminal, output, exit)),
        Err(error) => {
            drop(channel);
            Process::abandon(spawned, exit).await;
            Err(error)
        }
    }
}

/// A stage that dies without a word has been killed: say by what.
async fn explain(failure: Failure, mut exit: watch::Receiver<Option<Exit>>) -> Failure {
    if failure.text != super::process::ENDED_EARLY {
        return failure;
    }
    let status = exit
        .wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|exit| *exit);
    match status {
        Some(Exit { signal, .. }) if signal != 0 => Failure::internal(format!(
            "{} (signal {signal}; is its memory limit too small?)",
            failure.text
        )),
        Some(Exit { status, .. }) => {
            Failure::internal(format!("{} (status {status})", failure.text))
        }
        None => failure,
    }
}

/// Runs something that may block on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work)
        .await
        .expect("a panic ends the agent, and the task is never aborted")
}
