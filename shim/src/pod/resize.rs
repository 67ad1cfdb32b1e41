//! The size of a machine that runs follows what its containers may use.
//!
//! ```text
//! a container comes, or its limits rise ──► claim: host's ceiling up ──► memory plugged, vCPUs online ──► its limits
//! a container goes, or its limits fall  ──► its limits ──► settle: vCPUs offline, memory unplugged ──► ceiling down
//! ```
//!
//! A machine is never smaller than it was booted, and never larger than that and what it was given
//! to spare ([`Size::spare`]). docs/adr/0019-sizes-that-move.md has the reasons.

use std::{collections::BTreeMap, time::Duration};

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
/// Between two looks at it.
const LOOK: Duration = Duration::from_millis(10);

/// What the size of a pod's machine depends on.
#[derive(Debug)]
pub(super) struct Sizes {
    config: Config,
    boot: Size,
    spare: Size,
    /// The containers that said what they may use.
    asked: BTreeMap<String, Asked>,
}

impl Sizes {
    pub(super) fn new(config: &Config, boot: Size, spare: Size) -> Sizes {
        Sizes {
            config: config.clone(),
            boot,
            spare,
            asked: BTreeMap::new(),
        }
    }

    pub(super) fn boot(&self) -> Size {
        self.boot
    }

    /// What the containers need together.
    fn needed(&self) -> Result<Size, Error> {
        let total = limits::together(self.asked.values()).map_err(size::Error::from)?;
        let (time, memory) = (total.quota.is_some() || total.cpus.is_some(), total.memory);
        let size = Size::of(&total, &self.config)?;
        // Who has no limit is content with what there is.
        let or = |asked, now, boot: u64| if asked { u64::max(now, boot) } else { boot };
        let needed = Size {
            vcpus: or(time, size.vcpus.into(), self.boot.vcpus.into()) as u32,
            memory_mib: or(memory.is_some(), size.memory_mib, self.boot.memory_mib),
        };
        let most = Size {
            vcpus: self.boot.vcpus + self.spare.vcpus,
            memory_mib: self.boot.memory_mib + self.spare.memory_mib,
        };
        needed.within(most).map_err(Error::from)
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
        *self.now.lock().expect("no panic while it is held")
    }

    fn set_size(&self, size: Size) {
        *self.now.lock().expect("no panic while it is held") = size;
    }

    /// Remembers what the container may use for which the machine was booted.
    pub async fn adopt(&self, container: &str, asked: Asked) {
        let mut sizes = self.sizes.lock().await;
        sizes.asked.insert(container.into(), asked);
    }

    /// Has the machine grow to what its containers need when this one may use so much; what `asked`
    /// does not name stays as it was. Limits that fall wait for [`Pod::settle`].
    ///
    /// # Errors
    /// The machine cannot be so large, or does not become it. It is as before.
    pub async fn claim(&self, container: &str, asked: Asked) -> Result<Claim, Error> {
        let mut sizes = self.sizes.lock().await;
        let before = sizes.asked.get(container).cloned();
        let asked = match &before {
            Some(before) => before.updated(asked),
            None => asked,
        };
        sizes.asked.insert(container.into(), asked);
        let claim = Claim {
            container: container.into(),
            before,
        };
        let grown = match sizes.needed() {
            Ok(needed) => self.grow(&sizes, needed).await,
            Err(error) => Err(error),
        };
        if let Err(error) = grown {
            sizes.restore(claim);
            self.shrink(&sizes).await;
            return Err(error);
        }
        Ok(claim)
    }

    /// Takes a claim back.
    pub async fn disclaim(&self, claim: Claim) {
        let mut sizes = self.sizes.lock().await;
        sizes.restore(claim);
        self.shrink(&sizes).await;
    }

    /// Takes from the machine what its containers do not need any more: limits have fallen.
    pub async fn settle(&self) {
        self.shrink(&*self.sizes.lock().await).await;
    }

    /// The same, when a container has gone.
    pub(super) async fn release(&self, container: &str) {
        let mut sizes = self.sizes.lock().await;
        if sizes.asked.remove(container).is_some() && !self.is_ending() {
            self.shrink(&sizes).await;
        }
    }

