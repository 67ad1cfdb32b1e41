//! The size of a machine that runs follows what its containers may use.
//!
//! ```text
//! a container comes, or its limits rise
//!     ──► join, claim: host's ceiling up ──► memory plugged, vCPUs online ──► its limits
//! a container ends, or its limits fall
//!     ──► its limits ──► settle: vCPUs offline, memory unplugged ──► ceiling down
//! ```
//!
//! A machine is never smaller than it was booted, and never larger than that and what it was given
//! to spare ([`Size::spare`]). docs/adr/0019-sizes-that-move.md has the reasons.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout},
};

use super::{
    Access, Error, Pod,
    limits::limit,
    promptly,
    size::{self, Host, Size},
};
use crate::{
    cgroup,
    config::Config,
    machine::vmm,
    oci::{
        asked::{Amounts, Asked, together},
        limits::Limits,
    },
};

/// How long a guest may take to plug memory: it makes a page array for it, and little else.
const GROWTH: Duration = Duration::from_secs(10);
/// How long whoever lowers a limit waits for the guest to let go of memory.
const LETTING_GO: Duration = Duration::from_secs(2);
/// How long the VMM may be silent beside.
const SILENCE: Duration = Duration::from_secs(5);
/// Between two looks at what the guest has, the first and the last ones: each asks it something.
const FIRST_LOOK: Duration = Duration::from_millis(5);
const LAST_LOOK: Duration = Duration::from_millis(100);
/// Between two looks at a guest that keeps more than it is to have, the first and the last ones.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LAST_PAUSE: Duration = Duration::from_secs(60);

/// How a machine may grow.
#[derive(Clone, Debug, Default)]
pub struct Room {
    /// What it may get beside.
    pub spare: Size,
    /// The limits of the pod that it was booted for, where an engine has announced them: they are
    /// its size whatever its containers add up to, until an update changes one.
    pub announced: Limits,
}

impl Room {
    /// Of a machine of this size.
    pub fn of(size: Size, announced: Limits, config: &Config) -> Room {
        Room {
            spare: size.spare(config),
            announced,
        }
    }
}

/// What the size of a pod's machine depends on, and what it is.
#[derive(Debug)]
pub(super) struct Sizes {
    id: String,
    config: Config,
    boot: Size,
    /// What it can come to.
    most: Size,
    announced: Limits,
    access: Access,
    cgroup: PathBuf,
    state: Mutex<State>,
    /// One change at a time.
    changing: tokio::sync::Mutex<()>,
    /// Counts who has wanted the machine smaller: the last one sees to it.
    turn: AtomicU64,
}

#[derive(Debug)]
struct State {
    /// The most that the machine has.
    now: Size,
    /// What it was asked to have.
    requested: Size,
    /// The containers that said what they may use.
    asked: BTreeMap<String, Asked>,
    /// The same after an update that is being made.
    pending: BTreeMap<String, Asked>,
    /// What updates have changed of what was announced.
    updates: Amounts,
    /// The container for which the machine was booted: its processors are the host's.
    holder: Option<String>,
}

