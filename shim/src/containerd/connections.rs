//! The connections to the shim's socket, counted: the shim ends after its clients have closed them.
//!
//! An answer that arrives together with the connection's end may be lost: ttrpc's client in Go takes whichever it sees first. So the
//! answer to Shutdown and ShutdownSandbox is followed by the client's own close, and only then by the shim's end.

use std::{
    collections::BTreeSet,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bulkhead_agent_protocol::Watched;
use futures_core::Stream;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
};
use ttrpc::r#async::transport::Listener;

use super::offers::Offers;

/// How many are open.
pub struct Connections(watch::Sender<usize>);

impl Connections {
    /// Those that `listener` will accept, to a server of these services.
    pub fn of(listener: UnixListener, services: BTreeSet<String>) -> (Connections, Listener) {
        let open = watch::Sender::new(0);
        let accepting = Accepting {
            listener,
            services: Arc::new(services),
            open: open.clone(),
        };
        (Connections(open), Listener::new(accepting))
    }

    /// Waits until none is open, at most `limit`: a client that keeps its own holds up nothing.
    pub async fn closed(&self, limit: Duration) {
        let mut open = self.0.subscribe();
        let _ = tokio::time::timeout(limit, open.wait_for(|open| *open == 0)).await;
    }
}

struct Accepting {
    listener: UnixListener,
    services: Arc<BTreeSet<String>>,
    open: watch::Sender<usize>,
}

impl Stream for Accepting {
    type Item = io::Result<Watched<Offers<UnixStream>, Open>>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let accepted = ready!(self.listener.poll_accept(context));
        Poll::Ready(Some(accepted.map(|(stream, _)| {
            self.open.send_modify(|open| *open += 1);
            let stream = Offers::new(stream, self.services.clone());
            Watched::new(stream, Open(self.open.clone()))
        })))
    }
}

/// One that is open.
struct Open(watch::Sender<usize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}
