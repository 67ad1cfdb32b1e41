//! Create and Start of a container.

use std::{
    collections::BTreeMap,
    future::pending,
    path::{Path, PathBuf},
    sync::Arc,
};

use bulkhead_agent_protocol::agent as wire;
use containerd_shim_protos::{
    api::CreateTaskRequest, events::task as events_wire, types::mount::Mount,
};

use super::{Error, Exec, Guest, Phase, Process, Slot, Task, Tasks, metrics::Usage};
use crate::{
    audit,
    config::Config,
    containerd::{
        bootstrap,
        events::Event,
        stdio::{Ends, Handed, Names, Owner, Streams},
    },
    ids,
    oci::{self, Bundle, Plan, PodPlan, Role, RootFrom, asked::Asked, limits::Limits},
    pod::{self, Container, Held, Order, Parts, Pod, Request, Room, Size, layers::Layer},
};

/// What Create asks for.
pub(super) struct Wanted {
    id: String,
    bundle: Bundle,
    layers: Vec<Layer>,
    names: Names,
    mounts: Vec<Mount>,
    config: Option<PathBuf>,
}

/// File of the bundle that names the pod's configuration, for `delete` after our own death.
pub const CONFIG_NAME: &str = "bulkhead-config";

impl Wanted {
    pub(super) fn read(request: CreateTaskRequest) -> Result<Wanted, Error> {
        ids::check("id", &request.id)?;
        if !request.checkpoint.is_empty() {
            return Err(Error::Unimplemented("restoring from a checkpoint"));
        }
        let layers = request.rootfs.iter().map(|mount| Layer {
            kind: mount.type_.clone(),
            source: mount.source.clone(),
            options: mount.options.clone(),
        });
        let config = bootstrap::config_path(request.options.as_ref()).map_err(Error::Invalid)?;
        Ok(Wanted {
            bundle: Bundle::load(Path::new(&request.bundle))?,
            config,
            layers: layers.collect(),
            names: Names {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            mounts: request.rootfs,
            id: request.id,
        })
    }

    /// The operator's configuration: what the engine's options name, or the default one.
    fn config(&self, otherwise: Option<&Path>) -> Result<Config, Error> {
        let Some(path) = &self.config else {
            return Ok(Config::load(otherwise)?);
        };
        let note = self.bundle.directory.join(CONFIG_NAME);
        std::fs::write(&note, path.as_os_str().as_encoded_bytes()).map_err(|source| Error::Io {
            action: format!("write {}", note.display()),
            source,
        })?;
        Ok(Config::load(Some(path))?)
    }

    /// Reads the pids by which an engine knows the pod's processes as the one that stands for the
    /// pod.
    fn join_namespaces(&mut self, handed: &Handed, stub: i32) {
        let linux = self.bundle.spec.linux_mut().as_mut();
        let Some(linux) = linux else { return };
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        for namespace in &mut namespaces {
            let path = namespace.path().as_deref();
            if let Some(path) = path.and_then(|path| handed.of_pod(path, stub)) {
                namespace.set_path(Some(path));
            }
        }
        linux.set_namespaces(Some(namespaces));
    }

    fn plan(&self, pod: &PodPlan) -> Result<Plan, Error> {
        let root = match self.layers.is_empty() {
            true => RootFrom::Bundle,
            false => RootFrom::Mounts,
        };
        let mut plan = oci::plan_in_pod(&self.bundle, &self.id, &pod.paths, root)?;
        let process = plan.container.process.mut_or_insert_default();
        // The client has made its streams by this word, not by config.json's.
        process.terminal = self.names.terminal;
        for (name, value) in &pod.sysctls {
            let sysctls = &mut plan.container.sysctls;
            sysctls.entry(name.clone()).or_insert_with(|| value.clone());
        }
        Ok(plan)
    }
}

impl Tasks {
    /// Makes a task; its pod first, when it has none.
    pub(super) async fn create(self: Arc<Self>, request: CreateTaskRequest) -> Result<u32, Error> {
        let mut wanted = Wanted::read(request)?;
        if let (Some(handed), Some(pod)) = (&self.place.handed, self.pod()) {
            wanted.join_namespaces(handed, pod.pid);
        }
        let id = wanted.id.clone();
        {
            let mut slots = self.slots();
            if slots.contains_key(&id) {
                return Err(Error::Exists(format!(
                    "there is a container {id:?} already"
                )));
            }
            slots.insert(id.clone(), Slot::Making);
        }
        let (mounts, config) = (wanted.mounts.clone(), wanted.config.clone());
        let made = self.make(wanted).await;
        match self.heed(config.as_deref(), &id, made) {
            Ok(task) => {
                let task = Arc::new(task);
                self.slots().insert(id, Slot::Made(task.clone()));
                self.announce(&task, mounts);
                self.leaving.send_modify(|_| ());
                Ok(task.pid())
            }
            Err(error) => {
                self.slots().remove(&id);
                self.leaving.send_modify(|_| ());
                Err(error)
            }
        }
    }

