//! Taps: the end of a redirect that the VMM holds.

use std::{fs, io, os::fd::OwnedFd};

use super::{
    Error, Step, link,
    message::{Message, field},
    socket::Socket,
};

/// `struct virtio_net_hdr_v1` before each frame (VIRTIO 1.2 §5.1.6).
const HEADER: libc::c_int = 12;
/// Frames that wait for the guest; the kernel drops more.
const QUEUE: u32 = 1000;
/// Largest MTU that the kernel lets a tap have: 65535 less the Ethernet header. It limits nothing that passes through a redirect.
const MOST_MTU: u32 = 65535 - 14;

/// Parent of what is attached to a link itself (linux/pkt_sched.h).
const TC_H_ROOT: u32 = u32::MAX;

/// Makes a tap in the thread's network namespace. It goes when its last descriptor is closed.
pub(crate) fn create(name: &str, queues: u32) -> io::Result<Vec<OwnedFd>> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    (0..queues.max(1))
        .map(|queue| {
            // The first queue makes the tap: one that exists is somebody's.
            let exclusive = if queue == 0 { libc::IFF_TUN_EXCL } else { 0 };
            assert!(name.len() < libc::IFNAMSIZ, "names of taps are short");
            linux::tap::open_queue(name, flags | exclusive, HEADER)
        })
        .collect()
}

/// Lets the tap carry frames, and nothing else: no address, no word of its own to the guest.
pub(crate) fn bring_up(socket: &mut Socket, name: &str, index: u32, mtu: u32) -> Result<(), Error> {
    // Before it is up: or the namespace's kernel greets the guest by router solicitations from a link-local address.
    let sysctl = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    match fs::write(&sysctl, "1") {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => other.map_err(|source| Error::Tap {
            tap: name.into(),
            source,
        })?,
    }
    // The tap's ring is the queue, which drops what the guest does not take. A qdisc before it would only add a lock, and as
    // fq_codel 100 KiB of kernel memory a queue.
    let noqueue = Message::new(libc::RTM_NEWQDISC, libc::NLM_F_CREATE | libc::NLM_F_REPLACE)
        .with_number(field::INDEX, index)
        .with_number(field::TC_PARENT, TC_H_ROOT)
        .with_name(libc::TCA_KIND, "noqueue");
    socket.request(noqueue).step("take the queue from", name)?;
    let up = libc::IFF_UP as u32;
    let message = link::flags(index, up, up)
        .with(libc::IFLA_MTU, &mtu.min(MOST_MTU).to_ne_bytes())
        .with(libc::IFLA_TXQLEN, &QUEUE.to_ne_bytes());
    socket.request(message).step("bring up", name)
}
