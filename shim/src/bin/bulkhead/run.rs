//! `bulkhead run`: a bundle from its directory to its exit status.

use std::{fs::File, io::Write, os::fd::OwnedFd, path::PathBuf};

use bulkhead_agent_protocol::agent::{self as wire, WaitProcessResponse};
use bulkhead_shim::{
    config::{self, Config},
    hooks::{self, State},
    ids,
    machine::agent,
    oci::{self, Bundle, Plan},
    pod::{self, Parts, Request, Sandbox, timeline::Timeline},
    sys::stub::Stub,
};

use crate::{
    failure::{self, Failure},
    signals::{Arrival, Signals},
    streams::Streams,
    terminal,
};

const NAMESPACE: &str = "default";

#[derive(clap::Args)]
pub struct Arguments {
    /// Directory of the bundle: config.json and the root file system
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Memory of the guest in MiB, at least 64
    #[arg(short, long, value_name = "MIB")]
    memory: Option<u64>,
    /// Virtual processors of the guest, 1 to 32
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    /// Give the container a terminal, whatever config.json says
    #[arg(short, long)]
    tty: bool,
    /// Print when the boot reached what, to standard error, after the container's output
    #[arg(long)]
    timeline: bool,
    /// Write the same as JSON to a file
    #[arg(long, value_name = "FILE")]
    timeline_json: Option<PathBuf>,
    /// Draw the same as an SVG picture to a file
    #[arg(long, value_name = "FILE")]
    timeline_svg: Option<PathBuf>,
    /// Write the guest's serial console to a file, for debugging: the boot becomes much slower
    #[arg(long, value_name = "FILE")]
    serial: Option<PathBuf>,
    /// Name of the container and its pod, unique on this host
    id: String,
}

/// Runs to the end; the exit code of this command.
pub fn run(arguments: &Arguments, config: &Config, began_ns: u64) -> Result<u8, Failure> {
    ids::check("id", &arguments.id)?;
    let vcpus = arguments.vcpus.unwrap_or(config.vcpus);
    if !(1..=config::MAX_VCPUS).contains(&vcpus) {
        let text = format!(
            "--vcpus {vcpus} cannot work: 1 to {} are possible",
            config::MAX_VCPUS
        );
        return Err(Failure::new(text));
    }
    let memory_mib = arguments.memory.unwrap_or(config.memory_mib);
    if memory_mib < config::MIN_MEMORY_MIB {
        let text = format!(
            "--memory {memory_mib} cannot boot: the guest needs at least {} MiB",
            config::MIN_MEMORY_MIB
        );
        return Err(Failure::new(text));
    }
    let bundle = Bundle::load(&arguments.bundle)?;
    let mut plan = oci::plan(&bundle, &arguments.id)?;
    if arguments.tty {
        process_mut(&mut plan).terminal = true;
    }
    let parts = Parts::open(config)?;
    let serial = open_some(arguments.serial.as_ref())?;
    // Before anything runs: a timeline that cannot be written must not cost a container its status.
    let pictures = Pictures {
        json: open_some(arguments.timeline_json.as_ref())?,
        svg: open_some(arguments.timeline_svg.as_ref())?,
    };
    let run = Run {
        arguments,
        pictures,
        config,
        network: oci::network(&bundle),
        bundle,
        plan,
        parts,
        stub: None,
        timeline: Timeline::started_at(began_ns),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(run.finish(vcpus, memory_mib, serial.map(OwnedFd::from)))
}

fn open_some(path: Option<&PathBuf>) -> Result<Option<File>, Failure> {
    let open = |path: &PathBuf| {
        File::create(path)
            .map_err(|error| Failure::new(format!("cannot write {}: {error}", path.display())))
    };
    path.map(open).transpose()
}

/// Where the timeline goes besides standard error.
struct Pictures {
    json: Option<File>,
    svg: Option<File>,
}

fn process_mut(plan: &mut Plan) -> &mut wire::Process {
    plan.container.process.mut_or_insert_default()
}

/// A run that has checked everything which can be checked before anything is taken.
struct Run<'a> {
    arguments: &'a Arguments,
    pictures: Pictures,
    config: &'a Config,
    bundle: Bundle,
    plan: Plan,
    network: Option<PathBuf>,
    parts: Parts,
    /// What hooks are told the pid of.
    stub: Option<Stub>,
    timeline: Timeline,
}

/// Why a container did not come to an exit status of its own.
enum Stop {
    Failed(Failure),
    /// A signal came before there was a container to send it to.
    Interrupted(i32),
}

impl<E: Into<Failure>> From<E> for Stop {
    fn from(error: E) -> Stop {
        Stop::Failed(error.into())
    }
}

