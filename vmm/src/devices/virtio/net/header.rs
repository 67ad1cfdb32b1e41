//! The header before each frame (VIRTIO 1.2 §5.1.6), and what of it may reach the host's kernel.

use virtio_bindings::bindings::virtio_net::*;

use crate::devices::virtio::fault::Fault;

/// Its size: with the number of buffers, as VERSION_1 has it.
pub const SIZE: usize = 12;
/// Where the number of buffers is.
pub const NUM_BUFFERS: usize = 10;
/// An Ethernet header.
pub const MIN_FRAME: usize = 14;
/// A packet of 64 KiB behind the longest Ethernet header with two VLAN tags.
pub const MAX_FRAME: usize = 65536 + MIN_FRAME + 8;

/// A driver's header, taken out of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    /// Reads a driver's.
    pub fn parse(bytes: &[u8; SIZE]) -> Header {
        let number = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Header {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: number(2),
            gso_size: number(4),
            csum_start: number(6),
            csum_offset: number(8),
        }
    }

    /// What the host's kernel gets to see for a frame of `length` bytes: only what was negotiated, and nothing that points past
    /// the frame. Bits that mean nothing in this direction are left out (§5.1.6.2.2).
    ///
    /// `None`: a frame to be dropped. A Linux driver writes such a header for a process that has the right to send raw packets, so
    /// that it is no reason to stop the device for the others.
    ///
    /// # Errors
    /// §5.1.6.2.1: the driver must not have written this.
    pub fn checked(self, features: u64, length: usize) -> Result<Option<Header>, Fault> {
        let has = |feature: u32| features & 1 << feature != 0;
        let mut checked = Header::default();
        if u32::from(self.flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
            let end = usize::from(self.csum_start) + usize::from(self.csum_offset) + 2;
            if !has(VIRTIO_NET_F_CSUM) || end > length {
                return Err(Fault::NetHeader);
            }
            checked.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
            checked.csum_start = self.csum_start;
            checked.csum_offset = self.csum_offset;
        }
        let kind = u32::from(self.gso_type);
        if kind == VIRTIO_NET_HDR_GSO_NONE {
            return Ok(Some(checked));
        }
        let ecn = kind & VIRTIO_NET_HDR_GSO_ECN != 0;
        let negotiated = match kind & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_TCPV4 => has(VIRTIO_NET_F_HOST_TSO4),
            VIRTIO_NET_HDR_GSO_TCPV6 => has(VIRTIO_NET_F_HOST_TSO6),
            VIRTIO_NET_HDR_GSO_UDP => has(VIRTIO_NET_F_HOST_UFO),
            VIRTIO_NET_HDR_GSO_UDP_L4 => has(VIRTIO_NET_F_HOST_USO),
            _ => false,
        };
        let possible = negotiated
            && (!ecn || has(VIRTIO_NET_F_HOST_ECN))
            && self.gso_size != 0
            && usize::from(self.hdr_len) <= length;
        if !possible {
            return Err(Fault::NetHeader);
        }
        let udp = matches!(
            kind & !VIRTIO_NET_HDR_GSO_ECN,
            VIRTIO_NET_HDR_GSO_UDP | VIRTIO_NET_HDR_GSO_UDP_L4
        );
        if checked.flags == 0 || ecn && udp {
            return Ok(None);
        }
        checked.gso_type = self.gso_type;
        checked.gso_size = self.gso_size;
        checked.hdr_len = self.hdr_len;
        Ok(Some(checked))
    }

    /// As the host's kernel reads it.
    pub fn bytes(self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        let numbers = [
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
        ];
        for (place, number) in bytes[2..NUM_BUFFERS].chunks_mut(2).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: u64 = 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_HOST_TSO6
        | 1 << VIRTIO_NET_F_HOST_ECN
        | 1 << VIRTIO_NET_F_HOST_UFO
        | 1 << VIRTIO_NET_F_HOST_USO;

    fn header(flags: u8, gso_type: u8, gso_size: u16, csum_start: u16) -> Header {
        Header {
            flags,
            gso_type,
            hdr_len: 54,
            gso_size,
            csum_start,
            csum_offset: 16,
        }
    }

    #[test]
    fn a_good_header_passes_unchanged() {
        for kind in [1, 3, 4, 5, 0x81, 0x84] {
            let good = header(1, kind, 1448, 34);
            assert_eq!(good.checked(ALL, 3000), Ok(Some(good)), "{kind:#x}");
            assert_eq!(Header::parse(&good.bytes()), good);
        }
        let checksum = Header {
            hdr_len: 0,
            ..header(1, 0, 0, 34)
        };
        assert_eq!(checksum.checked(ALL, 52), Ok(Some(checksum)));
    }

    #[test]
    fn what_means_nothing_is_left_out() {
        let noise = header(0xfe, 0, 99, 65535);
        assert_eq!(noise.checked(ALL, 60), Ok(Some(Header::default())));
    }

    #[test]
    fn a_header_that_points_past_its_frame_or_was_not_negotiated_is_refused_or_its_frame_dropped() {
        let bad = Err(Fault::NetHeader);
        assert_eq!(
            header(1, 0, 0, 34).checked(ALL, 51),
            bad,
            "checksum past the end"
        );
        assert_eq!(header(1, 0, 0, u16::MAX).checked(ALL, 60), bad);
        assert_eq!(header(1, 1, 0, 34).checked(ALL, 3000), bad, "segments of 0");
        assert_eq!(
            header(0, 1, 1448, 34).checked(ALL, 3000),
            Ok(None),
            "no checksum"
        );
        assert_eq!(
            header(1, 1, 1448, 34).checked(ALL, 53),
            bad,
            "headers past the end"
        );
        assert_eq!(
            header(1, 0x83, 1448, 34).checked(ALL, 3000),
            Ok(None),
            "UDP with ECN"
        );
        for kind in [2, 6, 0x40, 0x80] {
            assert_eq!(
                header(1, kind, 1448, 34).checked(ALL, 3000),
                bad,
                "{kind:#x}"
            );
        }
        let bits = [
            (1, VIRTIO_NET_F_HOST_TSO4),
            (0x81, VIRTIO_NET_F_HOST_ECN),
            (3, VIRTIO_NET_F_HOST_UFO),
            (4, VIRTIO_NET_F_HOST_TSO6),
            (5, VIRTIO_NET_F_HOST_USO),
            (0, VIRTIO_NET_F_CSUM),
        ];
        for (kind, feature) in bits {
            let features = ALL & !(1 << feature);
            assert_eq!(
                header(1, kind, 1448, 34).checked(features, 3000),
                bad,
                "{kind:#x}"
            );
        }
    }

    proptest! {
        #[test]
        fn nothing_that_passes_points_past_the_frame(
            bytes: [u8; SIZE], features: u64, length in MIN_FRAME..=MAX_FRAME
        ) {
            if let Ok(Some(checked)) = Header::parse(&bytes).checked(features, length) {
                let end = usize::from(checked.csum_start) + usize::from(checked.csum_offset) + 2;
                prop_assert!(checked.flags == 0 || end <= length);
                prop_assert!(checked.flags & !1 == 0);
                prop_assert!(checked.gso_type == 0 || checked.flags == 1 && checked.gso_size > 0);
                prop_assert!(usize::from(checked.hdr_len) <= length);
            }
        }
    }
}
