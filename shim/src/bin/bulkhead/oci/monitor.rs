//! The daemon that `create` leaves behind.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::Mutex,
};

use bulkhead_shim::{
    command_line::{KEEPERS, Monitor},
    sys::{
        self,
        daemon::{self, LISTENER},
        own,
    },
};
use tracing_subscriber::{
    Layer, filter::LevelFilter, filter::Targets, layer::SubscriberExt, util::SubscriberInitExt,
};

use super::Engine;
use crate::failure::Failure;

/// Largest log of one monitor, in bytes: it is in memory.
const MOST: usize = 1 << 20;

#[derive(clap::Args)]
pub struct Arguments {
    id: String,
}

pub fn run(engine: &Engine<'_>, arguments: &Arguments) -> Result<u8, Failure> {
    let calls = daemon::listener(LISTENER)?;
    let keepers = daemon::listener(KEEPERS)?;
    own::close_inherited(KEEPERS + 1)?;
    own::narrow()?;
    // Whoever called `create` may want to unmount where he stood.
    std::env::set_current_dir("/")?;
    sys::keep_memory_small();
    sys::allow_files();
    let room = engine.find(&arguments.id)?;
    log_to(&room.log(), engine.debug)?;
    let config = engine.config.map(Path::to_path_buf);
    daemon::event_loop()?.block_on(Monitor::run(room, config, calls, keepers))?;
    Ok(0)
}

fn log_to(path: &Path, debug: bool) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let file = options.append(true).create(true).mode(0o600).open(path)?;
    let own = match debug {
        true => LevelFilter::DEBUG,
        false => LevelFilter::INFO,
    };
    let targets = Targets::new()
        .with_default(LevelFilter::OFF)
        .with_target("bulkhead_shim", own);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(Mutex::new(Lines { file, room: MOST }))
        .with_target(false)
        .with_ansi(false);
    tracing_subscriber::registry()
        .with(lines.with_filter(targets))
        .init();
    Ok(())
}

/// Lines for as long as there is room.
struct Lines {
    file: File,
    room: usize,
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(left) = self.room.checked_sub(line.len()) {
            self.room = left;
            // A full disk is no reason to end.
            let _ = self.file.write(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
