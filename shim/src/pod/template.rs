//! Machines that are saved, and pods that go on from them.
//!
//! ```text
//! pod ── a template of its shape? ── yes ──► the VMM goes on from it ──► StartSandbox ──► interfaces are plugged
//!                                 └─ no ───► it boots ... ready ──► `bulkhead template build`, detached
//!
//! builder   lock ──► launch, as a pod ──► agent dialled ──► idle ──► saved ──► given back
//!                ──► launch from it ──► ready ──► a container runs ──► powered off: what it has touched is written
//!                ──► given back ──► published
//! ```
//!
//! The builder tells the agent that is saved nothing: StartSandbox, which is the first word that an
//! agent hears, is what makes a guest one pod's.

use std::{
    io,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use bulkhead_vmm_config::{GuestEnd, MAX_DEVICES, Phase};
use tokio::time::{sleep, timeout};

use super::{Error, Parts, Request, Room, SHARE_TAG, Sandbox, Size};
use crate::{
    config::{self, Config},
    error::line,
    ledger,
    machine::vmm::{self, End},
    oci::limits::Limits,
    template::{Begun, Building, Files, Key, Origin, Shape, Store},
};

/// Whose sandboxes builders make.
const NAMESPACE: &str = "templates";
/// Between two looks at how far the boot has come.
const LOOK: Duration = Duration::from_millis(20);
/// The guest's kernel names free memory two seconds after it was freed: what it has named by then
/// is no part of the template.
const SETTLING: Duration = Duration::from_secs(3);
/// A guest with fewer exits of each vCPU than this in so long is idle: its timers cause some 50 a
/// second.
const IDLE_EXITS: u64 = 60;
const IDLE: Duration = Duration::from_millis(500);
/// How long a guest may take until it is.
const RESTLESS: Duration = Duration::from_secs(20);
/// How long the VMM may take to write a machine down, or what it has touched: nobody waits.
const SAVING: Duration = Duration::from_secs(60);

/// Places for interfaces: all, the share being a device too, so that pods of any number of
/// interfaces have one template.
const SLOTS: u32 = MAX_DEVICES as u32 - 1;

/// How a machine begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Start<'a> {
    /// It boots.
    Boot,
    /// From a template, where the configuration says so and there is one.
    Pod,
    /// It boots, and is to be saved as a template.
    Save(&'a Building),
    /// From that template, as the first one: what it touches is learned.
    Learn(&'a Building),
}

/// What [`build`] has done.
#[derive(Debug)]
pub enum Built {
    /// Made it.
    New(Key),
    /// It was there.
    There(Key),
    /// Somebody else makes it.
    Busy(Key),
}

/// The shape of a machine of this size.
pub fn shape(config: &Config, size: Size, spare: Size) -> Shape {
    Shape {
        vcpus: size.vcpus,
        spare_vcpus: spare.vcpus,
        memory_mib: size.memory_mib,
        spare_memory_mib: spare.memory_mib,
        kernel_arguments: config.kernel_arguments.clone(),
        share_tag: SHARE_TAG.into(),
        share_queues: config.share.queues,
        net_slots: SLOTS,
        balloon: config.return_memory,
    }
}

/// From what the machine of a pod goes on: the files too, if that is a template.
///
/// # Errors
/// It may not boot, and has to.
pub(super) fn origin(
    config: &Config,
    parts: &Parts,
    request: &Request<'_>,
    state: &Path,
) -> Result<(Origin, Option<Files>), Error> {
    let found = match (config.template, &request.serial) {
        (config::Template::Off, _) => return Ok((Origin::Boot, None)),
        // Who has had none made expects none, and pays for no key.
        (config::Template::Built, _) if Store::at(state).is_empty() => {
            return Ok((Origin::Boot, None));
        }
        (_, Some(_)) => (Origin::cold("a serial console is to show its boot"), None),
        _ => {
            let spare = request.room.spare;
            let shape = shape(config, request.size, spare);
            match parts.basis(config, shape) {
                Ok(basis) => Origin::find(&Store::at(state), basis),
                Err(error) => (Origin::cold(line(&error)), None),
            }
        }
    };
    match &found.0 {
        Origin::Cold { reason, .. } if config.template == config::Template::Required => {
            return Err(Error::NoTemplate(reason.clone()));
        }
        Origin::Cold { reason, .. } => {
            tracing::info!(pod = request.id, reason, "the pod boots");
        }
        Origin::Template(key) => {
            tracing::info!(pod = request.id, %key, "the pod goes on from a template");
        }
        Origin::Boot => {}
    }
    Ok(found)
}

/// From what the first machine goes on that has this template.
///
/// # Errors
/// open(2)'s.
pub(super) fn first(building: &Building) -> Result<(Origin, Option<Files>), Error> {
    let failed = |source| Error::Store {
        action: "open",
        path: building.path().into(),
        source,
    };
    let files = building.reopened().map_err(failed)?;
    Ok((Origin::Template(building.key()), Some(files)))
}

/// Places that the machine must have for interfaces that come later.
pub(super) fn slots(request: &Request<'_>, origin: &Origin) -> usize {
    match origin {
        Origin::Template(_) => SLOTS as usize,
        Origin::Boot | Origin::Cold { .. } => request.net_slots,
    }
}

impl Sandbox {
    /// Whether it has gone on from a template. One that the VMM has refused is of no use to others
    /// either.
    ///
    /// # Errors
    /// It had to.
    pub(super) fn heed_template(&mut self) -> Result<(), Error> {
        let Origin::Template(key) = &self.origin else {
            return Ok(());
        };
        let Some(reason) = self.vm.template_refused() else {
            return Ok(());
        };
        tracing::warn!(pod = %self.id, %key, reason, "the pod has booted: its template was refused");
        Store::at(self.ledger.state()).refuse(key, &reason);
        self.origin = Origin::cold(reason.clone());
        match self.templates {
            config::Template::Required => Err(Error::NoTemplate(reason)),
            _ => Ok(()),
        }
    }

    /// Drops the template whose guest has not become a pod's, for whatever reason: the next pod
    /// boots.
    pub(super) fn blame_template(&self, error: &Error) {
        if let Origin::Template(key) = &self.origin {
            Store::at(self.ledger.state()).refuse(key, &error.text());
        }
    }

    /// Has the template made that this pod has missed, by a process that outlives it and that
    /// nobody waits for.
    pub(super) fn leave_template(&self, config: &Config) {
        let Origin::Cold {
            missing: Some(basis),
            ..
        } = &self.origin
        else {
            return;
        };
        // Ten pods at once miss the same one.
        let (store, key) = (Store::at(self.ledger.state()), basis.key());
        let comes = || store.has(&key) || store.hold_off(&key).is_some();
        if self.templates != config::Template::Auto || comes() {
            return;
        }
        if let Err(error) = start_builder(config, &basis.shape) {
            tracing::warn!(pod = %self.id, %error, "cannot start `bulkhead template build`");
        }
    }

    /// Waits until the agent has dialled and the guest has nothing more to do, and has the machine
    /// saved, which ends it.
    async fn save(&self, vcpus: u64) -> Result<(), Error> {
        let saving = async {
            self.dialled().await?;
            sleep(SETTLING).await;
            match timeout(RESTLESS, self.idle(vcpus)).await {
                Ok(idle) => idle?,
                Err(_) => return Err(Error::Restless(RESTLESS.as_secs())),
            }
            Ok(self.vm.save().await?)
        };
        tokio::select! {
            biased;
            done = saving => done?,
            error = self.trouble() => return Err(error),
        }
        match timeout(SAVING, self.vm.ended()).await {
            Ok(End::Guest {
                end: GuestEnd::Saved,
                ..
            }) => Ok(()),
            Ok(end) => Err(vmm::Error::Gone(end).into()),
            Err(_) => Err(Error::from(vmm::Error::Silent {
                request: "to be saved",
                secs: SAVING.as_secs(),
            })),
        }
    }

    /// Has the guest power off, at which the VMM writes down what it has learned.
    async fn end_well(&self) -> Result<(), Error> {
        self.power_off_within(SAVING).await;
        match self.vm.end() {
            Some(End::Guest {
                end: GuestEnd::PowerOff,
                ..
            }) => Ok(()),
            Some(end) => Err(vmm::Error::Gone(end).into()),
            None => Err(Error::from(vmm::Error::Silent {
                request: "to power off",
                secs: SAVING.as_secs(),
            })),
        }
    }

    async fn dialled(&self) -> Result<(), Error> {
        let looking = async {
            let has_dialled =
                |stamp: &bulkhead_vmm_config::Stamp| stamp.phase == Phase::AgentDialled;
            while !self.vm.stamps().iter().any(has_dialled) {
                sleep(LOOK).await;
            }
        };
        match timeout(self.boot_timeout, looking).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.too_slow().await),
        }
    }

    async fn idle(&self, vcpus: u64) -> Result<(), Error> {
        let mut before = self.exits().await?;
        loop {
            sleep(IDLE).await;
            let now = self.exits().await?;
            if now.saturating_sub(before) < IDLE_EXITS * vcpus {
                return Ok(());
            }
            before = now;
        }
    }

    async fn exits(&self) -> Result<u64, Error> {
        let counters = self.vm.stats().await?.kvm;
        let count = |name: &str| counters.get(name).copied().unwrap_or_default();
        // The host's own interrupts say nothing about the guest.
        Ok(count("exits").saturating_sub(count("irq_exits")))
    }
}

