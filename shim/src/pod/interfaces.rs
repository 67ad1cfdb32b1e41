//! What a machine does with the interfaces of the pod's namespace: those that come later, links, and localhost.

use super::{Sandbox, error::Error, links, localhost};
use crate::{machine::vmm::Nic, network::Network};

impl Sandbox {
    /// Gives the guest, which is ready, the interfaces that have come into the pod's network namespace since the last look.
    ///
    /// # Errors
    /// Nothing has changed when an interface is refused ([`crate::network::Error`]).
    pub async fn find_interfaces(&mut self) -> Result<(), Error> {
        self.look_for_interfaces(false).await
    }

    /// The same for a guest that has heard nothing of its namespace yet: it is told of one without
    /// interfaces, too.
    pub(super) async fn tell_network(&mut self) -> Result<(), Error> {
        self.look_for_interfaces(true).await
    }

    async fn look_for_interfaces(&mut self, first: bool) -> Result<(), Error> {
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
        let given = self.give_interfaces(first).await;
        if given.is_err() {
            // Its taps are closed, or the guest does not know of them.
            self.network = None;
        }
        given
    }

    async fn give_interfaces(&mut self, first: bool) -> Result<(), Error> {
        let news = |network: &&mut Network| first || network.has_news();
        let Some(network) = self.network.as_mut().filter(news) else {
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
