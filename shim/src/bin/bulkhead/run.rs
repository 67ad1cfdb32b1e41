//! `bulkhead run`: a container from its bundle, or its image, to its exit status.

use std::{
    fs::File,
    io::{IsTerminal, Write},
    os::fd::OwnedFd,
    path::PathBuf,
};

use bulkhead_agent_protocol::agent::{self as wire, WaitProcessResponse};
use bulkhead_images::Reference;
use bulkhead_shim::{
    audit::{self, Audit},
    config::Config,
    ids,
    machine::agent,
    oci::{self, Bundle, Plan, PodPaths, PodPlan},
    pod::{
        self, Container, Held, Order, Parts, Pod, Request, Size, layers::Layer,
        size::least_memory_mib, timeline::Timeline,
    },
    sys::own,
};

use crate::{
    failure::{self, Failure},
    image::{self, Prepared},
    oci::{Create, refuse_descriptors},
    signals::{Arrival, Signals},
    streams::Streams,
    terminal,
};

const NAMESPACE: &str = "default";

#[derive(clap::Args)]
pub struct Arguments {
    /// Directory of the bundle: config.json and the root file system [default: .]
    #[arg(short, long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Memory of the guest in MiB, at least 48, whatever config.json limits
    #[arg(short, long, value_name = "MIB")]
    memory: Option<u64>,
    /// Virtual processors of the guest, 1 to 32, whatever config.json limits
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
    /// End when the container runs, as runc does; other commands know it then: state, exec, kill,
    /// delete
    #[arg(short, long)]
    detach: bool,
    /// With --detach: file for the pid of the process that stands for the container's
    #[arg(long, value_name = "FILE", requires = "detach")]
    pid_file: Option<PathBuf>,
    /// With --detach: socket to which the terminal's master is sent
    #[arg(long, value_name = "SOCKET", requires = "detach")]
    console_socket: Option<PathBuf>,
    /// runc's, without a meaning here
    #[arg(long, hide = true)]
    no_pivot: bool,
    /// runc's, without a meaning here
    #[arg(long, hide = true)]
    no_new_keyring: bool,
    /// runc's, without a meaning here
    #[arg(long, hide = true)]
    no_subreaper: bool,
    /// runc's: only 0
    #[arg(long, value_name = "N", default_value_t = 0, hide = true)]
    preserve_fds: u32,
    #[command(flatten)]
    wanted: image::Wanted,
    /// Name of the container and its pod, unique on this host; or an image, which has a `/` or a
    /// `:` in its name: a directory with an OCI layout, an archive (oci-archive, docker save), or
    /// podman:NAME, docker:NAME, containerd:NAME
    ///
    /// With an image, what follows is the program and its words in the place of the image's own.
    #[arg(value_name = "ID|IMAGE", required = true, trailing_var_arg = true)]
    words: Vec<String>,
}

impl Arguments {
    /// What is to be made if the command shall not wait for it.
    pub fn detached(&self) -> Result<Option<Create>, Failure> {
        if !self.detach {
            return Ok(None);
        }
        if self.is_image() {
            let text = "--detach does not go with an image: leave it out, or give the container to an engine";
            return Err(Failure::new(text));
        }
        self.refuse_wishes()?;
        let of_the_foreground = [
            ("--memory", self.memory.is_some()),
            ("--vcpus", self.vcpus.is_some()),
            ("--tty", self.tty),
            ("--timeline", self.timeline),
            ("--timeline-json", self.timeline_json.is_some()),
            ("--timeline-svg", self.timeline_svg.is_some()),
            ("--serial", self.serial.is_some()),
        ];
        if let Some((flag, _)) = of_the_foreground.iter().find(|(_, given)| *given) {
            let text = format!("{flag} does not go with --detach: leave one of them out");
            return Err(Failure::new(text));
        }
        Ok(Some(Create {
            bundle: self.directory(),
            console_socket: self.console_socket.clone(),
            pid_file: self.pid_file.clone(),
            no_pivot: self.no_pivot,
            no_new_keyring: self.no_new_keyring,
            preserve_fds: self.preserve_fds,
            id: self.id().into(),
        }))
    }

