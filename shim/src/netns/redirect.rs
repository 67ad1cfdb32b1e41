//! The redirect: what arrives at an interface goes to its tap, what arrives at the tap (from the guest) leaves by the interface.
//!
//! ```text
//! wire ──► eth0 ingress: ... filters that were there ... , u32 match all ──► mirred redirect ──► bulkhead1a2b3c ──► guest
//! wire ◄── eth0 egress  ◄── mirred redirect ◄── u32 match all :ingress bulkhead1a2b3c ◄── guest
//! ```
//!
//! The namespace keeps its addresses, at which engines look, but no longer hears anything by the interface. What its own kernel
//! still says there (gratuitous ARP, neighbour and router solicitations, MLD reports of its copy of the addresses) is true of the
//! guest, which has the same addresses at the same Ethernet address; the answers go to the guest, which ignores what it did not
//! ask. A VLAN tag that the kernel has taken off a frame is put back by the tap.

use super::{
    Error, Step,
    message::{self, Message, field},
    socket::{Failure, Socket},
};

/// Numbers of linux/pkt_sched.h, pkt_cls.h and tc_act/tc_mirred.h that libc does not have.
const TC_H_INGRESS: u32 = 0xffff_fff1;
/// Parent of ingress filters; of an `ingress` qdisc as of a `clsact` one.
const TC_H_MIN_INGRESS: u32 = 0xffff_fff2;
const INGRESS_HANDLE: u32 = 0xffff_0000;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TC_U32_TERMINAL: u8 = 1;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TC_ACT_STOLEN: i32 = 4;
const TCA_EGRESS_REDIR: i32 = 1;

/// Our filters' preference. Those that the kernel chooses for others begin at 49152 and go down, so others' go first.
const PREFERENCE: u32 = 60_000;

/// Makes room for filters on what arrives, where there is none.
pub(crate) fn add_ingress(socket: &mut Socket, index: u32, name: &str) -> Result<(), Error> {
    let message = Message::new(libc::RTM_NEWQDISC, libc::NLM_F_CREATE | libc::NLM_F_EXCL)
        .with_number(field::INDEX, index)
        .with_number(field::TC_HANDLE, INGRESS_HANDLE)
        .with_number(field::TC_PARENT, TC_H_INGRESS)
        .with_name(libc::TCA_KIND, "ingress");
    socket
        .request(message)
        .step("add an ingress qdisc to", name)
}

/// The interfaces that have an ingress or clsact qdisc.
pub(crate) fn with_ingress(socket: &mut Socket) -> Result<Vec<u32>, Failure> {
    let qdiscs = socket.dump(Message::new(libc::RTM_GETQDISC, 0))?;
    Ok(qdiscs
        .iter()
        .filter(|qdisc| qdisc.number(field::TC_PARENT) == TC_H_INGRESS)
        .map(|qdisc| qdisc.number(field::INDEX))
        .collect())
}

fn filter(kind: u16, flags: libc::c_int, index: u32) -> Message {
    // Preference, and the protocol in network order.
    let all = u32::from((libc::ETH_P_ALL as u16).to_be());
    Message::new(kind, flags)
        .with_number(field::INDEX, index)
        .with_number(field::TC_PARENT, TC_H_MIN_INGRESS)
        .with_number(field::TC_INFO, PREFERENCE << 16 | all)
        .with_name(libc::TCA_KIND, "u32")
}

/// Redirects all that arrives at `from` to `to`.
pub(crate) fn add(socket: &mut Socket, from: u32, to: u32, name: &str) -> Result<(), Error> {
    // struct tc_u32_sel without keys, so that all of none match: a key that matches any word, as `match u32 0 0`, lets a frame
    // pass by whose payload is shorter than a word.
    let mut selector = [0; 16];
    selector[0] = TC_U32_TERMINAL;
    // struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex.
    let parameters: Vec<u8> = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to as i32]
        .iter()
        .flat_map(|number| number.to_ne_bytes())
        .collect();
    let options = message::nested(&[(TCA_MIRRED_PARMS, &parameters)]);
    let action = message::nested(&[(TCA_ACT_KIND, b"mirred\0"), (TCA_ACT_OPTIONS, &options)]);
    let actions = message::nested(&[(1, &action)]);
    let filtering = message::nested(&[(TCA_U32_SEL, &selector), (TCA_U32_ACT, &actions)]);
    let new = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let message = filter(libc::RTM_NEWTFILTER, new, from).with(libc::TCA_OPTIONS, &filtering);
    socket
        .request(message)
        .step("redirect what arrives at", name)
}

