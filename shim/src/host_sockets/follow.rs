//! The sockets of a pod: who has them, and the task that follows the host.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bulkhead_agent_protocol::agent as wire;
use bulkhead_vmm_config::LISTEN_SUFFIX;
use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, Inotify, WatchDescriptor},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Notify, Semaphore, watch},
    task::AbortHandle,
};

use super::{
    Error, check,
    dial::{Kind, probe},
    place::{Found, Look, Place},
    relay,
};
use crate::{
    error::line,
    machine::agent::{self, Agent},
    oci::{GUEST_SHARE, HostBind, Plan},
    pod::Access,
    sys,
};

/// How long the guest may take over one socket.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long we rest after a look: a guest that makes many files is seen now and then.
const PAUSE: Duration = Duration::from_millis(100);
/// When sockets without a listener are asked again: a server binds before it listens, and nothing tells when it does.
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// The sockets, for whoever uses the pod.
#[derive(Clone, Debug)]
pub struct Sockets(Arc<Shared>);

/// The same for the one whose drop ends it all.
#[derive(Debug)]
pub struct Owner(Sockets);

#[derive(Debug)]
struct Shared {
    agent: Agent,
    /// Who dials, and whose instance of inotify it is.
    uid: u32,
    allowed: bool,
    table: Mutex<Table>,
    /// Held over a look and what follows from it.
    turn: tokio::sync::Mutex<()>,
    /// Some server has gone.
    lost: Notify,
}

#[derive(Debug, Default)]
struct Table {
    watcher: Option<Watcher>,
    relay: Option<AbortHandle>,
    last: u64,
    mounts: Vec<Mounted>,
    placed: Vec<Placed>,
}

#[derive(Debug)]
struct Watcher {
    inotify: Arc<Inotify>,
    task: AbortHandle,
}

/// A mount of the share that is or may have sockets.
#[derive(Debug)]
struct Mounted {
    number: u64,
    place: Arc<Place>,
    watches: HashSet<WatchDescriptor>,
    served: BTreeMap<String, Served>,
    /// Some socket has no listener.
    silent: bool,
    /// The guest has been told of a socket.
    told: bool,
    /// Its connections end with it.
    alive: watch::Sender<()>,
}

#[derive(Debug)]
struct Served {
    socket: u64,
    inode: (u64, u64),
    kind: Kind,
    /// Datagrams are one connection at a time.
    single: Arc<Semaphore>,
}

#[derive(Debug)]
struct Placed {
    container: String,
    numbers: Vec<u64>,
}

/// Where a connection goes.
pub(super) struct Target {
    pub(super) place: Arc<Place>,
    pub(super) path: String,
    pub(super) kind: Kind,
    pub(super) single: Arc<Semaphore>,
    pub(super) alive: watch::Receiver<()>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        let mut table = self.0.table();
        let tasks = [
            table.watcher.take().map(|watcher| watcher.task),
            table.relay.take(),
        ];
        for task in tasks.into_iter().flatten() {
            task.abort();
        }
        *table = Table::default();
    }
}

impl Owner {
    /// None yet.
    pub fn new(agent: Agent, uid: u32, allowed: bool) -> Owner {
        Owner(Sockets(Arc::new(Shared {
            agent,
            uid,
            allowed,
            table: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            lost: Notify::new(),
        })))
    }

    /// For whoever uses the pod.
    pub fn sockets(&self) -> &Sockets {
        &self.0
    }
}