/// A pod's trouble with the guest's last words beneath.
fn told(error: pod::Error) -> Failure {
    let line = failure::line(&error);
    Failure::new(line).with_details(error.last_lines())
}

impl Run<'_> {
    async fn finish(
        mut self,
        vcpus: u32,
        memory_mib: u64,
        serial: Option<OwnedFd>,
    ) -> Result<u8, Failure> {
        let mut signals = Signals::catch()?;
        let request = Request {
            namespace: NAMESPACE,
            id: &self.arguments.id,
            vcpus,
            memory_mib,
            cgroups_path: self.plan.cgroups_path.as_deref(),
            host_limits: &self.plan.host_limits,
            network: self.network.as_deref(),
            // There is no order to start, before which others could add some.
            net_slots: match self.plan.hooks.create.is_empty() {
                true => 0,
                false => oci::LATER_INTERFACES,
            },
            serial,
            oom_score_adj: Some(self.plan.container.process.oom_score_adj.unwrap_or(0)),
        };
        let mut sandbox = Sandbox::launch(self.config, &self.parts, request)
            .await
            .map_err(told)?;
        let outcome = self.in_sandbox(&mut sandbox, &mut signals).await;
        terminal::restore();
        self.timeline.add(&sandbox.stamps());
        if outcome.is_ok() {
            sandbox.power_off().await;
            self.timeline.mark("guest powered off");
        }
        let left = sandbox.give_back();
        if let Some(stub) = self.stub.take() {
            stub.release();
        }
        self.timeline.mark("everything given back");
        let stopped = self.hooks("poststop", None).await;
        if !left.is_empty() {
            tracing::warn!("{} resources are left; try `bulkhead gc`", left.len());
        }
        if let Err(error) = stopped {
            // OCI runtime.md#lifecycle: a failing poststop hook is logged and changes nothing.
            tracing::warn!("{error}");
        }
        self.print_timeline()?;
        match outcome {
            Ok(status) => Ok(status),
            Err(Stop::Interrupted(signal)) => Ok(128 + signal as u8),
            Err(Stop::Failed(failure)) => Err(failure),
        }
    }

    /// From a booting pod to the container's exit code.
    async fn in_sandbox(
        &mut self,
        sandbox: &mut Sandbox,
        signals: &mut Signals,
    ) -> Result<u8, Stop> {
        tokio::select! {
            ready = self.prepare(sandbox) => ready?,
            signal = signals.asks_to_end() => return Err(Stop::Interrupted(signal)),
        }
        self.timeline.mark("agent ready");
        let terminal = process_mut(&mut self.plan).terminal;
        if terminal && let Some((rows, columns)) = terminal::size() {
            let process = process_mut(&mut self.plan);
            (process.rows, process.columns) = (rows.into(), columns.into());
        }
        let streams = Streams::open(sandbox, terminal).await.map_err(told)?;
        let mut spec = self.plan.container.clone();
        // In the guest the process is the first of its own pid namespace.
        let state = self.state("created", Some(1));
        spec.hook_state =
            serde_json::to_vec(&state).expect("a state is made of strings and numbers");
        let id = &self.arguments.id;
        tokio::select! {
            created = sandbox.create_container(id, spec, streams.stdio.clone()) => created.map_err(told)?,
            error = sandbox.trouble() => return Err(told(error).into_stop()),
            signal = signals.asks_to_end() => return Err(Stop::Interrupted(signal)),
        }
        self.timeline.mark("container created");
        let output = streams.relay(terminal)?;
        if let Err(error) = sandbox.agent().start(id).await {
            return Err(Stop::Failed(exec_failure(sandbox, error).await));
        }
        self.timeline.mark("container started");
        self.hooks("poststart", self.pid()).await?;
        let exit = self.attend(sandbox, signals, terminal).await?;
        self.timeline.mark("container exited");
        // All writers are gone with the container's pid namespace: the streams end by themselves, drained.
        for relay in output {
            tokio::select! {
                // A reader of ours that went away has told the container, and is no failure.
                finished = relay.finished() => drop(finished),
                error = sandbox.trouble() => return Err(told(error).into_stop()),
            }
        }
        self.timeline.mark("output drained");
        Ok(exit_code(&exit))
    }

    /// From a booting pod to one that is ready, with the interfaces that the hooks have put into its network namespace.
    async fn prepare(&mut self, sandbox: &mut Sandbox) -> Result<(), Stop> {
        let id = &self.arguments.id;
        let hooks = &self.plan.hooks;
        let has_hooks = !hooks.create.is_empty();
        // While the guest boots.
        sandbox
            .place_container(id, &self.plan)
            .await
            .map_err(told)?;
        if has_hooks || !hooks.started.is_empty() {
            self.stub = Some(sandbox.start_stub().map_err(told)?);
        }
        self.hooks("createRuntime", self.pid()).await?;
        let hostname = match self.plan.container.hostname.as_str() {
            "" => ids::hostname(id),
            name => name,
        };
        sandbox.ready(hostname).await.map_err(told)?;
        if has_hooks {
            sandbox.find_interfaces().await.map_err(told)?;
        }
        Ok(())
    }

    /// What stands for the pod, in its network namespace.
    fn pid(&self) -> Option<i32> {
        self.stub.as_ref().map(Stub::pid)
    }

    /// Passes signals on until the container's init has exited.
    async fn attend(
        &self,
        sandbox: &Sandbox,
        signals: &mut Signals,
        terminal: bool,
    ) -> Result<WaitProcessResponse, Stop> {
        let id = self.arguments.id.as_str();
        let wait = sandbox.agent().wait(id);
        let mut wait = std::pin::pin!(wait);
        let trouble = sandbox.trouble();
        let mut trouble = std::pin::pin!(trouble);
        loop {
            let arrival = tokio::select! {
                biased;
                exit = &mut wait => return match exit {
                    Ok(exit) => Ok(exit),
                    Err(error) => Err(told(sandbox.access().explain(error).await).into_stop()),
                },
                error = &mut trouble => return Err(told(error).into_stop()),
                arrival = signals.next() => arrival,
            };
            let agent = sandbox.agent().clone();
            let container = id.to_string();
            match arrival {
                Arrival::Resized => {
                    if let (true, Some((rows, columns))) = (terminal, terminal::size()) {
                        tokio::spawn(async move {
                            let _ = agent.resize(&container, rows, columns).await;
                        });
                    }
                }
                Arrival::Signal(number) => send(agent, container, number),
                Arrival::Impatient => {
                    tracing::warn!("interrupted twice: killing the container");
                    send(agent, container, libc::SIGKILL);
                }
            }
        }
    }

    async fn hooks(&self, kind: &'static str, pid: Option<i32>) -> Result<(), hooks::Error> {
        let (status, list) = match kind {
            "createRuntime" => ("creating", &self.plan.hooks.create),
            "poststart" => ("running", &self.plan.hooks.started),
            _ => ("stopped", &self.plan.hooks.stopped),
        };
        hooks::run(kind, list, &self.state(status, pid)).await
    }

    /// What a hook reads of the container (OCI runtime.md#state).
    fn state<'s>(&'s self, status: &'s str, pid: Option<i32>) -> State<'s> {
        State {
            oci_version: &self.plan.oci_version,
            id: &self.arguments.id,
            status,
            pid,
            bundle: &self.bundle.directory,
            annotations: &self.plan.annotations,
        }
    }

    fn print_timeline(&self) -> Result<(), Failure> {
        if self.arguments.timeline {
            eprint!("{}", self.timeline.table());
        }
        if let Some(file) = &self.pictures.json {
            serde_json::to_writer_pretty(file, &self.timeline.moments())?;
        }
        if let Some(mut file) = self.pictures.svg.as_ref() {
            let title = format!("bulkhead run {}", self.arguments.id);
            file.write_all(self.timeline.svg(&title).as_bytes())?;
        }
        Ok(())
    }
}

impl Failure {
    fn into_stop(self) -> Stop {
        Stop::Failed(self)
    }
}

/// In a task of its own: an agent that is slow to answer must not hold up the next signal.
fn send(agent: agent::Agent, container: String, number: i32) {
    tokio::spawn(async move {
        if let Err(error) = agent.signal(&container, number).await {
            tracing::debug!(%error, number, "signal not delivered");
        }
    });
}

fn exit_code(exit: &WaitProcessResponse) -> u8 {
    if exit.oom_killed {
        tracing::warn!("the container ran out of memory");
    }
    // From the guest: whatever it says, an exit code has 8 bits.
    (exit.exit_status & 0xff) as u8
}

/// Docker's and the shells' codes for a program that is not there or cannot be executed.
async fn exec_failure(sandbox: &Sandbox, error: agent::Error) -> Failure {
    match error {
        agent::Error::Refused { .. } => {
            let code = error.exec_status().unwrap_or(failure::OWN);
            Failure::new(error.to_string()).with_code(code)
        }
        lost => {
            let limit = std::time::Duration::from_secs(2);
            match tokio::time::timeout(limit, sandbox.trouble()).await {
                Ok(error) => told(error),
                Err(_) => lost.into(),
            }
        }
    }
}