    fn announce(self: &Arc<Self>, task: &Arc<Task>, rootfs: Vec<Mount>) {
        if self.place.handed.is_none() {
            // For `delete` after our own death: which pid was this?
            let _ = std::fs::write(task.bundle.join("init.pid"), task.pid().to_string());
        }
        let names = &task.init.names;
        let io = events_wire::TaskIO {
            stdin: names.stdin.clone(),
            stdout: names.stdout.clone(),
            stderr: names.stderr.clone(),
            terminal: names.terminal,
            ..Default::default()
        };
        self.events.publish(Event::Create(events_wire::TaskCreate {
            container_id: task.id.clone(),
            bundle: task.bundle.to_string_lossy().into_owned(),
            rootfs,
            io: Some(io).into(),
            pid: task.pid(),
            ..Default::default()
        }));
        if task.holds_pod {
            tokio::spawn(self.clone().guard(task.pod.clone()));
        }
        if task.guest.is_some() {
            tokio::spawn(self.clone().attend_init(task.clone()));
        }
    }

    async fn make(&self, wanted: Wanted) -> Result<Task, Error> {
        let annotations = wanted.bundle.spec.annotations().clone().unwrap_or_default();
        if let (Some(group), Some(pod)) = (annotations.get(oci::GROUP), self.pod()) {
            let (name, value) = (oci::GROUP.into(), group.clone());
            let audit = pod.access.audit();
            audit.tell_of(Some(&wanted.id), audit::Event::Switch { name, value });
        }
        match (oci::role(&annotations, &wanted.id), self.pod()) {
            (Role::Member(sandbox), Some(pod)) if pod.id == sandbox => {
                let mut plan = pod.plan.clone();
                plan.paths.has_guest = false;
                self.make_member(wanted, pod, &plan).await
            }
            // A pod of Podman's without an infra container holds no namespaces that its members share.
            (Role::Member(_), None)
                if self.place.handed.is_some() && oci::is_podmans(&annotations) =>
            {
                self.make_alone(wanted).await
            }
            (Role::Member(sandbox), _) => Err(Error::State(format!(
                "the pod {sandbox:?} of container {:?} does not run here",
                wanted.id
            ))),
            // One shim is one pod: who asks on its socket means this pod, whatever the engine's annotations are.
            (Role::Alone, Some(pod)) => {
                let mut plan = pod.plan.clone();
                plan.paths.has_guest = !self.has_another(&wanted.id);
                self.make_member(wanted, pod, &plan).await
            }
            (Role::Sandbox, Some(pod)) => Err(Error::State(format!(
                "this shim runs the pod {:?} and does not make the pod {:?}",
                pod.id, wanted.id
            ))),
            (_, None) if self.api_pod().is_some() => Err(Error::State(format!(
                "this shim's sandbox does not run, and container {:?} would be a member of it",
                wanted.id
            ))),
            // Nor does one that is about to run a pod make another one beside it.
            (_, None) if self.makes_another(&wanted.id) => Err(Error::State(format!(
                "this shim makes a pod and does not make that of container {:?} beside it",
                wanted.id
            ))),
            (Role::Sandbox, None) => self.make_sandbox(wanted).await,
            (Role::Alone, None) => self.make_alone(wanted).await,
        }
    }

