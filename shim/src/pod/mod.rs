//! A pod on the host: one sandbox, the process that stands for it, and the roots of its containers; and the life of a container in it.
#![forbid(unsafe_code)]

mod access;
mod background;
mod container;
mod error;
#[cfg_attr(test, path = "testing/installed.rs")]
mod installed;
mod interfaces;
mod jailed;
#[cfg_attr(test, path = "testing/launch.rs")]
mod launch;
pub mod layers;
mod limits;
mod links;
mod localhost;
mod oom;
mod pause;
mod reclaim;
mod resize;
mod sandbox;
pub mod size;
pub mod template;
#[cfg(test)]
pub(crate) mod testing;
pub mod timeline;

use std::{
    collections::BTreeMap,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_protocol::agent as wire;
use bulkhead_vmm_config::Phase;
use tokio::{
    io::Interest,
    sync::{Mutex, MutexGuard},
};

pub use self::{
    access::Access,
    container::Container,
    error::Error,
    installed::Parts,
    jailed::Jailed,
    resize::{Claim, Room},
    sandbox::{Request, Sandbox},
    size::Size,
};
use crate::{
    cgroup,
    config::Config,
    ids,
    machine::agent::{self, Agent},
    oci::{Plan, PodPlan},
    pod::{
        launch::Stub,
        layers::{Layer, Roots},
        resize::Sizes,
        template::Start,
        timeline::now_ns,
    },
    sys,
};

/// The virtio-fs tag of the share.
const SHARE_TAG: &str = "share";
/// How long the guest may take over something that costs it microseconds.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long a container may take to end that the guest says it has killed: it may have much memory to give back.
pub const KILLED_PATIENCE: Duration = Duration::from_secs(30);

/// What a pod is made from.
pub struct Order<'a> {
    /// What is installed.
    pub parts: &'a Parts,
    /// What its own config.json says.
    pub plan: &'a PodPlan,
    /// What its machine is to have ([`Size::of`] says what follows from limits).
    pub request: Request<'a>,
}

/// A pod that runs.
#[derive(Debug)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// The pid that stands for it on the host; 0: none does.
    pub pid: i32,
    /// What its members' configurations mean by paths of the host.
    pub plan: PodPlan,
    /// For calls about its containers, and to see its end.
    pub access: Access,
    /// Its cgroup on the host.
    pub cgroup: PathBuf,
    /// What its machine has, and why.
    sizes: Arc<Sizes>,
    ending: AtomicBool,
    private_pids: AtomicBool,
    paused: AtomicBool,
    /// The container that has namespaces of the guest itself.
    guest_holder: std::sync::Mutex<Option<String>>,
    held: Mutex<Option<Held>>,
}

/// What must be given back.
#[derive(Debug)]
pub struct Held {
    sandbox: Sandbox,
    roots: Roots,
    stub: Option<Stub>,
}

impl Held {
    /// Mounts a container's root, if the engine has not, and puts its files into the share.
    pub async fn place(
        &mut self,
        id: &str,
        plan: &mut Plan,
        layers: &[Layer],
    ) -> Result<(), Error> {
        if !layers.is_empty() {
            plan.root.path = self.roots.mount(self.sandbox.ledger(), id, layers)?;
        }
        self.sandbox.place_container(id, plan).await?;
        self.sandbox.name_sources(id, &mut plan.container)
    }

    /// Offers the guest those of stdin, stdout and stderr that are wanted: what the agent is told, and our ends in the same order.
    pub async fn streams(
        &mut self,
        wanted: [bool; 3],
    ) -> Result<(wire::Stdio, [Option<UnixStream>; 3]), Error> {
        self.sandbox.streams(wanted).await
    }

    /// Starts a process that stands for the pod on the host: engines and hooks are told its pid.
    pub fn stand_in(&mut self) -> Result<i32, Error> {
        let stub = self.stub.insert(self.sandbox.start_stub()?);
        Ok(stub.pid())
    }

    /// The pid that stands for the pod, if one does.
    pub fn pid(&self) -> Option<i32> {
        self.stub.as_ref().map(Stub::pid)
    }

