//! A pod that containerd makes by its sandbox service (`sandboxer = "shim"`): no container holds it, and nothing but the service ends it.
//!
//! ```text
//! CreateSandbox ──► created ──► StartSandbox ──► ready ──► StopSandbox, or the machine's end ──► stopped
//!                                                                        ShutdownSandbox, from anywhere ──► the shim ends
//! ```
//!
//! What is refused is refused by CreateSandbox; the machine boots in StartSandbox, when its network is there.

use std::{
    collections::HashMap,
    future::pending,
    path::{Path, PathBuf},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{cgroups_v2::metrics::Metrics, sandbox_api::CreateSandboxRequest};

use super::{CONFIG_NAME, Error, Exit, Phase, Process, Tasks, create::stand_in, metrics::of_pod};
use crate::{
    config::Config,
    containerd::stdio::Names,
    ids,
    oci::{PodFiles, PodPlan, cri},
    pod::{self, Order, Parts, Pod, Request, Room, Size},
};

/// How long the guest of a pod that nobody knows any more may take to end.
const BRIEF: Duration = Duration::from_secs(1);

/// The pod, from its creation to the shim's end.
#[derive(Debug)]
pub(super) struct ApiPod {
    pub(super) id: String,
    pub(super) created: SystemTime,
    config: Config,
    plan: PodPlan,
    cgroups_path: Option<PathBuf>,
    size: Size,
    room: Room,
    /// Its phases are those of a process, and whoever waits for its end waits in the same way.
    life: Process,
    pod: Mutex<Option<Arc<Pod>>>,
    /// What it had used when its end was wanted.
    used: Mutex<Option<Metrics>>,
    /// One end at a time.
    ending: tokio::sync::Mutex<()>,
}

/// The configuration that its runtime options have named, in a file of the bundle.
fn bundle_config(bundle: &Path) -> Option<PathBuf> {
    let named = std::fs::read_to_string(bundle.join(CONFIG_NAME)).ok();
    named.map(PathBuf::from)
}

impl ApiPod {
    /// Checks what is asked for and writes the files that the containers will share. Nothing else is taken.
    fn read(request: &CreateSandboxRequest, config: Option<&Path>) -> Result<ApiPod, Error> {
        let asked = cri::parse(request.options.as_ref())?;
        cri::check(&asked)?;
        let bundle = Path::new(&request.bundle_path);
        if !bundle.is_absolute() {
            let text = format!("the bundle's path {bundle:?} is not absolute");
            return Err(Error::Invalid(text));
        }
        let config = Config::load(config)?;
        let limits = cri::limits(&asked)?;
        let size = Size::of(&limits, &config).map_err(pod::Error::from)?;
        let room = Room::of(size, limits, &config);
        let id = &request.sandbox_id;
        let files = PodFiles::beneath(bundle);
        let plan = cri::plan(&asked, id, &request.netns_path, files.clone());
        cri::write_files(&asked, &plan.hostname, &files)?;
        Ok(ApiPod {
            id: id.clone(),
            created: SystemTime::now(),
            config,
            plan,
            cgroups_path: cri::cgroups_path(&asked, id),
            size,
            room,
            life: Process::new("", Names::default(), Phase::Created),
            pod: Mutex::default(),
            used: Mutex::default(),
            ending: tokio::sync::Mutex::default(),
        })
    }

    /// Where it is.
    pub(super) fn phase(&self) -> Phase {
        self.life.phase()
    }

    /// Waits for its end.
    pub(super) async fn ended(&self) -> Exit {
        self.life.ended().await
    }

    /// The pid that stands for it while it is ready, else 0.
    pub(super) fn pid(&self) -> u32 {
        match (self.phase(), self.pod().as_ref()) {
            (Phase::Running, Some(pod)) => pod.pid.unsigned_abs(),
            _ => 0,
        }
    }

    /// What a person may want to know of it, in words.
    pub(super) fn info(&self, state: &str) -> HashMap<String, String> {
        let mut info = vec![
            ("pid", self.pid().to_string()),
            ("state", state.into()),
            ("shim_pid", std::process::id().to_string()),
            ("version", env!("CARGO_PKG_VERSION").into()),
            ("hostname", self.plan.hostname.clone()),
        ];
        if let Some(network) = &self.plan.paths.network {
            info.push(("network_namespace", network.display().to_string()));
        }
        if let Some(pod) = self.pod().as_ref() {
            info.push(("cgroup", pod.cgroup.display().to_string()));
            let size = pod.size();
            info.push(("vcpus", size.vcpus.to_string()));
            info.push(("memory_bytes", size.memory_bytes().to_string()));
        }
        let pairs = info.into_iter();
        pairs.map(|(name, value)| (name.into(), value)).collect()
    }

    /// What it uses, or had used at its end, as the host counts it.
    ///
    /// # Errors
    /// It never ran, or its machine has just gone, uncounted.
    pub(super) fn metrics(&self) -> Result<Metrics, Error> {
        let now = match (self.phase(), self.pod().as_ref()) {
            (Phase::Running, Some(pod)) => of_pod(pod),
            _ => None,
        };
        let mut used = self.used.lock().expect("no panic while it is held");
        if now.is_some() {
            *used = now;
        }
        used.clone().ok_or_else(|| {
            Error::Unavailable(format!("the sandbox {:?} has ended, uncounted", self.id))
        })
    }

    /// Refuses with the words of a state error.
    pub(super) fn refuse(&self, verb: &str) -> Error {
        let state = match self.phase() {
            Phase::Added | Phase::Created => "has not been started",
            Phase::Starting => "is being started",
            Phase::Running | Phase::Paused => "runs already",
            Phase::Stopped(_) => "has ended",
        };
        Error::State(format!(
            "cannot {verb} the sandbox {:?}: it {state}",
            self.id
        ))
    }

    fn pod(&self) -> MutexGuard<'_, Option<Arc<Pod>>> {
        self.pod.lock().expect("no panic while it is held")
    }

    fn remember_use(&self, pod: &Pod) {
        if let Some(used) = of_pod(pod) {
            *self.used.lock().expect("no panic while it is held") = Some(used);
        }
    }
}