    fn makes_another(&self, id: &str) -> bool {
        let slots = self.slots();
        let mut others = slots.iter().filter(|(other, _)| *other != id);
        others.any(|(_, slot)| matches!(slot, Slot::Making))
    }

    /// Whether another container than this one is in the guest, or about to be.
    pub(super) fn has_another(&self, id: &str) -> bool {
        let slots = self.slots();
        let mut others = slots.iter().filter(|(other, _)| *other != id);
        others.any(|(_, slot)| match slot {
            Slot::Making => true,
            Slot::Made(task) => task.guest.is_some(),
        })
    }

    /// A pod's own container: the machine, and nothing in it.
    async fn make_sandbox(&self, wanted: Wanted) -> Result<Task, Error> {
        let config = wanted.config(self.place.config.as_deref())?;
        oci::check_sandbox(&wanted.bundle)?;
        let plan = oci::pod_plan(&wanted.bundle)?;
        let limits = oci::limits::of_sandbox(&wanted.bundle)?;
        let linux = wanted.bundle.spec.linux().as_ref();
        let parts = Parts::open(&config)?;
        let size = Size::of(&limits, &config).map_err(pod::Error::from)?;
        let order = Order {
            parts: &parts,
            plan: &plan,
            request: Request {
                cgroups_path: linux.and_then(|linux| linux.cgroups_path().as_deref()),
                joins: true,
                room: Room::of(size, limits, &config),
                network: plan.paths.network.as_deref(),
                net_slots: plan.later_interfaces(),
                oom_score_adj: Some(oom_score_adj(&wanted.bundle)),
                ..Request::plain(&self.place.namespace, &wanted.id, size)
            },
        };
        let (pod, ()) = Pod::boot(&config, order, stand_in, pending()).await?;
        let pod = Arc::new(pod);
        self.set_pod(Some(pod.clone()));
        Ok(task(wanted, pod, None, true, Streams::default()))
    }

