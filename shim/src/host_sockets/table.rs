//! What the guest listens at, mount by mount, and who has the mounts.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use nix::sys::inotify::{Inotify, WatchDescriptor};
use tokio::{
    sync::{Semaphore, watch},
    task::AbortHandle,
    time::Instant,
};

use super::{
    Error,
    dial::Kind,
    look::Looked,
    place::{Found, Place},
};
use crate::oci::HostBind;

/// How much longer than the guest may trust a name we have it listen at the socket that had it: the
/// guest counts from when it hears, and its clock is its own.
const MARGIN: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) watcher: Option<Watcher>,
    pub(super) relay: Option<AbortHandle>,
    last: u64,
    mounts: Vec<Mounted>,
    placed: Vec<Placed>,
}

#[derive(Debug)]
pub(super) struct Watcher {
    pub(super) inotify: Arc<Inotify>,
    pub(super) task: AbortHandle,
}

/// A mount of the share that is or may have sockets.
#[derive(Debug)]
pub(super) struct Mounted {
    pub(super) number: u64,
    pub(super) place: Arc<Place>,
    watches: HashSet<WatchDescriptor>,
    /// By the number that the guest says.
    listeners: HashMap<u64, Listener>,
    /// Some socket has no listener.
    pub(super) silent: bool,
    /// The guest has been told of a socket.
    pub(super) told: bool,
    /// Its connections end with it.
    alive: watch::Sender<()>,
}

/// A socket at which the guest listens.
#[derive(Debug)]
struct Listener {
    path: String,
    inode: (u64, u64),
    kind: Kind,
    /// Datagrams are one connection at a time.
    single: Arc<Semaphore>,
    /// Another one has its name. The guest may still find this one by it until then, and whoever
    /// connects reaches the new server, as on the host.
    until: Option<Instant>,
}

#[derive(Debug)]
struct Placed {
    container: String,
    numbers: Vec<u64>,
}

/// What follows from a look.
#[derive(Debug, Default)]
pub(super) struct Noted {
    /// Numbers of the sockets that are not there any more.
    pub(super) gone: Vec<u64>,
    /// Some have another one in their place, which is about to be served.
    pub(super) replaced: bool,
}

/// Where a connection goes.
pub(super) struct Target {
    /// Of the mount.
    pub(super) number: u64,
    pub(super) place: Arc<Place>,
    pub(super) path: String,
    /// Of the socket that the guest's client has found.
    pub(super) inode: (u64, u64),
    pub(super) kind: Kind,
    pub(super) single: Arc<Semaphore>,
    pub(super) alive: watch::Receiver<()>,
}

impl Table {
    /// Notes the mounts of a container, each with its number in the share.
    pub(super) fn place<'a>(
        &mut self,
        container: &str,
        binds: impl Iterator<Item = (u64, &'a HostBind)>,
    ) -> Result<(), Error> {
        self.placed.push(Placed {
            container: container.into(),
            numbers: Vec::new(),
        });
        for (number, bind) in binds {
            if self.mounted(number).is_none() {
                let place = Place::of(&bind.source).map_err(|source| Error::Look {
                    path: bind.source.clone(),
                    source,
                })?;
                let Some(place) = place else {
                    continue;
                };
                self.mounts.push(Mounted {
                    number,
                    place: Arc::new(place),
                    watches: HashSet::new(),
                    listeners: HashMap::new(),
                    silent: false,
                    told: false,
                    alive: watch::Sender::new(()),
                });
            }
            let placed = self.placed.last_mut().expect("just pushed");
            placed.numbers.push(number);
        }
        Ok(())
    }

    /// Forgets a container: the mounts that it was the last one to use.
    pub(super) fn leave(&mut self, container: &str) -> Vec<Mounted> {
        self.placed.retain(|placed| placed.container != container);
        let Table { mounts, placed, .. } = self;
        let is_used = |number| placed.iter().any(|p| p.numbers.contains(&number));
        let unused: Vec<Mounted> = mounts.extract_if(.., |m| !is_used(m.number)).collect();
        for mounted in &unused {
            self.unwatch(&mounted.watches);
        }
        unused
    }

    /// The mounts of a container.
    pub(super) fn numbers_of(&self, container: &str) -> Vec<u64> {
        let mut placed = self.placed.iter();
        let placed = placed.find(|placed| placed.container == container);
        placed.map_or(Vec::new(), |placed| placed.numbers.clone())
    }

    fn mounted(&mut self, number: u64) -> Option<&mut Mounted> {
        let mut mounts = self.mounts.iter_mut();
        mounts.find(|mounted| mounted.number == number)
    }

