//! What a pod takes on the host before its guest runs.

use std::{
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
};

use bulkhead_vmm_config::{MAX_DEVICES, port};

use super::{Parts, Request, error::Error, sandbox::SHARE_TAG};
use crate::{
    cgroup::Cgroup,
    config::Config,
    io as streams,
    ledger::Ledger,
    logs::{self, Tail},
    machine::{
        agent::Agent,
        fs::Fs,
        peer::Place,
        vmm::{Hardware, Nic, Vm},
    },
    network::Network,
    share::Share,
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
}

impl Taken {
    pub(super) async fn take(
        config: &Config,
        parts: &Parts,
        request: &Request<'_>,
        cgroup: &Path,
        ledger: &mut Ledger,
    ) -> Result<Taken, Error> {
        let uid = claim_uid(config, request, ledger)?;
        let share = Share::create(ledger)?;
        let cgroup = Cgroup::create(ledger, cgroup)?;
        cgroup.contain(tasks(config, request))?;
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
        };
        let pairs = config.network.pairs(request.vcpus);
        let attached = request
            .network
            // The machine itself says when there are too many.
            .map(|namespace| Network::attach(namespace, pairs, usize::MAX, ledger));
        let mut network = attached.transpose()?;
        let devices = network.as_mut().map(Network::devices).unwrap_or_default();
        let nic = |device| Nic::new(device, &config.network);
        let nics: Vec<Nic> = devices.into_iter().map(nic).collect();
        // The share is a device, too.
        let slots = (MAX_DEVICES - 1)
            .saturating_sub(nics.len())
            .min(request.net_slots);
        if let Some(network) = &mut network {
            network.settle(slots);
        }
        let (front, back) = UnixStream::pair().map_err(Error::Stream)?;
        let (rpc, rpc_guest) = streams::stream().map_err(Error::Stream)?;
        let (log, log_guest) = streams::stream().map_err(Error::Stream)?;
        // The machine first: it has the longest way to go before it needs the other one.
        let hardware = Hardware {
            vcpus: request.vcpus,
            memory_mib: request.memory_mib,
            kvm: parts.kvm.as_fd(),
            kernel: parts.kernel.as_fd(),
            initrd: parts.initrd.as_fd(),
            kernel_arguments: config.kernel_arguments.clone(),
            ports: vec![(port::AGENT, rpc_guest), (port::LOG, log_guest)],
            share: (SHARE_TAG.into(), front.into(), config.share.queues),
            net: nics,
            net_slots: slots as u32,
            serial: request.serial.as_ref().map(AsFd::as_fd),
            uid,
        };
        let vm = Vm::start(place, hardware, ledger).await?;
        let fs = Fs::start(place, share.path(), &config.share, back.into(), ledger).await?;
        log.set_nonblocking(true).map_err(Error::Stream)?;
        let log = tokio::net::UnixStream::from_std(log).map_err(Error::Stream)?;
        Ok(Taken {
            share,
            cgroup,
            fs,
            vm,
            agent: Agent::new(rpc)?,
            agent_log: logs::follow(request.id, "agent", log),
            uid,
            network,
            slots,
        })
    }
}

/// Most processes and threads that a pod needs on the host: of the VMM one for each vCPU and each pair of queues of a network
/// device, of the fs process one for each queue. The rest is room for the two processes' own, the stub, and what the kernel
/// starts for a machine.
fn tasks(config: &Config, request: &Request<'_>) -> u64 {
    const ROOM: u64 = 32;
    let pairs = u64::from(config.network.pairs(request.vcpus));
    u64::from(request.vcpus) + pairs * MAX_DEVICES as u64 + u64::from(config.share.queues) + ROOM
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