    /// For calls that need not wait, and to see the pod's end; it stays usable when the pod has gone.
    pub fn access(&self) -> Access {
        self.sandbox.access()
    }

    /// Takes a container's files out of the share and unmounts its root.
    pub async fn withdraw(&mut self, id: &str) -> Result<(), Error> {
        self.sandbox.withdraw_container(id).await?;
        Ok(self.roots.unmount(self.sandbox.ledger(), id)?)
    }

    /// Waits until the guest is ready.
    async fn ready(&mut self, hostname: &str) -> Result<(), Error> {
        let guest = self.sandbox.ready(hostname).await?;
        self.sandbox.tell_layers().await;
        tracing::info!(kernel = %guest.kernel_release, vcpus = guest.vcpus, memory = guest.memory_bytes, "guest ready");
        Ok(())
    }

    async fn give_back(self) {
        let Held { sandbox, stub, .. } = self;
        let work = move || {
            let left = sandbox.give_back();
            if let Some(stub) = stub {
                stub.release();
            }
            left
        };
        // It waits for processes to end and for mounts to be let go: not on the thread that answers requests.
        match launch::aside(work).await {
            Ok(left) if left.is_empty() => {}
            Ok(left) => tracing::error!(left = left.len(), "resources are left; try `bulkhead gc`"),
            Err(error) => tracing::error!(%error, "the teardown panicked; try `bulkhead gc`"),
        }
    }
}

impl Pod {
    /// Starts it and, while it boots, does `meanwhile` with it. `stop` ends the boot with its error.
    ///
    /// # Errors
    /// Everything taken has been given back.
    pub async fn boot<T, E: From<Error>>(
        config: &Config,
        order: Order<'_>,
        meanwhile: impl AsyncFnOnce(&mut Held) -> Result<T, E>,
        stop: impl Future<Output = E>,
    ) -> Result<(Pod, T), E> {
        let began = now_ns();
        let Order {
            parts,
            plan,
            request,
        } = order;
        let (id, sizes) = (request.id, (request.size, request.room.clone()));
        let mut sandbox = Sandbox::launch_as(config, parts, request, Start::Pod).await?;
        if plan.paths.shm.is_some() {
            sandbox.share_memory(plan.shm_bytes);
        }
        let mut held = Held {
            sandbox,
            roots: Roots::default(),
            stub: None,
        };
        let hostname = match plan.hostname.as_str() {
            "" => ids::hostname(id),
            name => name,
        };
        let work = async {
            let done = meanwhile(&mut held).await?;
            held.ready(hostname).await?;
            Ok(done)
        };
        // `meanwhile` begins even when `stop` is due: it is how a front end knows that something was taken.
        let done = tokio::select! {
            biased;
            done = work => done,
            error = stop => Err(error),
        };
        match done {
            Ok(done) => {
                tell_boot(id, began, &held.sandbox);
                held.sandbox.leave_template(config);
                let pod = Pod::new(id, plan.clone(), held, (config, sizes));
                Ok((pod, done))
            }
            Err(error) => {
                held.give_back().await;
                Err(error)
            }
        }
    }

    /// The guest's agent.
    pub fn agent(&self) -> &Agent {
        self.access.agent()
    }

    fn new(
        id: &str,
        mut plan: PodPlan,
        held: Held,
        (config, sizes): (&Config, (Size, Room)),
    ) -> Pod {
        plan.paths.pid = held.pid();
        let machine = (held.sandbox.access(), held.sandbox.cgroup().into());
        Pod {
            id: id.into(),
            pid: held.pid().unwrap_or(0),
            plan,
            access: held.sandbox.access(),
            cgroup: held.sandbox.cgroup().into(),
            sizes: Sizes::new(id, config, sizes, machine),
            ending: AtomicBool::new(false),
            private_pids: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            guest_holder: std::sync::Mutex::default(),
            held: Mutex::new(Some(held)),
        }
    }