    /// A container with a machine of its own.
    async fn make_alone(&self, wanted: Wanted) -> Result<Task, Error> {
        let config = wanted.config(self.place.config.as_deref())?;
        let mut pod_plan = oci::pod_plan(&wanted.bundle)?;
        // Shared memory comes from config.json's own tmpfs or volume, sysctls are the container's own.
        if self.place.handed.is_none() || !is_engines_memory(pod_plan.paths.shm.as_deref()) {
            pod_plan.shm_bytes = 0;
            pod_plan.paths.shm = None;
        }
        pod_plan.paths.alone = true;
        pod_plan.paths.has_guest = true;
        pod_plan.sysctls.clear();
        let mut plan = wanted.plan(&pod_plan)?;
        let asked = Asked::of(&wanted.bundle)?;
        let size = Size::of(asked.limits(), &config).map_err(pod::Error::from)?;
        let cgroups_path = plan.cgroups_path.clone();
        let host_limits = oci::host_limits::of_host(&mut plan, size.vcpus);
        let container = Container::new(&wanted.id, wanted.bundle.directory.clone(), &plan);
        let parts = Parts::open(&config)?;
        let order = Order {
            parts: &parts,
            plan: &pod_plan,
            request: Request {
                cgroups_path: cgroups_path.as_deref(),
                joins: true,
                host_limits: &host_limits,
                room: Room::of(size, Limits::default(), &config),
                network: pod_plan.paths.network.as_deref(),
                net_slots: pod_plan.later_interfaces(),
                oom_score_adj: Some(oom_score_adj(&wanted.bundle)),
                ..Request::plain(&self.place.namespace, &wanted.id, size)
            },
        };
        let opened = Ends::open(&wanted.names, self.owner(&wanted.id)).await?;
        let mut launched = false;
        let prepared = async |held: &mut Held| {
            launched = true;
            held.stand_in()?;
            container.place(held, &mut plan, &wanted.layers).await?;
            let streams = join(held, opened).await?;
            container.run_create_hooks(held.pid()).await?;
            Ok::<_, Error>(streams)
        };
        let booted = Pod::boot(&config, order, prepared, pending()).await;
        let (pod, (stdio, streams)) = match booted {
            Ok(booted) => booted,
            Err(error) => {
                if launched {
                    container.run_stopped_hooks().await;
                }
                return Err(error);
            }
        };
        let pod = Arc::new(pod);
        // Not before: a boot takes all that it gets, and there is nobody in the guest yet to bound.
        let bounded = pod.bound_time(&plan.container.resources);
        // Nobody is there yet who could have it.
        let _ = pod.enter_guest(&container.id, &plan.container.namespaces);
        pod.adopt(&container.id, asked);
        let spec = std::mem::take(&mut plan.container);
        let process = spec.process.clone().unwrap_or_default();
        let created = match bounded {
            Ok(()) => container.create(&pod, spec, stdio).await,
            Err(error) => Err(error),
        };
        match created {
            Ok(()) => {
                self.set_pod(Some(pod.clone()));
                let guest = Guest { process, container };
                Ok(task(wanted, pod, Some(guest), true, streams))
            }
            Err(error) => {
                pod.destroy().await;
                container.run_stopped_hooks().await;
                Err(error.into())
            }
        }
    }

    /// A container of a pod that runs; `pod_plan` is the pod's, as this container sees it.
    async fn make_member(
        &self,
        mut wanted: Wanted,
        pod: Arc<Pod>,
        pod_plan: &PodPlan,
    ) -> Result<Task, Error> {
        if let Some(files) = &pod_plan.files {
            files.add_to(&mut wanted.bundle.spec, &pod_plan.paths);
        }
        let mut plan = wanted.plan(pod_plan)?;
        if pod.is_paused() {
            let pod = &pod.id;
            return Err(Error::State(format!(
                "the pod {pod:?} is paused; resume it first"
            )));
        }
        let container = Container::new(&wanted.id, wanted.bundle.directory.clone(), &plan);
        let asked = Asked::of(&wanted.bundle)?;
        let process = plan.container.process.clone().unwrap_or_default();
        let opened = Ends::open(&wanted.names, self.owner(&wanted.id)).await?;
        pod.admit(&container.id, &plan.container.namespaces)?;
        if pod.plan.paths.alone {
            pod.free_time()?;
        }
        let limits = pod
            .limit(&plan.host_limits)
            .inspect_err(|_| pod.leave(&container.id))?;
        let made = async {
            pod.join(&container.id, asked).await?;
            let (stdio, streams) = {
                let mut held = pod.held().await;
                let held = held.as_mut().ok_or_else(|| pod.ended())?;
                container.place(held, &mut plan, &wanted.layers).await?;
                join(held, opened).await?
            };
            container.run_create_hooks(Some(pod.pid)).await?;
            container.create(&pod, plan.container, stdio).await?;
            match pod.is_ending() {
                // The ends of all who were there have been told.
                true => Err(pod.ended().into()),
                false => Ok(streams),
            }
        };
        match made.await {
            Ok(streams) => {
                let guest = Guest { process, container };
                Ok(task(wanted, pod, Some(guest), false, streams))
            }
            Err(error) => {
                limits.undo();
                container.remove(&pod).await;
                container.run_stopped_hooks().await;
                Err(error)
            }
        }
    }

    pub(super) fn owner<'a>(&'a self, container: &'a str) -> Owner<'a> {
        Owner {
            namespace: &self.place.namespace,
            container,
            handed: self.place.handed.as_deref(),
        }
    }

