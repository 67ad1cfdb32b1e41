//! Giving a guest the interfaces of a namespace.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::{MAX_MESSAGE, agent};

use super::{
    Error,
    guest::{self, Given},
    snapshot::Snapshot,
};
use crate::{
    ledger::{Ledger, Resource, Ticket},
    netns::{
        self, Carriers, Namespace, Redirect, Step,
        link::{self, Link},
        redirect::{self, Filters, Holder},
        socket::Socket,
        tap,
    },
};

/// The most that [`Network::for_guest`] may hold: the rest of the agent's message has room beside it.
const MOST: usize = MAX_MESSAGE / 2;

/// What the VMM needs to give the guest one network device.
#[derive(Debug)]
pub struct Device {
    /// The interface's name in the namespace, which the guest's device gets too.
    pub name: String,
    /// Its Ethernet address, the guest's too.
    pub mac: [u8; 6],
    /// Largest frame without its Ethernet header, in bytes.
    pub mtu: u32,
    /// A descriptor of the tap for each queue pair: non-blocking, a header of 12 bytes before each frame.
    pub taps: Vec<OwnedFd>,
}

/// A pod's network.
#[derive(Debug)]
pub struct Network {
    path: PathBuf,
    inode: u64,
    queues: u32,
    /// How many the machine has places for.
    places: usize,
    given: Vec<Given>,
    /// How many of them the agent has been told.
    told: usize,
    devices: Vec<Device>,
    description: agent::Network,
    /// Digest of the description that was given last.
    given_last: u64,
}

impl Network {
    /// Gives the interfaces of the namespace at `path` to the guest, at most as many as there are `places`; `queues` is the number of
    /// queue pairs of each device. Nothing stays when it fails.
    ///
    /// # Errors
    /// See [`Error`]: above all, an interface of a kind that a guest cannot have is refused by its name.
    pub fn attach(
        path: &Path,
        queues: u32,
        places: usize,
        ledger: &mut Ledger,
    ) -> Result<Network, Error> {
        let namespace = Namespace::open(path)?;
        let mut network = Network {
            path: path.into(),
            inode: namespace.inode,
            queues,
            places,
            given: Vec::new(),
            told: 0,
            devices: Vec::new(),
            description: agent::Network::default(),
            given_last: 0,
        };
        network.look(&namespace, ledger)?;
        Ok(network)
    }

    /// The machine is made of what there is, and has room for this many more.
    pub fn settle(&mut self, later: usize) {
        self.places = self.given.len() + later;
    }

    /// Looks once more: hooks fill a namespace, and Docker does between Create and Start. [`Network::devices`] then has the interfaces
    /// that came since, and [`Network::for_guest`] tells all.
    ///
    /// # Errors
    /// Everything is as it was before.
    pub fn rescan(&mut self, ledger: &mut Ledger) -> Result<(), Error> {
        let namespace = self.namespace()?;
        self.look(&namespace, ledger)
    }

    /// The devices that nobody has asked for yet, in the guest's order.
    pub fn devices(&mut self) -> Vec<Device> {
        std::mem::take(&mut self.devices)
    }

    /// Whether the last look has found anything that the agent has not been told.
    pub fn has_news(&self) -> bool {
        !self.given.is_empty() && digest(&self.description) != self.given_last
    }

    /// What the agent is to do, as of the last look. It is given once: nothing of it is kept in memory.
    pub fn for_guest(&mut self) -> agent::Network {
        self.told = self.given.len();
        self.given_last = digest(&self.description);
        std::mem::take(&mut self.description)
    }

    /// Whether there are no interfaces.
    pub fn is_empty(&self) -> bool {
        self.given.is_empty()
    }

    /// The namespace, for as long as it is held.
    pub fn namespace(&self) -> Result<Namespace, Error> {
        let namespace = Namespace::find(&self.path, self.inode)?;
        let gone = || netns::Error::Namespace {
            path: self.path.clone(),
            source: std::io::ErrorKind::NotFound.into(),
        };
        Ok(namespace.ok_or_else(gone)?)
    }

    /// The links of all interfaces, to be watched.
    pub fn carriers(&self) -> Result<Carriers, Error> {
        let indices: Vec<u32> = self.given.iter().map(|given| given.index).collect();
        Ok(Carriers::listen(self.namespace()?, &indices)?)
    }

    fn look(&mut self, namespace: &Namespace, ledger: &mut Ledger) -> Result<(), Error> {
        let mut new = Attaching {
            namespace,
            queues: self.queues,
            places: self.places,
            ledger,
            tickets: Vec::new(),
            given: self.given.clone(),
            devices: Vec::new(),
        };
        let told = self.told;
        match namespace.enter(|socket| new.all(socket, told)) {
            Ok(description) => {
                self.given = new.given;
                self.devices.extend(new.devices);
                self.description = description;
                Ok(())
            }
            Err(error) => {
                // The taps first: what redirects to them is then known to be dead.
                drop(new.devices);
                for ticket in new.tickets.into_iter().rev() {
                    if let Err(leftover) = new.ledger.undo(ticket) {
                        tracing::warn!(%leftover, "left for the pod's end");
                    }
                }
                Err(error)
            }
        }
    }
}

