//! Which work on packets the device does for the guest and the guest for the device.

use virtio_bindings::bindings::virtio_net::*;

use super::tap::Tap;

/// What the driver may accept, and the tap's word for it.
const GUEST: [(u32, libc::c_uint); 7] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
    (VIRTIO_NET_F_GUEST_USO4, libc::TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, libc::TUN_F_USO6),
];
/// What the host's kernel does with what it gets from a tap, whatever the tap is told.
const HOST: [u32; 5] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_UFO,
];
/// Linux 6.2: both directions or none.
const SEGMENTED_UDP: [u32; 3] = [
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_USO,
];

/// What this host can do, as feature bits.
pub fn features(tap: &Tap) -> u64 {
    let bits = |list: &[u32]| list.iter().fold(0, |bits, feature| bits | 1 << feature);
    let guest: Vec<u32> = GUEST.iter().map(|(feature, _)| *feature).collect();
    let all = bits(&guest) | bits(&HOST) | bits(&SEGMENTED_UDP);
    match tap.set_offloads(flags(all)) {
        Ok(()) => all,
        Err(_) => all & !bits(&SEGMENTED_UDP),
    }
}

/// The tap's words for accepted features. Without checksums there is no segmentation either (§5.1.3.1).
pub fn flags(features: u64) -> libc::c_uint {
    let accepted = |feature: u32| features & 1 << feature != 0;
    if !accepted(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let flags = GUEST.iter().filter(|(feature, _)| accepted(*feature));
    let mut flags = flags.fold(0, |flags, (_, flag)| flags | flag);
    // The kernel refuses what makes no sense alone, and a driver may accept it.
    if flags & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
        flags &= !libc::TUN_F_TSO_ECN;
    }
    let segmented = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    if flags & segmented != segmented {
        flags &= !segmented;
    }
    flags
}
