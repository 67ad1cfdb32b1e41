//! The size of a machine that runs follows what its containers may use.
//!
//! ```text
//! a container comes, or its limits rise ──► claim: host's ceiling up ──► memory plugged, vCPUs online ──► its limits
//! a container goes, or its limits fall  ──► its limits ──► settle: vCPUs offline, memory unplugged ──► ceiling down
//! ```
//!
//! A machine is never smaller than it was booted, and never larger than that and what it was given
//! to spare ([`Size::spare`]). docs/adr/0019-sizes-that-move.md has the reasons.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Error, Pod, promptly,
    size::{self, Size},
};
use crate::{
    cgroup,
    config::Config,
    oci::limits::{self, Asked},
};

/// How long a guest may take to plug memory: it makes a page array for it, and little else.
const GROWTH: Duration = Duration::from_secs(10);
/// How long whoever lowers a limit waits for the guest to let go of memory. It goes on by itself.
const LETTING_GO: Duration = Duration::from_secs(2);
/// Between two looks at it, the first and the last ones: each asks the guest something.
const FIRST_LOOK: Duration = Duration::from_millis(5);
const LAST_LOOK: Duration = Duration::from_millis(100);

/// What the size of a pod's machine depends on, and what it is.
#[derive(Debug)]
pub(super) struct Sizes {
    config: Config,
    boot: Size,
    spare: Size,
    state: Mutex<State>,
    /// One change at a time.
    changing: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    now: Size,
    /// The containers that said what they may use.
    asked: BTreeMap<String, Asked>,
}

impl Sizes {
    pub(super) fn new(config: &Config, boot: Size, spare: Size) -> Sizes {
        let asked = BTreeMap::new();
        Sizes {
            config: config.clone(),
            boot,
            spare,
            state: Mutex::new(State { now: boot, asked }),
            changing: tokio::sync::Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while it is held")
    }

    fn set(&self, change: impl FnOnce(&mut Size)) {
        change(&mut self.state().now);
    }

    /// What the containers need together.
    fn needed(&self) -> Result<Size, Error> {
        let total = limits::together(self.state().asked.values()).map_err(size::Error::from)?;
        let (time, memory) = (total.quota.is_some() || total.cpus.is_some(), total.memory);
        let size = Size::of(&total, &self.config)?;
        // Who has no limit is content with what there is.
        let mut needed = self.boot;
        if time {
            needed.vcpus = needed.vcpus.max(size.vcpus);
        }
        if memory.is_some() {
            needed.memory_mib = needed.memory_mib.max(size.memory_mib);
        }
        let most = Size {
            vcpus: self.boot.vcpus + self.spare.vcpus,
            memory_mib: self.boot.memory_mib + self.spare.memory_mib,
        };
        Ok(needed.within(most)?)
    }

    fn restore(&self, claim: Claim) {
        let asked = &mut self.state().asked;
        match (claim.before, asked.get_mut(&claim.container)) {
            (Some(before), Some(asked)) => *asked = before,
            // It has gone meanwhile.
            (Some(_), None) => {}
            (None, _) => drop(asked.remove(&claim.container)),
        }
    }
}

/// What a container asked for before, to be asked for again where the new limits do not come true.
#[must_use]
#[derive(Debug)]
pub struct Claim {
    container: String,
    before: Option<Asked>,
}

impl Pod {
    /// What its machine has now.
    pub fn size(&self) -> Size {
        self.sizes.state().now
    }

    /// Remembers what the container may use for which the machine was booted.
    pub fn adopt(&self, container: &str, asked: Asked) {
        self.sizes.state().asked.insert(container.into(), asked);
    }

    /// Has the machine grow to what its containers need when this one may use so much; what `asked`
    /// does not name stays as it was. Limits that fall wait for [`Pod::settle`].
    ///
    /// # Errors
    /// The machine cannot be so large, or does not become it. It is as before.
    pub async fn claim(&self, container: &str, asked: Asked) -> Result<Claim, Error> {
        let _one = self.sizes.changing.lock().await;
        let claim = {
            let all = &mut self.sizes.state().asked;
            let before = all.get(container).cloned();
            let asked = match &before {
                Some(before) => before.updated(asked),
                None => asked,
            };
            all.insert(container.into(), asked);
            Claim {
                container: container.into(),
                before,
            }
        };
        let grown = match self.sizes.needed() {
            Ok(needed) => self.grow(needed).await,
            Err(error) => Err(error),
        };
        match grown {
            Ok(()) => Ok(claim),
            Err(error) => {
                self.sizes.restore(claim);
                self.shrink().await;
                Err(error)
            }
        }
    }

    /// Takes a claim back.
    pub async fn disclaim(&self, claim: Claim) {
        self.sizes.restore(claim);
        self.settle().await;
    }