    /// The container's, or the image.
    fn id(&self) -> &str {
        self.words.first().map_or("", String::as_str)
    }

    fn directory(&self) -> PathBuf {
        self.bundle.clone().unwrap_or_else(|| ".".into())
    }

    fn is_image(&self) -> bool {
        self.bundle.is_none() && Reference::is_one(self.id())
    }

    /// What only an image takes, where there is none.
    fn refuse_wishes(&self) -> Result<(), Failure> {
        let wrong = match (self.wanted.given(), self.words.get(1)) {
            (Some(option), _) => option,
            (None, Some(_)) => "a command",
            (None, None) => return Ok(()),
        };
        Err(Failure::new(format!(
            "{wrong} goes with an image, and {:?} names a container, whose config.json has it; an image is named as DIR/FILE or podman:NAME, and options come before both",
            self.id()
        )))
    }

    /// What to run, and the image that it comes from.
    fn bundle(&mut self, config: &Config) -> Result<(Bundle, Option<Prepared>), Failure> {
        if !self.is_image() {
            ids::check("id", self.id())?;
            self.refuse_wishes()?;
            return Ok((Bundle::load(&self.directory())?, None));
        }
        let id = self.wanted.id();
        ids::check("id", &id)?;
        let words = std::mem::replace(&mut self.words, vec![id]);
        // Who sits before a terminal wants the container's.
        self.tty |= std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        let prepared = image::prepare(&words[0], &self.wanted, &words[1..], self.tty, config)?;
        Ok((prepared.0, Some(prepared.1)))
    }
}

/// Runs to the end; the exit code of this command.
pub fn run(mut arguments: Arguments, config: &Config, began_ns: u64) -> Result<u8, Failure> {
    check_size(arguments.vcpus, arguments.memory, config)?;
    refuse_descriptors(arguments.preserve_fds)?;
    let (bundle, image) = arguments.bundle(config)?;
    let layers = image.as_ref().map_or(&[][..], |image| &image.layers);
    let status = run_bundle(&arguments, &bundle, layers, config, began_ns);
    if let Some(image) = image {
        image.remove();
    }
    status
}

