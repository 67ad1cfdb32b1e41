//! The pod: its containers and their processes by name, and what the shim can ask of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bulkhead_agent_protocol::{PROTOCOL_VERSION, SEED, agent};

use crate::container::{self, Container, Launcher, Process, ProcessError, blocking, cgroup};
use crate::error::Error;
use crate::network::{self, Watch};
use crate::reaper::Exit;
use crate::share::Share;
use crate::sockets::Sockets;
use crate::volume::Volumes;
use crate::{log, machine};

/// Longest id of a container or process.
const MAX_ID: usize = 256;

/// The pod.
#[derive(Debug)]
pub(crate) struct Sandbox {
    launcher: Launcher,
    /// `None` while a container is being made, which is without the lock.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
    share: Arc<Share>,
    volumes: Arc<Volumes>,
    pub(crate) sockets: Sockets,
    /// Held while the network is being made: renames of two requests must not meet.
    network: Arc<Mutex<()>>,
    listeners: Watch,
    started: AtomicBool,
    init_monotonic_ns: u64,
    /// The agent is PID 1 of a guest and owns clock, name and mounts.
    owns_machine: bool,
}

impl Sandbox {
    /// A pod without containers.
    pub(crate) fn new(launcher: Launcher, init_monotonic_ns: u64, owns_machine: bool) -> Self {
        Self {
            launcher,
            containers: Mutex::default(),
            share: Arc::default(),
            volumes: Arc::default(),
            sockets: Sockets::default(),
            network: Arc::default(),
            listeners: Watch::default(),
            started: AtomicBool::new(false),
            init_monotonic_ns,
            owns_machine,
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.containers
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// The first request.
    pub(crate) async fn start(
        &self,
        request: agent::StartSandboxRequest,
    ) -> Result<agent::StartSandboxResponse, Error> {
        if request.version != PROTOCOL_VERSION {
            return Err(Error::Version {
                ours: PROTOCOL_VERSION,
                theirs: request.version,
            });
        }
        let seed: [u8; SEED] = request.seed.as_slice().try_into().map_err(|_| {
            let found = request.seed.len();
            Error::Invalid(format!("the seed has {found} bytes, and must have {SEED}"))
        })?;
        if self.started.swap(true, Ordering::Relaxed) {
            return Err(Error::Started);
        }
        if self.owns_machine {
            // First of all: until then every clone of a template draws the same numbers.
            machine::reseed(&seed)?;
            machine::set_clock(request.realtime_ns)?;
            if !request.hostname.is_empty() {
                machine::set_hostname(&request.hostname)?;
            }
            for (name, value) in &request.sysctls {
                machine::write_sysctl(name, value).map_err(machine::MachineError::Sysctl)?;
            }
            if !request.share_tag.is_empty() {
                let tag = request.share_tag.clone();
                blocking(move || machine::mount_share(&tag)).await?;
            }
            if request.shm_bytes != 0 {
                machine::mount_shm(request.shm_bytes)?;
            }
        }
        if let Some(network) = request.network.into_option() {
            self.configure_network(network).await?;
        }
        log::info(&format!("sandbox {} started", request.sandbox_id));
        Ok(agent::StartSandboxResponse {
            agent_version: crate::VERSION.to_owned(),
            kernel_release: machine::kernel_release(),
            vcpus: machine::vcpus(),
            memory_bytes: machine::memory_bytes(),
            init_monotonic_ns: self.init_monotonic_ns,
            ..Default::default()
        })
    }

    /// Makes the network what it is to be.
    pub(crate) async fn configure_network(&self, wanted: agent::Network) -> Result<(), Error> {
        let (lock, owns_machine) = (Arc::clone(&self.network), self.owns_machine);
        let configured = blocking(move || {
            let _alone = lock
                .lock()
                .expect("no code panics while it holds this lock");
            network::configure(&wanted, owns_machine)
        });
        Ok(configured.await?)
    }

    /// Waits until other ports are listened on than those that are known.
    pub(crate) async fn watch_listeners(
        &self,
        known: &agent::Listeners,
    ) -> Result<agent::Listeners, Error> {
        Ok(self.listeners.differing(known).await?)
    }

    /// Connects a listener of the pod with a port of the host.
    pub(crate) async fn connect_listener(
        &self,
        request: &agent::ConnectListenerRequest,
    ) -> Result<(), Error> {
        Ok(network::connect(&self.launcher.host, request).await?)
    }

    /// Ends what is listened at in a place of the share, and unmounts it if it was the last that used it.
    pub(crate) async fn end_sockets(&self, place: String) {
        self.sockets.end(&place).await;
        let share = Arc::clone(&self.share);
        blocking(move || share.release(&place)).await;
    }

    /// Joins a connection to a socket of the host with a port of the host.
    pub(crate) async fn answer_connection(
        &self,
        request: &agent::AnswerConnectionRequest,
    ) -> Result<(), Error> {
        Ok(self.sockets.answer(&self.launcher.host, request).await?)
    }

    /// Makes a container.
    pub(crate) async fn create_container(
        &self,
        request: agent::CreateContainerRequest,
    ) -> Result<u32, Error> {
        let id = checked_id(&request.container_id)?;
        if self.containers().contains_key(&id) {
            return Err(Error::ContainerExists(id));
        }
        // The id is taken from here on; the lock is not held while the container is made.
        self.containers().insert(id.clone(), None);
        let (share, request) = (Arc::clone(&self.share), Arc::new(request));
        let entering = (id.clone(), Arc::clone(&request));
        // On another thread: a share that does not answer must stop nobody else.
        let entered = blocking(move || share.enter(&entering.0, &entering.1.spec)).await;
        let made = match entered {
            Ok(()) => container::create(&self.launcher, request)
                .await
                .map_err(Error::from),
            Err(error) => Err(error.into()),
        };
        match made {
            Ok(made) => {
                let pid = made.init.pid() as u32;
                self.containers().insert(id, Some(made));
                Ok(pid)
            }
            Err(error) => {
                self.leave_share(&id).await;
                self.containers().remove(&id);
                Err(error)
            }
        }
    }

    /// Adds a process to a container.
    pub(crate) async fn create_exec(
        &self,
        request: agent::CreateExecRequest,
    ) -> Result<u32, Error> {
        let container = self.container(&request.container_id)?;
        let id = checked_id(&request.exec_id)?;
        {
            let mut execs = container.execs();
            if execs.contains_key(&id) {
                return Err(Error::ProcessExists {
                    container: container.id.clone(),
                    process: id,
                });
            }
            execs.insert(id.clone(), None);
        }
        match container::create_exec(&self.launcher, &container, &request).await {
            Ok(process) => {
                let pid = process.pid() as u32;
                container.execs().insert(id, Some(Arc::new(process)));
                Ok(pid)
            }
            Err(error) => {
                container.execs().remove(&id);
                Err(error.into())
            }
        }
    }

    /// Lets a process execute its program.
    pub(crate) async fn start_process(
        &self,
        request: &agent::ProcessRequest,
    ) -> Result<u32, Error> {
        let (_, process) = self.process(&request.container_id, &request.exec_id)?;
        process.start().await?;
        Ok(process.pid() as u32)
    }

    /// Waits for the end of a process. With it comes what it had written to stdout and stderr, in bytes.
    pub(crate) async fn wait_process(
        &self,
        request: &agent::ProcessRequest,
    ) -> Result<(Exit, [u64; 2]), Error> {
        let (_, process) = self.process(&request.container_id, &request.exec_id)?;
        let exit = process.wait().await;
        Ok((exit, process.written()))
    }

    /// Sends a signal to a process or to all of a container.
    pub(crate) async fn signal_process(
        &self,
        request: &agent::SignalProcessRequest,
    ) -> Result<(), Error> {
        if request.all && !request.exec_id.is_empty() {
            return Err(Error::Invalid(
                "a signal to all processes of a container names no exec process".to_owned(),
            ));
        }
        if request.signal > 64 {
            return Err(Error::Invalid(format!(
                "no such signal: {}",
                request.signal
            )));
        }
        let (container, process) = self.process(&request.container_id, &request.exec_id)?;
        if !request.all {
            return Ok(process.signal(request.signal)?);
        }
        if process.exited().is_some() {
            return Err(ProcessError::Exited.into());
        }
        let signal = request.signal;
        Ok(blocking(move || container.signal_all(signal)).await?)
    }

    /// Sets the size of a process' terminal.
    pub(crate) fn resize_terminal(
        &self,
        request: &agent::ResizeTerminalRequest,
    ) -> Result<(), Error> {
        let (_, process) = self.process(&request.container_id, &request.exec_id)?;
        Ok(process.resize(request.rows, request.columns)?)
    }

    /// Forgets an exited process, or an exited container with all that it held.
    pub(crate) async fn delete_process(
        &self,
        request: &agent::ProcessRequest,
    ) -> Result<(), Error> {
        let (container, process) = self.process(&request.container_id, &request.exec_id)?;
        if process.exited().is_none() {
            let what = if request.exec_id.is_empty() {
                &request.container_id
            } else {
                &request.exec_id
            };
            return Err(Error::Running(what.clone()));
        }
        if !request.exec_id.is_empty() {
            container.execs().remove(&request.exec_id);
            return Ok(());
        }
        let cgroup = Arc::clone(&container.cgroup);
        blocking(move || {
            let cgroup = cgroup
                .read()
                .expect("no code panics while it holds this lock");
            cgroup.kill_all()?;
            cgroup.delete()
        })
        .await?;
        self.leave_share(&request.container_id).await;
        self.containers().remove(&request.container_id);
        Ok(())
    }

    async fn leave_share(&self, container: &str) {
        let (share, container) = (Arc::clone(&self.share), container.to_owned());
        let sockets = self.sockets.clone();
        blocking(move || share.leave(&container, |path| sockets.has(path))).await;
    }

    /// The processes of a container.
    pub(crate) async fn list_processes(&self, id: &str) -> Result<Vec<u32>, Error> {
        let cgroup = Arc::clone(&self.container(id)?.cgroup);
        Ok(blocking(move || {
            cgroup
                .read()
                .expect("no code panics while it holds this lock")
                .pids()
        })
        .await?)
    }

    /// What a container uses: files of its cgroup and their text.
    pub(crate) async fn container_stats(&self, id: &str) -> Result<Vec<agent::CgroupFile>, Error> {
        let cgroup = Arc::clone(&self.container(id)?.cgroup);
        Ok(blocking(move || {
            cgroup
                .read()
                .expect("no code panics while it holds this lock")
                .stats()
        })
        .await?)
    }

    /// Freezes or thaws a container.
    pub(crate) async fn set_frozen(&self, id: &str, frozen: bool) -> Result<(), Error> {
        let container = self.container(id)?;
        if container.init.exited().is_some() {
            return Err(ProcessError::State("has exited already").into());
        }
        let cgroup = Arc::clone(&container.cgroup);
        Ok(blocking(move || {
            let cgroup = cgroup
                .read()
                .expect("no code panics while it holds this lock");
            if frozen {
                cgroup.freeze()
            } else {
                cgroup.thaw()
            }
        })
        .await?)
    }

    /// Sets new limits.
    pub(crate) async fn update_container(
        &self,
        request: agent::UpdateContainerRequest,
    ) -> Result<(), Error> {
        let cgroup = Arc::clone(&self.container(&request.container_id)?.cgroup);
        Ok(blocking(move || {
            cgroup
                .write()
                .expect("no code panics while it holds this lock")
                .apply(&request.resources)
        })
        .await?)
    }

    /// Frees page cache of all containers, at most `most` bytes; how much it was.
    pub(crate) async fn reclaim_memory(&self, most: u64) -> u64 {
        /// The kernel may take long over what it has to write back first.
        const LIMIT: Duration = Duration::from_secs(20);
        let containers: Vec<_> = self.containers().values().flatten().cloned().collect();
        blocking(move || {
            let end = Instant::now() + LIMIT;
            let mut freed = 0;
            for container in containers {
                let cgroup = container.cgroup.read();
                // Not under the lock: who sets limits does not wait for it.
                let path = cgroup
                    .expect("no code panics while it holds this lock")
                    .path()
                    .to_path_buf();
                freed += cgroup::reclaim(&path, most.saturating_sub(freed), end);
            }
            freed
        })
        .await
    }

    /// Has the machine run on its first `count` processors.
    pub(crate) async fn set_processors(&self, count: u32) -> Result<(), Error> {
        Ok(blocking(move || machine::set_processors(count)).await?)
    }

    /// Makes an empty volume.
    pub(crate) async fn create_volume(&self, number: u64) -> Result<(), Error> {
        let volumes = Arc::clone(&self.volumes);
        Ok(blocking(move || volumes.create(number)).await?)
    }

    /// Makes changes in a volume.
    pub(crate) async fn change_volume(
        &self,
        request: agent::ChangeVolumeRequest,
    ) -> Result<(), Error> {
        let volumes = Arc::clone(&self.volumes);
        Ok(blocking(move || volumes.change(request.volume, &request.changes)).await?)
    }

    /// Forgets a volume.
    pub(crate) async fn delete_volume(&self, number: u64) -> Result<(), Error> {
        let volumes = Arc::clone(&self.volumes);
        Ok(blocking(move || volumes.delete(number)).await?)
    }

    /// Ends the machine, or in a test the agent.
    pub(crate) fn shut_down(&self) -> ! {
        if self.owns_machine {
            machine::power_off();
        }
        std::process::exit(0);
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match self.containers().get(id) {
            Some(Some(container)) => Ok(Arc::clone(container)),
            Some(None) => Err(Error::Unfinished(format!("container \"{id}\""))),
            None => Err(Error::NoContainer(id.to_owned())),
        }
    }

    /// A process with its container; the init when `exec_id` is empty.
    fn process(
        &self,
        container_id: &str,
        exec_id: &str,
    ) -> Result<(Arc<Container>, Arc<Process>), Error> {
        let container = self.container(container_id)?;
        if exec_id.is_empty() {
            let init = Arc::clone(&container.init);
            return Ok((container, init));
        }
        let found = container.execs().get(exec_id).cloned();
        match found {
            Some(Some(process)) => Ok((container, process)),
            Some(None) => Err(Error::Unfinished(format!("process \"{exec_id}\""))),
            None => Err(Error::NoProcess {
                container: container_id.to_owned(),
                process: exec_id.to_owned(),
            }),
        }
    }
}

fn checked_id(id: &str) -> Result<String, Error> {
    if id.is_empty() || id.len() > MAX_ID {
        return Err(Error::Invalid(format!(
            "an id has 1 to {MAX_ID} bytes, this one has {}",
            id.len()
        )));
    }
    Ok(id.to_owned())
}
