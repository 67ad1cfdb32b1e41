//! The daemon: serves the socket that `start` has bound until containerd lets it go.

use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_shim::{
    containerd::{Place, Server, Tasks, events::Events},
    sys::{
        self,
        daemon::{self, LISTENER},
    },
};
use tokio::signal::unix::{SignalKind, signal};

use crate::{flags::Flags, log};

/// In the environment: containerd's socket for events.
pub const EVENTS_ADDRESS: &str = "TTRPC_ADDRESS";
/// How long the last events may take to reach containerd.
const FAREWELL: Duration = Duration::from_secs(3);

/// Runs to its end. The working directory is the bundle of the pod's first container.
pub fn run(flags: &Flags) -> Result<()> {
    sys::keep_memory_small();
    sys::allow_files();
    log::begin(flags.debug);
    let done = daemon::event_loop()
        .context("cannot make the event loop")?
        .block_on(serve(flags));
    if let Err(error) = &done {
        tracing::error!("{error:#}");
    }
    done
}

async fn serve(flags: &Flags) -> Result<()> {
    let listener = daemon::listener(LISTENER).context("no listening socket was handed over")?;
    let publish_to = std::env::var(EVENTS_ADDRESS).unwrap_or_default();
    let events = Events::start(&flags.namespace, &publish_to);
    let place = Place {
        namespace: flags.namespace.clone(),
        ..Place::default()
    };
    let tasks = Tasks::new(place, events);
    let server = Server::start(&tasks, listener).await;
    let server = server.context("cannot serve the socket")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch signals")?;
    tokio::select! {
        () = tasks.released() => tracing::info!("released by containerd"),
        _ = terminate.recv() => tracing::warn!("terminated"),
        _ = interrupt.recv() => tracing::warn!("interrupted"),
    }
    tasks.close(FAREWELL).await;
    server.stop().await;
    Ok(())
}