    async fn grow(&self, sizes: &Sizes, needed: Size) -> Result<(), Error> {
        let now = self.size();
        if needed.memory_mib > now.memory_mib {
            // First, and for good when the guest has begun: it may have all of it at once.
            self.set_ceiling(sizes, needed.memory_mib)?;
            self.set_size(Size {
                memory_mib: needed.memory_mib,
                ..now
            });
            let wanted = needed.memory_mib - sizes.boot.memory_mib;
            let plugged = self.plug(wanted, GROWTH).await?;
            if plugged < wanted {
                return Err(Error::Growth {
                    wanted_mib: wanted,
                    plugged_mib: plugged,
                    secs: GROWTH.as_secs(),
                });
            }
        }
        if needed.vcpus > now.vcpus {
            self.set_size(Size {
                vcpus: needed.vcpus,
                ..self.size()
            });
            promptly(self.agent().set_processors(needed.vcpus)).await?;
        }
        let grown = self.size();
        if grown != now {
            tracing::info!(pod = %self.id, vcpus = grown.vcpus, memory_mib = grown.memory_mib, "the machine has grown");
        }
        Ok(())
    }

    /// What does not shrink stays the machine's, and is told.
    async fn shrink(&self, sizes: &Sizes) {
        let now = self.size();
        let needed = match sizes.needed() {
            // The operator may have fewer processors by now.
            Err(error) => {
                return tracing::warn!(pod = %self.id, error = %error.text(), "the machine stays as it is");
            }
            Ok(needed) => needed,
        };
        if needed.vcpus < now.vcpus {
            match promptly(self.agent().set_processors(needed.vcpus)).await {
                Ok(()) => self.set_size(Size {
                    vcpus: needed.vcpus,
                    ..self.size()
                }),
                Err(error) => {
                    tracing::warn!(pod = %self.id, vcpus = now.vcpus, error = %error.text(), "the machine keeps its vCPUs")
                }
            }
        }
        if needed.memory_mib < now.memory_mib {
            let wanted = needed.memory_mib - sizes.boot.memory_mib;
            let plugged = match self.plug(wanted, LETTING_GO).await {
                Ok(plugged) => plugged,
                Err(error) => {
                    return tracing::warn!(pod = %self.id, error = %error.text(), "the machine keeps its memory");
                }
            };
            if plugged > wanted {
                tracing::warn!(pod = %self.id, wanted_mib = wanted, plugged_mib = plugged, "the guest uses memory that it is to let go, and keeps it until then");
            }
            // Never more than it had: a guest that fell tells what it likes.
            let memory_mib = now
                .memory_mib
                .min(sizes.boot.memory_mib + plugged.max(wanted));
            self.set_size(Size {
                memory_mib,
                ..self.size()
            });
            if let Err(error) = self.set_ceiling(sizes, memory_mib) {
                tracing::warn!(pod = %self.id, error = %error.text(), "the pod keeps its ceiling on the host");
            }
        }
    }

    /// Has the guest plug memory until it has so many MiB beside what it was booted with, or unplug
    /// it; how much it has when that is done, or the time is over.
    async fn plug(&self, wanted_mib: u64, limit: Duration) -> Result<u64, Error> {
        let vm = &self.access.vm;
        let before = self.plugged().await?;
        vm.plug_memory(wanted_mib).await?;
        let end = Instant::now() + limit;
        loop {
            let plugged = self.plugged().await?;
            let reached = match before <= wanted_mib {
                true => plugged >= wanted_mib,
                false => plugged <= wanted_mib,
            };
            if reached || Instant::now() >= end {
                return Ok(plugged);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// MiB.
    async fn plugged(&self) -> Result<u64, Error> {
        let stats = self.access.vm.stats().await?;
        Ok(stats.plugged.map_or(0, |memory| memory.plugged_bytes >> 20))
    }

    fn set_ceiling(&self, sizes: &Sizes, memory_mib: u64) -> Result<(), Error> {
        let bytes = size::host_ceiling(memory_mib, &sizes.config);
        let files = cgroup::memory_limits(bytes).into_iter();
        // Without the controller the pod is not bounded by it, as its start has told.
        let there = files.filter(|(name, _)| self.cgroup.join(name).exists());
        let files: Vec<_> = there.map(|(name, value)| (name.into(), value)).collect();
        self.limit(&files).map(drop)
    }
}

impl Sizes {
    fn restore(&mut self, claim: Claim) {
        match (claim.before, self.asked.get_mut(&claim.container)) {
            (Some(before), Some(asked)) => *asked = before,
            // It has gone meanwhile.
            (Some(_), None) => {}
            (None, _) => drop(self.asked.remove(&claim.container)),
        }
    }
}
