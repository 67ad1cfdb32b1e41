//! The volumes of a pod: who uses them, and the task that follows the host.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bulkhead_agent_protocol::agent::{self as wire, volume_change::Kind};
use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, Inotify, WatchDescriptor},
};
use tokio::{io::Interest, io::unix::AsyncFd, task::AbortHandle};

use super::{
    Error,
    changes::{self, Step},
    host::{self, Directory, Node, Stamp},
};
use crate::{
    agent::{self, Agent},
    error::line,
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

/// How often a volume that the host changes while it is read is read again, and after what time.
const ATTEMPTS: u32 = 50;
const AGAIN: Duration = Duration::from_millis(10);
/// How long the guest may take to forget a volume.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of files in one message, which may have 4 MiB.
const PORTION: usize = 1 << 20;

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

#[derive(Debug)]
struct Volume {
    number: u64,
    path: PathBuf,
    /// Device and inode: another directory at the path is not this volume.
    identity: (u64, u64),
    watch: WatchDescriptor,
    mirror: tokio::sync::Mutex<Mirror>,
}

/// What the guest has.
#[derive(Debug, Default)]
struct Mirror {
    made: bool,
    /// It has been what the host's was.
    filled: bool,
    has: Directory,
    /// The host's directory is not watched any more: it was removed, or unmounted.
    ended: bool,
    /// What was told of last.
    failure: Option<String>,
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
            // One that could not be followed is not given to another container either.
            if mirror.filled && mirror.failure.is_none() {
                continue;
            }
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
        for volume in unused {
            let forgotten = async {
                // A change that is on its way comes first.
                match volume.mirror.lock().await.made {
                    true => self.0.agent.delete_volume(volume.number).await,
                    false => Ok(()),
                }
            };
            match tokio::time::timeout(PATIENCE, forgotten).await {
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
                volume.catch_up(&self.0.agent, &events).await;
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

impl Volume {
    async fn fill(&self, mirror: &mut Mirror, agent: &Agent) -> Result<(), Error> {
        if !mirror.made {
            agent.create_volume(self.number).await?;
        }
        // From here on it must be deleted, filled or not.
        mirror.made = true;
        self.repeat(mirror, agent).await?;
        mirror.filled = true;
        mirror.failure = None;
        Ok(())
    }

    /// After events. A failure is told once, and the end of it.
    async fn catch_up(&self, agent: &Agent, events: &Events) {
        let mut mirror = self.mirror.lock().await;
        if !mirror.filled || mirror.ended {
            return;
        }
        mirror.ended = events.ended.contains(&self.watch);
        let repeated = match events.removed.contains(&self.watch) {
            // rmdir(2): it was empty.
            true => {
                let empty = Directory {
                    attributes: mirror.has.attributes,
                    ..Directory::default()
                };
                self.send(&mut mirror, agent, None, empty).await
            }
            false if mirror.ended => Ok(()),
            false => self.repeat(&mut mirror, agent).await,
        };
        let failure = repeated.err().map(|error| line(&error));
        let volume = self.path.display();
        match (&failure, &mirror.failure) {
            (Some(now), before) if before.as_ref() != Some(now) => {
                tracing::error!(%volume, error = %now, "a volume has changed on the host, and the containers of the pod still see an older version");
            }
            (None, Some(_)) => tracing::info!(%volume, "the volume is followed again"),
            _ => {}
        }
        mirror.failure = failure;
    }

    /// Makes the guest's what the host's is.
    async fn repeat(&self, mirror: &mut Mirror, agent: &Agent) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            match self.try_repeat(mirror, agent).await {
                Err(Error::Moving) => tokio::time::sleep(AGAIN).await,
                other => return other,
            }
        }
        Err(Error::Moving)
    }

    async fn try_repeat(&self, mirror: &mut Mirror, agent: &Agent) -> Result<(), Error> {
        // Not kept open: kubelet could not unmount it.
        let opened = match open(&self.path) {
            Ok(opened) => opened,
            // Its removal has an event of its own.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(host::read("")(source)),
        };
        let found = opened.metadata().map_err(host::read(""))?;
        if (found.dev(), found.ino()) != self.identity {
            return Ok(());
        }
        let has = |name: &str| mirror.has.entries.contains_key(name);
        let wants = host::look(opened.as_fd(), has)?;
        self.send(mirror, agent, Some(&opened), wants).await
    }

    async fn send(
        &self,
        mirror: &mut Mirror,
        agent: &Agent,
        source: Option<&File>,
        wants: Directory,
    ) -> Result<(), Error> {
        let steps = changes::steps(&mirror.has, &wants);
        if steps.is_empty() {
            return Ok(());
        }
        // What a failure on the way leaves behind has to be made anew or removed.
        let touched: Vec<String> = steps
            .iter()
            .filter_map(Step::top)
            .map(String::from)
            .collect();
        let mut message = Message::new(agent, self.number);
        let sent = async {
            for step in steps {
                message.add(source, step).await?;
            }
            message.send().await
        };
        let sent = sent.await;
        match &sent {
            Ok(()) => mirror.has = wants,
            Err(_) => {
                mirror.has.attributes = host::Attributes::default();
                for name in touched {
                    mirror.has.entries.insert(name, Node::Unsure);
                }
            }
        }
        // Files of a megabyte have been in our heap.
        sys::trim_memory();
        sent
    }
}

/// Changes on their way to the agent, in messages that it takes.
struct Message<'a> {
    agent: &'a Agent,
    volume: u64,
    changes: Vec<wire::VolumeChange>,
    bytes: usize,
}

impl<'a> Message<'a> {
    fn new(agent: &'a Agent, volume: u64) -> Message<'a> {
        Message {
            agent,
            volume,
            changes: Vec::new(),
            bytes: 0,
        }
    }

    async fn add(&mut self, source: Option<&File>, step: Step) -> Result<(), Error> {
        let empty = wire::Empty::default;
        match step {
            Step::Directory(path) => self.push(path, Kind::Directory(empty())).await,
            Step::Link(path, target) => self.push(path, Kind::Link(target)).await,
            Step::Rename(path, name) => self.push(path, Kind::Rename(name)).await,
            Step::Remove(path) => self.push(path, Kind::Remove(empty())).await,
            Step::Attributes(path, attributes, modified_ns) => {
                let attributes = wire::VolumeAttributes {
                    mode: attributes.mode,
                    uid: attributes.uid,
                    gid: attributes.gid,
                    modified_ns,
                    ..wire::VolumeAttributes::default()
                };
                self.push(path, Kind::Attributes(attributes)).await
            }
            Step::File(path, stamp) => self.file(source.ok_or(Error::Moving)?, path, &stamp).await,
        }
    }

    async fn file(&mut self, volume: &File, path: String, stamp: &Stamp) -> Result<(), Error> {
        let file = host::open(volume.as_fd(), &path, stamp)?;
        let mut left = stamp.size;
        let mut first = true;
        while first || left > 0 {
            let mut bytes = Vec::new();
            let portion = left.min(PORTION as u64);
            let read = (&file).take(portion).read_to_end(&mut bytes);
            // Shorter than it was: somebody writes to it.
            if read.map_err(host::read(&path))? as u64 != portion {
                return Err(Error::Moving);
            }
            left -= portion;
            let kind = match first {
                true => Kind::File(bytes),
                false => Kind::Append(bytes),
            };
            first = false;
            self.push(path.clone(), kind).await?;
        }
        Ok(())
    }

    async fn push(&mut self, path: String, kind: Kind) -> Result<(), Error> {
        let content = match &kind {
            Kind::File(bytes) | Kind::Append(bytes) => bytes.len(),
            Kind::Link(target) => target.len(),
            _ => 0,
        };
        // With room for the numbers and lengths of the message.
        let size = content + path.len() + 64;
        if self.bytes + size > 2 * PORTION {
            self.send().await?;
        }
        self.bytes += size;
        self.changes.push(wire::VolumeChange {
            path,
            kind: Some(kind),
            ..wire::VolumeChange::default()
        });
        Ok(())
    }

    async fn send(&mut self) -> Result<(), Error> {
        self.bytes = 0;
        let changes = std::mem::take(&mut self.changes);
        Ok(self.agent.change_volume(self.volume, changes).await?)
    }
}

fn open(path: &Path) -> io::Result<File> {
    let directory = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    File::options()
        .read(true)
        .custom_flags(directory)
        .open(path)
}

impl Error {
    fn of(self, path: &Path) -> Error {
        Error::In {
            path: path.into(),
            source: Box::new(self),
        }
    }
}