/// The filters of an interface on what arrives.
pub(crate) struct Filters(Vec<Message>);

/// Who has our preference on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    Nobody,
    /// A redirect to a tap that is gone: of a pod that died.
    Dead,
    /// A redirect to this link.
    Redirect(u32),
    /// A filter of another kind.
    Other,
}

impl Filters {
    /// None when the interface or its qdisc is gone.
    pub(crate) fn of(socket: &mut Socket, index: u32) -> Result<Filters, Failure> {
        let ask = Message::new(libc::RTM_GETTFILTER, 0)
            .with_number(field::INDEX, index)
            .with_number(field::TC_PARENT, TC_H_MIN_INGRESS);
        match socket.dump(ask) {
            Err(error) if error.is_gone() => Ok(Filters(Vec::new())),
            Err(error) => Err(error),
            // A kernel that does not find the qdisc may answer with the filters of another one.
            Ok(filters) => Ok(Filters(
                filters
                    .into_iter()
                    .filter(|filter| filter.number(field::INDEX) == index)
                    .collect(),
            )),
        }
    }

    pub(crate) fn holder(&self) -> Holder {
        let mut holder = Holder::Nobody;
        let ours = |filter: &&Message| filter.number(field::TC_INFO) >> 16 == PREFERENCE;
        for filter in self.0.iter().filter(ours) {
            if filter.get_text(libc::TCA_KIND).as_deref() != Some("u32") {
                return Holder::Other;
            }
            match target(filter) {
                Some(0) => holder = Holder::Dead,
                Some(index) => return Holder::Redirect(index),
                // A u32 filter is listed with its hash tables, which select nothing.
                None if selects(filter) => return Holder::Other,
                None if holder == Holder::Nobody => holder = Holder::Dead,
                None => {}
            }
        }
        holder
    }

    fn is_empty_but_for_ours(&self) -> bool {
        self.0
            .iter()
            .all(|filter| filter.number(field::TC_INFO) >> 16 == PREFERENCE)
    }
}

fn selects(filter: &Message) -> bool {
    let options = filter.get(libc::TCA_OPTIONS).unwrap_or_default();
    message::find(options, TCA_U32_SEL).is_some()
}

/// The link that a filter's action redirects to; 0: one that is gone.
fn target(filter: &Message) -> Option<u32> {
    let options = filter.get(libc::TCA_OPTIONS)?;
    let (_, action) = message::attributes(message::find(options, TCA_U32_ACT)?).next()?;
    let parameters = message::find(message::find(action, TCA_ACT_OPTIONS)?, TCA_MIRRED_PARMS)?;
    message::u32_of(parameters.get(24..)?)
}

/// Removes our filter.
pub(crate) fn remove(socket: &mut Socket, index: u32) -> Result<(), Failure> {
    match socket.request(filter(libc::RTM_DELTFILTER, 0, index)) {
        Err(error) if error.is_gone() => Ok(()),
        other => other,
    }
}

/// Removes the ingress qdisc, unless somebody else has put a filter into it.
pub(crate) fn remove_ingress(
    socket: &mut Socket,
    index: u32,
    filters: &Filters,
) -> Result<(), Failure> {
    if !filters.is_empty_but_for_ours() {
        return Ok(());
    }
    let qdiscs =
        socket.dump(Message::new(libc::RTM_GETQDISC, 0).with_number(field::INDEX, index))?;
    // Nor a clsact that has taken its place.
    if !qdiscs.iter().any(|qdisc| {
        qdisc.number(field::INDEX) == index
            && qdisc.number(field::TC_PARENT) == TC_H_INGRESS
            && qdisc.get_text(libc::TCA_KIND).as_deref() == Some("ingress")
    }) {
        return Ok(());
    }
    let message = Message::new(libc::RTM_DELQDISC, 0)
        .with_number(field::INDEX, index)
        .with_number(field::TC_PARENT, TC_H_INGRESS);
    match socket.request(message) {
        Err(error) if error.is_gone() => Ok(()),
        other => other,
    }
}
