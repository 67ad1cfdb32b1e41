//! A pod: one virtual machine with everything that it takes on the host.
//!
//! ```text
//! launch ──► (booting: the host goes on preparing) ──► ready ──► containers ... ──► power_off
//!    │                      │                            │                            │
//!    └── error: undone      └───────────────────────► give_back ◄─────────────────────┘
//! ```
//!
//! Every step writes the ledger first, so that [`Sandbox::give_back`] and, when this process is killed, `bulkhead gc` both end in the same replay.

use std::{
    collections::BTreeMap,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bulkhead_agent_protocol::agent::{self as wire, StartSandboxResponse};
use bulkhead_vmm_config::{Phase, Stamp};

use super::{
    SHARE_TAG,
    access::{Access, DESTROYED, LAST_WORDS},
    background::Background,
    error::Error,
    installed::Parts,
    jailed::Jailed,
    launch::{Cgroup, Fs, Share, Taken, Vm},
    oom::OomScores,
    reclaim,
    resize::Room,
    size::Size,
    template::Start,
};
use crate::{
    audit::{Audit, Event},
    cgroup,
    config::{self, Config},
    host_sockets, kubelet_volume,
    ledger::{self, Ledger, Leftover, Resource},
    logs::Tail,
    machine::{
        agent::{self, Agent},
        vmm,
    },
    network::Network,
    oci::{HostBind, Plan},
    share::{self, mount_points},
    sys::process::{self, ProcessId},
    template::Origin,
};

/// How long the guest may take to sync and power off, and the VMM to end.
const FAREWELL: Duration = Duration::from_secs(10);

/// What is asked for.
#[derive(Debug)]
pub struct Request<'a> {
    /// Whose pods they are; `default` for the command.
    pub namespace: &'a str,
    /// Unique in the namespace.
    pub id: &'a str,
    /// Of its machine.
    pub size: Size,
    /// How its machine may grow while it runs.
    pub room: Room,
    /// `linux.cgroupsPath`.
    pub cgroups_path: Option<&'a Path>,
    /// The process that makes the pod belongs to it and goes into its cgroup: a shim does, a
    /// command stays with its user.
    pub joins: bool,
    /// Control files of the pod's cgroup.
    pub host_limits: &'a [(String, String)],
    /// The network namespace whose interfaces the pod gets.
    pub network: Option<&'a Path>,
    /// How many interfaces may come when it runs ([`Sandbox::find_interfaces`]); fewer where a machine cannot have so many.
    pub net_slots: usize,
    /// Where a debugging console of the guest goes.
    pub serial: Option<OwnedFd>,
    /// `process.oomScoreAdj` of the pod's own container (0 where that says nothing); `None`: it has none.
    pub oom_score_adj: Option<i32>,
}

impl<'a> Request<'a> {
    /// A machine that no engine has asked for, and nothing around it.
    pub fn plain(namespace: &'a str, id: &'a str, size: Size) -> Request<'a> {
        Request {
            namespace,
            id,
            size,
            room: Room::default(),
            cgroups_path: None,
            joins: false,
            host_limits: &[],
            network: None,
            net_slots: 0,
            serial: None,
            oom_score_adj: None,
        }
    }
}

/// A pod.
#[derive(Debug)]
pub struct Sandbox {
    pub(super) id: String,
    audit: Audit,
    pub(super) boot_timeout: Duration,
    pub(super) ledger: Ledger,
    share: Share,
    fs: Arc<Fs>,
    pub(super) vm: Arc<Vm>,
    pub(super) agent: Agent,
    volumes: kubelet_volume::Owner,
    sockets: host_sockets::Owner,
    agent_log: Tail,
    shm_bytes: u64,
    /// When page cache of the containers goes.
    rules: Option<reclaim::Rules>,
    /// Queues of an interface, and what the operator says about them.
    pub(super) pairs: u32,
    pub(super) limits: config::Network,
    pub(super) network: Option<Network>,
    /// The pod's network namespace, if it has one on the host.
    pub(super) namespace: Option<PathBuf>,
    /// How many interfaces may come later.
    pub(super) slots: usize,
    /// Those that there are come when the guest is ready, too.
    late_network: bool,
    /// From what its machine goes on, and what the operator says about that.
    pub(super) origin: Origin,
    pub(super) templates: config::Template,
    pub(super) oom: OomScores,
    /// The process whose pid stands for the pod's; it may have ended.
    pub(super) stub: Option<ProcessId>,
    // Held for their end.
    pub(super) links: Option<Background>,
    pub(super) localhost: Option<Background>,
    reclaim: Option<Background>,
    // Last: its directory must be open until the processes are gone.
    pub(super) cgroup: Cgroup,
}

