//! What a pod takes on the host before its guest runs.
//!
//! Unit tests have `testing/launch.rs` in this file's place, which takes nothing: whoever uses one
//! of these types in a pod has it from here.

use std::{
    io,
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
};

use bulkhead_vmm_config::{MAX_DEVICES, port};

use super::{
    Parts, Request, SHARE_TAG, Sandbox,
    error::Error,
    size,
    template::{self, Start},
};
use crate::{
    audit::Audit,
    cgroup::{self, stay},
    config::Config,
    io as streams,
    ledger::{Ledger, Resource},
    logs::{self, Tail},
    machine::{
        agent::Agent,
        peer::Place,
        vmm::{Hardware, Nic},
    },
    netns,
    network::{self, Network},
    sys::{
        process::{self, ProcessId},
        stub,
    },
    template::Origin,
};
pub(super) use tokio::task::spawn_blocking as aside;

pub(super) use crate::{
    cgroup::Cgroup,
    machine::{fs::Fs, vmm::Vm},
    share::Share,
    sys::stub::Stub,
};

/// What [`super::Sandbox::launch`] takes, in this order.
pub(super) struct Taken {
    pub(super) share: Share,
    pub(super) cgroup: Cgroup,
    pub(super) fs: Fs,
    pub(super) vm: Vm,
    pub(super) agent: Agent,
    pub(super) agent_log: Tail,
    pub(super) uid: u32,
    pub(super) network: Option<Network>,
    pub(super) slots: usize,
    pub(super) origin: Origin,
}

impl Taken {
    pub(super) async fn take(
        config: &Config,
        parts: &Parts,
        (request, start): (&Request<'_>, Start<'_>),
        cgroup: &Path,
        ledger: &mut Ledger,
        audit: &Audit,
    ) -> Result<Taken, Error> {
        cgroup::require_v2()?;
        let (origin, template) = match start {
            Start::Pod => template::origin(config, parts, request, ledger.state())?,
            Start::Learn(building) => template::first(building)?,
            Start::Boot | Start::Save(_) => (Origin::Boot, None),
        };
        let uid = claim_uid(config, request, ledger)?;
        let share = Share::create(ledger)?;
        let home = request.joins.then(stay::home).flatten();
        let cgroup = Cgroup::create(ledger, cgroup, home)?;
        let memory = size::host_ceiling(request.size.memory_mib, config);
        cgroup.contain(tasks(config, request), memory)?;
        let entering = cgroup.shim().map(|shim| {
            let shim = shim.to_path_buf();
            aside(move || stay::enter(&shim))
        });
        for (name, value) in request.host_limits {
            cgroup.write(name, value).map_err(|source| Error::Limit {
                name: name.clone(),
                value: value.clone(),
                source,
            })?;
        }
        let place = Place {
            sandbox: request.id,
            executable: &parts.executable,
            cgroup: cgroup.as_fd(),
            oom_score_adj: request.oom_score_adj.unwrap_or(0),
            audit,
        };
        let pairs = config.network.pairs(request.size.vcpus);
        let attached = request
            .network
            // A saved machine has seen none: they come when its guest is ready.
            .filter(|_| template.is_none())
            // The machine itself says when there are too many.
            .map(|namespace| Network::attach(namespace, pairs, usize::MAX, ledger));
        let mut network = attached.transpose()?;
        let devices = network.as_mut().map(Network::devices).unwrap_or_default();
        let nic = |device| Nic::new(device, &config.network);
        let nics: Vec<Nic> = devices.into_iter().map(nic).collect();
        // The share is a device, too.
        let slots = (MAX_DEVICES - 1)
            .saturating_sub(nics.len())
            .min(template::slots(request, &origin));
        if let Some(network) = &mut network {
            network.settle(slots);
        }
        let (front, back) = UnixStream::pair().map_err(Error::Stream)?;
        let (rpc, rpc_guest) = streams::stream().map_err(Error::Stream)?;
        let (log, log_guest) = streams::stream().map_err(Error::Stream)?;
        let lending = template.as_ref().map(|_| linux::packet::pair());
        let lending = lending.transpose().map_err(io::Error::from);
        let (lender, borrower) = lending.map_err(Error::Stream)?.unzip();
        // The machine first: it has the longest way to go before it needs the other one.
        let hardware = Hardware {
            vcpus: request.size.vcpus,
            memory_mib: request.size.memory_mib,
            spare_vcpus: request.room.spare.vcpus,
            spare_memory_mib: request.room.spare.memory_mib,
            kvm: parts.kvm.as_fd(),
            kernel: parts.kernel.as_fd(),
            initrd: parts.initrd.as_fd(),
            kernel_arguments: config.kernel_arguments.clone(),
            ports: vec![(port::AGENT, rpc_guest), (port::LOG, log_guest)],
            share: (SHARE_TAG.into(), front.into(), config.share.queues),
            net: nics,
            net_slots: slots as u32,
            balloon: config.return_memory,
            serial: request.serial.as_ref().map(AsFd::as_fd),
            uid,
            accept_missing: &config.accept_missing,
            template: template
                .as_ref()
                .map(|files| files.each_ref().map(AsFd::as_fd)),
            lender,
            learn: match start {
                Start::Learn(building) => Some(building.files()[2].as_fd()),
                Start::Boot | Start::Pod | Start::Save(_) => None,
            },
            save: match start {
                Start::Save(building) => {
                    let [state, memory, _] = building.files();
                    Some([state.as_fd(), memory.as_fd()])
                }
                Start::Boot | Start::Pod | Start::Learn(_) => None,
            },
        };
        let vm = Vm::start(place, hardware, ledger).await?;
        let settings = (&config.share, &*config.accept_missing);
        let sockets = (back.into(), borrower);
        let fs = Fs::start(place, share.path(), settings, sockets, ledger).await?;
        // What it takes of memory then counts for the engine, which is no reason to have no pod.
        if let Some(entering) = entering
            && let Ok(Err(error)) = entering.await
        {
            tracing::warn!(cgroup = %cgroup.path().display(), %error, "the shim cannot enter its pod's cgroup");
        }
        log.set_nonblocking(true).map_err(Error::Stream)?;
        let log = tokio::net::UnixStream::from_std(log).map_err(Error::Stream)?;
        Ok(Taken {
            share,
            cgroup,
            fs,
            vm,
            agent: Agent::new(rpc, audit)?,
            agent_log: logs::follow(request.id, "agent", audit, log),
            uid,
            network,
            slots,
            origin,
        })
    }
}

