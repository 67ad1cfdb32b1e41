//! Sockets of the host: the agent listens in the place of their servers (docs/adr/0009).
//!
//! ```text
//!  client ── connect(2) ──► a socket's inode in the share ── listener ──► waiting ──► NextConnection's answer
//!                                                                            │
//!  client ◄──────────────────── bytes ──────────────► the host's vsock port ◄┘ AnswerConnection
//! ```
//!
//! Listeners and connections pin the file system of the socket, so that those of a place in the share end together.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bulkhead_agent_protocol::{MAX_DATAGRAM, agent};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{UnixDatagram, UnixListener, UnixStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::{JoinHandle, JoinSet};

use crate::container::blocking;
use crate::log;
use crate::stage::mounts::open_guest_path;
use crate::stream::{Host, Stream};

/// Clients that wait for the host to take them, beside one a listener; others wait in the kernel's queue, as at any busy server.
const MOST_WAITING: usize = 64;
/// Bytes in flight in each direction of a connection.
const BUFFER: usize = 16 << 10;
/// Between two tries of what failed.
const PAUSE: Duration = Duration::from_millis(100);

/// A socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// The number is taken.
    #[error("socket {0} is served already")]
    Served(u64),
    /// The client has gone, or never was.
    #[error("no connection {0} waits for an answer")]
    NoConnection(u64),
    /// The system refused.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The sockets that are served.
#[derive(Clone, Debug)]
pub(crate) struct Sockets {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    room: Arc<Semaphore>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Table {
    served: HashMap<u64, Served>,
    /// The oldest first.
    waiting: VecDeque<Client>,
    /// Those that the shim has been told of.
    clients: HashMap<u64, Client>,
    last: u64,
    /// By place, from its first listener to its end.
    connections: HashMap<String, JoinSet<()>>,
}

#[derive(Debug)]
struct Served {
    place: String,
    listener: JoinHandle<()>,
}

/// Who wants to be connected to the host's server.
#[derive(Debug)]
struct Client {
    socket: u64,
    place: String,
    wish: Wish,
    /// Given back when the shim has been told.
    room: Option<OwnedSemaphorePermit>,
}

#[derive(Debug)]
enum Wish {
    Stream(UnixStream),
    /// Where the stream that datagrams are written to is awaited.
    Datagrams(oneshot::Sender<Stream>),
}

enum Listener {
    Stream(UnixListener),
    Datagrams(UnixDatagram),
}

impl Default for Sockets {
    fn default() -> Self {
        let shared = Arc::new(Shared {
            table: Mutex::default(),
            room: Arc::new(Semaphore::new(MOST_WAITING)),
            arrived: Notify::new(),
        });
        Self { shared }
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table
            .lock()
            .expect("no code panics while it holds this lock")
    }
}

/// Where the clients of one listener queue.
struct Queue {
    shared: Arc<Shared>,
    socket: u64,
    place: String,
}

impl Queue {
    async fn add(&self, wish: Wish) {
        let room = Arc::clone(&self.shared.room).acquire_owned().await;
        let client = Client {
            socket: self.socket,
            place: self.place.clone(),
            wish,
            room: Some(room.expect("nobody closes the semaphore")),
        };
        self.shared.table().waiting.push_back(client);
        self.shared.arrived.notify_one();
    }
}

impl Sockets {
    /// Whether something of a place has been served, and the place has not been ended.
    pub(crate) fn has(&self, place: &str) -> bool {
        self.shared.table().connections.contains_key(place)
    }

    /// Begins to listen.
    pub(crate) async fn serve(
        &self,
        request: agent::ServeSocketRequest,
    ) -> Result<(), SocketError> {
        let agent::ServeSocketRequest { socket, place, .. } = request.clone();
        if self.shared.table().served.contains_key(&socket) {
            return Err(SocketError::Served(socket));
        }
        // On another thread: a share that does not answer must stop nobody else.
        let bound = blocking(move || bind(&request)).await?;
        let queue = Queue {
            shared: Arc::clone(&self.shared),
            socket,
            place: place.clone(),
        };
        let listener = match bound {
            Listener::Stream(listener) => tokio::spawn(accept(listener, queue)),
            Listener::Datagrams(socket) => tokio::spawn(collect(socket, queue)),
        };
        let replaced = {
            let mut table = self.shared.table();
            table.connections.entry(place.clone()).or_default();
            table.served.insert(socket, Served { place, listener })
        };
        // Two requests for one number at once: the shim makes none.
        if let Some(Served { listener, .. }) = replaced {
            ended(listener).await;
        }
        Ok(())
    }

    /// Stops listening. Clients that wait still get their answer.
    pub(crate) async fn stop(&self, socket: u64) {
        let served = self.shared.table().served.remove(&socket);
        if let Some(served) = served {
            ended(served.listener).await;
        }
    }

