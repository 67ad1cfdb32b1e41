//! `create`, `start`, and `run --detach`, which is both.

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use bulkhead_shim::{
    audit::time,
    command_line::{Client, Record, Room},
    oci::{self, Bundle, Role, Seen},
    sys::{
        daemon,
        mount::Depth,
        process::{ProcessId, wait_gone},
        view::View,
    },
};
use oci_spec::runtime as spec;

use super::{Engine, console, process, status, wait_for};
use crate::failure::Failure;

/// How long a monitor may take to give everything back after a failure.
const UNDOING: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub struct Create {
    /// Directory of the bundle: config.json and the root file system
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// Socket to which the terminal's master is sent
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// File for the pid of the process that stands for the container's
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Without a meaning here: the guest's root is always pivoted
    #[arg(long)]
    pub no_pivot: bool,
    /// Without a meaning here: a guest has keyrings of its own
    #[arg(long)]
    pub no_new_keyring: bool,
    /// Only 0: descriptors cannot go into a guest
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// Name of the container
    pub id: String,
}

pub fn create(engine: &Engine<'_>, words: &Create) -> Result<u8, Failure> {
    make(engine, words)?;
    Ok(0)
}

/// `run --detach`.
pub fn run_detached(engine: &Engine<'_>, words: &Create) -> Result<u8, Failure> {
    make(engine, words)?;
    let started = start(engine, &words.id);
    if started.is_err() {
        let _ = super::delete::by_force(engine, &words.id);
    }
    started
}

pub fn start(engine: &Engine<'_>, id: &str) -> Result<u8, Failure> {
    let (room, _) = engine.made(id)?;
    wait_for(async {
        match status(&room).await? {
            "created" => {}
            "stopped" => {
                return Err(Failure::new("cannot start a container that has stopped"));
            }
            _ => {
                return Err(Failure::new("cannot start an already running container"));
            }
        }
        Client::connect(&room)?.start("").await?;
        Ok(0)
    })
}

/// Refuses descriptors that would have to go into a guest.
pub fn refuse_descriptors(count: u32) -> Result<(), Failure> {
    match count {
        0 => Ok(()),
        count => Err(Failure::new(format!(
            "--preserve-fds {count} is not supported: descriptors of the host cannot go into a guest"
        ))),
    }
}

fn make(engine: &Engine<'_>, words: &Create) -> Result<(), Failure> {
    refuse_descriptors(words.preserve_fds)?;
    let bundle = Bundle::load(&words.bundle)?;
    let process = bundle.spec.process().as_ref();
    let terminal = process.and_then(|process| process.terminal()) == Some(true);
    let socket = words.console_socket.as_deref();
    console::check(terminal, true, socket)?;
    let room = Room::make(engine.root(), &words.id)?;
    let mut monitor = None;
    let made = make_in(engine, words, &room, &bundle, terminal, &mut monitor);
    if made.is_err() {
        // It ends with our connection, which is closed by now.
        let pidfd = monitor.and_then(|monitor: ProcessId| monitor.open().ok().flatten());
        if let Some(pidfd) = pidfd {
            let _ = wait_gone(pidfd.as_fd(), UNDOING);
        }
        let _ = room.remove();
    }
    made
}

fn make_in(
    engine: &Engine<'_>,
    words: &Create,
    room: &Room,
    bundle: &Bundle,
    terminal: bool,
    monitor: &mut Option<ProcessId>,
) -> Result<(), Failure> {
    room.keep_config(&fs::read(bundle.directory.join("config.json"))?)?;
    let listeners = match holder(engine, bundle, &words.id)? {
        Some(holder) => {
            room.join(&holder)?;
            None
        }
        None => Some(vec![
            room.listen_for_calls()?.into(),
            room.listen_for_keepers()?.into(),
        ]),
    };
    let slave = words.console_socket.as_deref().map(console::open);
    let slave = slave.transpose()?;
    let slave = slave.as_ref().map(AsFd::as_fd);
    // Before the monitor is there: it looks after nothing but this connection until there is a
    // container.
    let connection = process::introduce(room, "", slave)?;
    if let Some(listeners) = listeners {
        *monitor = ProcessId::of(start_monitor(engine, &words.id, listeners)? as i32);
    }
    connection.heard()?;
    let path = bundle.directory.to_string_lossy();
    let stub = wait_for(async { Ok(Client::connect(room)?.create(&path, terminal).await?) })?;
    let title = format!(
        "bulkhead: container {} (its processes are in its virtual machine)",
        words.id
    );
    let view = view(bundle)?;
    let pid = process::keep(&connection, slave, stub, Some(&view), &title)?;
    let keeper = ProcessId::of(pid);
    let keeper = keeper.ok_or_else(|| Failure::new("the container's keeper has ended"))?;
    room.write(&record(bundle, &words.id, keeper, *monitor))?;
    process::write_pid(words.pid_file.as_deref(), pid)?;
    Ok(connection.kept(pid)?)
}

