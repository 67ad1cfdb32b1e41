//! Serves the agent's RPCs on one connection that is already made.
//!
//! ttrpc's server takes connections from a listener only: here is a listener that hands out one connection and then waits
//! for ever, and a stream that says when the server has let go of it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bulkhead_agent_protocol::{Watched, agent_ttrpc};
use futures_core::Stream as FutureStream;
use tokio::sync::oneshot;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::sandbox::Sandbox;
use crate::service::Service;
use crate::stream::Stream;

/// Serves until the connection ends.
pub(crate) async fn serve(connection: Stream, sandbox: Arc<Sandbox>) -> ttrpc::Result<()> {
    let (closed, when_closed) = oneshot::channel();
    let watched = Watched::new(connection, closed);
    let service = agent_ttrpc::create_agent(Arc::new(Service(sandbox)));
    let mut server = Server::new()
        .add_listener(Listener::new(Once(Some(watched))))
        .register_service(service);
    server.start().await?;
    // Resolves with an error, because the sender is dropped with the stream and never used.
    let _ = when_closed.await;
    Ok(())
}

/// A listener's stream of connections that has one.
struct Once(Option<Connection>);

type Connection = Watched<Stream, oneshot::Sender<()>>;

impl FutureStream for Once {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0
            .take()
            .map_or(Poll::Pending, |stream| Poll::Ready(Some(Ok(stream))))
    }
}
