//! Routes, repeated in the guest.

use std::collections::HashMap;

use crate::netns::message::{self, Attribute, Message, field};

/// Numbers of linux/rtnetlink.h that libc does not have.
const RTA_EXPIRES: u16 = 23;
const RTA_NH_ID: u16 = 30;
const RTNH_F_ONLINK: u32 = 4;
/// Length of struct rtnexthop: length, flags, hops, interface.
const HOP: usize = 8;

/// Made by the kernel for an address.
pub(super) fn is_of_the_kernel(route: &Message) -> bool {
    route.byte(field::PROTOCOL) == libc::RTPROT_KERNEL
        && route.byte(field::ROUTE_TYPE) == libc::RTN_UNICAST
}

/// Requests for the routes that somebody made, in an order in which each gateway is reachable when its route is made.
pub(super) fn translate<'a>(
    routes: &'a [Message],
    numbers: &'a HashMap<u32, u32>,
) -> impl Iterator<Item = Message> + 'a {
    let (through, direct): (Vec<Message>, Vec<Message>) = routes
        .iter()
        .filter_map(|message| route(message, numbers))
        .partition(has_gateway);
    direct.into_iter().chain(through)
}

fn has_gateway(route: &Message) -> bool {
    let is_gateway = |kind| kind == libc::RTA_GATEWAY || kind == libc::RTA_VIA;
    let of_a_hop = |hops: &[u8]| {
        hops_of(hops).any(|(_, attributes)| {
            message::attributes(attributes).any(|(kind, _)| is_gateway(kind))
        })
    };
    route
        .attributes
        .iter()
        .any(|attribute| is_gateway(attribute.kind))
        || route.get(libc::RTA_MULTIPATH).is_some_and(of_a_hop)
}

fn route(message: &Message, numbers: &HashMap<u32, u32>) -> Option<Message> {
    let made_by_the_kernel = [libc::RTPROT_KERNEL, libc::RTPROT_REDIRECT];
    let flags = message.number(field::ROUTE_FLAGS);
    if made_by_the_kernel.contains(&message.byte(field::PROTOCOL))
        || flags & libc::RTM_F_CLONED != 0
    {
        return None;
    }
    let mut request = message.clone();
    request.kind = libc::RTM_NEWROUTE;
    request.flags =
        (libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_APPEND) as u16;
    request.set_number(field::ROUTE_FLAGS, flags & RTNH_F_ONLINK);
    request.attributes.clear();
    let mut somewhere = message.byte(field::ROUTE_TYPE) != libc::RTN_UNICAST;
    for Attribute { kind, value } in &message.attributes {
        let value = match *kind {
            libc::RTA_CACHEINFO | RTA_EXPIRES | RTA_NH_ID => continue,
            libc::RTA_OIF | libc::RTA_IIF => {
                let Some(number) = message::u32_of(value).and_then(|index| numbers.get(&index))
                else {
                    return left_out(message, "its interface");
                };
                number.to_ne_bytes().to_vec()
            }
            libc::RTA_MULTIPATH => {
                let hops = translate_hops(value, numbers);
                if hops.is_empty() {
                    return left_out(message, "the interfaces of its next hops");
                }
                hops
            }
            _ => value.clone(),
        };
        somewhere |= [libc::RTA_OIF, libc::RTA_MULTIPATH, libc::RTA_GATEWAY].contains(kind);
        request.attributes.push(Attribute { kind: *kind, value });
    }
    if !somewhere {
        // net.ipv4.nexthop_compat_mode=0 leaves only the number of the object.
        return left_out(message, "its next hop's object");
    }
    Some(request)
}

fn left_out(route: &Message, what: &str) -> Option<Message> {
    tracing::debug!(
        family = route.byte(field::FAMILY),
        to = ?route.get(libc::RTA_DST),
        prefix = route.byte(field::PREFIX),
        "a route of the namespace is not in the guest, which does not have {what}"
    );
    None
}

/// Each next hop: its struct and its attributes.
fn hops_of(mut bytes: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let hop = bytes.get(..length).filter(|hop| hop.len() >= HOP)?;
        bytes = bytes.get(message::aligned(length)..).unwrap_or_default();
        Some(hop.split_at(HOP))
    })
}

fn translate_hops(bytes: &[u8], numbers: &HashMap<u32, u32>) -> Vec<u8> {
    let mut hops = Vec::new();
    for (hop, attributes) in hops_of(bytes) {
        let Some(number) = message::u32_of(&hop[4..]).and_then(|index| numbers.get(&index)) else {
            tracing::debug!(
                "a next hop of a route is by an interface that the guest does not have"
            );
            continue;
        };
        hops.extend(&hop[..2]);
        hops.push(hop[2] & RTNH_F_ONLINK as u8);
        hops.push(hop[3]);
        hops.extend(number.to_ne_bytes());
        hops.extend(attributes);
        hops.resize(message::aligned(hops.len()), 0);
    }
    hops
}
