//! The daemon: serves the socket that `start` has bound until containerd lets it go.

use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_shim::{
    containerd::{self, Place, Tasks, events::Events},
    sys::{self, daemon},
};
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::r#async::Server;

use crate::{connections::Connections, flags::Flags, log};

/// In the environment: containerd's socket for events.
pub const EVENTS_ADDRESS: &str = "TTRPC_ADDRESS";
/// How long the last events may take to reach containerd.
const FAREWELL: Duration = Duration::from_secs(3);
/// How long a client may take to close its connection once it has let the shim go.
const CLOSING: Duration = Duration::from_secs(1);

/// Runs to its end. The working directory is the bundle of the pod's first container.
pub fn run(flags: &Flags) -> Result<()> {
    sys::keep_memory_small();
    sys::allow_files();
    log::begin(flags.debug);
    let done = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Blocking work is rare: a thread that waits for more costs memory in every pod.
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .context("cannot make the event loop")?
        .block_on(serve(flags));
    if let Err(error) = &done {
        tracing::error!("{error:#}");
    }
    done
}

async fn serve(flags: &Flags) -> Result<()> {
    let listener = daemon::listener().context("no listening socket was handed over")?;
    let address = listener.local_addr().context("cannot name the socket")?;
    listener
        .set_nonblocking(true)
        .context("cannot set up the socket")?;
    let listener =
        tokio::net::UnixListener::from_std(listener).context("cannot watch the socket")?;
    let publish_to = std::env::var(EVENTS_ADDRESS).unwrap_or_default();
    let events = Events::start(&flags.namespace, &publish_to);
    let place = Place {
        namespace: flags.namespace.clone(),
        config: None,
    };
    let tasks = Tasks::new(place, events);
    let services = containerd::services(&tasks);
    let names = services.keys().cloned().collect();
    let (connections, listener) = Connections::of(listener, names);
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(services);
    server.start().await.context("cannot serve the socket")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch signals")?;
    tokio::select! {
        () = tasks.released() => tracing::info!("released by containerd"),
        _ = terminate.recv() => tracing::warn!("terminated"),
        _ = interrupt.recv() => tracing::warn!("interrupted"),
    }
    tasks.close(FAREWELL).await;
    connections.closed(CLOSING).await;
    let _ = server.shutdown().await;
    if let Some(path) = address.as_pathname() {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}
