//! What a machine does with the interfaces of the pod's namespace: those that come later, links, and localhost.

use std::os::fd::AsFd;

use super::{Sandbox, error::Error, links, localhost};
use crate::{
    ledger::Resource,
    machine::vmm::Nic,
    network::{self, Network},
    sys::{
        process::{self, ProcessId},
        stub::{self, Stub},
    },
};

impl Sandbox {
    /// Forks the process whose pid stands for the pod's (see [`Stub`]). Of a pod that was given no network namespace, that of the
    /// process is the pod's from now on.
    pub fn start_stub(&mut self) -> Result<Stub, Error> {
        let given = match &self.namespace {
            None => None,
            Some(path) => {
                let opened = stub::open_network(path);
                Some(opened.map_err(|source| network::Error::Namespace {
                    path: path.clone(),
                    source,
                })?)
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

    /// Gives the guest, which is ready, the interfaces that have come into the pod's network namespace since the last look.
    ///
    /// # Errors
    /// Nothing has changed when an interface is refused ([`network::Error`]).
    pub async fn find_interfaces(&mut self) -> Result<(), Error> {
        let Some(namespace) = &self.namespace else {
            return Ok(());
        };
        match &mut self.network {
            Some(network) => network.rescan(&mut self.ledger)?,
            none => {
                let (pairs, places) = (self.pairs, self.slots);
                *none = Some(Network::attach(namespace, pairs, places, &mut self.ledger)?);
            }
        }
        let given = self.give_interfaces().await;
        if given.is_err() {
            // Its taps are closed, or the guest does not know of them.
            self.network = None;
        }
        given
    }

    async fn give_interfaces(&mut self) -> Result<(), Error> {
        let Some(network) = self.network.as_mut().filter(|network| network.has_news()) else {
            return Ok(());
        };
        for device in network.devices() {
            self.vm.plug(Nic::new(device, &self.limits)).await?;
        }
        let description = network.for_guest();
        if let Err(error) = self.agent.configure_network(&description).await {
            return Err(self.access().explain(error).await);
        }
        self.follow_network()
    }

    /// Keeps the guest's links as those of the namespace are, and lets who dials localhost there reach who listens in the guest.
    pub(super) fn follow_network(&mut self) -> Result<(), Error> {
        let Some(network) = self.network.as_ref().filter(|network| !network.is_empty()) else {
            return Ok(());
        };
        self.links = Some(links::start(network.carriers()?, self.vm.clone()));
        if self.localhost.is_none() {
            self.localhost = Some(localhost::start(network.namespace()?, self.access()));
        }
        Ok(())
    }
}
