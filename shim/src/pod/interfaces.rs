//! What a machine does with the interfaces of the pod's namespace: those that come later, links, and localhost.

use super::{Sandbox, error::Error, links, localhost};
use crate::{machine::vmm::Nic, network::Network};

impl Sandbox {
    /// Gives the guest, which is ready, the interfaces that have come into the pod's network namespace since the last look.
    ///
    /// # Errors
    /// Nothing has changed when an interface is refused ([`crate::network::Error`]).
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
