//! The sockets of a pod, and the task that follows the host.

use std::{
    collections::HashSet,
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
    sync::Notify,
    task::AbortHandle,
    time::Instant,
};

use super::{
    Error, Offers, check,
    dial::Kind,
    look::Looked,
    place::{Found, Place},
    table::{Noted, Table, Target, Watcher},
};
use crate::{
    error::line,
    machine::agent::{self, Agent},
    oci::{GUEST_SHARE, HostBind, Plan},
    sys,
};

/// How long the guest may take over one socket.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long we rest after a look: a guest that makes many files is seen now and then.
const PAUSE: Duration = Duration::from_millis(100);
/// When sockets without a listener are asked again: a server binds before it listens, and nothing
/// tells when it does.
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
    /// How long the guest trusts what it knows of a name.
    trust: Duration,
    table: Mutex<Table>,
    /// Held over a look and what follows from it.
    turn: tokio::sync::Mutex<()>,
    /// Some server has gone, or another one has come in its place.
    lost: Notify,
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
    /// None yet. `trust` is how long the guest trusts a name of the share.
    pub fn new(agent: Agent, uid: u32, allowed: bool, trust: Duration) -> Owner {
        Owner(Sockets(Arc::new(Shared {
            agent,
            uid,
            allowed,
            trust,
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

    /// Notes the mounts of a container, each with its number in the share. After an error,
    /// [`Sockets::leave`] undoes it.
    pub fn place<'a>(
        &self,
        container: &str,
        binds: impl Iterator<Item = (u64, &'a HostBind)>,
    ) -> Result<(), Error> {
        if !self.0.allowed {
            return Ok(());
        }
        self.table().place(container, binds)
    }

    /// Has the guest listen at the sockets of a container's mounts. The guest is ready, the
    /// container not yet made.
    pub async fn fill(&self, container: &str, offers: &impl Offers) -> Result<(), Error> {
        let numbers = self.table().numbers_of(container);
        if numbers.is_empty() {
            return Ok(());
        }
        self.watch()?;
        self.relay(offers);
        for number in numbers {
            self.refresh(number).await?;
        }
        Ok(())
    }

    /// Notes the task that takes connections, unless there is one.
    pub(super) fn relay_by(&self, start: impl FnOnce() -> AbortHandle) {
        self.table().relay.get_or_insert_with(start);
    }

    pub(super) fn agent(&self) -> &Agent {
        &self.0.agent
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
        let Some((place, known, inotify)) = self.table().known(number) else {
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
        let Noted { gone, replaced } = self.table().note(number, &looked, self.0.trust);
        for socket in gone {
            self.call(&place, self.0.agent.stop_socket(socket)).await?;
        }
        for (found, kind) in looked.new {
            self.serve(number, &place, found, kind).await?;
        }
        if replaced {
            self.0.lost.notify_one();
        }
        Ok(())
    }

    /// Stops those that are not found by their name any more.
    async fn retire(&self) {
        let _turn = self.0.turn.lock().await;
        let due = self.table().take_due(Instant::now());
        for (place, socket) in due {
            self.stop(&place, socket).await;
        }
    }

    async fn stop(&self, place: &Place, socket: u64) {
        let stopped = self.call(place, self.0.agent.stop_socket(socket)).await;
        if let Err(error) = stopped {
            tracing::debug!(error = %line(&error), "a socket of the host is still listened at in the guest");
        }
    }

    async fn serve(
        &self,
        number: u64,
        place: &Place,
        found: Found,
        kind: Kind,
    ) -> Result<(), Error> {
        let name = place.path().join(&found.path);
        // Before the guest is told: a connection may come before its answer.
        let socket = self.table().add(number, &found, kind);
        let request = request(number, place, socket, &found, kind);
        let answer = self.call(place, self.0.agent.serve_socket(&request)).await;
        if answer.is_err() {
            self.table().remove(socket);
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
        self.table().target(socket)
    }

    /// Nobody listens at a socket any more: so does nobody in the guest, until somebody does again.
    pub(super) async fn lost(&self, socket: u64) {
        let _turn = self.0.turn.lock().await;
        let place = self.table().remove(socket).map(|mounted| {
            mounted.silent = true;
            mounted.place.clone()
        });
        if let Some(place) = place {
            self.stop(&place, socket).await;
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
        let unused = self.table().leave(container);
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
            let (is_silent, due) = {
                let table = self.table();
                (table.is_silent(), table.next_due())
            };
            let again = (is_silent && retry <= LAST_RETRY).then(|| Instant::now() + retry);
            let news = tokio::select! {
                () = until(due) => {
                    self.retire().await;
                    continue;
                }
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
                () = until(again) => {
                    retry *= 2;
                    News::default()
                }
            };
            let concerned = self.table().concerned(&news.changed, news.lost);
            for number in concerned {
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
}

/// For ever, when there is no such time.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
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
