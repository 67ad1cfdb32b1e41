//! The daemon that looks after a container between the engine's calls: containerd's tasks, and the
//! keepers of their processes.
//!
//! It begins with the connection of whoever makes the container, and ends when nothing is left: no
//! container, and no keeper. So a command that is killed at any moment leaves no monitor behind.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixStream,
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use super::{
    keepers::{self, Word},
    room::{Room, namespace},
};
use crate::{
    cgroup::{self, stay},
    containerd::{Exit, Place, Server, Tasks, events::Events, stdio::Handed},
    sys::{self, daemon::LISTENER},
};

/// The monitor's descriptor of the socket for keepers; that for calls is [`LISTENER`].
pub const KEEPERS: RawFd = LISTENER + 1;

/// How long a keeper may take from its connection to its first word.
const HELLO: Duration = Duration::from_secs(10);

/// How long it may take to end once it was told its status.
const FAREWELL: Duration = Duration::from_secs(10);

/// A monitor.
pub struct Monitor {
    tasks: Arc<Tasks>,
    handed: Arc<Handed>,
    /// How many keepers are connected.
    keepers: watch::Sender<usize>,
}

/// A keeper that is connected.
struct Connected(watch::Sender<usize>);

impl Connected {
    fn to(monitor: &Monitor) -> Connected {
        monitor.keepers.send_modify(|count| *count += 1);
        Connected(monitor.keepers.clone())
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Monitor {
    /// Runs one to its end. `config` is another configuration than the default one.
    ///
    /// # Errors
    /// It cannot listen, and nothing was begun.
    pub async fn run(
        room: Room,
        config: Option<PathBuf>,
        calls: UnixListener,
        keepers: UnixListener,
    ) -> io::Result<()> {
        leave_cgroup();
        let handed = Arc::new(Handed::default());
        let namespace = namespace(room.root());
        let events = Events::start(&namespace, "");
        let place = Place {
            namespace,
            config,
            handed: Some(handed.clone()),
        };
        let monitor = Arc::new(Monitor {
            tasks: Tasks::new(place, events),
            handed,
            keepers: watch::Sender::new(0),
        });
        keepers.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(keepers)?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let server = Server::start(&monitor.tasks, calls).await?;
        let is_over = tokio::select! {
            () = monitor.clone().listen(&listener) => true,
            _ = terminate.recv() => false,
            _ = interrupt.recv() => false,
        };
        monitor.tasks.close(Duration::ZERO).await;
        server.stop().await;
        if is_over && let Err(error) = room.remove() {
            tracing::warn!("{error}");
        }
        Ok(())
    }

    /// Takes keepers until nothing is left to look after.
    async fn listen(self: Arc<Self>, listener: &tokio::net::UnixListener) {
        // That of the maker came before this process began.
        let Ok(Ok((first, _))) = tokio::time::timeout(HELLO, listener.accept()).await else {
            return;
        };
        self.take(first);
        let over = self.clone();
        let over = over.until_nothing_is_left();
        let mut over = std::pin::pin!(over);
        loop {
            tokio::select! {
                () = &mut over => return,
                accepted = listener.accept() => match accepted {
                    Ok((keeper, _)) => self.take(keeper),
                    Err(error) => {
                        // Too many open files, perhaps: those that are connected may go.
                        tracing::warn!(%error, "a keeper is not heard");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
    }

    async fn until_nothing_is_left(self: Arc<Self>) {
        let mut keepers = self.keepers.subscribe();
        loop {
            // The sender is in `self`.
            let _ = keepers.wait_for(|count| *count == 0).await;
            self.tasks.until(|count| count == 0).await;
            if *self.keepers.borrow() == 0 {
                return;
            }
        }
    }

    fn take(self: &Arc<Self>, keeper: UnixStream) {
        // Of packets: it is watched as such from here on.
        let Ok(keeper) = keeper.into_std().map(OwnedFd::from) else {
            return;
        };
        let connected = Connected::to(self);
        let monitor = self.clone();
        tokio::spawn(async move {
            monitor.attend(keeper).await;
            drop(connected);
        });
    }

    /// Hears a keeper to its end.
    async fn attend(&self, keeper: OwnedFd) {
        let Ok(keeper) = sys::watch(keeper, Interest::READABLE) else {
            return;
        };
        let hello = tokio::time::timeout(HELLO, keepers::next(&keeper)).await;
        let Ok(Some(Word::Hello(ticket, streams))) = hello else {
            return;
        };
        let terminal = streams[0].try_clone().ok();
        let terminal = terminal.filter(|fd| linux::terminal::size(fd.as_fd()).is_ok());
        if !self.handed.put(&ticket, streams) {
            tracing::warn!(%ticket, "two keepers of one process");
            return;
        }
        keepers::tell(&keeper, 0);
        let (container, exec) = ticket.split_once('/').unwrap_or((&ticket, ""));
        let kept = Kept {
            tasks: &self.tasks,
            handed: &self.handed,
            container,
            exec,
            terminal,
        };
        kept.attend(&keeper).await;
        self.handed.forget(&ticket);
    }
}

/// A process and its keeper.
struct Kept<'a> {
    tasks: &'a Arc<Tasks>,
    handed: &'a Handed,
    container: &'a str,
    exec: &'a str,
    /// Of the process on the host, if it has one.
    terminal: Option<OwnedFd>,
}

impl Kept<'_> {
    async fn attend(&self, keeper: &AsyncFd<OwnedFd>) {
        let pid = loop {
            match keepers::next(keeper).await {
                Some(Word::Kept(pid)) => break pid,
                Some(_) => {}
                // Its maker has died, or could not make it.
                None => return self.undo().await,
            }
        };
        self.handed.stand_in(pid);
        self.keep(keeper).await;
        self.handed.leave(pid);
    }

    /// From the moment when the engine knows the process.
    async fn keep(&self, keeper: &AsyncFd<OwnedFd>) {
        self.resize().await;
        let ended = self.ended();
        let mut ended = std::pin::pin!(ended);
        let exit = loop {
            tokio::select! {
                biased;
                exit = &mut ended => break exit,
                word = keepers::next(keeper) => match word {
                    Some(Word::Signal(number)) => self.signal(number).await,
                    Some(_) => {}
                    None => {
                        tracing::warn!(container = self.container, exec = self.exec, "its keeper has gone: it is killed");
                        self.kill().await;
                        break ended.await;
                    }
                },
            }
        };
        let Some(exit) = exit else { return };
        if let Some(task) = self.tasks.made(self.container).await {
            task.stop_input(self.exec);
            if !self.exec.is_empty() {
                let _ = self.tasks.delete_exec(&task, self.exec).await;
            }
        }
        keepers::tell(keeper, exit.status);
        // It ends now; then this connection does.
        let gone = async { while keepers::next(keeper).await.is_some() {} };
        let _ = tokio::time::timeout(FAREWELL, gone).await;
    }

    /// The process' end; `None`: there is no such process.
    async fn ended(&self) -> Option<Exit> {
        let task = self.tasks.made(self.container).await?;
        task.ended(self.exec).await
    }

    /// Signals that come faster than the guest takes them wait in the connection.
    async fn signal(&self, number: u32) {
        if number == libc::SIGWINCH as u32 && self.terminal.is_some() {
            return self.resize().await;
        }
        let killed = self.tasks.kill(self.container, self.exec, number, false);
        if let Err(error) = killed.await {
            tracing::debug!(%error, number, "signal not delivered");
        }
    }

    async fn kill(&self) {
        let kill = libc::SIGKILL as u32;
        let all = self.exec.is_empty();
        let killed = self.tasks.kill(self.container, self.exec, kill, all);
        if let Err(error) = killed.await {
            tracing::debug!(%error, "not killed");
        }
    }

    async fn resize(&self) {
        let size = self.terminal.as_ref();
        let size = size.and_then(|fd| linux::terminal::size(fd.as_fd()).ok());
        if let Some((rows, columns)) = size.filter(|(rows, columns)| *rows > 0 && *columns > 0) {
            let resized = self
                .tasks
                .resize(self.container, self.exec, rows, columns)
                .await;
            if let Err(error) = resized {
                tracing::debug!(%error, "terminal not resized");
            }
        }
    }

    /// Ends and forgets what nobody was told of.
    async fn undo(&self) {
        let Some(task) = self.tasks.made(self.container).await else {
            return;
        };
        if task.runs(self.exec).await {
            self.kill().await;
            task.ended(self.exec).await;
        }
        let undone = match self.exec {
            "" => self.tasks.delete(self.container).await.map(drop),
            exec => self.tasks.delete_exec(&task, exec).await.map(drop),
        };
        if let Err(error) = undone {
            tracing::debug!(%error, "nothing to undo");
        }
    }
}

/// Goes to the root of cgroups: that of the engine goes with the engine's own unit, and a pod's is
/// killed as a whole when the pod ends. Where the root takes no process it stays where it is.
fn leave_cgroup() {
    if let Err(error) = stay::enter(Path::new(cgroup::ROOT)) {
        tracing::debug!(%error, "stays in the cgroup of its maker");
    }
}