    /// Ends everything of a place.
    pub(crate) async fn end(&self, place: &str) {
        let (listeners, connections) = {
            let mut table = self.shared.table();
            let listeners: Vec<Served> = table
                .served
                .extract_if(|_, served| served.place == place)
                .map(|(_, served)| served)
                .collect();
            table.waiting.retain(|client| client.place != place);
            table.clients.retain(|_, client| client.place != place);
            (listeners, table.connections.remove(place))
        };
        for served in listeners {
            ended(served.listener).await;
        }
        if let Some(mut connections) = connections {
            connections.shutdown().await;
        }
    }

    /// Waits for the next client; its socket's number, and the connection's.
    pub(crate) async fn next(&self) -> (u64, u64) {
        loop {
            {
                let mut table = self.shared.table();
                if let Some(mut client) = table.waiting.pop_front() {
                    client.room = None;
                    table.last += 1;
                    let (socket, connection) = (client.socket, table.last);
                    table.clients.insert(connection, client);
                    return (socket, connection);
                }
            }
            // One that arrives in between leaves its permit.
            self.shared.arrived.notified().await;
        }
    }

    /// Joins a client with the host, or closes it.
    pub(crate) async fn answer(
        &self,
        host: &Host,
        request: &agent::AnswerConnectionRequest,
    ) -> Result<(), SocketError> {
        let number = request.connection;
        let client = self.shared.table().clients.remove(&number);
        let client = client.ok_or(SocketError::NoConnection(number))?;
        let port = request.stream_port;
        if port == 0 {
            return Ok(());
        }
        let stream = host
            .dial(port)
            .await
            .map_err(system(format!("connect to port {port} of the host")))?;
        match client.wish {
            Wish::Stream(inside) => {
                let mut table = self.shared.table();
                // Without its place, which has ended meanwhile, so does the client.
                if let Some(connections) = table.connections.get_mut(&client.place) {
                    while connections.try_join_next().is_some() {}
                    connections.spawn(copy(inside, stream));
                }
            }
            // Its listener may have ended meanwhile.
            Wish::Datagrams(awaited) => drop(awaited.send(stream)),
        }
        Ok(())
    }
}

fn system(what: String) -> impl FnOnce(io::Error) -> SocketError {
    move |source| SocketError::System { what, source }
}

/// Its descriptors are closed after this.
async fn ended(task: JoinHandle<()>) {
    task.abort();
    // Cancelled, or it has ended by itself.
    let _ = task.await;
}

fn bind(request: &agent::ServeSocketRequest) -> Result<Listener, SocketError> {
    let what = || format!("listen in {} for {:?}", request.directory, request.name);
    let directory = open_guest_path(&request.directory)
        .map_err(|errno| system(what())(io::Error::from(errno)))?;
    // A directory of a volume is reached by no name that a container could have changed, and its path may be too long for a
    // socket's address.
    let path =
        PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(&request.name);
    let bound = match request.datagrams {
        false => UnixListener::bind(&path).map(Listener::Stream),
        true => UnixDatagram::bind(&path).map(Listener::Datagrams),
    };
    bound.map_err(system(what()))
}

async fn accept(listener: UnixListener, queue: Queue) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => queue.add(Wish::Stream(stream)).await,
            Err(error) => {
                // Out of descriptors, mostly: the client stays where it is.
                log::warn(&format!(
                    "cannot accept a connection to a socket of the host: {error}"
                ));
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Copies until both directions have ended, each of which may end before the other. When one side breaks, the other does.
async fn copy(mut inside: UnixStream, mut host: Stream) {
    // A side that broke has lost its reader or its writer: closing both tells the other one.
    let _ = copy_bidirectional_with_sizes(&mut inside, &mut host, BUFFER, BUFFER).await;
}

/// Passes datagrams to the host, on a stream that begins with the first of them and begins again when it has ended.
async fn collect(socket: UnixDatagram, queue: Queue) {
    while socket.readable().await.is_ok() {
        let (sender, answer) = oneshot::channel();
        queue.add(Wish::Datagrams(sender)).await;
        match answer.await {
            Ok(stream) => forward(&socket, stream).await,
            // Nobody is there on the host: what has come is lost, as the datagrams of a server that dies.
            Err(_) => {
                while socket.try_recv(&mut []).is_ok() {}
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn forward(socket: &UnixDatagram, mut stream: Stream) {
    let mut frame = vec![0; 4 + MAX_DATAGRAM];
    loop {
        let mut nothing = [0];
        let received = {
            let mut host = &stream;
            tokio::select! {
                // The host's server has gone.
                _ = host.read(&mut nothing) => return,
                received = socket.recv(&mut frame[4..]) => received,
            }
        };
        let Ok(length) = received else {
            return;
        };
        frame[..4].copy_from_slice(&(length as u32).to_le_bytes());
        if stream.write_all(&frame[..4 + length]).await.is_err() {
            return;
        }
    }
}
