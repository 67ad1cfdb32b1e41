//! Which ports are listened on, kept up to date by the bell and not by looking again and again.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use bulkhead_agent_protocol::agent;
use tokio::sync::{OnceCell, watch};

use super::NetworkError;
use super::bell::{Bell, Event};
use super::listeners::{self, Snapshot};
use crate::container::blocking;
use crate::log;

/// The cgroup of all sockets.
const CGROUP: &str = "/sys/fs/cgroup";

/// The bell rings just before a socket changes: one that has not changed yet is looked at again after these times, each twice
/// the one before. What has not changed at the end does not: its listen(2) failed.
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LAST_LOOK: Duration = Duration::from_secs(4);

/// Sockets that are remembered as changing; of more than these it is remembered that there are some.
const MAX_CHANGING: usize = 1024;

/// The pod's listeners, watched from the first question on. It has to come before the first container: a socket that listens
/// already is told of, but its end is seen only with the next change of another.
#[derive(Debug, Default)]
pub(crate) struct Watch(OnceCell<watch::Receiver<agent::Listeners>>);

impl Watch {
    /// Waits until other ports are listened on than the known ones.
    pub(crate) async fn differing(
        &self,
        known: &agent::Listeners,
    ) -> Result<agent::Listeners, NetworkError> {
        let mut now = self.0.get_or_try_init(start).await?.clone();
        let differ = |now: &agent::Listeners| now.ipv4 != known.ipv4 || now.ipv6 != known.ipv6;
        match now.wait_for(differ).await {
            Ok(now) => Ok(now.clone()),
            Err(_) => Err(failed(io::Error::other("the watch has ended"))),
        }
    }
}

fn failed(source: io::Error) -> NetworkError {
    NetworkError::System {
        what: "watch what listens in the pod".to_owned(),
        source,
    }
}

async fn start() -> Result<watch::Receiver<agent::Listeners>, NetworkError> {
    // The bell first, so that nothing happens unheard after the first look.
    let bell = Bell::attach(Path::new(CGROUP)).map_err(failed)?;
    let (told, now) = watch::channel(agent::Listeners::default());
    let mut follower = Follower {
        bell,
        changing: Changing::default(),
        told,
        warned: false,
    };
    follower.look().await.map_err(failed)?;
    tokio::spawn(follower.follow());
    Ok(now)
}

/// What has been rung for and not been seen yet.
#[derive(Debug, Default, PartialEq)]
struct Changing {
    /// Whether a socket is to listen.
    sockets: HashMap<u64, bool>,
    /// There are others.
    others: bool,
    /// When to look again.
    next: Duration,
}

impl Changing {
    fn add(&mut self, events: Vec<Event>, all: bool) {
        self.next = FIRST_LOOK;
        self.others |= !all;
        for Event { cookie, listens } in events {
            if self.sockets.len() < MAX_CHANGING || self.sockets.contains_key(&cookie) {
                self.sockets.insert(cookie, listens);
            } else {
                self.others = true;
            }
        }
    }

    /// Forgets what the snapshot shows.
    fn seen(&mut self, now: &Snapshot) {
        self.sockets
            .retain(|cookie, listens| now.listening.contains(cookie) != *listens);
    }

    /// How long to wait before the next look; for ever when nothing is changing.
    fn wait(&mut self) -> Option<Duration> {
        if self.next > LAST_LOOK {
            *self = Self::default();
        }
        (self.others || !self.sockets.is_empty()).then(|| {
            let wait = self.next;
            self.next *= 2;
            wait
        })
    }
}

#[derive(Debug)]
struct Follower {
    bell: Bell,
    changing: Changing,
    told: watch::Sender<agent::Listeners>,
    /// That there are too many ports is said once.
    warned: bool,
}

impl Follower {
    async fn follow(mut self) {
        loop {
            let look_again = self.changing.wait();
            tokio::select! {
                rung = self.bell.wait() => match rung {
                    Ok((events, all)) => self.changing.add(events, all),
                    Err(error) => {
                        log::warn(&format!("cannot watch what listens in the pod: {error}"));
                        return;
                    }
                },
                () = tokio::time::sleep(look_again.unwrap_or_default()), if look_again.is_some() => {}
            }
            if let Err(error) = self.look().await {
                log::warn(&format!("cannot read what listens in the pod: {error}"));
                self.changing.others = true;
            }
        }
    }

    /// On another thread: a pod may have very many sockets.
    async fn look(&mut self) -> io::Result<()> {
        let asked = std::mem::take(&mut self.changing.sockets);
        let (asked, now) = blocking(move || {
            let now = listeners::read(&asked);
            (asked, now)
        })
        .await;
        self.changing.sockets = asked;
        let now = now.map_err(io::Error::other)?;
        self.changing.seen(&now);
        if now.left_out > 0 && !self.warned {
            self.warned = true;
            log::warn(&format!(
                "{} ports that are listened on are not forwarded: there are too many",
                now.left_out
            ));
        }
        self.told.send_if_modified(|told| {
            let differ = *told != now.ports;
            *told = now.ports;
            differ
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(cookie: u64, listens: bool) -> Event {
        Event { cookie, listens }
    }

    fn showing(listening: &[u64]) -> Snapshot {
        Snapshot {
            listening: listening.iter().copied().collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_socket_is_looked_for_until_it_is_what_was_rung_for() {
        let mut changing = Changing::default();
        assert_eq!(changing.wait(), None);
        changing.add(vec![event(1, true), event(2, false)], true);
        changing.seen(&showing(&[2]));
        assert_eq!(changing.wait(), Some(FIRST_LOOK));
        assert_eq!(changing.wait(), Some(FIRST_LOOK * 2));
        changing.seen(&showing(&[1, 2]));
        assert_eq!(changing.sockets, [(2, false)].into());
        changing.add(vec![event(1, false)], true);
        assert_eq!(changing.wait(), Some(FIRST_LOOK));
        changing.seen(&showing(&[]));
        assert_eq!(changing.wait(), None);
    }

    #[test]
    fn what_never_comes_is_given_up() {
        for all in [true, false] {
            let mut changing = Changing::default();
            changing.add(vec![event(1, true)], all);
            let mut looks = 0;
            while changing.wait().is_some() {
                changing.seen(&showing(&[]));
                looks += 1;
            }
            assert_eq!(looks, 12);
            assert_eq!(changing, Changing::default());
        }
    }

    #[test]
    fn more_changes_than_are_remembered_are_looked_for_all_the_same() {
        let mut changing = Changing::default();
        changing.add((0..5000).map(|cookie| event(cookie, true)).collect(), true);
        assert_eq!(changing.sockets.len(), MAX_CHANGING);
        changing.seen(&showing(&(0..5000).collect::<Vec<_>>()));
        assert!(changing.sockets.is_empty() && changing.wait().is_some());
    }
}
