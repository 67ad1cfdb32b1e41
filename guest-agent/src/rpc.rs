//! Serves the agent's RPCs on one connection that is already made.
//!
//! ttrpc's server takes connections from a listener only: here is a listener that hands out one connection and then waits
//! for ever, and a stream that says when the server has let go of it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bulkhead_agent_protocol::agent_ttrpc;
use futures_core::Stream as FutureStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::sandbox::Sandbox;
use crate::service::Service;
use crate::stream::Stream;

/// Serves until the connection ends.
pub(crate) async fn serve(connection: Stream, sandbox: Arc<Sandbox>) -> ttrpc::Result<()> {
    let (closed, when_closed) = oneshot::channel();
    let watched = Watched {
        stream: connection,
        _closed: closed,
    };
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
struct Once(Option<Watched>);

impl FutureStream for Once {
    type Item = io::Result<Watched>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0
            .take()
            .map_or(Poll::Pending, |stream| Poll::Ready(Some(Ok(stream))))
    }
}

/// A stream whose end is noticed.
struct Watched {
    stream: Stream,
    _closed: oneshot::Sender<()>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