/// The container's files of the host, for who enters its mount namespace.
fn view(bundle: &Bundle) -> Result<View, Failure> {
    let (root, seen) = oci::view(bundle)?;
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |error| Failure::new(format!("cannot show {path} in the keeper's root: {error}"))
    };
    let mut view = View::of(&root.path, root.read_only).map_err(failed(&root.path))?;
    for (path, seen) in seen {
        let added = match seen {
            Seen::Nothing => view.hide(&path),
            Seen::Processes => view.processes(&path),
            Seen::Host {
                source,
                recursive,
                read_only,
            } => view.bind(&path, &source, Depth::of(recursive), read_only),
        };
        added.map_err(failed(&path))?;
    }
    Ok(view)
}

fn record(bundle: &Bundle, id: &str, keeper: ProcessId, monitor: Option<ProcessId>) -> Record {
    let root = bundle.spec.root().as_ref();
    let rootfs = root.map_or(Path::new("rootfs"), |root| root.path());
    Record {
        oci_version: bundle.spec.version().clone(),
        id: id.into(),
        bundle: bundle.directory.clone(),
        rootfs: bundle.directory.join(rootfs),
        annotations: bundle.spec.annotations().clone().unwrap_or_default(),
        created: time::written(SystemTime::now()),
        keeper,
        monitor,
    }
}

/// The container whose pod this one joins: Podman names namespaces of its process (`podman pod`,
/// `--network container:NAME`).
fn holder(engine: &Engine<'_>, bundle: &Bundle, id: &str) -> Result<Option<Room>, Failure> {
    let annotations = bundle.spec.annotations().clone().unwrap_or_default();
    let role = oci::role(&annotations, id);
    let linux = bundle.spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_deref());
    let mut found = None;
    for namespace in namespaces.unwrap_or_default() {
        if let Some(path) = namespace.path()
            && let Some(holder) = Room::holder(engine.root(), path)?
        {
            check_shared(&holder, namespace.typ(), &role)?;
            found = Some(holder);
        }
    }
    Ok(found)
}

/// Refuses a namespace that the holder has to itself: of a lone container's only the network is its
/// machine's; those of a pod are shared by whoever says that he is its member.
fn check_shared(holder: &Room, kind: spec::LinuxNamespaceType, role: &Role) -> Result<(), Failure> {
    let is_member = matches!(role, Role::Member(pod) if *pod == holder.id);
    if kind == spec::LinuxNamespaceType::Network || is_member {
        return Ok(());
    }
    Err(Failure::new(format!(
        "--{kind}=container: is not supported: container {} has its {kind} namespace to itself; make a pod of both \
        (podman pod create --share {kind})",
        holder.id
    )))
}

fn start_monitor(engine: &Engine<'_>, id: &str, listeners: Vec<OwnedFd>) -> Result<u32, Failure> {
    let own = std::env::current_exe()?;
    let absolute = |path: &Path| fs::canonicalize(path).map(|path| path.display().to_string());
    let root = absolute(engine.root())?;
    let config = engine.config.map(absolute).transpose()?;
    let mut arguments = vec!["monitor", "--root", &root];
    if let Some(config) = &config {
        arguments.extend(["--config", config]);
    }
    if engine.debug {
        arguments.push("--debug");
    }
    arguments.extend(["--", id]);
    let started = daemon::spawn(&own, &arguments, &[], listeners);
    started.map_err(|error| Failure::new(format!("cannot start the container's monitor: {error}")))
}
