//! 127.0.0.1 and ::1 of the pod's network namespace: who connects there reaches who listens in the guest.
//!
//! `kubectl port-forward` and some probes enter the pod's namespace on the host and dial localhost. The interfaces' traffic goes on
//! to the guest, that of lo does not: its port would be closed. So each port that somebody in the guest listens on gets a
//! listener here, as long as it is there; a connection to it goes over vsock to the agent, which has connected in the guest. A port
//! that nobody listens on stays closed, and the host's kernel refuses it.
//!
//! Nothing here looks at anything twice: the agent's answer comes when the ports have changed.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use bulkhead_agent_protocol::agent::Listeners;
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpListener, TcpStream, UnixStream},
    sync::Semaphore,
};

use super::{Access, background::Background, error::Error};
use crate::{error::line, netns::Namespace};

/// Most ports of each family that are mirrored: a listener is a descriptor of ours.
const MOST_PORTS: usize = 256;
/// Most connections at once; more wait to be accepted.
const MOST_CONNECTIONS: usize = 256;
/// How long the guest is left alone after it has told of its ports; a fraction of the 200 ms in which a port is to be reachable.
const PAUSE: Duration = Duration::from_millis(20);
/// How often it is heard that soon: a server that opens its ports one after another, and its restart.
const SOON: u32 = 64;
/// How long it is left alone when it has used that up, which is also how long it takes to get one back.
const SLOW_PAUSE: Duration = Duration::from_secs(1);
/// How long the guest may take to connect to itself.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that wait in each direction of a connection.
const BUFFER: usize = 16 << 10;

/// Mirrors the listeners of one pod until it is dropped; connections go with the machine.
pub(super) fn start(namespace: Namespace, access: Access) -> Background {
    let mirror = Mirror {
        namespace: Arc::new(namespace),
        access,
        room: Arc::new(Semaphore::new(MOST_CONNECTIONS)),
        open: BTreeMap::new(),
    };
    Background::start(mirror.follow())
}

/// How often the guest is heard: every round takes listeners away and makes others, in this process' only thread.
#[derive(Debug)]
struct Pace {
    soon: u32,
    at: Instant,
}

impl Pace {
    fn new(now: Instant) -> Pace {
        Pace {
            soon: SOON,
            at: now,
        }
    }

    /// How long to leave the guest alone now.
    fn pause(&mut self, now: Instant) -> Duration {
        let quiet = now.saturating_duration_since(self.at);
        let back = u32::try_from(quiet.as_secs() / SLOW_PAUSE.as_secs()).unwrap_or(SOON);
        if back > 0 {
            self.soon = self.soon.saturating_add(back).min(SOON);
            self.at = now;
        }
        match self.soon.checked_sub(1) {
            Some(soon) => {
                self.soon = soon;
                PAUSE
            }
            None => SLOW_PAUSE,
        }
    }
}

struct Mirror {
    namespace: Arc<Namespace>,
    access: Access,
    room: Arc<Semaphore>,
    /// What is mirrored now.
    open: BTreeMap<SocketAddr, Background>,
}

impl Mirror {
    async fn follow(mut self) {
        let mut known = Listeners::default();
        let mut pace = Pace::new(Instant::now());
        loop {
            known = match self.access.agent().watch_listeners(&known).await {
                Ok(listeners) => listeners,
                // The pod's end is for others to tell.
                Err(error) => {
                    return tracing::debug!(error = %line(&error), "nobody is mirrored on localhost");
                }
            };
            self.show(&known).await;
            // A guest that always has something new to say is heard now and then.
            tokio::time::sleep(pace.pause(Instant::now())).await;
        }
    }

    async fn show(&mut self, listeners: &Listeners) {
        let wanted = addresses(listeners);
        self.open.retain(|address, _| wanted.contains(address));
        let new: Vec<SocketAddr> = wanted
            .into_iter()
            .filter(|address| !self.open.contains_key(address))
            .collect();
        if new.is_empty() {
            return;
        }
        let (namespace, addresses) = (self.namespace.clone(), new.clone());
        // It enters the namespace, and containerd's calls do not wait for that.
        let bound = tokio::task::spawn_blocking(move || namespace.listen(&addresses)).await;
        let bound = match bound.expect("binding does not panic") {
            Ok(bound) => bound,
            Err(error) => {
                return tracing::warn!(error = %line(&error), "cannot listen on the pod's localhost");
            }
        };
        for (address, listener) in new.into_iter().zip(bound) {
            let accepted = listener.and_then(|listener| {
                listener.set_nonblocking(true)?;
                TcpListener::from_std(listener)
            });
            match accepted {
                Ok(listener) => {
                    let serve = serve(listener, address, self.access.clone(), self.room.clone());
                    self.open.insert(address, Background::start(serve));
                }
                // Somebody on the host has the port already, or the host has no IPv6.
                Err(error) => tracing::debug!(%address, %error, "a port is not mirrored"),
            }
        }
    }
}

