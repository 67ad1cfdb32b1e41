//! The volumes of a pod: who uses them, and the task that follows the host.

use std::{
    collections::HashSet,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bulkhead_agent_protocol::agent as wire;
use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, Inotify, WatchDescriptor},
};
use tokio::{io::Interest, io::unix::AsyncFd, task::AbortHandle};

use super::{
    Error,
    mirror::{Volume, open},
};
use crate::{
    error::line,
    machine::agent::{self, Agent},
    oci::{GUEST_VOLUMES, HostBind},
    sys,
};

/// What of a directory wakes us. Attributes too: an older kubelet gives a version its group after it has shown it.
const EVENTS: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_ONLYDIR);

/// How long the guest may take to forget a container's volumes.
const PATIENCE: Duration = Duration::from_secs(10);

/// The volumes, for whoever uses the pod.
#[derive(Clone, Debug)]
pub struct Volumes(Arc<Shared>);

/// The same for the one whose drop ends it all.
#[derive(Debug)]
pub struct Owner(Volumes);

#[derive(Debug)]
struct Shared {
    agent: Agent,
    /// Whose instance of inotify it is.
    uid: u32,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    watcher: Option<Watcher>,
    last: u64,
    volumes: Vec<Arc<Volume>>,
    placed: Vec<Placed>,
}

/// One for the pod.
#[derive(Debug)]
struct Watcher {
    inotify: Arc<Inotify>,
    task: AbortHandle,
}

/// What a container uses: indices in its list of mounts, and numbers of volumes.
#[derive(Debug)]
struct Placed {
    container: String,
    mounts: Vec<(usize, u64)>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        let mut table = self.0.table();
        if let Some(watcher) = table.watcher.take() {
            watcher.task.abort();
        }
        *table = Table::default();
    }
}

impl Owner {
    /// None yet. The watches count for `uid`.
    pub fn new(agent: Agent, uid: u32) -> Owner {
        Owner(Volumes(Arc::new(Shared {
            agent,
            uid,
            table: Mutex::default(),
        })))
    }

    /// For whoever uses the pod.
    pub fn volumes(&self) -> &Volumes {
        &self.0
    }
}

