//! A request to rtnetlink(7) as the shim describes it, made one of this guest: its interfaces have other indices here.

use std::net::IpAddr;

use linux::netlink::{HEADER, read_u16, read_u32};

use super::records::{Cut, Records, attributes};

/// Index of lo in every network namespace.
const LO: u32 = 1;

/// Size of struct rtnexthop, and where the interface is in it.
const NEXT_HOP: usize = 8;
const NEXT_HOP_INTERFACE: usize = 4;

/// Where the interface is in struct ifinfomsg, ifaddrmsg and ndmsg.
const INTERFACE: usize = 4;
/// Where the length of the destination's prefix is in struct ifaddrmsg and rtmsg.
const PREFIX: usize = 1;

/// Why a request cannot be made.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RequestError {
    /// Its length is not what it says, or something in it ends beyond it.
    #[error("the message is malformed: {0}")]
    Malformed(&'static str),
    /// It is none of the five that make a network.
    #[error("{0} does not describe a network: links, addresses, neighbours, routes and rules do")]
    Foreign(String),
    /// No such interface.
    #[error("it names interface {index}, but 1 is lo and the {devices} devices begin at 2")]
    NoInterface {
        /// What came.
        index: u32,
        /// How many devices there are.
        devices: usize,
    },
}

impl From<Cut> for RequestError {
    fn from(_: Cut) -> Self {
        Self::Malformed("something in it is cut off")
    }
}

/// The guest's indices of the machine's network devices, in the host's order.
#[derive(Debug)]
pub(super) struct Interfaces(pub(super) Vec<u32>);

impl Interfaces {
    /// The guest's index for one of agent.proto.
    fn translate(&self, index: u32) -> Result<u32, RequestError> {
        let device = |number: u32| self.0.get(number as usize).copied();
        match index {
            LO => Some(LO),
            _ => index.checked_sub(LO + 1).and_then(device),
        }
        .ok_or(RequestError::NoInterface {
            index,
            devices: self.0.len(),
        })
    }

    fn replace(&self, bytes: &mut [u8], at: usize) -> Result<(), RequestError> {
        let index = read_u32(bytes, at).ok_or(Cut)?;
        let index = self.translate(index)?;
        bytes[at..at + 4].copy_from_slice(&index.to_ne_bytes());
        Ok(())
    }

    /// The same where 0 stands for none.
    fn replace_some(&self, bytes: &mut [u8], at: usize) -> Result<(), RequestError> {
        match read_u32(bytes, at) {
            Some(0) => Ok(()),
            _ => self.replace(bytes, at),
        }
    }
}

/// What a request makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Link,
    Address,
    Route,
    Neighbour,
    Rule,
}

impl Kind {
    fn new(number: u16) -> Option<Self> {
        Some(match number {
            libc::RTM_NEWLINK => Self::Link,
            libc::RTM_NEWADDR => Self::Address,
            libc::RTM_NEWROUTE => Self::Route,
            libc::RTM_NEWNEIGH => Self::Neighbour,
            libc::RTM_NEWRULE => Self::Rule,
            _ => return None,
        })
    }

    /// Size of what stands between the header and the attributes: struct ifinfomsg, ifaddrmsg, rtmsg, ndmsg, fib_rule_hdr.
    const fn body(self) -> usize {
        match self {
            Self::Link => 16,
            Self::Address => 8,
            Self::Route | Self::Neighbour | Self::Rule => 12,
        }
    }
}

/// A message to the kernel that names the guest's interfaces.
#[derive(Debug)]
pub(super) struct Request {
    /// It gives an interface its name.
    pub(super) renames: bool,
    pub(super) message: Vec<u8>,
}