/// Makes the template of machines of this shape, unless it is there.
///
/// # Errors
/// What the machine took has been given back; what could not is in its ledger for `bulkhead gc`.
pub async fn build(config: &Config, shape: Shape) -> Result<Built, Error> {
    let parts = Parts::open(config)?;
    let state = ledger::canonical_state(&config.state_dir)?;
    let basis = parts.basis(config, shape)?;
    let key = basis.key();
    let failed = |action| {
        let path = state.clone();
        move |source| Error::Store {
            action,
            path,
            source,
        }
    };
    let begun = Store::at(&state).begin(basis).map_err(failed("begin"))?;
    let building = match begun {
        Begun::There => return Ok(Built::There(key)),
        Begun::Busy => return Ok(Built::Busy(key)),
        Begun::Building(building) => building,
    };
    match make(config, &parts, &state, &building).await {
        Ok(()) => Ok(Built::New(building.publish().map_err(failed("finish"))?)),
        Err(error) => {
            building.fail(&error.text());
            Err(error)
        }
    }
}

/// Has one machine saved, and a second one go on from it: to see that it can, and what it touches.
async fn make(
    config: &Config,
    parts: &Parts,
    state: &Path,
    building: &Building,
) -> Result<(), Error> {
    let (shape, key) = (building.shape(), building.key().to_string());
    let mut config = config.clone();
    config.kernel_arguments.clone_from(&shape.kernel_arguments);
    config.share.queues = shape.share_queues;
    config.return_memory = shape.balloon;
    // The machine's memory is there a second time while it is being written.
    config.host_overhead_mib += shape.memory_mib;
    config.template = config::Template::Required;
    let size = |vcpus, memory_mib| Size { vcpus, memory_mib };
    let request = || Request {
        room: Room {
            spare: size(shape.spare_vcpus, shape.spare_memory_mib),
            announced: Limits::default(),
        },
        net_slots: shape.net_slots as usize,
        ..Request::plain(NAMESPACE, &key, size(shape.vcpus, shape.memory_mib))
    };
    // An older builder's: this one has the lock.
    ledger::reclaim(state, NAMESPACE, &key)?;
    let start = Start::Save(building);
    let sandbox = Sandbox::launch_as(&config, parts, request(), start).await?;
    let saved = sandbox.save(shape.vcpus.into()).await;
    given_back(sandbox, saved)?;
    let start = Start::Learn(building);
    let mut sandbox = Sandbox::launch_as(&config, parts, request(), start).await?;
    let learned = learn(&mut sandbox, building, &config.installed()?.vmm).await;
    given_back(sandbox, learned)
}

