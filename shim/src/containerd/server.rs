//! The socket on which a daemon offers its tasks.

use std::{io, os::unix::net::UnixListener, path::PathBuf, sync::Arc, time::Duration};

use super::{Tasks, connections::Connections, services};

/// How long a client may take to close its connection once it has let the daemon go.
const CLOSING: Duration = Duration::from_secs(1);

/// A server of containerd's services on one socket.
pub struct Server {
    server: ttrpc::r#async::Server,
    connections: Connections,
    path: Option<PathBuf>,
}

impl Server {
    /// Begins to serve `listener`.
    ///
    /// # Errors
    /// It is no socket that can be watched.
    pub async fn start(tasks: &Arc<Tasks>, listener: UnixListener) -> io::Result<Server> {
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let services = services(tasks);
        let names = services.keys().cloned().collect();
        let (connections, listener) = Connections::of(listener, names);
        let mut server = ttrpc::r#async::Server::new()
            .add_listener(listener)
            .register_service(services);
        server.start().await.map_err(io::Error::other)?;
        Ok(Server {
            server,
            connections,
            path: address.as_pathname().map(PathBuf::from),
        })
    }

    /// Lets the last answers be read, ends, and removes the socket.
    pub async fn stop(mut self) {
        self.connections.closed(CLOSING).await;
        let _ = self.server.shutdown().await;
        if let Some(path) = self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}