impl Sizes {
    pub(super) fn new(
        id: &str,
        config: &Config,
        (boot, room): (Size, Room),
        (access, cgroup): (Access, PathBuf),
    ) -> Arc<Sizes> {
        Arc::new(Sizes {
            id: id.into(),
            config: config.clone(),
            boot,
            most: Size {
                vcpus: boot.vcpus + room.spare.vcpus,
                memory_mib: boot.memory_mib + room.spare.memory_mib,
            },
            announced: room.announced,
            access,
            cgroup,
            state: Mutex::new(State {
                now: boot,
                requested: boot,
                asked: BTreeMap::new(),
                pending: BTreeMap::new(),
                updates: Amounts::default(),
                holder: None,
            }),
            changing: tokio::sync::Mutex::default(),
            turn: AtomicU64::new(0),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while it is held")
    }

    /// What the containers may use together, before or after the updates that are being made.
    fn total(&self, after: bool) -> Limits {
        let state = self.state();
        let mut updates = state.updates;
        let mut all = Vec::new();
        for (id, asked) in &state.asked {
            let new = state.pending.get(id).filter(|_| after);
            if let Some(new) = new {
                updates = updates.changed(asked, new);
            }
            all.push(new.unwrap_or(asked));
        }
        let is_holder = |id: &String| state.holder.as_ref() == Some(id);
        let alone = state.asked.len() == 1 && state.asked.keys().all(is_holder);
        together(&all, alone).announced(&self.announced, updates)
    }

    /// What they need: of limits that are about to change, the larger ones.
    fn needed(&self) -> Result<Size, Error> {
        let (host, bounds) = (Host::here(), (self.boot, self.most));
        let size = |after| Size::grown(&host, &self.total(after), bounds, &self.config);
        let after = size(true)?;
        let before = size(false).unwrap_or(self.boot);
        Ok(Size {
            vcpus: after.vcpus.max(before.vcpus),
            memory_mib: after.memory_mib.max(before.memory_mib),
        })
    }

    async fn grow(&self, needed: Size) -> Result<(), Error> {
        let State { now, requested, .. } = *self.state();
        if needed.memory_mib > requested.memory_mib {
            if needed.memory_mib > now.memory_mib {
                // First, and for good when the guest has begun: it may have all of it at once.
                self.set_ceiling(needed.memory_mib)?;
                self.state().now.memory_mib = needed.memory_mib;
            }
            let wanted_mib = self.plugged_in(needed);
            let plugged_mib = self.plug(needed, GROWTH, |mib| mib >= wanted_mib).await?;
            if plugged_mib < wanted_mib {
                return Err(Error::Growth {
                    wanted_mib,
                    plugged_mib,
                    secs: GROWTH.as_secs(),
                });
            }
        }
        if needed.vcpus > requested.vcpus {
            self.state().now.vcpus = needed.vcpus.max(now.vcpus);
            self.state().requested.vcpus = needed.vcpus;
            promptly(self.access.agent().set_processors(needed.vcpus)).await?;
        }
        let has = self.state().now;
        if has != now {
            tracing::info!(pod = %self.id, vcpus = has.vcpus, memory_mib = has.memory_mib, "the machine has grown");
        }
        Ok(())
    }

    /// Whether the machine keeps what it is not to have.
    async fn shrink(&self) -> Result<bool, Error> {
        let needed = self.needed()?;
        let State { now, requested, .. } = *self.state();
        if needed.vcpus < now.vcpus.max(requested.vcpus) {
            self.state().requested.vcpus = needed.vcpus;
            promptly(self.access.agent().set_processors(needed.vcpus)).await?;
            self.state().now.vcpus = needed.vcpus;
        }
        if needed.memory_mib >= now.memory_mib.max(requested.memory_mib) {
            return Ok(false);
        }
        let wanted_mib = self.plugged_in(needed);
        let plugged_mib = self
            .plug(needed, LETTING_GO, |mib| mib <= wanted_mib)
            .await?;
        let mut memory_mib = needed.memory_mib;
        let keeps = plugged_mib > wanted_mib;
        if keeps {
            // Never more than it had: a VMM that fell tells what it likes.
            let has = self.boot.memory_mib.saturating_add(plugged_mib);
            memory_mib = has.min(now.memory_mib).max(memory_mib);
            tracing::warn!(pod = %self.id, wanted_mib, plugged_mib, "the guest uses memory that it is to let go, and keeps it until then");
        }
        self.state().now.memory_mib = memory_mib;
        self.set_ceiling(memory_mib)?;
        Ok(keeps)
    }

    /// Shrinks the machine as far as its containers let it, in the background for as long as the
    /// guest keeps more. Returns after the first try, or when that takes long.
    async fn settle(self: &Arc<Self>) {
        let sizes = self.clone();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) + 1;
        let (tried, first) = oneshot::channel();
        tokio::spawn(async move {
            let mut tried = Some(tried);
            let mut pause = FIRST_PAUSE;
            loop {
                let shrunk = {
                    let _one = sizes.changing.lock().await;
                    sizes.shrink().await
                };
                // Whoever has gone on does not hear it.
                let _ = tried.take().map(|tried| tried.send(()));
                match shrunk {
                    Ok(false) => return,
                    Ok(true) => {}
                    Err(error) => {
                        tracing::warn!(pod = %sizes.id, error = %error.text(), "the machine keeps a size that its containers do not need");
                    }
                }
                tokio::select! {
                    () = sleep(pause) => {}
                    _ = sizes.access.vm.ended() => return,
                }
                if sizes.turn.load(Ordering::Relaxed) != turn {
                    return;
                }
                pause = LAST_PAUSE.min(2 * pause);
            }
        });
        let _ = timeout(2 * LETTING_GO, first).await;
    }

    /// MiB beside what it was booted with, in whole blocks.
    fn plugged_in(&self, size: Size) -> u64 {
        (size.memory_mib - self.boot.memory_mib).next_multiple_of(2)
    }

    /// Asks the guest to plug memory until it has so much, or to unplug it; how many MiB it has
    /// beside what it was booted with when that is enough, or the time is over.
    async fn plug(
        &self,
        size: Size,
        limit: Duration,
        enough: impl Fn(u64) -> bool,
    ) -> Result<u64, Error> {
        let vm = &self.access.vm;
        let plugging = async {
            self.state().requested.memory_mib = size.memory_mib;
            vm.plug_memory(self.plugged_in(size)).await?;
            let (end, mut look) = (Instant::now() + limit, FIRST_LOOK);
            loop {
                let plugged = vm.stats().await?.plugged.unwrap_or_default();
                let now = plugged.plugged_bytes >> 20;
                if enough(now) || Instant::now() >= end {
                    return Ok(now);
                }
                sleep(look).await;
                look = LAST_LOOK.min(2 * look);
            }
        };
        let secs = (limit + SILENCE).as_secs();
        let silent = |_| vmm::Error::Silent {
            request: "other memory",
            secs,
        };
        let done: Result<u64, vmm::Error> =
            timeout(limit + SILENCE, plugging).await.map_err(silent)?;
        Ok(done?)
    }

    fn set_ceiling(&self, memory_mib: u64) -> Result<(), Error> {
        let bytes = size::host_ceiling(memory_mib, &self.config);
        let files = cgroup::memory_limits(bytes).into_iter();
        // Without the controller the pod is not bounded by it, as its start has told.
        let there = files.filter(|(name, _)| self.cgroup.join(name).exists());
        let files: Vec<_> = there.map(|(name, value)| (name.into(), value)).collect();
        limit(&self.cgroup, &files).map(drop)
    }
}

/// An update that its machine is large enough for. Until it is done, the larger limits count.
#[must_use]
#[derive(Debug)]
pub struct Claim(String);

impl Pod {
    /// What its machine has.
    pub fn size(&self) -> Size {
        self.sizes.state().now
    }