impl Tasks {
    /// The pod of the sandbox service, if there is one.
    pub(super) fn api_pod(&self) -> Option<Arc<ApiPod>> {
        let pod = self.api_pod.lock();
        pod.expect("no panic while it is held").clone()
    }

    /// The pod with this id.
    pub(super) fn sandbox(&self, id: &str) -> Result<Arc<ApiPod>, Error> {
        let found = self.api_pod().filter(|pod| pod.id == id);
        found.ok_or_else(|| Error::NotFound(format!("no sandbox {id:?}")))
    }

    /// CreateSandbox.
    pub(super) fn create_sandbox(&self, request: &CreateSandboxRequest) -> Result<(), Error> {
        let id = &request.sandbox_id;
        ids::check("id", id)?;
        // One shim is one pod, by whichever service it was made.
        let there = match (self.api_pod(), self.pod()) {
            (Some(sandbox), _) => Some(sandbox.id.clone()),
            (None, Some(pod)) => Some(pod.id.clone()),
            (None, None) => self.slots().keys().next().cloned(),
        };
        if let Some(there) = there {
            let text = match there == *id {
                true => format!("there is a sandbox {id:?} already"),
                false => {
                    format!("this shim runs the pod {there:?} already and does not make {id:?}")
                }
            };
            return Err(Error::Exists(text));
        }
        // Nothing waits from the question to the answer: no other request comes between.
        // Its runtime options came with `start`.
        let named = bundle_config(Path::new(&request.bundle_path));
        let config = named.as_deref().or(self.place.config.as_deref());
        let pod = self.heed(config, id, ApiPod::read(request, config))?;
        self.set_api_pod(Some(Arc::new(pod)));
        Ok(())
    }

