//! `exec`: a further process in a container, with a keeper (`--detach`) or with this command in the
//! keeper's place.

use std::{
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use bulkhead_shim::command_line::{Client, Connection, Room};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};
use oci_spec::runtime as spec;
use serde_json::Value;

use super::{Engine, console, create::refuse_descriptors, process, status, wait_for};
use crate::{failure::Failure, terminal};

/// What runc's `exec` exits with when it has failed itself.
pub const FAILED: u8 = 255;

/// When the monitor has gone with the process.
const LOST: u8 = 255;

#[derive(clap::Args)]
pub struct Exec {
    /// Socket to which the terminal's master is sent
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// A variable, NAME=VALUE; any number of them
    #[arg(short, long, value_name = "VARIABLE")]
    env: Vec<String>,
    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,
    /// UID or UID:GID
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// Further groups; any number of them
    #[arg(short = 'g', long, value_name = "GID")]
    additional_gids: Vec<u32>,
    /// File with the process as config.json has it
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,
    /// End when the process runs
    #[arg(short, long)]
    detach: bool,
    /// File for the pid of the process that stands for it
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Let it and what it executes gain no privileges
    #[arg(long)]
    no_new_privs: bool,
    /// A further capability; any number of them
    #[arg(short, long, value_name = "NAME")]
    cap: Vec<String>,
    /// Only 0: descriptors cannot go into a guest
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// The container
    id: String,
    /// Program and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub fn exec(engine: &Engine<'_>, words: &Exec) -> Result<u8, Failure> {
    refuse_descriptors(words.preserve_fds)?;
    let (room, _) = engine.made(&words.id)?;
    let process = words.read(&room)?;
    let has_terminal = process.terminal() == Some(true);
    let socket = words.console_socket.as_deref();
    console::check(has_terminal, words.detach || socket.is_some(), socket)?;
    let status = wait_for(status(&room))?;
    match status {
        "running" => {}
        "paused" => return Err(Failure::new("cannot exec in a paused container")),
        "created" => {
            return Err(Failure::new(
                "cannot exec in a container that was not started",
            ));
        }
        _ => {
            let text = "cannot exec in a stopped container: container not running";
            return Err(Failure::new(text));
        }
    }
    // Before anything runs that they could be meant for.
    let signals = match words.detach {
        true => None,
        false => Some(catch_signals()?),
    };
    let slave = socket.map(console::open).transpose()?;
    let slave = slave.as_ref().map(AsFd::as_fd);
    let exec_id = fresh_id()?;
    let connection = process::introduce(&room, &exec_id, slave)?;
    connection.heard()?;
    let json = serde_json::to_vec(&process)?;
    let stub = wait_for(async {
        let client = Client::connect(&room)?;
        client.exec(&exec_id, json, has_terminal).await?;
        Ok(client.start(&exec_id).await?)
    })?;
    let own = std::process::id() as i32;
    if words.detach {
        let title = format!("bulkhead: a process of container {}", words.id);
        let pid = process::keep(&connection, slave, stub, None, &title)?;
        process::write_pid(words.pid_file.as_deref(), pid)?;
        connection.kept(pid)?;
        return Ok(0);
    }
    process::write_pid(words.pid_file.as_deref(), own)?;
    if has_terminal && slave.is_none() {
        terminal::make_raw();
    }
    connection.kept(own)?;
    let status = attend(&connection, &signals.expect("caught above"));
    terminal::restore();
    status
}

/// An id that no other process of the container has.
fn fresh_id() -> Result<String, Failure> {
    let mut bytes = [0; 16];
    linux::random(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn catch_signals() -> nix::Result<SignalFd> {
    let mut all = SigSet::all();
    for own in [Signal::SIGCHLD, Signal::SIGPIPE] {
        all.remove(own);
    }
    all.thread_block()?;
    SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// Passes signals on until the process has ended: its status.
fn attend(connection: &Connection, signals: &SignalFd) -> Result<u8, Failure> {
    loop {
        let mut fds = [
            PollFd::new(connection.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        linux::retry(|| poll(&mut fds, PollTimeout::NONE))?;
        if fds[0].any() == Some(true) {
            return Ok(connection.status()?.unwrap_or(LOST));
        }
        if let Some(signal) = signals.read_signal()? {
            // A monitor that has gone shows at the connection.
            let _ = connection.signal(signal.ssi_signo as i32);
        }
    }
}

impl Exec {
    /// The process: as the file has it, or the container's own with what the words change.
    fn read(&self, room: &Room) -> Result<spec::Process, Failure> {
        let parse = |path: &Path, what: &str| -> Result<Value, Failure> {
            let text = fs::read(path).map_err(|error| {
                let path = path.display();
                Failure::new(format!("cannot read {what} {path}: {error}"))
            })?;
            serde_json::from_slice(&text).map_err(|error| {
                let path = path.display();
                Failure::new(format!("{what} {path} is not valid: {error}"))
            })
        };
        let mut process: spec::Process = match &self.process {
            Some(path) => serde_json::from_value(parse(path, "--process")?)?,
            None => {
                let config = parse(&room.config(), "the container's configuration")?;
                let config: spec::Spec = serde_json::from_value(config)?;
                let mut process = config.process().clone().unwrap_or_default();
                if self.command.is_empty() {
                    return Err(Failure::new("exec needs a program, or --process FILE"));
                }
                // A terminal is asked for by its flag.
                process.set_terminal(Some(false));
                process
            }
        };
        if !self.command.is_empty() {
            process.set_args(Some(self.command.clone()));
        }
        self.change(&mut process)?;
        Ok(process)
    }

    fn change(&self, process: &mut spec::Process) -> Result<(), Failure> {
        if self.tty {
            process.set_terminal(Some(true));
        }
        if let Some(cwd) = &self.cwd {
            process.set_cwd(cwd.clone());
        }
        if self.no_new_privs {
            process.set_no_new_privileges(Some(true));
        }
        let mut env = process.env().clone().unwrap_or_default();
        env.extend(self.env.iter().cloned());
        process.set_env(Some(env));
        let mut user = process.user().clone();
        if let Some(words) = &self.user {
            let number = |text: &str| {
                text.parse::<u32>()
                    .map_err(|_| Failure::new(format!("--user {words:?} is not UID or UID:GID")))
            };
            let (uid, gid) = words.split_once(':').unwrap_or((words, ""));
            user.set_uid(number(uid)?);
            if !gid.is_empty() {
                user.set_gid(number(gid)?);
            }
        }
        if !self.additional_gids.is_empty() {
            user.set_additional_gids(Some(self.additional_gids.clone()));
        }
        process.set_user(user);
        self.add_capabilities(process)
    }

    fn add_capabilities(&self, process: &mut spec::Process) -> Result<(), Failure> {
        if self.cap.is_empty() {
            return Ok(());
        }
        let mut sets = process.capabilities().clone().unwrap_or_default();
        for name in &self.cap {
            let unknown = |_| Failure::new(format!("unknown capability {name:?}"));
            let capability: spec::Capability = name.parse().map_err(unknown)?;
            let with = |set: &Option<spec::Capabilities>| {
                let mut set = set.clone().unwrap_or_default();
                set.insert(capability);
                Some(set)
            };
            sets.set_bounding(with(sets.bounding()));
            sets.set_effective(with(sets.effective()));
            sets.set_permitted(with(sets.permitted()));
        }
        process.set_capabilities(Some(sets));
        Ok(())
    }
}