fn run_bundle(
    arguments: &Arguments,
    bundle: &Bundle,
    layers: &[Layer],
    config: &Config,
    began_ns: u64,
) -> Result<u8, Failure> {
    let plan = oci::plan(bundle, arguments.id());
    let mut plan = plan.inspect_err(|error| heed(config, arguments.id(), error.refusal()))?;
    let size = size(arguments, config, bundle)?;
    if arguments.tty {
        process_mut(&mut plan).terminal = true;
    }
    // Before files are made for what cannot start.
    let parts = Parts::open(config)?;
    let serial = open_some(arguments.serial.as_ref())?;
    // Before anything runs: a timeline that cannot be written must not cost a container its status.
    let pictures = Pictures {
        json: open_some(arguments.timeline_json.as_ref())?,
        svg: open_some(arguments.timeline_svg.as_ref())?,
    };
    // The files above have the modes that their user's mask wants. There is one thread yet.
    own::narrow()?;
    let container = Container::new(arguments.id(), bundle.directory.clone(), &plan);
    let run = Run {
        arguments,
        pictures,
        config,
        network: oci::network(bundle),
        container,
        layers,
        plan,
        parts,
        timeline: Timeline::started_at(began_ns),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(run.finish(size, serial.map(OwnedFd::from)))
}

/// Refuses sizes on the command line that cannot work.
pub fn check_size(vcpus: Option<u32>, memory: Option<u64>, config: &Config) -> Result<(), Failure> {
    if let Some(vcpus) = vcpus {
        let most = config.most_vcpus();
        if !(1..=most).contains(&vcpus) {
            let text = format!("--vcpus {vcpus} cannot work: 1 to {most} are possible");
            return Err(Failure::new(text));
        }
    }
    if let Some(mib) = memory {
        let vcpus = vcpus.unwrap_or(config.vcpus);
        let least = least_memory_mib(vcpus);
        if mib < least {
            let text = format!("--memory {mib} cannot boot: the guest needs at least {least} MiB");
            return Err(Failure::new(text));
        }
        let most = config.most_memory_mib();
        if mib > most {
            let text = format!("--memory {mib} cannot work: {most} MiB is the most");
            return Err(Failure::new(text));
        }
    }
    Ok(())
}

/// What the container's limits ask for, where the command line does not say.
fn size(arguments: &Arguments, config: &Config, bundle: &Bundle) -> Result<Size, Failure> {
    let mut limits = oci::asked::Asked::of(bundle)?.limits().clone();
    if arguments.vcpus.is_some() {
        limits.quota = None;
    }
    if arguments.memory.is_some() {
        limits.memory = None;
    }
    let size = Size::of(&limits, config).map_err(|error| Failure::new(error.to_string()))?;
    Ok(Size {
        vcpus: arguments.vcpus.unwrap_or(size.vcpus),
        memory_mib: arguments.memory.unwrap_or(size.memory_mib),
    })
}

/// Tells of what the container is refused.
fn heed(config: &Config, id: &str, refusal: Option<audit::Event>) {
    if let Some(event) = refusal {
        let audit = Audit::of(config, NAMESPACE, id);
        audit.tell_of(Some(id), event);
        audit.finish();
    }
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
    container: Container,
    layers: &'a [Layer],
    plan: Plan,
    network: Option<PathBuf>,
    parts: Parts,
    timeline: Timeline,
}

/// Why a container did not come to an exit status of its own.
enum Stop {
    Failed(Failure),
    /// A signal came before there was a container to send it to.
    Interrupted(i32),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Stop {
        Stop::Failed(failure)
    }
}

impl From<pod::Error> for Stop {
    fn from(error: pod::Error) -> Stop {
        Stop::Failed(told(error))
    }
}

/// A pod's trouble with the guest's last words beneath. The shells' status says whether the program is missing or cannot be executed.
fn told(error: pod::Error) -> Failure {
    let status = match &error {
        pod::Error::Agent(error) => error.exec_status(),
        _ => None,
    };
    let line = failure::line(&error);
    Failure::new(line)
        .with_details(error.last_lines())
        .with_code(status.unwrap_or(failure::OWN))
}

impl Run<'_> {
    async fn finish(mut self, size: Size, serial: Option<OwnedFd>) -> Result<u8, Failure> {
        let mut signals = Signals::catch()?;
        let outcome = self.boot(size, serial, &mut signals).await;
        match outcome {
            Ok(status) => Ok(status),
            Err(Stop::Interrupted(signal)) => Ok(128 + signal as u8),
            Err(Stop::Failed(failure)) => Err(failure),
        }
    }

    /// From nothing to the container's exit code, and to nothing again.
    async fn boot(
        &mut self,
        size: Size,
        serial: Option<OwnedFd>,
        signals: &mut Signals,
    ) -> Result<u8, Stop> {
        let pod_plan = PodPlan {
            hostname: self.plan.container.hostname.clone(),
            paths: PodPaths {
                network: self.network.clone(),
                ..PodPaths::default()
            },
            ..PodPlan::default()
        };
        let cgroups_path = self.plan.cgroups_path.clone();
        let host_limits = oci::host_limits::of_host(&mut self.plan, size.vcpus);
        let order = Order {
            parts: &self.parts,
            plan: &pod_plan,
            // Nobody changes its limits: no room.
            request: Request {
                cgroups_path: cgroups_path.as_deref(),
                host_limits: &host_limits,
                network: pod_plan.paths.network.as_deref(),
                // There is no order to start, before which others could add some.
                net_slots: match self.plan.hooks.create.is_empty() {
                    true => 0,
                    false => oci::LATER_INTERFACES,
                },
                serial,
                oom_score_adj: Some(self.plan.container.process.oom_score_adj.unwrap_or(0)),
                ..Request::plain(NAMESPACE, self.arguments.id(), size)
            },
        };
        let (config, container, plan) = (self.config, &self.container, &mut self.plan);
        let layers = self.layers;
        let mut access = None;
        let meanwhile = async |held: &mut Held| {
            access = Some(held.access());
            if container.has_hooks() {
                held.stand_in()?;
            }
            let placed = container.place(held, plan, layers).await;
            placed.inspect_err(|error| heed(config, &container.id, error.refusal()))?;
            Ok::<(), Stop>(container.run_create_hooks(held.pid()).await?)
        };
        let interrupted = async { Stop::Interrupted(signals.asks_to_end().await) };
        let booted = Pod::boot(config, order, meanwhile, interrupted).await;
        let outcome = match booted {
            Ok((pod, ())) => {
                self.timeline.mark("agent ready");
                let outcome = self.in_pod(&pod, signals).await;
                terminal::restore();
                match outcome.is_ok() {
                    true => {
                        pod.end_with(|| self.timeline.mark("guest powered off"))
                            .await
                    }
                    false => pod.destroy().await,
                }
                outcome
            }
            Err(stop) => Err(stop),
        };
        // Without it nothing was taken, and there was no container that could have stopped.
        if let Some(access) = access {
            self.timeline.add(&access.stamps());
            self.timeline.mark("everything given back");
            self.container.run_stopped_hooks().await;
            let printed = self.print_timeline();
            return outcome.and_then(|status| Ok(printed.map(|()| status)?));
        }
        outcome
    }

    /// From a pod that is ready to the container's exit code.
    async fn in_pod(&mut self, pod: &Pod, signals: &mut Signals) -> Result<u8, Stop> {
        pod.bound_time(&self.plan.container.resources)?;
        let mut spec = std::mem::take(&mut self.plan.container);
        let process = spec.process.mut_or_insert_default();
        let terminal = process.terminal;
        if terminal && let Some((rows, columns)) = terminal::size() {
            (process.rows, process.columns) = (rows.into(), columns.into());
        }
        let streams = Streams::open(pod, terminal).await?;
        let container = &self.container;
        tokio::select! {
            created = container.create(pod, spec, streams.stdio.clone()) => created?,
            signal = signals.asks_to_end() => return Err(Stop::Interrupted(signal)),
        }
        self.timeline.mark("container created");
        let (output, input) = streams.relay(terminal)?;
        container
            .start(pod, || Ok::<(), Stop>(input.open()?))
            .await?;
        self.timeline.mark("container started");
        let exit = self.attend(pod, signals, terminal).await?;
        self.timeline.mark("container exited");
        // All writers are gone with the container's pid namespace: the streams end by themselves, drained.
        for relay in output {
            tokio::select! {
                // A reader of ours that went away has told the container, and is no failure.
                finished = relay.finished() => drop(finished),
                error = pod.access.trouble() => return Err(error.into()),
            }
        }
        self.timeline.mark("output drained");
        if exit.oom_killed {
            pod.access.tell_memory(self.arguments.id());
        }
        Ok(exit_code(&exit))
    }

    /// Passes signals on until the container's init has exited.
    async fn attend(
        &self,
        pod: &Pod,
        signals: &mut Signals,
        terminal: bool,
    ) -> Result<WaitProcessResponse, Stop> {
        let id = self.arguments.id();
        let wait = pod.agent().wait(id);
        let mut wait = std::pin::pin!(wait);
        let trouble = pod.access.trouble();
        let mut trouble = std::pin::pin!(trouble);
        loop {
            let arrival = tokio::select! {
                biased;
                exit = &mut wait => return match exit {
                    Ok(exit) => Ok(exit),
                    Err(error) => Err(pod.access.explain(error).await.into()),
                },
                error = &mut trouble => return Err(error.into()),
                arrival = signals.next() => arrival,
            };
            let agent = pod.agent().clone();
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

    fn print_timeline(&self) -> Result<(), Failure> {
        if self.arguments.timeline {
            eprint!("{}", self.timeline.table());
        }
        if let Some(file) = &self.pictures.json {
            serde_json::to_writer_pretty(file, &self.timeline.moments())?;
        }
        if let Some(mut file) = self.pictures.svg.as_ref() {
            let title = format!("bulkhead run {}", self.arguments.id());
            file.write_all(self.timeline.svg(&title).as_bytes())?;
        }
        Ok(())
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