/// Has a machine do what every pod does.
async fn learn(sandbox: &mut Sandbox, building: &Building, program: &Path) -> Result<(), Error> {
    sandbox.ready(NAMESPACE).await?;
    trial::run(sandbox, &building.trial(), program).await?;
    sandbox.end_well().await
}

fn given_back(sandbox: Sandbox, done: Result<(), Error>) -> Result<(), Error> {
    let left = sandbox.give_back();
    done?;
    match left.first() {
        None => Ok(()),
        Some(leftover) => Err(Error::Left(leftover.to_string())),
    }
}

/// Starts `bulkhead template build`, which goes its own way ([`detach`]); on a thread, since a fork
/// takes its time, and somebody must collect it. If this process ends earlier, init does.
fn start_builder(config: &Config, shape: &Shape) -> io::Result<()> {
    let program = std::env::current_exe()?.with_file_name("bulkhead");
    let mut command = Command::new(program);
    if let Some(path) = &config.named {
        command.arg("--config").arg(path);
    }
    let shape = serde_json::to_string(shape).expect("made of strings and numbers");
    command
        .args(["template", "build", "--shape", &shape])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    linux::process::hand_over(&mut command, 3, Vec::new(), true);
    let run = move || match command.status() {
        Ok(status) if status.success() => {}
        // Beside the template, that is to be, is why; the next pod tells it.
        Ok(status) => tracing::warn!(%status, "`bulkhead template build` has made no template"),
        Err(error) => tracing::warn!(%error, "cannot start `bulkhead template build`"),
    };
    let thread = std::thread::Builder::new().name("template".into());
    thread.stack_size(256 << 10).spawn(run)?;
    Ok(())
}

/// Takes this process, which a pod has started, out of the pod's cgroup and out of the way of
/// others. While there is one thread.
pub fn detach() -> io::Result<()> {
    use crate::{cgroup, sys::process};
    process::set_oom_score_adj(std::process::id() as i32, 0)?;
    linux::schedule::set_attributes(linux::schedule::Attributes {
        nice: 19,
        ..Default::default()
    })?;
    // It is not killed with the pod where it cannot, but counts for it.
    if let Err(error) = cgroup::stay::enter(Path::new(cgroup::ROOT)) {
        tracing::warn!(%error, "the builder of a template stays in its pod's cgroup");
    }
    Ok(())
}

mod trial;

#[cfg(test)]
mod tests;