    /// Lets a created init exec.
    pub(super) async fn start_init(&self, task: &Arc<Task>) -> Result<u32, Error> {
        let init = &task.init;
        if task.guest.is_some() && init.phase() == Phase::Created {
            task.awake("start")?;
        }
        init.step(&[Phase::Created], Phase::Starting)
            .map_err(|phase| init.refuse("start", phase))?;
        if let Some(guest) = &task.guest {
            // Docker fills the pod's network namespace between create and start.
            let found = match task.pod.plan.paths.alone {
                true => task.pod.find_interfaces().await.map_err(Error::from),
                false => Ok(()),
            };
            if let Err(error) = found {
                init.stop(super::Exit::now(exec_status(&error)));
                return Err(error);
            }
            let started = guest.container.start(&task.pod, || init.open_input()).await;
            if let Err(error) = started {
                // Its end is told by this error, and by an event only where the pod's own end was quicker.
                init.stop(super::Exit::now(exec_status(&error)));
                return Err(error);
            }
        }
        let started = Event::Start(events_wire::TaskStart {
            container_id: task.id.clone(),
            pid: task.pid(),
            ..Default::default()
        });
        // Whoever waits for its end waits until it is not starting any more: the start is told first. Only the pod's end does
        // not wait; then there was no start.
        init.step_and(&[Phase::Starting], Phase::Running, || {
            self.events.publish(started);
        })
        .map_err(|phase| init.refuse("start", phase))?;
        if task.guest.is_some() {
            // So that there is something to tell from the first Stats on, even if the guest hangs by then.
            let task = task.clone();
            tokio::spawn(async move { task.usage.refresh(&task.pod, &task.id).await });
        }
        Ok(task.pid())
    }
}

/// What a process that could not be started has ended with.
pub(super) fn exec_status(error: &Error) -> u32 {
    let status = match error {
        Error::Pod(pod::Error::Agent(error)) => error.exec_status(),
        _ => None,
    };
    status.map_or(255, u32::from)
}

fn task(
    wanted: Wanted,
    pod: Arc<Pod>,
    guest: Option<Guest>,
    holds_pod: bool,
    streams: Streams,
) -> Task {
    let init = Process::new("", wanted.names, Phase::Created);
    init.connect(streams);
    Task {
        id: wanted.id,
        bundle: wanted.bundle.directory,
        init: Arc::new(init),
        pod,
        holds_pod,
        guest,
        execs: std::sync::Mutex::new(BTreeMap::<String, Arc<Exec>>::new()),
        usage: Usage::default(),
        deletion: tokio::sync::Mutex::new(()),
        updating: tokio::sync::Mutex::new(()),
    }
}

/// All that a machine without a container needs while it boots.
pub(super) async fn stand_in(held: &mut Held) -> Result<(), Error> {
    held.stand_in()?;
    Ok(())
}

/// Offers the guest the streams that `ends` wants, and joins them.
pub(super) async fn join(held: &mut Held, ends: Ends) -> Result<(wire::Stdio, Streams), Error> {
    let (stdio, ours) = held.streams(ends.wanted()).await?;
    let streams = ends.join(ours).map_err(|source| Error::Io {
        action: "join the streams".into(),
        source,
    })?;
    Ok((stdio, streams))
}

/// Whether a directory is the tmpfs that Podman and Docker make for a container's /dev/shm, beside
/// its bundle.
fn is_engines_memory(path: Option<&Path>) -> bool {
    path.is_some_and(|path| {
        let found = nix::sys::statfs::statfs(path);
        path.ends_with("shm")
            && found.is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC)
    })
}

fn oom_score_adj(bundle: &Bundle) -> i32 {
    let process = bundle.spec.process().as_ref();
    let score = process.and_then(|process| process.oom_score_adj());
    score.unwrap_or(0).clamp(-1000, 1000)
}
