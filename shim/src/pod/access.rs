//! What works on a pod beside whoever changes what it holds.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    os::unix::net::UnixStream,
    sync::Arc,
    time::Duration,
};

use bulkhead_agent_protocol::agent as wire;
use bulkhead_vmm_config::{Stamp, port};

use super::{
    error::Error,
    launch::{Fs, Vm},
};
use crate::{
    audit::{Audit, Event},
    error::line,
    host_sockets::{Offers, Sockets},
    io as streams,
    kubelet_volume::Volumes,
    machine::{
        agent::{self, Agent},
        vmm,
    },
};

/// How long the machine's own words may take after its connection broke.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(2);

/// In the audit log, of a machine that did not end by itself.
pub(super) const DESTROYED: &str = "the shim ended the machine";

/// A pod, for calls about its containers and to see its end; cheap to clone.
#[derive(Clone, Debug)]
pub struct Access {
    pub(super) vm: Arc<Vm>,
    pub(super) fs: Arc<Fs>,
    pub(super) agent: Agent,
    pub(super) volumes: Volumes,
    pub(super) sockets: Sockets,
    pub(super) audit: Audit,
}

impl Access {
    /// The agent, for calls about containers that are there.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The phases of the boot so far.
    pub fn stamps(&self) -> Vec<Stamp> {
        self.vm.stamps()
    }

    /// A stream that the guest may dial: its port, and our end.
    ///
    /// Whoever dials the port first gets the stream, and only the agent is told the port: it is not to be guessed.
    pub async fn stream(&self) -> Result<(u32, UnixStream), Error> {
        let mut tries = 3;
        loop {
            tries -= 1;
            let (ours, theirs) = streams::stream().map_err(Error::Stream)?;
            let port = random_port().map_err(Error::Stream)?;
            match self.vm.offer_port(port, theirs).await {
                Ok(()) => return Ok((port, ours)),
                // The port may be on offer already, as rarely as it is guessed.
                Err(vmm::Error::Refused { .. }) if tries > 0 => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes back a stream that the guest has not dialled.
    pub async fn withdraw(&self, port: u32) {
        // It has, or it is gone: both ways the stream ends by itself.
        if self.vm.withdraw_port(port).await.is_ok() {
            self.audit.tell(Event::OfferWithdrawn { port });
        }
    }

    /// Where what is worth a line is told.
    pub fn audit(&self) -> &Audit {
        &self.audit
    }

    /// Tells that a container's processes were killed because its memory ran out.
    pub fn tell_memory(&self, container: &str) {
        let detail = "the guest's kernel killed in it, because its memory had run out";
        let event = Event::limit("container", "memory", None, detail);
        self.audit.tell_of(Some(container), event);
    }

    /// Makes a placed container in the guest, up to the point before exec; its files' places are in `spec`
    /// ([`super::Sandbox::name_sources`]).
    pub async fn create_container(
        &self,
        container: &str,
        spec: wire::Container,
        stdio: wire::Stdio,
    ) -> Result<(), Error> {
        self.volumes.fill(container).await?;
        self.sockets.fill(container, self).await?;
        let created = self.agent.create_container(container, spec, stdio).await;
        match created {
            Ok(()) => Ok(()),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Waits until the pod cannot go on, and tells why.
    pub async fn trouble(&self) -> Error {
        let gone = async {
            tokio::select! {
                end = self.vm.ended() => vmm::Error::Gone(end).into(),
                error = self.fs.gone() => match self.vm.is_killed() {
                    // Both were, by us: the machine's end is what counts.
                    true => vmm::Error::Gone(self.vm.ended().await).into(),
                    false => error.into(),
                },
            }
        };
        let mut gone = std::pin::pin!(gone);
        let trouble: Error = tokio::select! {
            error = &mut gone => error,
            lost = self.agent.lost() => {
                // Mostly the first sign of the machine's end, which says more.
                let trouble = tokio::time::timeout(LAST_WORDS, gone).await;
                trouble.unwrap_or_else(|_| lost.into())
            }
        };
        match self.vm.is_killed() {
            true => self.audit.tell_end("destroyed", DESTROYED, BTreeMap::new()),
            false => trouble.tell_end(&self.audit),
        }
        trouble
    }

    /// Ends both processes at once, whatever they do: everyone who waits for one of them gets an error.
    pub fn kill(&self) {
        self.vm.kill();
        self.fs.kill();
    }

    /// Of a broken connection the machine's own words say why, if they come soon.
    pub async fn explain(&self, error: agent::Error) -> Error {
        if !matches!(error, agent::Error::Lost { .. }) {
            return error.into();
        }
        let trouble = tokio::time::timeout(LAST_WORDS, self.trouble()).await;
        trouble.unwrap_or_else(|_| error.into())
    }
}

impl Offers for Access {
    async fn stream(&self) -> io::Result<(u32, UnixStream)> {
        let stream = Access::stream(self).await;
        stream.map_err(|error| io::Error::other(line(&error)))
    }

    async fn withdraw(&self, port: u32) {
        Access::withdraw(self, port).await;
    }
}

/// A port for a stream, of all that there are.
fn random_port() -> io::Result<u32> {
    let mut random = File::open("/dev/urandom")?;
    loop {
        let mut bytes = [0; 4];
        random.read_exact(&mut bytes)?;
        let port = u32::from_ne_bytes(bytes);
        // u32::MAX is VMADDR_PORT_ANY.
        if (port::FIRST_STREAM..u32::MAX).contains(&port) {
            return Ok(port);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_streams_port_says_nothing_of_the_next_ones() {
        let ports: BTreeSet<u32> = (0..1000).map(|_| random_port().unwrap()).collect();
        assert!(ports.len() > 990, "{} different ones", ports.len());
        assert!(ports.iter().all(|port| *port >= port::FIRST_STREAM));
        // Spread over all 32 bits: neighbours would be found by a walk.
        let mut quarters = [0; 4];
        for port in &ports {
            quarters[(port >> 30) as usize] += 1;
        }
        assert!(quarters.iter().all(|count| *count > 150), "{quarters:?}");
        let closest = ports.iter().zip(ports.iter().skip(1)).map(|(a, b)| b - a);
        let near = closest.filter(|distance| *distance < 100).count();
        assert!(near < 10, "{near} close pairs");
    }
}