    /// StartSandbox: boots the machine. One that does not boot stays, ended, until it is shut down.
    pub(super) async fn start_sandbox(self: &Arc<Self>, id: &str) -> Result<Arc<ApiPod>, Error> {
        if self.api_pod().is_none() {
            let text = format!("there is no sandbox {id:?} yet: it must be created first");
            return Err(Error::State(text));
        }
        let sandbox = self.sandbox(id)?;
        sandbox
            .life
            .step(&[Phase::Created], Phase::Starting)
            .map_err(|_| sandbox.refuse("start"))?;
        let parts = match Parts::open(&sandbox.config) {
            Ok(parts) => parts,
            Err(error) => {
                sandbox.life.stop(Exit::now(255));
                return Err(error.into());
            }
        };
        let order = Order {
            parts: &parts,
            plan: &sandbox.plan,
            request: Request {
                cgroups_path: sandbox.cgroups_path.as_deref(),
                joins: true,
                room: sandbox.room.clone(),
                network: sandbox.plan.paths.network.as_deref(),
                net_slots: sandbox.plan.later_interfaces(),
                ..Request::plain(&self.place.namespace, id, sandbox.size)
            },
        };
        let pod = match Pod::boot(&sandbox.config, order, stand_in, pending()).await {
            Ok((pod, ())) => Arc::new(pod),
            Err(error) => {
                sandbox.life.stop(Exit::now(255));
                return Err(error);
            }
        };
        *sandbox.pod() = Some(pod.clone());
        self.set_pod(Some(pod.clone()));
        sandbox
            .life
            .step(&[Phase::Starting], Phase::Running)
            .map_err(|_| sandbox.refuse("start"))?;
        tokio::spawn(self.clone().guard_sandbox(sandbox.clone(), pod));
        Ok(sandbox)
    }

    /// Watches the machine until its end, and tells of it when nobody wanted it.
    async fn guard_sandbox(self: Arc<Self>, sandbox: Arc<ApiPod>, pod: Arc<Pod>) {
        let trouble = pod.trouble().await;
        let _one = sandbox.ending.lock().await;
        if !pod.begin_end() {
            return;
        }
        tracing::error!(reason = %trouble.reason, "the pod cannot go on");
        sandbox.remember_use(&pod);
        self.end_all(trouble.status, trouble.out_of_memory);
        sandbox.life.stop(Exit::now(trouble.status));
        pod.destroy().await;
        self.set_pod(None);
    }

    /// StopSandbox: ends the machine, and with it all that runs in it. What has ended can still be asked about and deleted.
    pub(super) async fn stop_sandbox(
        &self,
        sandbox: &ApiPod,
        limit: Option<Duration>,
    ) -> Result<(), Error> {
        // Whoever has asked for its start has first to learn what became of it.
        sandbox.life.settled().await;
        let _one = sandbox.ending.lock().await;
        let pod = sandbox.pod().clone();
        if let Some(pod) = pod.filter(|pod| pod.begin_end()) {
            if sandbox.phase() == Phase::Running {
                sandbox.remember_use(&pod);
            }
            self.end_all(137, false);
            let mut end = pin!(pod.end());
            match limit {
                None => end.await,
                Some(limit) => tokio::select! {
                    () = &mut end => {}
                    () = tokio::time::sleep(limit) => {
                        pod.access.kill();
                        end.await;
                    }
                },
            }
            self.set_pod(None);
        }
        sandbox.life.stop(Exit::now(0));
        Ok(())
    }

    /// ShutdownSandbox: the same, and lets the shim go.
    pub(super) async fn shut_down_sandbox(&self, id: &str) -> Result<(), Error> {
        match self.api_pod() {
            Some(sandbox) if sandbox.id == id => {
                self.stop_sandbox(&sandbox, None).await?;
                self.set_api_pod(None);
            }
            Some(_) => return self.sandbox(id).map(drop),
            // One that could not be created leaves its shim to be ended.
            None if self.pod().is_none() && self.slots().is_empty() => {}
            None => {
                let text = format!("no sandbox {id:?}, and this shim runs containers");
                return Err(Error::NotFound(text));
            }
        }
        self.shutdown.notify_one();
        Ok(())
    }

    /// Shutdown of the task service, by the sandbox's own id: containerd has lost its record of it, and nothing else will end it.
    pub(super) async fn shut_down_lost(&self, sandbox: &ApiPod) -> Result<(), Error> {
        self.stop_sandbox(sandbox, Some(BRIEF)).await?;
        self.shut_down_sandbox(&sandbox.id).await
    }

    fn set_api_pod(&self, pod: Option<Arc<ApiPod>>) {
        *self.api_pod.lock().expect("no panic while it is held") = pod;
    }
}