impl Sandbox {
    /// Takes what a pod takes and starts its processes. The guest boots while the caller goes on.
    ///
    /// # Errors
    /// Everything taken has been given back; what could not is in the ledger for `bulkhead gc`.
    pub async fn launch(
        config: &Config,
        parts: &Parts,
        request: Request<'_>,
    ) -> Result<Sandbox, Error> {
        Sandbox::launch_as(config, parts, request, Start::Boot).await
    }

    pub(super) async fn launch_as(
        config: &Config,
        parts: &Parts,
        request: Request<'_>,
        start: Start<'_>,
    ) -> Result<Sandbox, Error> {
        let place = cgroup::place(request.cgroups_path, request.namespace, request.id)?;
        let state = ledger::canonical_state(&config.state_dir)?;
        let mut ledger = Ledger::create(&state, request.namespace, request.id)?;
        let audit = Audit::of(config, request.namespace, request.id);
        tell_switches(config, &request, &audit);
        let given = (&request, start);
        let taken = Taken::take(config, parts, given, &place, &mut ledger, &audit);
        match taken.await {
            Ok(taken) => Ok(Sandbox {
                id: request.id.into(),
                audit,
                boot_timeout: config.boot_timeout(),
                ledger,
                share: taken.share,
                fs: Arc::new(taken.fs),
                vm: Arc::new(taken.vm),
                volumes: kubelet_volume::Owner::new(taken.agent.clone(), taken.uid),
                sockets: host_sockets::Owner::new(
                    taken.agent.clone(),
                    taken.uid,
                    config.host_sockets,
                    Duration::from_millis(config.share.entry_ms),
                ),
                agent: taken.agent,
                agent_log: taken.agent_log,
                shm_bytes: 0,
                rules: reclaim::Rules::of(config),
                pairs: config.network.pairs(request.size.vcpus),
                limits: config.network.clone(),
                network: taken.network,
                namespace: request.network.map(Path::to_path_buf),
                slots: taken.slots,
                late_network: taken.origin.is_template() && request.network.is_some(),
                origin: taken.origin,
                templates: config.template,
                oom: OomScores::of_pod(request.oom_score_adj),
                stub: None,
                links: None,
                localhost: None,
                reclaim: None,
                cgroup: taken.cgroup,
            }),
            Err(error) => {
                error.tell_end(&audit);
                report(&ledger.teardown());
                audit.finish();
                Err(error)
            }
        }
    }

    /// Waits until the guest's agent answers.
    pub async fn ready(&mut self, hostname: &str) -> Result<StartSandboxResponse, Error> {
        let network = self.network.as_mut().map(Network::for_guest);
        let answer = match self.answer(hostname, network).await {
            Ok(answer) => self.complete().await.map(|()| answer),
            Err(error) => {
                self.blame_template(&error);
                Err(error)
            }
        };
        let answer = answer.inspect_err(|error| error.tell_end(&self.audit))?;
        self.reclaim = self
            .rules
            .map(|rules| reclaim::start(self.cgroup.path(), self.agent.clone(), rules));
        Ok(answer)
    }

    /// What a guest lacks that is no other's any more.
    async fn complete(&mut self) -> Result<(), Error> {
        self.heed_template()?;
        match self.late_network {
            true => self.tell_network().await,
            false => self.follow_network(),
        }
    }

    /// Waits until the share can be served.
    async fn serving(&self) -> Result<(), Error> {
        Ok(self.fs.serving(self.boot_timeout).await?)
    }

