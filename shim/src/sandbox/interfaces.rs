//! What a running machine does with the interfaces of the pod's namespace: those that come later, links, and localhost.

use std::path::Path;

use super::{Error, Sandbox, links, localhost};
use crate::{network::Network, vm::Nic};

impl Sandbox {
    /// Gives the guest the interfaces that have come into the pod's network namespace since the last look.
    ///
    /// # Errors
    /// The next look begins anew.
    pub async fn find_interfaces(&mut self, namespace: &Path) -> Result<(), Error> {
        let found = self.look_for_interfaces(namespace).await;
        if found.is_err() {
            // Its taps are closed, or the guest does not know of them.
            self.network = None;
        }
        found
    }

    async fn look_for_interfaces(&mut self, namespace: &Path) -> Result<(), Error> {
        let network = match &mut self.network {
            Some(network) => {
                network.rescan(&mut self.ledger)?;
                network
            }
            none => none.insert(Network::attach(namespace, self.pairs, &mut self.ledger)?),
        };
        if !network.has_news() {
            return Ok(());
        }
        for device in network.devices() {
            self.vm.plug(Nic::new(device, &self.limits)).await?;
        }
        let description = network.for_guest();
        self.agent.configure_network(&description).await?;
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