    /// What is served of a mount, for the next look.
    pub(super) fn known(&mut self, number: u64) -> Option<(Arc<Place>, Vec<Found>, Arc<Inotify>)> {
        let inotify = self.watcher.as_ref()?.inotify.clone();
        let mounted = self.mounted(number)?;
        let listeners = mounted.listeners.values();
        let served = listeners.filter(|listener| listener.until.is_none());
        let known = served.map(|listener| Found {
            path: listener.path.clone(),
            inode: listener.inode,
        });
        Some((mounted.place.clone(), known.collect(), inotify))
    }

    /// Notes what a look has given. The guest trusts a name for as long as `trust`.
    pub(super) fn note(&mut self, number: u64, looked: &Looked, trust: Duration) -> Noted {
        let Some(mounted) = self.mounted(number) else {
            return Noted::default();
        };
        mounted.silent = looked.silent;
        let watches = looked.look.watches.iter().copied().collect();
        let old = std::mem::replace(&mut mounted.watches, watches);
        let is_there = |listener: &Listener| {
            let mut sockets = looked.look.sockets.iter();
            sockets.any(|found| found.path == listener.path && found.inode == listener.inode)
        };
        let comes = |path: &str| looked.new.iter().any(|(found, _)| found.path == path);
        let listeners = &mut mounted.listeners;
        let left: HashSet<String> = listeners
            .values()
            .filter(|listener| listener.until.is_none() && !is_there(listener))
            .map(|listener| listener.path.clone())
            .collect();
        // One that left before the one that leaves now had its name is not found any more.
        let gone = listeners.extract_if(|_, listener| {
            left.contains(&listener.path) && (listener.until.is_some() || !comes(&listener.path))
        });
        let gone = gone.map(|(socket, _)| socket).collect();
        let mut replaced = false;
        for listener in listeners.values_mut() {
            if left.contains(&listener.path) {
                listener.until = Some(Instant::now() + trust + MARGIN);
                replaced = true;
            }
        }
        self.unwatch(&old);
        Noted { gone, replaced }
    }

    /// Notes a socket that is about to be served: its number.
    pub(super) fn add(&mut self, number: u64, found: &Found, kind: Kind) -> u64 {
        self.last += 1;
        let socket = self.last;
        if let Some(mounted) = self.mounted(number) {
            mounted.told = true;
            let listener = Listener {
                path: found.path.clone(),
                inode: found.inode,
                kind,
                single: Arc::new(Semaphore::new(1)),
                until: None,
            };
            mounted.listeners.insert(socket, listener);
        }
        socket
    }

    /// Forgets a socket: the mount that had it.
    pub(super) fn remove(&mut self, socket: u64) -> Option<&mut Mounted> {
        let mut mounts = self.mounts.iter_mut();
        mounts.find_map(|mounted| mounted.listeners.remove(&socket).map(|_| mounted))
    }

    /// When the next of those that leave is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let listeners = self.mounts.iter().flat_map(|m| m.listeners.values());
        listeners.filter_map(|listener| listener.until).min()
    }

    /// Forgets those that are not found by their name any more.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<(Arc<Place>, u64)> {
        let mut due = Vec::new();
        for Mounted {
            place, listeners, ..
        } in &mut self.mounts
        {
            let is_due = |until: Option<Instant>| until.is_some_and(|until| until <= now);
            let taken = listeners.extract_if(|_, listener| is_due(listener.until));
            due.extend(taken.map(|(socket, _)| (place.clone(), socket)));
        }
        due
    }

    /// Where connections to a socket go.
    pub(super) fn target(&self, socket: u64) -> Option<Target> {
        self.mounts.iter().find_map(|mounted| {
            let listener = mounted.listeners.get(&socket)?;
            Some(Target {
                number: mounted.number,
                place: mounted.place.clone(),
                path: listener.path.clone(),
                inode: listener.inode,
                kind: listener.kind,
                single: listener.single.clone(),
                alive: mounted.alive.subscribe(),
            })
        })
    }

    /// Whether some socket has no listener.
    pub(super) fn is_silent(&self) -> bool {
        self.mounts.iter().any(|mounted| mounted.silent)
    }

    /// The mounts that have to be looked at after these directories have changed, or all may have.
    pub(super) fn concerned(&self, changed: &HashSet<WatchDescriptor>, all: bool) -> Vec<u64> {
        let mounts = self.mounts.iter();
        let concerned = mounts.filter(|m| m.silent || all || !m.watches.is_disjoint(changed));
        concerned.map(|mounted| mounted.number).collect()
    }

    /// Ends those watches that no mount has.
    fn unwatch(&self, watches: &HashSet<WatchDescriptor>) {
        let is_used = |watch| self.mounts.iter().any(|m| m.watches.contains(watch));
        for watch in watches.iter().filter(|watch| !is_used(watch)) {
            if let Some(watcher) = &self.watcher {
                // One that the kernel has taken away before is no error.
                let _ = watcher.inotify.rm_watch(*watch);
            }
        }
    }
}