/// What the guest says, within bounds: ports that are none are left out.
fn addresses(listeners: &Listeners) -> Vec<SocketAddr> {
    let of = |ip: IpAddr, ports: &[u32]| {
        let ports = ports.iter().take(MOST_PORTS);
        let ports = ports.filter_map(|port| u16::try_from(*port).ok().filter(|port| *port > 0));
        ports
            .map(|port| SocketAddr::new(ip, port))
            .collect::<Vec<_>>()
    };
    let mut all = of(Ipv4Addr::LOCALHOST.into(), &listeners.ipv4);
    all.extend(of(Ipv6Addr::LOCALHOST.into(), &listeners.ipv6));
    all.sort_unstable();
    all.dedup();
    all
}

async fn serve(listener: TcpListener, address: SocketAddr, access: Access, room: Arc<Semaphore>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, mostly: the connection stays where it is, and so does its readiness.
                tracing::warn!(%address, %error, "cannot accept a connection to the pod's localhost");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Not before: a listener that waits takes no room.
        let Ok(permit) = room.clone().acquire_owned().await else {
            return;
        };
        let access = access.clone();
        tokio::spawn(async move {
            if let Err(error) = join(stream, address, &access).await {
                tracing::debug!(%address, error = %line(&error), "a connection to the pod's localhost is reset");
            }
            drop(permit);
        });
    }
}

/// Joins a connection with one that the agent makes in the guest.
async fn join(mut stream: TcpStream, address: SocketAddr, access: &Access) -> Result<(), Error> {
    let joined = async {
        let mut inside = connect(address, access).await?;
        copy_bidirectional_with_sizes(&mut stream, &mut inside, BUFFER, BUFFER)
            .await
            .map_err(Error::Stream)
    };
    let joined = joined.await;
    if joined.is_err() {
        // The port has just closed, or one side was reset: so is the other.
        let _ = stream.set_zero_linger();
    }
    joined.map(drop)
}

async fn connect(address: SocketAddr, access: &Access) -> Result<UnixStream, Error> {
    let (port, inside) = access.stream().await?;
    let ipv6 = address.is_ipv6();
    let connected = access.agent().connect_listener(address.port(), ipv6, port);
    let refused = match tokio::time::timeout(PATIENCE, connected).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.into()),
        Err(_) => Some(Error::Stream(std::io::ErrorKind::TimedOut.into())),
    };
    if let Some(error) = refused {
        access.withdraw(port).await;
        return Err(error);
    }
    inside.set_nonblocking(true).map_err(Error::Stream)?;
    UnixStream::from_std(inside).map_err(Error::Stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_always_has_something_new_is_heard_once_a_second() {
        let start = Instant::now();
        let (mut now, mut pace, mut heard) = (start, Pace::new(start), 0);
        while now < start + Duration::from_secs(100) {
            now += pace.pause(now);
            heard += 1;
        }
        assert!((SOON..SOON + 101 * 2).contains(&heard), "{heard}");
        // One that was quiet is heard soon again.
        now += Duration::from_secs(3600);
        for _ in 0..SOON {
            assert_eq!(pace.pause(now), PAUSE);
        }
        assert_eq!(pace.pause(now), SLOW_PAUSE);
    }

    #[test]
    fn what_a_guest_says_is_bounded() {
        let listeners = Listeners {
            ipv4: (0..100_000).collect(),
            ipv6: vec![80, 80, 65_535, 65_536, u32::MAX],
            ..Listeners::default()
        };
        let all = addresses(&listeners);
        assert_eq!(all.len(), MOST_PORTS - 1 + 2);
        assert!(all.iter().all(|address| address.port() != 0));
    }
}