impl Volumes {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0
            .table
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// Watches the volumes of a container; from here on no change is missed. After an error, [`Volumes::leave`] undoes it.
    pub fn place<'a>(
        &self,
        container: &str,
        binds: impl Iterator<Item = &'a HostBind>,
    ) -> Result<(), Error> {
        let mut table = self.table();
        table.placed.push(Placed {
            container: container.into(),
            mounts: Vec::new(),
        });
        for bind in binds {
            let number = self.watch(&mut table, &bind.source)?;
            let placed = table.placed.last_mut().expect("just pushed");
            placed.mounts.push((bind.mount, number));
        }
        Ok(())
    }

    /// The number of the volume at the path: one that is watched, or a new one.
    fn watch(&self, table: &mut Table, path: &Path) -> Result<u64, Error> {
        let opened = open(path).map_err(|source| Error::Open {
            path: path.into(),
            source,
        })?;
        let failed = |source: io::Error| Error::Watch {
            path: path.into(),
            source,
        };
        if table.watcher.is_none() {
            table.watcher = Some(self.start_watcher().map_err(failed)?);
        }
        let watcher = table.watcher.as_ref().expect("just made");
        // By the open directory: a directory that is watched already has the same watch again, whatever its name.
        let name = format!("/proc/self/fd/{}", opened.as_raw_fd());
        let added = watcher.inotify.add_watch(name.as_str(), EVENTS);
        let watch = added.map_err(|errno| failed(errno.into()))?;
        if let Some(there) = table.volumes.iter().find(|volume| volume.watch == watch) {
            return Ok(there.number);
        }
        let found = opened.metadata().map_err(failed)?;
        table.last += 1;
        table.volumes.push(Arc::new(Volume {
            number: table.last,
            path: path.into(),
            identity: (found.dev(), found.ino()),
            watch,
            mirror: tokio::sync::Mutex::default(),
        }));
        Ok(table.last)
    }

    fn start_watcher(&self) -> io::Result<Watcher> {
        let inotify = sys::inotify_of(self.0.uid)?;
        let readable = sys::watch(inotify.as_fd().try_clone_to_owned()?, Interest::READABLE)?;
        let inotify = Arc::new(inotify);
        let task = tokio::spawn(self.clone().follow(readable, inotify.clone()));
        Ok(Watcher {
            inotify,
            task: task.abort_handle(),
        })
    }

    /// Writes the places of a container's volumes into what the agent is told.
    pub fn name_sources(&self, container: &str, spec: &mut wire::Container) -> Result<(), Error> {
        let table = self.table();
        let mut placed = table.placed.iter();
        let placed = placed.find(|placed| placed.container == container);
        for (index, number) in placed.iter().flat_map(|placed| &placed.mounts) {
            let mount = spec.mounts.get_mut(*index);
            let mount = mount.ok_or_else(|| Error::Mounts(container.into()))?;
            mount.source = format!("{GUEST_VOLUMES}/{number}");
        }
        Ok(())
    }

    /// Fills those of a container's volumes that the guest does not have. The guest is ready, the container not yet made.
    pub async fn fill(&self, container: &str) -> Result<(), Error> {
        for volume in self.used_by(container) {
            let mut mirror = volume.mirror.lock().await;
            let filled = volume.fill(&mut mirror, &self.0.agent).await;
            filled.map_err(|error| error.of(&volume.path))?;
        }
        Ok(())
    }

    fn used_by(&self, container: &str) -> Vec<Arc<Volume>> {
        let table = self.table();
        let mine = table
            .placed
            .iter()
            .filter(|placed| placed.container == container);
        let numbers: HashSet<u64> = mine.flat_map(|p| p.mounts.iter().map(|m| m.1)).collect();
        let used = table.volumes.iter();
        used.filter(|volume| numbers.contains(&volume.number))
            .cloned()
            .collect()
    }

    /// Forgets a container, and the volumes that it was the last one to use.
    pub async fn leave(&self, container: &str) {
        let unused = {
            let mut table = self.table();
            table.placed.retain(|placed| placed.container != container);
            let Table {
                volumes,
                placed,
                watcher,
                ..
            } = &mut *table;
            let is_used = |volume: &Volume| {
                let mut numbers = placed.iter().flat_map(|placed| &placed.mounts);
                numbers.any(|(_, number)| *number == volume.number)
            };
            let unused: Vec<_> = volumes.extract_if(.., |volume| !is_used(volume)).collect();
            for volume in &unused {
                // One that the kernel has taken away before is no error.
                let _ = watcher
                    .as_ref()
                    .map(|watcher| watcher.inotify.rm_watch(volume.watch));
            }
            unused
        };
        let deadline = tokio::time::Instant::now() + PATIENCE;
        for volume in unused {
            let forgotten = async {
                // A change that is on its way comes first.
                match volume.mirror.lock().await.made {
                    true => self.0.agent.delete_volume(volume.number).await,
                    false => Ok(()),
                }
            };
            match tokio::time::timeout_at(deadline, forgotten).await {
                // It goes with the guest.
                Ok(Ok(()) | Err(agent::Error::Lost { .. })) => {}
                Ok(Err(error)) => {
                    tracing::warn!(volume = %volume.path.display(), error = %line(&error), "the guest keeps a volume that no container uses");
                }
                Err(_) => {
                    tracing::warn!(volume = %volume.path.display(), "the guest did not forget a volume in time");
                }
            }
        }
    }

    /// Repeats what happens on the host until it is aborted.
    async fn follow(self, readable: AsyncFd<OwnedFd>, inotify: Arc<Inotify>) {
        loop {
            let Ok(mut ready) = readable.readable().await else {
                return;
            };
            let events = match Events::read(&inotify) {
                Ok(events) => events,
                Err(errno) => {
                    tracing::error!(%errno, "the volumes of the pod are not followed any more: cannot read inotify");
                    return;
                }
            };
            ready.clear_ready();
            let volumes = self.table().volumes.clone();
            for volume in volumes.iter().filter(|volume| events.concern(volume)) {
                let removed = events.removed.contains(&volume.watch);
                let ended = events.ended.contains(&volume.watch);
                volume.catch_up(&self.0.agent, removed, ended).await;
            }
        }
    }
}

/// What has happened, to which directories.
#[derive(Debug, Default)]
struct Events {
    changed: HashSet<WatchDescriptor>,
    removed: HashSet<WatchDescriptor>,
    ended: HashSet<WatchDescriptor>,
    /// inotify(7): IN_Q_OVERFLOW. Everything may have changed.
    lost: bool,
}

impl Events {
    fn read(inotify: &Inotify) -> Result<Events, Errno> {
        let mut events = Events::default();
        loop {
            let some = match inotify.read_events() {
                Ok(some) => some,
                Err(Errno::EAGAIN) => return Ok(events),
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno),
            };
            for event in some {
                let is = |flag| event.mask.contains(flag);
                events.lost |= is(AddWatchFlags::IN_Q_OVERFLOW);
                events.changed.insert(event.wd);
                if is(AddWatchFlags::IN_DELETE_SELF) {
                    events.removed.insert(event.wd);
                }
                if is(AddWatchFlags::IN_IGNORED) {
                    events.ended.insert(event.wd);
                }
            }
        }
    }

    fn concern(&self, volume: &Volume) -> bool {
        self.lost || self.changed.contains(&volume.watch)
    }
}

impl Error {
    fn of(self, path: &Path) -> Error {
        Error::In {
            path: path.into(),
            source: Box::new(self),
        }
    }
}