impl Sockets {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0
            .table
            .lock()
            .expect("no code panics while it holds this lock")
    }

    pub(super) fn uid(&self) -> u32 {
        self.0.uid
    }

    /// Refuses what a container must not or cannot have.
    pub fn check(&self, plan: &Plan) -> Result<(), Error> {
        check(
            &plan.binds,
            &plan.container.mounts,
            self.0.allowed,
            self.0.uid,
        )
    }

    /// Notes the mounts of a container, each with its number in the share. After an error, [`Sockets::leave`] undoes it.
    pub fn place<'a>(
        &self,
        container: &str,
        binds: impl Iterator<Item = (u64, &'a HostBind)>,
    ) -> Result<(), Error> {
        if !self.0.allowed {
            return Ok(());
        }
        let mut table = self.table();
        table.placed.push(Placed {
            container: container.into(),
            numbers: Vec::new(),
        });
        for (number, bind) in binds {
            if !table.mounts.iter().any(|mounted| mounted.number == number) {
                let place = Place::of(&bind.source).map_err(|source| Error::Look {
                    path: bind.source.clone(),
                    source,
                })?;
                let Some(place) = place else {
                    continue;
                };
                table.mounts.push(Mounted {
                    number,
                    place: Arc::new(place),
                    watches: HashSet::new(),
                    served: BTreeMap::new(),
                    silent: false,
                    told: false,
                    alive: watch::Sender::new(()),
                });
            }
            let placed = table.placed.last_mut().expect("just pushed");
            placed.numbers.push(number);
        }
        Ok(())
    }

    /// Has the guest listen at the sockets of a container's mounts. The guest is ready, the container not yet made.
    pub async fn fill(&self, container: &str, access: &Access) -> Result<(), Error> {
        let numbers: Vec<u64> = {
            let table = self.table();
            let mut placed = table.placed.iter();
            let placed = placed.find(|placed| placed.container == container);
            placed.map_or(Vec::new(), |placed| placed.numbers.clone())
        };
        if numbers.is_empty() {
            return Ok(());
        }
        self.start(access)?;
        for number in numbers {
            self.refresh(number).await?;
        }
        Ok(())
    }

    fn start(&self, access: &Access) -> Result<(), Error> {
        self.watch()?;
        let mut table = self.table();
        if table.relay.is_none() {
            let serve = relay::serve(self.clone(), access.clone());
            table.relay = Some(tokio::spawn(serve).abort_handle());
        }
        Ok(())
    }

    pub(super) fn watch(&self) -> Result<(), Error> {
        let mut table = self.table();
        if table.watcher.is_none() {
            let started = self.start_watcher();
            table.watcher = Some(started.map_err(|source| Error::Watch {
                path: "the pod's volumes".into(),
                source,
            })?);
        }
        Ok(())
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

    /// Makes what the guest serves of a mount what the host has.
    pub(super) async fn refresh(&self, number: u64) -> Result<(), Error> {
        let _turn = self.0.turn.lock().await;
        let Some((place, known, inotify)) = self.known(number) else {
            return Ok(());
        };
        let path = place.path().to_path_buf();
        let (looking, uid) = (place.clone(), self.0.uid);
        let looked = move || Looked::at(&looking, &inotify, &known, uid);
        let looked = tokio::task::spawn_blocking(looked)
            .await
            .expect("looking does not panic")
            .map_err(|source| match source.raw_os_error() {
                Some(libc::ENOSPC) => Error::Watch {
                    path: path.clone(),
                    source,
                },
                _ => Error::Look {
                    path: path.clone(),
                    source,
                },
            })?;
        for socket in self.forget_gone(number, &looked) {
            self.call(&place, self.0.agent.stop_socket(socket)).await?;
        }
        for (found, kind) in looked.new {
            self.serve(number, &place, found, kind).await?;
        }
        Ok(())
    }

    fn known(&self, number: u64) -> Option<(Arc<Place>, Vec<Found>, Arc<Inotify>)> {
        let table = self.table();
        let inotify = table.watcher.as_ref()?.inotify.clone();
        let mounted = table.mounts.iter().find(|m| m.number == number)?;
        let known = mounted.served.iter().map(|(path, served)| Found {
            path: path.clone(),
            inode: served.inode,
        });
        Some((mounted.place.clone(), known.collect(), inotify))
    }

    /// Notes what a look has given; the numbers of the sockets that are not there any more.
    fn forget_gone(&self, number: u64, looked: &Looked) -> Vec<u64> {
        let mut table = self.table();
        let mut mounts = table.mounts.iter_mut();
        let Some(mounted) = mounts.find(|mounted| mounted.number == number) else {
            return Vec::new();
        };
        mounted.silent = looked.silent;
        let watches = looked.look.watches.iter().copied().collect();
        let old = std::mem::replace(&mut mounted.watches, watches);
        let is_there = |path: &str, inode| {
            let mut sockets = looked.look.sockets.iter();
            sockets.any(|found| found.path == path && found.inode == inode)
        };
        let mut gone = Vec::new();
        mounted.served.retain(|path, served| {
            let stays = is_there(path, served.inode);
            if !stays {
                gone.push(served.socket);
            }
            stays
        });
        table.unwatch(&old);
        gone
    }

    async fn serve(
        &self,
        number: u64,
        place: &Place,
        found: Found,
        kind: Kind,
    ) -> Result<(), Error> {
        let name = place.path().join(&found.path);
        let (socket, request) = {
            let mut table = self.table();
            table.last += 1;
            let socket = table.last;
            let request = request(number, place, socket, &found, kind);
            // Before the guest is told: a connection may come before its answer.
            if let Some(mounted) = table.mounts.iter_mut().find(|m| m.number == number) {
                mounted.told = true;
                let served = Served {
                    socket,
                    inode: found.inode,
                    kind,
                    single: Arc::new(Semaphore::new(1)),
                };
                mounted.served.insert(found.path, served);
            }
            (socket, request)
        };
        let answer = self.call(place, self.0.agent.serve_socket(&request)).await;
        if answer.is_err() {
            for mounted in &mut self.table().mounts {
                mounted.served.retain(|_, served| served.socket != socket);
            }
        }
        match answer {
            // A name that is too long for the agent, or one that has just gone.
            Err(Error::Agent {
                source: agent::Error::Refused { message, .. },
                ..
            }) => {
                tracing::warn!(socket = %name.display(), %message, "a socket of the host is not served in the guest");
                Ok(())
            }
            other => other,
        }
    }

    async fn call(
        &self,
        place: &Place,
        call: impl Future<Output = Result<(), agent::Error>>,
    ) -> Result<(), Error> {
        let path = || place.path().to_path_buf();
        match tokio::time::timeout(PATIENCE, call).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(Error::Agent {
                path: path(),
                source,
            }),
            Err(_) => Err(Error::Slow(path())),
        }
    }

    /// Where connections to a socket go, by the number that the guest says.
    pub(super) fn target(&self, socket: u64) -> Option<Target> {
        let table = self.table();
        table.mounts.iter().find_map(|mounted| {
            let mut served = mounted.served.iter();
            let (path, served) = served.find(|(_, served)| served.socket == socket)?;
            Some(Target {
                place: mounted.place.clone(),
                path: path.clone(),
                kind: served.kind,
                single: served.single.clone(),
                alive: mounted.alive.subscribe(),
            })
        })
    }

    /// Nobody listens at a socket any more: so does nobody in the guest, until somebody does again.
    pub(super) async fn lost(&self, socket: u64) {
        let _turn = self.0.turn.lock().await;
        let place = {
            let mut table = self.table();
            table.mounts.iter_mut().find_map(|mounted| {
                let before = mounted.served.len();
                mounted.served.retain(|_, served| served.socket != socket);
                mounted.silent |= mounted.served.len() < before;
                (mounted.served.len() < before).then(|| mounted.place.clone())
            })
        };
        if let Some(place) = place {
            let stopped = self.call(&place, self.0.agent.stop_socket(socket)).await;
            if let Err(error) = stopped {
                tracing::debug!(error = %line(&error), "a socket of the host is still listened at in the guest");
            }
            self.0.lost.notify_one();
        }
    }

    /// Forgets a container, and the mounts that it was the last one to use.
    pub async fn leave(&self, container: &str) {
        if !self.0.allowed {
            return;
        }
        // A look at a file system that does not answer must not keep a container from going.
        let _turn = tokio::time::timeout(PATIENCE, self.0.turn.lock()).await;
        let unused: Vec<Mounted> = {
            let mut table = self.table();
            table.placed.retain(|placed| placed.container != container);
            let Table { mounts, placed, .. } = &mut *table;
            let is_used = |number| placed.iter().any(|p| p.numbers.contains(&number));
            let unused: Vec<Mounted> = mounts.extract_if(.., |m| !is_used(m.number)).collect();
            for mounted in &unused {
                table.unwatch(&mounted.watches);
            }
            unused
        };
        for mounted in unused {
            if !mounted.told {
                continue;
            }
            let place = place_of(mounted.number);
            let ended = self.0.agent.end_sockets(&place);
            match self.call(&mounted.place, ended).await {
                Ok(()) => {}
                Err(Error::Agent {
                    source: agent::Error::Lost { .. },
                    ..
                }) => {}
                Err(error) => {
                    tracing::warn!(error = %line(&error), "the guest keeps sockets that no container uses");
                    if matches!(error, Error::Slow(_)) {
                        // Nor does it answer for the others; they go with it.
                        break;
                    }
                }
            }
        }
    }

    /// Repeats what happens on the host until it is aborted.
    async fn follow(self, readable: AsyncFd<OwnedFd>, inotify: Arc<Inotify>) {
        let mut retry = FIRST_RETRY;
        loop {
            let is_silent = self.table().mounts.iter().any(|mounted| mounted.silent);
            let again = async move {
                match is_silent && retry <= LAST_RETRY {
                    true => tokio::time::sleep(retry).await,
                    false => std::future::pending().await,
                }
            };
            let news = tokio::select! {
                ready = readable.readable() => {
                    let Ok(mut ready) = ready else {
                        return;
                    };
                    let news = match News::read(&inotify) {
                        Ok(news) => news,
                        Err(errno) => {
                            tracing::error!(%errno, "the sockets of the host are not followed any more: cannot read inotify");
                            return;
                        }
                    };
                    ready.clear_ready();
                    retry = FIRST_RETRY;
                    news
                }
                () = self.0.lost.notified() => {
                    retry = FIRST_RETRY;
                    News::default()
                }
                () = again => {
                    retry *= 2;
                    News::default()
                }
            };
            for number in self.concerned(&news) {
                match self.refresh(number).await {
                    Ok(()) => {}
                    Err(Error::Agent {
                        source: agent::Error::Lost { .. },
                        ..
                    }) => return,
                    Err(error) => {
                        tracing::warn!(error = %line(&error), "sockets of the host may not be as they should be in the guest");
                    }
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn concerned(&self, news: &News) -> Vec<u64> {
        let table = self.table();
        let concerned = table
            .mounts
            .iter()
            .filter(|m| m.silent || news.lost || !m.watches.is_disjoint(&news.changed));
        concerned.map(|mounted| mounted.number).collect()
    }
}

impl Table {
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

/// The mount of the share with this number, in the guest.
fn place_of(number: u64) -> String {
    format!("{GUEST_SHARE}/{number}")
}

/// What the agent is asked for to serve a socket.
fn request(
    number: u64,
    place: &Place,
    socket: u64,
    found: &Found,
    kind: Kind,
) -> wire::ServeSocketRequest {
    let (directory, name) = match (place.only(), found.path.rsplit_once('/')) {
        // A single socket is the mount itself.
        (Some(_), _) => (GUEST_SHARE.to_owned(), number.to_string()),
        (None, Some((way, name))) => (format!("{}/{way}", place_of(number)), name.to_owned()),
        (None, None) => (place_of(number), found.path.clone()),
    };
    wire::ServeSocketRequest {
        socket,
        place: place_of(number),
        directory,
        name: name + LISTEN_SUFFIX,
        datagrams: kind == Kind::Datagrams,
        ..wire::ServeSocketRequest::default()
    }
}

/// A look at a place, with what is new in it.
#[derive(Debug)]
pub(super) struct Looked {
    pub(super) look: Look,
    pub(super) new: Vec<(Found, Kind)>,
    pub(super) silent: bool,
}

impl Looked {
    /// Those in `known` are not asked again whether somebody listens.
    pub(super) fn at(
        place: &Place,
        inotify: &Inotify,
        known: &[Found],
        uid: u32,
    ) -> io::Result<Looked> {
        let look = match place.look(inotify) {
            Ok(look) => look,
            // The host has removed it, or put another one in its place.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::ENOTDIR | libc::ESTALE)
                ) =>
            {
                Look::default()
            }
            Err(error) => return Err(error),
        };
        let (mut new, mut silent) = (Vec::new(), false);
        for found in look.sockets.iter().filter(|found| !known.contains(found)) {
            let socket = place.socket(&found.path);
            match socket.ok().and_then(|socket| probe(uid, &socket)) {
                Some(Kind::Packets) => {
                    tracing::debug!(path = %found.path, "a SOCK_SEQPACKET socket is not served");
                }
                Some(kind) => new.push((found.clone(), kind)),
                None => silent = true,
            }
        }
        Ok(Looked { look, new, silent })
    }
}

/// What has happened, to which directories.
#[derive(Debug, Default)]
struct News {
    changed: HashSet<WatchDescriptor>,
    /// inotify(7): IN_Q_OVERFLOW. Everything may have changed.
    lost: bool,
}

impl News {
    fn read(inotify: &Inotify) -> Result<News, Errno> {
        let mut news = News::default();
        loop {
            match inotify.read_events() {
                Ok(events) => {
                    for event in events {
                        news.lost |= event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
                        news.changed.insert(event.wd);
                    }
                }
                Err(Errno::EAGAIN) => return Ok(news),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}