impl Sandbox {
    /// Forks the process whose pid stands for the pod's (see [`Stub`]). Of a pod that was given no
    /// network namespace, that of the process is the pod's from now on.
    pub fn start_stub(&mut self) -> Result<Stub, Error> {
        let given = match &self.namespace {
            None => None,
            Some(path) => {
                let opened = stub::open_network(path);
                let error = |source| netns::Error::Namespace {
                    path: path.clone(),
                    source,
                };
                Some(opened.map_err(|source| network::Error::from(error(source)))?)
            }
        };
        let network = match &given {
            None => stub::Network::New,
            Some(namespace) => stub::Network::Given(namespace.as_fd()),
        };
        let title = format!(
            "bulkhead: pod {} (its processes are in its virtual machine)",
            self.id
        );
        let stub = Stub::start(self.cgroup.as_fd(), network, &title).map_err(Error::Stub)?;
        if let Some(id) = ProcessId::of(stub.pid()) {
            let role = "bulkhead-pod".into();
            self.ledger.take(Resource::Process { id, role })?;
            self.stub = Some(id);
        }
        // It stands for the containers: who looks at their pid's score finds theirs.
        process::set_oom_score_adj(stub.pid(), self.oom.now()).map_err(Error::Stub)?;
        self.namespace
            .get_or_insert_with(|| format!("/proc/{}/ns/net", stub.pid()).into());
        Ok(stub)
    }
}

/// Most processes and threads that a pod needs on the host: of the VMM one for each vCPU and each pair of queues of a network
/// device, of the fs process one for each queue. The rest is room for the two processes' own, the stub, and what the kernel
/// starts for a machine.
fn tasks(config: &Config, request: &Request<'_>) -> u64 {
    const ROOM: u64 = 32;
    let pairs = u64::from(config.network.pairs(request.size.vcpus));
    u64::from(request.size.vcpus + request.room.spare.vcpus)
        + pairs * MAX_DEVICES as u64
        + u64::from(config.share.queues)
        + ROOM
}

/// A uid of its own for each VMM, so that one that is broken out of its jail cannot touch another one's process.
fn claim_uid(config: &Config, request: &Request<'_>, ledger: &mut Ledger) -> Result<u32, Error> {
    let holder = format!("{}/{}", request.namespace, request.id);
    // FNV-1a: pods spread over the range, so that the first try is nearly always free.
    let hash = holder.bytes().fold(0x811c_9dc5u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    for step in 0..config.uid_count {
        let offset = (u64::from(hash) + u64::from(step)) % u64::from(config.uid_count);
        let uid = config.uid_base + offset as u32;
        if ledger.claim(&format!("uid-{uid}"), &holder)? {
            return Ok(uid);
        }
    }
    Err(Error::NoUid {
        base: config.uid_base,
        count: config.uid_count,
    })
}
