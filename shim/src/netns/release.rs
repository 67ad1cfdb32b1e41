//! Giving a redirect back, in whatever order its parts died.

use std::{
    fmt,
    path::{Component, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    Error, Step, link,
    message::{Message, field},
    namespace::Namespace,
    redirect::{self, Filters, Holder},
    socket::{Failure, Socket},
};

/// An interface of a pod's network namespace that is redirected to a tap, as the ledger names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redirect {
    /// Path of the namespace.
    pub network: PathBuf,
    /// Its number: a path that was used again is another namespace's.
    pub inode: u64,
    /// The interface, for a person.
    pub interface: String,
    /// Its index, by which it is found: it may have been renamed.
    pub index: u32,
    /// The tap, a name that no other pod has.
    pub tap: String,
    /// The interface's ingress qdisc was made for the redirect.
    pub ingress: bool,
    /// The interface was opened for all groups for the redirect.
    pub groups: bool,
}

impl Redirect {
    /// Whether it is something that a pod can hold.
    pub(crate) fn is_plausible(&self) -> bool {
        self.network.is_absolute()
            && !self
                .network
                .components()
                .any(|part| part == Component::ParentDir)
            && self.inode != 0
            && self.index > 1 // 1 is lo
            && link::is_tap_name(&self.tap)
    }
}

impl fmt::Display for Redirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (interface, tap, network) = (&self.interface, &self.tap, self.network.display());
        write!(f, "redirect of {interface} to {tap} in {network}")
    }
}

/// Undoes a redirect: the namespace hears by its interface again, and the tap is gone. What is gone already, or was never made, is
/// no error; what others have put beside ours stays.
pub fn give_back(redirect: &Redirect) -> Result<(), Error> {
    match Namespace::find(&redirect.network, redirect.inode)? {
        Some(namespace) => namespace.enter(|socket| undo(socket, redirect)),
        None => Ok(()),
    }
}

fn undo(socket: &mut Socket, redirect: &Redirect) -> Result<(), Error> {
    let tap = index_of(socket, &redirect.tap).step("find", &redirect.tap)?;
    if link_of(socket, redirect.index)
        .step("find", &redirect.interface)?
        .is_some()
    {
        take_apart(socket, redirect, tap).step("end the redirect of", &redirect.interface)?;
    }
    let Some(tap) = tap else {
        return Ok(());
    };
    let delete = Message::new(libc::RTM_DELLINK, 0).with_number(field::INDEX, tap);
    match socket.request(delete) {
        Err(error) if error.is_gone() => Ok(()),
        other => other.step("remove", &redirect.tap),
    }
}

/// On the interface's side. Another pod may have taken the interface since our tap died: then nothing of it is ours any more.
fn take_apart(socket: &mut Socket, redirect: &Redirect, tap: Option<u32>) -> Result<(), Failure> {
    let filters = Filters::of(socket, redirect.index)?;
    match filters.holder() {
        Holder::Nobody => {}
        Holder::Dead => redirect::remove(socket, redirect.index)?,
        Holder::Redirect(to) if Some(to) == tap => redirect::remove(socket, redirect.index)?,
        Holder::Redirect(_) | Holder::Other => return Ok(()),
    }
    if redirect.ingress {
        redirect::remove_ingress(socket, redirect.index, &filters)?;
    }
    if redirect.groups {
        match socket.request(link::flags(redirect.index, 0, libc::IFF_ALLMULTI as u32)) {
            Err(error) if error.is_gone() => {}
            other => other?,
        }
    }
    Ok(())
}

/// The index of the link with this name.
pub(crate) fn index_of(socket: &mut Socket, name: &str) -> Result<Option<u32>, Failure> {
    let ask = Message::new(libc::RTM_GETLINK, 0).with_name(libc::IFLA_IFNAME, name);
    found(socket.get(ask)).map(|link| link.map(|link| link.number(field::INDEX)))
}

fn link_of(socket: &mut Socket, index: u32) -> Result<Option<Message>, Failure> {
    found(socket.get(Message::new(libc::RTM_GETLINK, 0).with_number(field::INDEX, index)))
}

fn found(answer: Result<Message, Failure>) -> Result<Option<Message>, Failure> {
    match answer {
        Ok(link) => Ok(Some(link)),
        Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}
