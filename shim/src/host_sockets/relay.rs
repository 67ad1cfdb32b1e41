//! Connections from the guest to sockets of the host.

use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use bulkhead_agent_protocol::MAX_DATAGRAM;
use nix::errno::Errno;
use tokio::{
    io::{AsyncReadExt, copy_bidirectional_with_sizes},
    net::{UnixDatagram, UnixStream},
    sync::Semaphore,
    time::{Instant, sleep, timeout},
};

use super::{
    Offers, Sockets,
    dial::{Kind, dial},
    table::Target,
};
use crate::{error::line, machine::agent::Agent};

/// Most connections of a pod at once; more wait in the guest.
const MOST_CONNECTIONS: usize = 256;
/// How long a server whose queue is full, and the guest, may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two tries to get into a server's queue; after a guest has said what makes no sense.
const PAUSE: Duration = Duration::from_millis(20);
/// Bytes that wait in each direction of a connection.
const BUFFER: usize = 16 << 10;

impl Sockets {
    /// Has connections taken from now on, if they are not yet.
    pub(super) fn relay(&self, offers: &impl Offers) {
        let serve = || tokio::spawn(serve(self.clone(), offers.clone())).abort_handle();
        self.relay_by(serve);
    }
}

/// Takes connections until it is aborted, or the guest is gone. Those that it has taken end with
/// their mount.
async fn serve(sockets: Sockets, offers: impl Offers) {
    let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let room = room.clone().acquire_owned().await;
        let permit = room.expect("nobody closes the semaphore");
        let told = match sockets.agent().next_connection().await {
            Ok(told) => told,
            // The pod's end is for others to tell.
            Err(error) => {
                return tracing::debug!(error = %line(&error), "no connection to a socket of the host is taken any more");
            }
        };
        let Some(target) = sockets.target(told.socket) else {
            // The server has just gone, or the guest makes it up.
            refuse(sockets.agent(), told.connection).await;
            sleep(PAUSE).await;
            continue;
        };
        let (sockets, offers) = (sockets.clone(), offers.clone());
        tokio::spawn(async move {
            let mut alive = target.alive.clone();
            tokio::select! {
                () = join(&sockets, &offers, &target, told.socket, told.connection) => {}
                // The mount has gone: nothing is ever sent, so that a change is the sender's end.
                _ = alive.changed() => {}
            }
            drop(permit);
        });
    }
}

async fn refuse(agent: &Agent, connection: u64) {
    let refused = agent.answer_connection(connection, 0);
    // A guest that does not want to hear it keeps its own client waiting.
    let _ = timeout(PATIENCE, refused).await;
}

/// Joins a connection with one to the host's server.
async fn join(
    sockets: &Sockets,
    offers: &impl Offers,
    target: &Target,
    socket: u64,
    connection: u64,
) {
    let _single = match target.kind {
        Kind::Datagrams => match target.single.clone().try_acquire_owned() {
            Ok(permit) => Some(permit),
            Err(_) => return refuse(sockets.agent(), connection).await,
        },
        _ => None,
    };
    let (host, inode) = match reach(sockets.uid(), target).await {
        Ok(reached) => reached,
        Err(error) => {
            tracing::debug!(path = %target.path, %error, "a socket of the host does not answer");
            refuse(sockets.agent(), connection).await;
            // Full is not gone.
            if error.kind() != io::ErrorKind::WouldBlock {
                sockets.lost(socket).await;
            }
            return;
        }
    };
    // The client came by a name that the guest remembers. From now on the guest may look the name
    // up at any moment: what it finds must be listened at before this client is answered, or the
    // next one would be refused by a server that is there.
    if inode != target.inode
        && let Err(error) = sockets.refresh(target.number).await
    {
        tracing::debug!(path = %target.path, error = %line(&error), "a server that has started again is not followed yet");
    }
    let joined = async {
        let inside = answer(sockets.agent(), offers, connection).await?;
        copy(inside, host, target.kind).await
    };
    if let Err(error) = joined.await {
        tracing::debug!(path = %target.path, %error, "a connection to a socket of the host has broken");
    }
}

/// By the socket's name at this moment, which may be a later server's; with the inode found.
async fn reach(uid: u32, target: &Target) -> io::Result<(OwnedFd, (u64, u64))> {
    let since = Instant::now();
    loop {
        let (place, path, kind) = (target.place.clone(), target.path.clone(), target.kind);
        let dialled = move || {
            let (socket, inode) = place.socket(&path)?;
            dial(uid, &socket, kind).map(|host| (host, inode))
        };
        let dialled = tokio::task::spawn_blocking(dialled).await;
        match dialled.expect("dialling does not panic") {
            Err(error)
                if error.raw_os_error() == Some(Errno::EAGAIN as i32)
                    && since.elapsed() < PATIENCE =>
            {
                sleep(PAUSE).await;
            }
            other => return other,
        }
    }
}

async fn answer(agent: &Agent, offers: &impl Offers, connection: u64) -> io::Result<UnixStream> {
    let (port, inside) = offers.stream().await?;
    let answered = agent.answer_connection(connection, port);
    let refused = match timeout(PATIENCE, answered).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(io::Error::other(line(&error))),
        Err(_) => Some(io::ErrorKind::TimedOut.into()),
    };
    if let Some(error) = refused {
        offers.withdraw(port).await;
        return Err(error);
    }
    inside.set_nonblocking(true)?;
    UnixStream::from_std(inside)
}

async fn copy(mut inside: UnixStream, host: OwnedFd, kind: Kind) -> io::Result<()> {
    if kind == Kind::Datagrams {
        return pass_datagrams(inside, UnixDatagram::from_std(host.into())?).await;
    }
    let mut host = UnixStream::from_std(host.into())?;
    copy_bidirectional_with_sizes(&mut inside, &mut host, BUFFER, BUFFER).await?;
    Ok(())
}

/// Each datagram comes after its length (agent.proto). A server that takes none stops the guest's
/// senders.
pub(super) async fn pass_datagrams(mut inside: UnixStream, host: UnixDatagram) -> io::Result<()> {
    let mut bytes = Vec::new();
    loop {
        let length = match inside.read_u32_le().await {
            Ok(length) => length as usize,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        if length > MAX_DATAGRAM {
            let text = format!("a datagram of {length} bytes, at most {MAX_DATAGRAM} are sent");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        bytes.resize(length, 0);
        inside.read_exact(&mut bytes).await?;
        host.send(&bytes).await?;
    }
}