/// Of what does not depend on how often it was told: links get their names once, and requests are numbered anew.
fn digest(description: &agent::Network) -> u64 {
    let mut sysctls: Vec<_> = description.sysctls.iter().collect();
    sysctls.sort();
    let mut hasher = DefaultHasher::new();
    (description.devices, sysctls).hash(&mut hasher);
    for request in &description.requests {
        // struct nlmsghdr: length, kind, flags, sequence number, port.
        let kind = request.get(4..6).unwrap_or_default();
        if kind != libc::RTM_NEWLINK.to_ne_bytes() {
            (kind, request.get(12..)).hash(&mut hasher);
        }
    }
    hasher.finish()
}

/// A look at the namespace under way.
struct Attaching<'a> {
    namespace: &'a Namespace,
    queues: u32,
    places: usize,
    ledger: &'a mut Ledger,
    /// Of what this look has taken.
    tickets: Vec<Ticket>,
    given: Vec<Given>,
    devices: Vec<Device>,
}

impl Attaching<'_> {
    fn all(&mut self, socket: &mut Socket, told: usize) -> Result<agent::Network, Error> {
        let snapshot = Snapshot::take(socket)?;
        let ours = |link: &Link| self.given.iter().any(|given| given.tap == link.name);
        if let Some(other) = snapshot
            .links
            .iter()
            .find(|link| link.is_tap_of_a_pod() && !ours(link))
        {
            return Err(netns::Error::Taken {
                interface: other.name.clone(),
            }
            .into());
        }
        for link in link::for_the_guest(&snapshot.links, &snapshot.addressed())? {
            if !self.given.iter().any(|given| given.index == link.index) {
                self.give(socket, link, snapshot.ingress.contains(&link.index))?;
            }
        }
        let description = guest::describe(&snapshot, &self.given, told);
        let bytes = description.requests.iter().map(Vec::len).sum();
        match bytes {
            ..=MOST => Ok(description),
            _ => Err(netns::Error::TooMuch { bytes, most: MOST }.into()),
        }
    }

    fn give(&mut self, socket: &mut Socket, link: &Link, ingress: bool) -> Result<(), Error> {
        if self.given.len() >= self.places {
            return Err(netns::Error::Late {
                interface: link.name.clone(),
                places: self.places,
            }
            .into());
        }
        let stale = ingress && must_replace(socket, link)?;
        let mut random = [0; 4];
        linux::random(&mut random).expect("a host that runs pods has random numbers");
        let redirect = Redirect {
            network: self.namespace.path.clone(),
            inode: self.namespace.inode,
            interface: link.name.clone(),
            index: link.index,
            tap: link::tap_name(u32::from_ne_bytes(random)),
            ingress: !ingress,
            groups: link.filters_groups(),
        };
        let resource = Resource::Redirect(redirect.clone());
        self.tickets.push(self.ledger.take(resource)?);
        let taps = tap::create(&redirect.tap, self.queues).map_err(|source| netns::Error::Tap {
            tap: redirect.tap.clone(),
            source,
        })?;
        let mac = link.mac().expect("what is given to a guest has an address");
        self.devices.push(Device {
            name: link.name.clone(),
            mac,
            mtu: link.mtu,
            taps,
        });
        self.given.push(Given {
            index: link.index,
            name: link.name.clone(),
            tap: redirect.tap.clone(),
            groups: redirect.groups,
        });
        if stale {
            redirect::remove(socket, link.index).step("remove a dead redirect of", &link.name)?;
        }
        Ok(connect(socket, link, &redirect)?)
    }
}

/// Whether a dead pod has left its filter.
fn must_replace(socket: &mut Socket, link: &Link) -> Result<bool, netns::Error> {
    let filters = Filters::of(socket, link.index).step("list the filters of", &link.name)?;
    let interface = || link.name.clone();
    match filters.holder() {
        Holder::Nobody => Ok(false),
        Holder::Dead => Ok(true),
        Holder::Redirect(_) => Err(netns::Error::Taken {
            interface: interface(),
        }),
        Holder::Other => Err(netns::Error::Preference {
            interface: interface(),
        }),
    }
}

/// Ties the tap to its interface.
fn connect(socket: &mut Socket, link: &Link, redirect: &Redirect) -> Result<(), netns::Error> {
    let (name, tap) = (&link.name, &redirect.tap);
    let tap_index = netns::index_of(socket, tap)
        .step("find", tap)?
        .ok_or_else(|| netns::Error::Tap {
            tap: tap.clone(),
            source: std::io::ErrorKind::NotFound.into(),
        })?;
    redirect::add_ingress(socket, tap_index, tap)?;
    redirect::add(socket, tap_index, link.index, tap)?;
    tap::bring_up(socket, tap, tap_index, link.mtu)?;
    if redirect.groups {
        let all = libc::IFF_ALLMULTI as u32;
        socket
            .request(link::flags(link.index, all, all))
            .step("open for all groups", name)?;
    }
    if redirect.ingress {
        redirect::add_ingress(socket, link.index, name)?;
    }
    // Last: from here on the namespace hears nothing.
    redirect::add(socket, link.index, tap_index, name)
}