    /// For a change of what it holds; one at a time. `None`: everything has been given back.
    pub async fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().await
    }

    /// Waits until it cannot go on: its status for containerd, whether memory was the reason, and the reason.
    pub async fn trouble(&self) -> Trouble {
        let stub = async {
            let held = self.held().await;
            let stub = held.as_ref().and_then(|held| held.stub.as_ref());
            let Some(pidfd) = stub.map(Stub::pidfd) else {
                drop(held);
                return std::future::pending().await;
            };
            drop(held);
            match pidfd.and_then(|pidfd| sys::watch(pidfd, Interest::READABLE)) {
                Ok(pidfd) => drop(pidfd.readable().await),
                // Without it only the stub's own death goes unnoticed.
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            error = self.access.trouble() => Trouble::of(&error, self.out_of_memory()),
            () = stub => {
                let reason = "the process that stands for the pod was killed";
                self.access.audit().tell_end("stub_killed", reason, BTreeMap::new());
                Trouble { status: 137, out_of_memory: self.out_of_memory(), reason: reason.into() }
            }
        }
    }

    /// Whether the host's kernel has killed in the pod's cgroup for memory.
    fn out_of_memory(&self) -> bool {
        cgroup::oom_kills(&self.cgroup).is_ok_and(|kills| kills > 0)
    }

    /// Bounds the time that the pod takes of the host's processors by the limits of its only
    /// container.
    pub fn bound_time(&self, limits: &wire::Resources) -> Result<(), Error> {
        let bound: Vec<_> = self.time_bound(limits).into_iter().collect();
        self.limit(&bound).map(drop)
    }

    /// That bound, where these limits change it: a file of the pod's cgroup.
    pub fn time_bound(&self, limits: &wire::Resources) -> Option<(String, String)> {
        let asked = limits.files.iter().rfind(|file| file.name == "cpu.max");
        // Without the controller the machine's vCPUs are the bound.
        let now = std::fs::read_to_string(self.cgroup.join("cpu.max")).ok()?;
        let ceiling = match (asked, limits.cpu_period) {
            (Some(asked), _) => size::cpu_ceiling(&asked.value, &now),
            (None, 0) => return None,
            (None, period) => size::cpu_ceiling_over(period, &now),
        };
        Some(("cpu.max".into(), ceiling))
    }

    /// Lifts that bound: another container comes, whose time it would be as well.
    pub fn free_time(&self) -> Result<(), Error> {
        match self.cgroup.join("cpu.max").exists() {
            true => self.limit(&[("cpu.max".into(), "max".into())]).map(drop),
            false => Ok(()),
        }
    }

    /// A container that has the guest's own pid or network namespace has the guest to itself: nobody comes beside it until [`Pod::leave`].
    pub fn enter_guest(&self, id: &str, namespaces: &wire::Namespaces) -> Result<(), Error> {
        use wire::namespaces::Kind;
        let mut holder = self.guest_holder();
        if let Some(holder) = holder.as_deref().filter(|holder| *holder != id) {
            return Err(Error::GuestTaken(holder.into()));
        }
        if [namespaces.pid, namespaces.network].contains(&Kind::AGENT.into()) {
            *holder = Some(id.into());
        }
        Ok(())
    }

    /// Checks what a member asks of namespaces that others have, and remembers it. All containers of a pod have one pid on the host, so
    /// that "the pod's pid namespace" and "that of the container TARGET" (`kubectl debug --target`) are one path. In a pod that shares
    /// its processes every member names it; where one did not, the other meaning is meant, and cannot be given.
    pub fn admit(&self, id: &str, namespaces: &wire::Namespaces) -> Result<(), Error> {
        use wire::namespaces::Kind;
        self.enter_guest(id, namespaces)?;
        if namespaces.pid == Kind::NEW.into() {
            self.private_pids.store(true, Ordering::Relaxed);
        } else if namespaces.pid == Kind::SANDBOX.into()
            && self.private_pids.load(Ordering::Relaxed)
        {
            return Err(Error::PrivatePids);
        }
        Ok(())
    }

    /// Forgets that a container, which has gone, had the guest to itself.
    pub fn leave(&self, id: &str) {
        let mut holder = self.guest_holder();
        if holder.as_deref() == Some(id) {
            *holder = None;
        }
    }

    fn guest_holder(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.guest_holder.lock().expect("no panic while it is held")
    }

    /// Gives the guest the interfaces that have come into the pod's network namespace meanwhile.
    pub async fn find_interfaces(&self) -> Result<(), Error> {
        match self.held().await.as_mut() {
            Some(held) => Ok(held.sandbox.find_interfaces().await?),
            None => Err(self.ended()),
        }
    }

    /// What to say when everything has been given back.
    pub fn ended(&self) -> Error {
        Error::Ended(self.id.clone())
    }

    /// Its end begins. `false`: it had begun before.
    pub fn begin_end(&self) -> bool {
        !self.ending.swap(true, Ordering::Relaxed)
    }

    /// Whether its end has begun: who comes in now would be told of by nobody.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// Lets the guest write back and power off, calls `powered_off`, then gives everything back. At once when that was done before.
    pub async fn end_with(&self, powered_off: impl FnOnce()) {
        // A machine that hangs in somebody's request would keep the lock.
        let held = match tokio::time::timeout(PATIENCE, self.held.lock()).await {
            Ok(mut held) => held.take(),
            Err(_) => return self.destroy().await,
        };
        if let Some(held) = held {
            // A guest that stands still would not hear it; one that has gone need not.
            let _ = self.resume().await;
            held.sandbox.power_off().await;
            powered_off();
            held.give_back().await;
        }
    }

    /// The same for who does not look.
    pub async fn end(&self) {
        self.end_with(|| {}).await;
    }

    /// Ends the machine without asking the guest, and gives everything back.
    pub async fn destroy(&self) {
        self.access.kill();
        let held = self.held.lock().await.take();
        if let Some(held) = held {
            held.give_back().await;
        }
    }
}