    /// Remembers what the container may use for which the machine was booted.
    pub fn adopt(&self, container: &str, asked: Asked) {
        let mut state = self.sizes.state();
        state.asked.insert(container.into(), asked);
        state.holder = Some(container.into());
    }

    /// Has the machine grow to what its containers need with one more.
    ///
    /// # Errors
    /// The machine cannot be so large, or does not become it. It is as before.
    pub async fn join(&self, container: &str, asked: Asked) -> Result<(), Error> {
        let joined = {
            let _one = self.sizes.changing.lock().await;
            self.sizes.state().asked.insert(container.into(), asked);
            self.grow().await
        };
        if joined.is_err() {
            self.release(container).await;
        }
        joined
    }

    /// Has the machine grow to what its containers need when this one may use so much; what `asked`
    /// does not name stays as it is. Who calls it has no other claim of the container.
    ///
    /// # Errors
    /// The machine cannot be so large, or does not become it. It is as before.
    pub async fn claim(&self, container: &str, asked: &Asked) -> Result<Claim, Error> {
        let claim = Claim(container.into());
        let grown = {
            let _one = self.sizes.changing.lock().await;
            {
                let mut state = self.sizes.state();
                let old = state.asked.get(container).cloned().unwrap_or_default();
                let new = old.updated(asked).map_err(size::Error::from)?;
                state.pending.insert(container.into(), new);
            }
            self.grow().await
        };
        match grown {
            Ok(()) => Ok(claim),
            Err(error) => {
                self.disclaim(claim).await;
                Err(error)
            }
        }
    }

    /// The processors that the container for which the machine was booted may run on, where a list
    /// names them, after an update that is being made.
    pub fn processors(&self, claim: &Claim) -> Option<String> {
        let state = self.sizes.state();
        let list = state.pending.get(&claim.0)?.processors();
        (state.holder.as_ref() == Some(&claim.0))
            .then_some(list)
            .flatten()
    }

    /// The update is made: takes from the machine what its containers do not need any more.
    pub async fn commit(&self, claim: Claim) {
        {
            let state = &mut *self.sizes.state();
            // One that has ended meanwhile asks for nothing.
            if let (Some(new), Some(asked)) = (
                state.pending.remove(&claim.0),
                state.asked.get_mut(&claim.0),
            ) {
                state.updates = state.updates.changed(asked, &new);
                *asked = new;
            }
        }
        self.sizes.settle().await;
    }

    /// The update is not made.
    pub async fn disclaim(&self, claim: Claim) {
        self.sizes.state().pending.remove(&claim.0);
        self.sizes.settle().await;
    }

    /// A container has ended, or was not made.
    pub async fn release(&self, container: &str) {
        let known = self.sizes.state().asked.remove(container);
        if known.is_some() && !self.is_ending() {
            self.sizes.settle().await;
        }
    }

    async fn grow(&self) -> Result<(), Error> {
        let needed = self.sizes.needed()?;
        self.sizes.grow(needed).await
    }
}