impl Request {
    /// Takes a whole message in which the interfaces are agent.proto's.
    pub(super) fn new(message: &[u8], interfaces: &Interfaces) -> Result<Self, RequestError> {
        let number =
            read_u16(message, 4).ok_or(RequestError::Malformed("it is shorter than a header"))?;
        let kind = Kind::new(number).ok_or_else(|| RequestError::Foreign(name(number)))?;
        if read_u32(message, 0).map(|length| length as usize) != Some(message.len()) {
            return Err(RequestError::Malformed(
                "its length is not that of its header",
            ));
        }
        if message.len() < HEADER + kind.body() {
            return Err(RequestError::Malformed("it is shorter than its type"));
        }
        let (mut message, mut renames) = (message.to_owned(), false);
        let (body, rest) = message[HEADER..].split_at_mut(kind.body());
        if matches!(kind, Kind::Link | Kind::Address | Kind::Neighbour) {
            interfaces.replace(body, INTERFACE)?;
        }
        for attribute in attributes(rest) {
            // Those of the other kinds are checked to be whole as well.
            let attribute = attribute?;
            let value = attribute.value;
            match (kind, attribute.kind) {
                (Kind::Link, libc::IFLA_IFNAME) => renames = true,
                (Kind::Route, libc::RTA_OIF | libc::RTA_IIF) => {
                    interfaces.replace_some(value, 0)?;
                }
                (Kind::Route, libc::RTA_MULTIPATH) => {
                    for hop in Records::new(value, NEXT_HOP) {
                        interfaces.replace_some(hop?, NEXT_HOP_INTERFACE)?;
                    }
                }
                _ => {}
            }
        }
        Ok(Self { renames, message })
    }
}

/// A message for people: its type, and what it makes as far as it can be read.
pub(super) fn describe(message: &[u8]) -> String {
    let number = read_u16(message, 4).unwrap_or(0);
    let mut text = name(number);
    if let Some(kind) = Kind::new(number)
        && let Some(object) = object(kind, message)
    {
        text.push(' ');
        text.push_str(&object);
    }
    text
}

fn object(kind: Kind, message: &[u8]) -> Option<String> {
    let mut message = message.to_owned();
    let (body, rest) = message
        .get_mut(HEADER..)?
        .split_at_mut_checked(kind.body())?;
    let mut find = |wanted: u16| {
        attributes(rest)
            .map_while(Result::ok)
            .find(|attribute| attribute.kind == wanted)
            .map(|attribute| attribute.value.to_owned())
    };
    let mut address = |wanted| find(wanted).and_then(|value| to_address(&value));
    let prefix = body[PREFIX];
    match kind {
        Kind::Link => find(libc::IFLA_IFNAME).map(|name| {
            let name = name.strip_suffix(&[0]).unwrap_or(&name);
            String::from_utf8_lossy(name).into_owned()
        }),
        Kind::Address => address(libc::IFA_LOCAL)
            .or_else(|| address(libc::IFA_ADDRESS))
            .map(|address| format!("{address}/{prefix}")),
        Kind::Neighbour => address(libc::NDA_DST).map(|address| address.to_string()),
        Kind::Route => Some(match address(libc::RTA_DST) {
            Some(address) => format!("{address}/{prefix}"),
            None => "default".to_owned(),
        }),
        Kind::Rule => None,
    }
}

fn to_address(value: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(value)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(value).map(IpAddr::from))
        .ok()
}

/// Name of a message type (linux/rtnetlink.h): objects have four numbers each, from 16 on.
fn name(number: u16) -> String {
    const VERBS: [&str; 4] = ["NEW", "DEL", "GET", "SET"];
    const OBJECTS: [&str; 9] = [
        "LINK", "ADDR", "ROUTE", "NEIGH", "RULE", "QDISC", "TCLASS", "TFILTER", "ACTION",
    ];
    let object = number
        .checked_sub(libc::RTM_NEWLINK)
        .and_then(|offset| OBJECTS.get(usize::from(offset / 4)));
    match object {
        Some(object) => format!("RTM_{}{object}", VERBS[usize::from(number % 4)]),
        None => format!("message type {number}"),
    }
}