    async fn answer(
        &self,
        hostname: &str,
        network: Option<wire::Network>,
    ) -> Result<StartSandboxResponse, Error> {
        let answer = async {
            let started = self
                .agent
                .start_sandbox(&self.id, hostname, SHARE_TAG, self.shm_bytes, network)
                .await;
            match started {
                Ok(answer) => Ok(answer),
                Err(error) => Err(self.access().explain(error).await),
            }
        };
        let served = async {
            match self.serving().await {
                Ok(()) => std::future::pending().await,
                Err(error) => error,
            }
        };
        tokio::select! {
            answer = answer => answer,
            error = served => Err(error),
            end = self.vm.ended() => Err(self.ended_early(end)),
            () = tokio::time::sleep(self.boot_timeout) => Err(self.too_slow().await),
        }
    }

    /// A guest that ended by itself; the VMM's own words need no comment.
    fn ended_early(&self, end: vmm::End) -> Error {
        match end {
            vmm::End::Guest { .. } => Error::Boot {
                end,
                reached: self.reached(),
            },
            end => vmm::Error::Gone(end).into(),
        }
    }

    /// How far the boot has come, to follow "it".
    fn reached(&self) -> &'static str {
        let stamps = self.vm.stamps();
        let has = |phase| stamps.iter().any(|stamp: &Stamp| stamp.phase == phase);
        match () {
            () if self.origin.is_template() => {
                "went on from a template, where its agent did not answer (the template is dropped: the next pod boots)"
            }
            () if has(Phase::AgentDialled) => "reached its agent, which dialled but did not answer",
            () if has(Phase::Init) => "reached its agent, which did not dial",
            () if has(Phase::FirstInstruction) => {
                "ran, but did not reach its agent: are the guest kernel and the guest image the right files?"
            }
            () if has(Phase::VmmStart) => "was not started by the virtual machine monitor",
            () => "was not reached: the virtual machine monitor did not begin",
        }
    }

    /// Stops the machine to get the guest's console, and says how far it came.
    pub(super) async fn too_slow(&self) -> Error {
        let reached = self.reached();
        let processors = self.processors().await;
        let _ = self.vm.stop().await;
        let mut console = match tokio::time::timeout(LAST_WORDS, self.vm.ended()).await {
            Ok(end) => end.last_lines().to_vec(),
            Err(_) => Vec::new(),
        };
        console.extend(self.agent_log.lines());
        if console.is_empty() {
            console.extend(processors);
        }
        Error::Timeout {
            secs: self.boot_timeout.as_secs(),
            reached,
            last: console
                .last()
                .map_or(String::new(), |line| format!(": {line}")),
            console,
        }
    }

    /// What the processors of a guest do that says nothing: one that loops has exits for
    /// interrupts, one that waits for what never comes has few or none.
    async fn processors(&self) -> Option<String> {
        let before = self.vm.stats().await.ok()?.kvm;
        tokio::time::sleep(LAST_WORDS).await;
        let after = self.vm.stats().await.ok()?.kvm;
        let told = ["exits", "halt_exits", "irq_exits", "io_exits", "mmio_exits"].map(|name| {
            let [was, is] = [&before, &after].map(|all| all.get(name).copied().unwrap_or_default());
            format!("{name} {is} (+{})", is.saturating_sub(was))
        });
        let told = told.join(", ");
        Some(format!(
            "its processors, with the last {LAST_WORDS:?}: {told}"
        ))
    }

    /// Waits until the pod cannot go on, and tells why.
    pub async fn trouble(&self) -> Error {
        self.access().trouble().await
    }

    /// For whoever uses the pod beside us.
    pub fn access(&self) -> Access {
        Access {
            vm: self.vm.clone(),
            fs: self.fs.clone(),
            agent: self.agent.clone(),
            volumes: self.volumes.volumes().clone(),
            sockets: self.sockets.sockets().clone(),
            audit: self.audit.clone(),
        }
    }

    /// Gives the containers of the pod a common /dev/shm of this size, at [`crate::oci::GUEST_SHM`]. Before [`Sandbox::ready`].
    pub fn share_memory(&mut self, bytes: u64) {
        self.shm_bytes = bytes;
    }

    /// The pod's processes, once the guest is ready.
    pub async fn jailed(&self) -> [Jailed; 2] {
        let (vmm, fs) = (self.vm.jailed(), self.fs.jailed().await);
        [("vmm", vmm), ("fs", fs)].map(|(role, (pid, landlock))| Jailed {
            role,
            pid,
            landlock,
        })
    }

    /// Tells which layers are in force, once the guest is ready. Nobody waits for it.
    pub(super) async fn tell_layers(&self) {
        if self.audit.is_kept() {
            let (jailed, audit) = (self.jailed().await, self.audit.clone());
            tokio::task::spawn_blocking(move || jailed.map(|process| audit.tell(process.event())));
        }
    }

    /// The pod's cgroup on the host.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// The record, for what a front end takes beside.
    pub fn ledger(&mut self) -> &mut Ledger {
        &mut self.ledger
    }

    /// The phases of the boot so far.
    pub fn stamps(&self) -> Vec<Stamp> {
        self.vm.stamps()
    }

    /// The agent, for calls about containers.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Puts a container's files into the share. The guest need not be ready.
    ///
    /// # Errors
    /// What got in has been taken out again.
    pub async fn place_container(&mut self, container: &str, plan: &Plan) -> Result<(), Error> {
        self.sockets.sockets().check(plan)?;
        self.serving().await?;
        if plan.root.read_only {
            mount_points::make(&plan.root.path, &plan.mount_points(), plan.owner())?;
        }
        let in_guest = |bind: &&HostBind| bind.is_kubelet_volume();
        let shared = plan.binds.iter().filter(|bind| !in_guest(bind));
        let added = match self
            .share
            .add(&mut self.ledger, container, &plan.root, shared)
        {
            Ok(()) => {
                let volumes = plan.binds.iter().filter(in_guest);
                let placed = self.volumes.volumes().place(container, volumes);
                placed.map_err(Error::from).and_then(|()| {
                    let places = self.share.places(container);
                    let bind = |index| plan.binds.iter().find(|bind| bind.mount == index);
                    let binds = places.filter_map(|(index, place)| Some((place, bind(index)?)));
                    Ok(self.sockets.sockets().place(container, binds)?)
                })
            }
            Err(error @ share::Error::Exists(_)) => return Err(error.into()),
            Err(error) => Err(error.into()),
        };
        match added {
            Ok(()) => {
                let own = plan.container.process.oom_score_adj;
                self.oom.enter(container, own.unwrap_or(0));
                self.adjust_oom_scores();
                Ok(())
            }
            Err(error) => {
                if let Err(left) = self.withdraw_container(container).await {
                    tracing::warn!(sandbox = %self.id, container, error = %left, "not all of a container's files could be taken out of the pod");
                }
                Err(error)
            }
        }
    }

    /// A stream that the guest may dial: its port, and our end.
    pub async fn stream(&self) -> Result<(u32, UnixStream), Error> {
        self.access().stream().await
    }

    /// Those of stdin, stdout and stderr that are wanted: what the agent is told, and our ends in the same order.
    pub async fn streams(
        &mut self,
        wanted: [bool; 3],
    ) -> Result<(wire::Stdio, [Option<UnixStream>; 3]), Error> {
        let mut ports = [0; 3];
        let mut ours = [None, None, None];
        for (index, wanted) in wanted.into_iter().enumerate() {
            if wanted {
                let (port, stream) = self.stream().await?;
                ports[index] = port;
                ours[index] = Some(stream);
            }
        }
        let [stdin_port, stdout_port, stderr_port] = ports;
        let stdio = wire::Stdio {
            stdin_port,
            stdout_port,
            stderr_port,
            ..wire::Stdio::default()
        };
        Ok((stdio, ours))
    }

    /// Makes a placed container in the guest, up to the point before exec.
    pub async fn create_container(
        &self,
        container: &str,
        mut spec: wire::Container,
        stdio: wire::Stdio,
    ) -> Result<(), Error> {
        self.name_sources(container, &mut spec)?;
        self.access().create_container(container, spec, stdio).await
    }

    /// Forgets an exited container in the guest and takes its files out of the share. After an error it can be tried again.
    ///
    /// # Errors
    /// The agent refuses it while the container runs; nothing has changed then.
    pub async fn remove_container(&mut self, container: &str) -> Result<(), Error> {
        match self.agent.delete(container).await {
            // It was placed and never made, or an earlier try came this far.
            Err(agent::Error::Refused {
                code: ttrpc::Code::NOT_FOUND,
                ..
            }) => {}
            other => other?,
        }
        self.withdraw_container(container).await
    }

    /// Writes the places of a placed container's files into what the agent will be told.
    pub fn name_sources(&self, container: &str, spec: &mut wire::Container) -> Result<(), Error> {
        self.share.name_sources(container, spec)?;
        Ok(self.volumes.volumes().name_sources(container, spec)?)
    }

    /// Takes a container's files out of the share, whatever the guest thinks of it.
    pub async fn withdraw_container(&mut self, container: &str) -> Result<(), Error> {
        self.oom.leave(container);
        self.adjust_oom_scores();
        self.volumes.volumes().leave(container).await;
        self.sockets.sockets().leave(container).await;
        Ok(self
            .share
            .remove(&mut self.ledger, container, &self.fs)
            .await?)
    }

    /// The kernel takes the pod's processes as readily as the engine wants it for the readiest of its containers.
    fn adjust_oom_scores(&mut self) {
        if let Some(score) = self.oom.change() {
            self.vm.set_oom_score_adj(score);
            self.fs.set_oom_score_adj(score);
            if let Some(stub) = self.stub.filter(|stub| stub.exists()) {
                // Only for who looks at it: it has next to no memory.
                let _ = process::set_oom_score_adj(stub.pid, score);
            }
        }
    }

    /// Lets the guest end by itself: it kills what runs, writes back and powers off. [`Sandbox::give_back`] comes next, whatever
    /// the guest did.
    pub async fn power_off(&self) {
        self.power_off_within(FAREWELL).await;
    }

    pub(super) async fn power_off_within(&self, limit: Duration) {
        let farewell = async {
            if let Err(error) = self.agent.shutdown(limit).await {
                tracing::warn!(sandbox = %self.id, %error, "the guest refused to power off");
                return;
            }
            self.vm.ended().await;
        };
        if tokio::time::timeout(limit, farewell).await.is_err() {
            tracing::warn!(sandbox = %self.id, "the guest did not power off in time and is stopped");
        }
    }

    /// Gives everything back, a running guest included. What is left stays in the ledger.
    pub fn give_back(self) -> Vec<Leftover> {
        self.tell_end();
        let left = self.ledger.teardown();
        report(&left);
        self.audit.finish();
        left
    }

    /// Tells of the pod's end, if nobody has, and what its cgroup has kept from it.
    fn tell_end(&self) {
        let path = self.cgroup.path();
        for (limit, count, detail) in [
            (
                "memory",
                cgroup::oom_kills(path),
                "processes that the host's kernel killed, because the pod's memory had run out",
            ),
            (
                "processes",
                cgroup::refused_forks(path),
                "processes and threads that the pod was not allowed to make on the host",
            ),
        ] {
            if let Ok(count @ 1..) = count {
                let event = Event::limit("pod", limit, Some(count), detail);
                self.audit.tell(event);
            }
        }
        match self.vm.end() {
            Some(end) if !self.vm.is_killed() => {
                Error::from(vmm::Error::Gone(end)).tell_end(&self.audit);
            }
            _ => {
                self.audit.tell_end("destroyed", DESTROYED, BTreeMap::new());
            }
        }
    }
}

/// Tells what the operator has chosen that changes how the pod is contained.
fn tell_switches(config: &Config, request: &Request<'_>, audit: &Audit) {
    let serial = request.serial.is_some();
    let serial = serial.then(|| ("--serial", "a console of the guest".into()));
    for (name, value) in config.switches().into_iter().chain(serial) {
        let name = name.into();
        audit.tell(Event::Switch { name, value });
    }
}

fn report(left: &[Leftover]) {
    for leftover in left {
        tracing::warn!("cannot give back {leftover}");
    }
}

/// For tests and front ends: the resources that a pod holds now.
impl Sandbox {
    /// What the ledger names, oldest first.
    pub fn held(&self) -> impl Iterator<Item = &Resource> {
        self.ledger.held()
    }
}
