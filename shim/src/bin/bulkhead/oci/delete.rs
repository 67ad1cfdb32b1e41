//! `delete`: what a container holds goes, whoever of its processes on the host has died.

use std::{os::fd::AsFd, time::Duration};

use bulkhead_shim::{
    command_line::{Client, ClientError, Room, RoomError, namespace},
    ledger::{self, Reclaimed},
    sys::process::{self, ProcessId},
};

use super::{Engine, wait_for};
use crate::failure::Failure;

/// How long a monitor may take to end after its container has been deleted.
const FAREWELL: Duration = Duration::from_secs(15);

#[derive(clap::Args)]
pub struct Delete {
    /// Kill it first if it runs; that there is none is no failure
    #[arg(short, long)]
    force: bool,
    /// The container
    id: String,
}

pub fn delete(engine: &Engine<'_>, words: &Delete) -> Result<u8, Failure> {
    let room = match Room::find(engine.root(), &words.id) {
        Err(RoomError::Missing(_)) if words.force => return Ok(0),
        other => other?,
    };
    delete_in(engine, &room, words.force)
}

/// The same for who tidies up.
pub fn by_force(engine: &Engine<'_>, id: &str) -> Result<u8, Failure> {
    delete_in(engine, &engine.find(id)?, true)
}

fn delete_in(engine: &Engine<'_>, room: &Room, force: bool) -> Result<u8, Failure> {
    let monitor = room.read()?.and_then(|record| record.monitor);
    match wait_for(ask(room, force)) {
        Ok(Asked::Done) => end(monitor, false)?,
        // Nobody is there who could be asked.
        Ok(Asked::Gone) => end(monitor, true)?,
        Err(failure) if !force => return Err(failure),
        Err(failure) => {
            // A monitor that does not answer must not go on.
            tracing::warn!("{}", failure.line());
            end(monitor, true)?;
        }
    }
    give_back(engine, room)?;
    room.remove()?;
    Ok(0)
}

enum Asked {
    Done,
    Gone,
}

async fn ask(room: &Room, force: bool) -> Result<Asked, Failure> {
    let client = match Client::connect(room) {
        Err(ClientError::Gone(_)) => return Ok(Asked::Gone),
        other => other?,
    };
    let status = match client.state().await {
        Ok(status) => status,
        Err(error) if error.is_missing() => return Ok(Asked::Done),
        Err(error) => return Err(error.into()),
    };
    if matches!(status, "running" | "paused") {
        if !force {
            let text = format!(
                "cannot delete container {} that is not stopped: {status}",
                room.id
            );
            return Err(Failure::new(text));
        }
        match client.kill(libc::SIGKILL.unsigned_abs(), true).await {
            Err(error) if !error.is_missing() => return Err(error.into()),
            _ => client.wait().await?,
        };
    }
    match client.delete().await {
        Err(error) if !error.is_missing() => Err(error.into()),
        _ => Ok(Asked::Done),
    }
}

/// Waits for the monitor's end, which comes by itself; or sees to it.
fn end(monitor: Option<ProcessId>, kill: bool) -> Result<(), Failure> {
    let Some(pidfd) = monitor.and_then(|monitor| monitor.open().ok().flatten()) else {
        return Ok(());
    };
    if kill {
        process::send_signal(pidfd.as_fd(), libc::SIGKILL)?;
    }
    if !process::wait_gone(pidfd.as_fd(), FAREWELL)? {
        tracing::warn!("the container's monitor does not end");
    }
    Ok(())
}

/// What a monitor that has died held is in its ledger.
fn give_back(engine: &Engine<'_>, room: &Room) -> Result<(), Failure> {
    let config = engine.load()?;
    match ledger::reclaim(&config.state_dir, &namespace(room.root()), &room.id)? {
        Reclaimed::Done(left) if !left.is_empty() => {
            let left: Vec<String> = left.iter().map(ToString::to_string).collect();
            let left = left.join("; ");
            Err(Failure::new(format!(
                "cannot give back {left}; try `bulkhead gc`"
            )))
        }
        Reclaimed::Alive(_) => Err(Failure::new(format!(
            "container {:?} is being created or deleted",
            room.id
        ))),
        _ => Ok(()),
    }
}