    /// Takes from the machine what its containers do not need any more: limits have fallen.
    pub async fn settle(&self) {
        let _one = self.sizes.changing.lock().await;
        self.shrink().await;
    }

    /// The same for a container that has ended. Who waits for its end, or deletes it, does not wait
    /// long for a guest that hangs: the next change does the rest.
    pub async fn release(&self, container: &str) {
        let asked = self.sizes.state().asked.remove(container);
        if asked.is_some() && !self.is_ending() {
            let _ = tokio::time::timeout(2 * LETTING_GO, self.settle()).await;
        }
    }

    async fn grow(&self, needed: Size) -> Result<(), Error> {
        let (sizes, now) = (&self.sizes, self.size());
        if needed.memory_mib > now.memory_mib {
            // First, and for good when the guest has begun: it may have all of it at once.
            self.set_ceiling(needed.memory_mib)?;
            sizes.set(|now| now.memory_mib = needed.memory_mib);
            let wanted_mib = blocks(needed.memory_mib - sizes.boot.memory_mib);
            let plugged_mib = self.plug(wanted_mib, GROWTH).await?;
            if plugged_mib < wanted_mib {
                return Err(Error::Growth {
                    wanted_mib,
                    plugged_mib,
                    secs: GROWTH.as_secs(),
                });
            }
        }
        if needed.vcpus > now.vcpus {
            sizes.set(|now| now.vcpus = needed.vcpus);
            promptly(self.agent().set_processors(needed.vcpus)).await?;
        }
        let Size { vcpus, memory_mib } = self.size();
        if self.size() != now {
            tracing::info!(pod = %self.id, vcpus, memory_mib, "the machine has grown");
        }
        Ok(())
    }

    /// What does not shrink stays the machine's, and is told.
    async fn shrink(&self) {
        let (sizes, now) = (&self.sizes, self.size());
        let shrunk = async {
            let needed = sizes.needed()?;
            if needed.vcpus < now.vcpus {
                promptly(self.agent().set_processors(needed.vcpus)).await?;
                sizes.set(|now| now.vcpus = needed.vcpus);
            }
            if needed.memory_mib < now.memory_mib {
                let wanted_mib = blocks(needed.memory_mib - sizes.boot.memory_mib);
                let plugged_mib = self.plug(wanted_mib, LETTING_GO).await?;
                let mut memory_mib = needed.memory_mib;
                if plugged_mib > wanted_mib {
                    tracing::warn!(pod = %self.id, wanted_mib, plugged_mib, "the guest uses memory that it is to let go, and keeps it until then");
                    // Never more than it had: a guest that fell tells what it likes.
                    memory_mib = now.memory_mib.min(sizes.boot.memory_mib + plugged_mib);
                }
                sizes.set(|now| now.memory_mib = memory_mib);
                self.set_ceiling(memory_mib)?;
            }
            Ok::<_, Error>(())
        };
        if let Err(error) = shrunk.await {
            tracing::warn!(pod = %self.id, error = %error.text(), "the machine keeps a size that its containers do not need");
        }
    }

    /// Has the guest plug memory until it has so many MiB beside what it was booted with, or unplug
    /// it; how much it has when that is done, or the time is over.
    async fn plug(&self, wanted_mib: u64, limit: Duration) -> Result<u64, Error> {
        let vm = &self.access.vm;
        let before = self.plugged().await?;
        vm.plug_memory(wanted_mib).await?;
        let (end, mut look) = (Instant::now() + limit, FIRST_LOOK);
        loop {
            let plugged = self.plugged().await?;
            let reached = match before <= wanted_mib {
                true => plugged >= wanted_mib,
                false => plugged <= wanted_mib,
            };
            if reached || Instant::now() >= end {
                return Ok(plugged);
            }
            tokio::time::sleep(look).await;
            look = LAST_LOOK.min(2 * look);
        }
    }

    /// MiB.
    async fn plugged(&self) -> Result<u64, Error> {
        let stats = self.access.vm.stats().await?;
        Ok(stats.plugged.map_or(0, |memory| memory.plugged_bytes >> 20))
    }

    fn set_ceiling(&self, memory_mib: u64) -> Result<(), Error> {
        let bytes = size::host_ceiling(memory_mib, &self.sizes.config);
        let files = cgroup::memory_limits(bytes).into_iter();
        // Without the controller the pod is not bounded by it, as its start has told.
        let there = files.filter(|(name, _)| self.cgroup.join(name).exists());
        let files: Vec<_> = there.map(|(name, value)| (name.into(), value)).collect();
        self.limit(&files).map(drop)
    }
}

/// MiB in whole blocks, as memory is plugged.
fn blocks(mib: u64) -> u64 {
    mib.next_multiple_of(2)
}
