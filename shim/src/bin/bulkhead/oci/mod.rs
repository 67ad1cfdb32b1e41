//! The commands that engines call: runc's, with runc's flags, exit codes and words.

mod console;
mod create;
mod delete;
mod events;
mod exec;
mod list;
mod log;
mod monitor;
mod process;
mod signals;
mod spec;
mod state;
mod update;

use std::path::{Path, PathBuf};

use bulkhead_shim::{
    command_line::{Client, ClientError, DEFAULT_ROOT, Record, Room},
    config::Config,
    oci as conversion,
    sys::own,
};

use crate::failure::Failure;

pub use create::{Create, refuse_descriptors, run_detached};
pub use events::of_container;
pub use log::Format;
pub use monitor::{Arguments as Monitor, run as monitor};

/// What runc exits with when it has failed.
const FAILED: u8 = 1;

/// runc's global flags, before or after the command.
#[derive(clap::Args)]
pub struct Globals {
    /// Where containers are written down
    #[arg(long, global = true, hide = true, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Write failures to a file too
    #[arg(long, global = true, hide = true, value_name = "FILE")]
    log: Option<PathBuf>,
    /// text or json
    #[arg(long, global = true, hide = true, value_name = "FORMAT", value_enum)]
    log_format: Option<Format>,
    /// cgroupsPath is SLICE:PREFIX:NAME, which it says by itself
    #[arg(long, global = true, hide = true, value_name = "YES", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    systemd_cgroup: Option<bool>,
    /// Without a meaning here
    #[arg(long, global = true, hide = true, value_name = "WORD")]
    rootless: Option<String>,
    /// Without a meaning here
    #[arg(long, global = true, hide = true, value_name = "FILE")]
    criu: Option<PathBuf>,
    /// Without a meaning here: a pod always has a cgroup
    #[arg(long, global = true, hide = true, value_name = "WORD")]
    cgroup_manager: Option<String>,
}

/// runc's commands that are not also people's.
#[derive(clap::Subcommand)]
pub enum Verb {
    /// Make a container that stands before its program
    #[command(hide = true)]
    Create(Create),
    /// Let a created container run
    #[command(hide = true)]
    Start(Id),
    /// Print a container's state as JSON
    #[command(hide = true)]
    State(Id),
    /// Send a container a signal
    #[command(hide = true)]
    Kill(signals::Kill),
    /// Forget a container that has stopped
    #[command(hide = true)]
    Delete(delete::Delete),
    /// Run a further process in a container
    #[command(hide = true)]
    Exec(exec::Exec),
    /// Show the processes on the host that stand for a container's
    #[command(hide = true)]
    Ps(list::Ps),
    /// List the containers of a root
    #[command(hide = true)]
    List(list::List),
    /// Freeze a container
    #[command(hide = true)]
    Pause(Id),
    /// Thaw it
    #[command(hide = true)]
    Resume(Id),
    /// Change a container's limits
    #[command(hide = true)]
    Update(update::Update),
    /// Print what can be done for a config.json
    #[command(hide = true)]
    Features,
    /// Write a config.json to begin with
    #[command(hide = true)]
    Spec(spec::Spec),
}

/// Of a command that takes nothing else.
#[derive(clap::Args)]
pub struct Id {
    /// The container
    id: String,
}

/// What every command knows.
pub struct Engine<'a> {
    globals: &'a Globals,
    /// `--config`
    config: Option<&'a Path>,
    debug: bool,
}

impl<'a> Engine<'a> {
    pub fn new(globals: &'a Globals, config: Option<&'a Path>, debug: bool) -> Engine<'a> {
        Engine {
            globals,
            config,
            debug,
        }
    }

    /// Runs a command, and writes down why it fails.
    pub fn run(&self, act: impl FnOnce(&Engine<'_>) -> Result<u8, Failure>) -> Result<u8, Failure> {
        let format = self.globals.log_format.unwrap_or_default();
        // Before anything can fail: engines read it whatever happens.
        let log = self.globals.log.as_deref();
        let log = log.map(|path| log::Log::open(path, format)).transpose();
        let log = log.map_err(|error| Failure::new(error).with_code(FAILED))?;
        let narrowed = own::narrow().map_err(Failure::from);
        narrowed.and_then(|()| act(self)).map_err(|failure| {
            if let Some(log) = log {
                log.write(failure.line());
            }
            match failure.code {
                crate::failure::OWN => failure.with_code(FAILED),
                _ => failure,
            }
        })
    }

    /// Does what a verb says.
    pub fn act(&self, verb: Verb) -> Result<u8, Failure> {
        match verb {
            Verb::Create(words) => create::create(self, &words),
            Verb::Start(Id { id }) => create::start(self, &id),
            Verb::State(Id { id }) => state::print(self, &id),
            Verb::Kill(words) => signals::kill(self, &words),
            Verb::Delete(words) => delete::delete(self, &words),
            Verb::Exec(words) => {
                exec::exec(self, &words).map_err(|failure| failure.with_code(exec::FAILED))
            }
            Verb::Ps(words) => list::ps(self, &words),
            Verb::List(words) => list::list(self, &words),
            Verb::Pause(Id { id }) => update::set_paused(self, &id, true),
            Verb::Resume(Id { id }) => update::set_paused(self, &id, false),
            Verb::Update(words) => update::update(self, &words),
            Verb::Features => print_json(&conversion::features()),
            Verb::Spec(words) => spec::write(&words),
        }
    }

    fn root(&self) -> &Path {
        let root = self.globals.root.as_deref();
        root.unwrap_or(Path::new(DEFAULT_ROOT))
    }

    fn find(&self, id: &str) -> Result<Room, Failure> {
        Ok(Room::find(self.root(), id)?)
    }

    /// A container that has been made, and what was written down of it.
    fn made(&self, id: &str) -> Result<(Room, Record), Failure> {
        let room = self.find(id)?;
        match room.read()? {
            Some(record) => Ok((room, record)),
            None => Err(Failure::new(format!("container {id:?} is being created"))),
        }
    }

    fn load(&self) -> Result<Config, Failure> {
        Ok(Config::load(self.config)?)
    }
}

/// Runs a command's part that waits for others.
fn wait_for<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(work)
}

/// Where a container is in its life. Within an event loop.
async fn status(room: &Room) -> Result<&'static str, Failure> {
    match Client::connect(room) {
        Ok(client) => match client.state().await {
            Ok(word) => Ok(word),
            // It is being deleted.
            Err(error) if error.is_missing() => Ok("stopped"),
            Err(error) => Err(error.into()),
        },
        Err(ClientError::Gone(_)) => Ok("stopped"),
        Err(error) => Err(error.into()),
    }
}

fn print_json(value: &impl serde::Serialize) -> Result<u8, Failure> {
    use std::io::Write;
    let text = serde_json::to_string_pretty(value)?;
    writeln!(std::io::stdout(), "{text}")?;
    Ok(0)
}
