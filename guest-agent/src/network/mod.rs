//! The pod's network: the guest's initial network namespace, made what the pod's one on the host is.
//!
//! ```text
//!  agent.Network ── request: rtnetlink messages, the host's indices replaced ──► interfaces, addresses, routes, rules
//!                └─ sysctls: those of all interfaces first, those of one when it has its name
//!
//!  socket begins or ends to listen ── bell ──► watch ── listeners: what listens now ──► WatchListeners' answer
//!  ConnectListener ── relay ──► loopback ◄── bytes ──► the host's vsock port
//! ```
#![forbid(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use bulkhead_agent_protocol::agent;
use linux::netlink::{Netlink, Refusal};
use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

use crate::machine;

mod bell;
mod devices;
mod listeners;
mod records;
mod relay;
mod request;
mod watch;

pub(crate) use relay::connect;
pub(crate) use watch::Watch;

use request::{Interfaces, Request, RequestError};

/// Where the machine's devices are shown.
const SYSFS: &str = "/sys";

/// The network could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// Some are missing, or not there yet.
    #[error("the pod's network has {wanted} devices, but the machine has {present}")]
    Devices {
        /// How many the request names.
        wanted: u32,
        /// How many there are.
        present: usize,
    },
    /// Not one of the network's.
    #[error("\"{0}\" is no sysctl of the network: those begin with \"net.\"")]
    ForeignSysctl(String),
    /// A sysctl was refused.
    #[error("{0}")]
    Sysctl(String),
    /// A request that makes no sense.
    #[error("request {number} of the pod's network ({what}) cannot be made")]
    Invalid {
        /// Its place, from 1.
        number: usize,
        /// What it makes.
        what: String,
        /// Why not.
        #[source]
        source: RequestError,
    },
    /// A request that the kernel refuses.
    #[error("the kernel refuses request {number} of the pod's network ({what}): {refusal}")]
    Refused {
        /// Its place, from 1.
        number: usize,
        /// What it makes.
        what: String,
        /// The kernel's reason.
        refusal: String,
    },
    /// No such port.
    #[error("{0} is no TCP port")]
    Port(u32),
    /// Nobody listens there, or not any more.
    #[error("cannot connect to {address} in the pod")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Makes the network in the network namespace of the calling thread, which is that of /sys. With `owns_machine` it looks
/// for devices that have been plugged in.
pub(crate) fn configure(network: &agent::Network, owns_machine: bool) -> Result<(), NetworkError> {
    let sysfs = Path::new(SYSFS);
    let wanted = network.devices as usize;
    let mut present = devices::present(sysfs)?;
    if present.len() < wanted && owns_machine {
        devices::look_again(sysfs)?;
        present = devices::present(sysfs)?;
    }
    if present.len() < wanted {
        return Err(NetworkError::Devices {
            wanted: network.devices,
            present: present.len(),
        });
    }
    apply(network, &Interfaces(present))
}

fn apply(network: &agent::Network, interfaces: &Interfaces) -> Result<(), NetworkError> {
    let mut requests = translated(network, interfaces)?;
    let sysctls = ordered(network)?;
    let of_all = sysctls.partition_point(|(reach, ..)| *reach != Reach::Interface);
    let renames = requests
        .iter()
        .take_while(|request| request.renames)
        .count();
    let mut kernel =
        Netlink::open(SockProtocol::NetlinkRoute).map_err(|errno| NetworkError::System {
            what: "speak rtnetlink to the kernel".to_owned(),
            source: errno.into(),
        })?;
    let mut number = 0;
    let mut make = |requests: &mut [Request]| {
        requests.iter_mut().try_for_each(|request| {
            number += 1;
            match kernel.request(&mut request.message, |_| {}) {
                Ok(()) => Ok(()),
                Err(refusal) if refusal.errno == Errno::EEXIST => Ok(()),
                Err(refusal) => Err(refused(number, &request.message, &refusal)),
            }
        })
    };
    let (names, rest) = requests.split_at_mut(renames);
    write(&sysctls[..of_all])?;
    make(names)?;
    // The interfaces have their names now, and no addresses yet.
    write(&sysctls[of_all..])?;
    make(rest)
}

fn refused(number: usize, message: &[u8], refusal: &Refusal) -> NetworkError {
    NetworkError::Refused {
        number,
        what: request::describe(message),
        refusal: refusal.to_string(),
    }
}

/// All requests, checked before the first is made.
fn translated(
    network: &agent::Network,
    interfaces: &Interfaces,
) -> Result<Vec<Request>, NetworkError> {
    let translate = |(place, message): (usize, &Vec<u8>)| {
        Request::new(message, interfaces).map_err(|source| NetworkError::Invalid {
            number: place + 1,
            what: request::describe(message),
            source,
        })
    };
    network.requests.iter().enumerate().map(translate).collect()
}

/// What a sysctl is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    /// The namespace. Some of these (ip_forward) reset those of interfaces, so that they come first.
    Namespace,
    /// All interfaces, or those to come.
    Interfaces,
    /// One interface.
    Interface,
}

impl Reach {
    fn new(name: &str) -> Self {
        // net.ipv4.conf.IF.x, net.ipv6.neigh.IF.x
        let mut parts = name.split(['.', '/']).skip(2);
        match (parts.next(), parts.next()) {
            (Some("conf" | "neigh"), Some("all" | "default")) => Self::Interfaces,
            (Some("conf" | "neigh"), Some(_)) => Self::Interface,
            _ => Self::Namespace,
        }
    }
}

type Sysctl<'a> = (Reach, &'a str, &'a str);

/// The sysctls in the order in which they are written.
fn ordered(network: &agent::Network) -> Result<Vec<Sysctl<'_>>, NetworkError> {
    let mut sysctls = Vec::with_capacity(network.sysctls.len());
    for (name, value) in &network.sysctls {
        if !name.starts_with("net.") && !name.starts_with("net/") {
            return Err(NetworkError::ForeignSysctl(name.clone()));
        }
        sysctls.push((Reach::new(name), name.as_str(), value.as_str()));
    }
    sysctls.sort_unstable();
    Ok(sysctls)
}

fn write(sysctls: &[Sysctl<'_>]) -> Result<(), NetworkError> {
    sysctls.iter().try_for_each(|(_, name, value)| {
        machine::write_sysctl(name, value).map_err(NetworkError::Sysctl)
    })
}

#[cfg(test)]
mod tests;