/// Why a pod cannot go on.
#[derive(Clone, Debug)]
pub struct Trouble {
    /// Exit status of all that ran in it.
    pub status: u32,
    /// Memory had run out.
    pub out_of_memory: bool,
    /// For the log.
    pub reason: String,
}

impl Trouble {
    fn of(error: &Error, killed_for_memory: bool) -> Trouble {
        use crate::{machine::vmm, sys::process::Death};
        let reason = error.text();
        // The guest's kernel panics when it finds nothing to kill ("System is deadlocked on memory").
        let panicked_for_memory = error
            .last_lines()
            .iter()
            .any(|line| line.contains("Kernel panic") && line.contains("memory"));
        let killed = matches!(
            error,
            Error::Vm(vmm::Error::Gone(vmm::End::Died {
                death: Some(Death::Signal(libc::SIGKILL)),
                ..
            }))
        );
        let out_of_memory = killed_for_memory || panicked_for_memory;
        Trouble {
            status: if killed || out_of_memory { 137 } else { 255 },
            out_of_memory,
            reason,
        }
    }
}

/// Logs what its start took: `boot_ms` from the VMM's first moment to the agent's call, `ready_ms` all of it.
fn tell_boot(pod: &str, began_ns: u64, sandbox: &Sandbox) {
    let stamps = sandbox.stamps();
    let template = sandbox.origin.is_template();
    let at = |phase| stamps.iter().find(|stamp| stamp.phase == phase);
    let boot_ns = match (at(Phase::VmmStart), at(Phase::AgentDialled)) {
        (Some(first), Some(last)) => last.at_ns.saturating_sub(first.at_ns),
        _ => 0,
    };
    let [boot_ms, ready_ms] = [boot_ns, now_ns().saturating_sub(began_ns)].map(|ns| ns / 1_000_000);
    tracing::info!(pod, template, boot_ms, ready_ms, "the pod is ready");
}

/// Asks the guest for something that it does at once, unless it hangs.
pub async fn promptly<T>(call: impl Future<Output = Result<T, agent::Error>>) -> Result<T, Error> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Error::Hung(PATIENCE.as_secs())),
    }
}
