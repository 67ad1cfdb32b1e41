//! A tap in a network namespace of the test's thread, and a packet socket at its other end. Tests that boot a guest have it, too.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sched::{CloneFlags, unshare};

pub(super) const NAME: &str = "tap0";

pub(super) struct Wire {
    socket: OwnedFd,
    index: i32,
    taps: Vec<OwnedFd>,
}

fn ok(result: libc::c_int) -> libc::c_int {
    assert!(result >= 0, "{}", io::Error::last_os_error());
    result
}

pub(super) fn request() -> libc::ifreq {
    // SAFETY: all-zero bytes are an ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
        *place = byte as libc::c_char;
    }
    request
}

pub(super) fn open_tap(flags: libc::c_int) -> OwnedFd {
    let tun = File::options().read(true).write(true).open("/dev/net/tun");
    let tun = tun.expect("these tests need root and /dev/net/tun");
    let mut request = request();
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request is an ifreq, as TUNSETIFF wants.
    ok(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request) });
    tun.into()
}

pub(super) const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

impl Wire {
    /// An interface with this many queues and MTU, up, in a namespace of its own.
    pub(super) fn new(queues: usize, mtu: i32) -> Wire {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        let flags = match queues {
            1 => FLAGS,
            _ => FLAGS | libc::IFF_MULTI_QUEUE,
        };
        let taps: Vec<OwnedFd> = (0..queues).map(|_| open_tap(flags)).collect();
        let quiet = format!("/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6");
        // Not where the kernel has no IPv6: nobody solicits routers then.
        let _ = std::fs::write(quiet, "1");
        let any = libc::ETH_P_ALL as u16;
        // SAFETY: system calls on numbers and on values of this stack, which have the types that they want.
        unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            let socket = ok(libc::socket(libc::AF_PACKET, kind, any.to_be().into()));
            let socket = OwnedFd::from_raw_fd(socket);
            let mut change = request();
            change.ifr_ifru.ifru_mtu = mtu;
            ok(libc::ioctl(
                socket.as_raw_fd(),
                libc::SIOCSIFMTU,
                &raw mut change,
            ));
            change.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
            ok(libc::ioctl(
                socket.as_raw_fd(),
                libc::SIOCSIFFLAGS,
                &raw mut change,
            ));
            let name = CString::new(NAME).unwrap();
            let index = ok(libc::if_nametoindex(name.as_ptr()) as libc::c_int);
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = any.to_be();
            address.sll_ifindex = index;
            let length = size_of_val(&address) as u32;
            ok(libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                length,
            ));
            let time = libc::timeval {
                tv_sec: 0,
                tv_usec: 200_000,
            };
            let length = size_of_val(&time) as u32;
            let option = libc::SO_RCVTIMEO;
            ok(libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const time).cast(),
                length,
            ));
            // Its own frames would come back.
            let one = 1;
            let length = size_of_val(&one) as u32;
            ok(libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                23,
                (&raw const one).cast(),
                length,
            ));
            Wire {
                socket,
                index,
                taps,
            }
        }
    }

    pub(super) fn take_taps(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.taps)
    }

    /// Sends a frame to the guest.
    pub(super) fn send(&self, frame: &[u8]) {
        // SAFETY: the pointer and the length are those of the frame.
        let sent = unsafe {
            libc::send(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
            )
        };
        assert_eq!(sent, frame.len() as isize, "{}", io::Error::last_os_error());
    }

    /// The next frame of the guest; none within 200 ms.
    pub(super) fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 17];
        // SAFETY: the pointer and the length are those of the buffer.
        let length = unsafe {
            libc::recv(
                self.socket.as_raw_fd(),
                frame.as_mut_ptr().cast(),
                frame.len(),
                0,
            )
        };
        let length = usize::try_from(length).ok()?;
        frame.truncate(length);
        Some(frame)
    }

    pub(super) fn delete_interface(&self) {
        // By netlink, as anybody may: RTM_DELLINK with the index.
        let mut message = [0_u8; 32];
        message[..4].copy_from_slice(&32_u32.to_ne_bytes());
        message[4..6].copy_from_slice(&libc::RTM_DELLINK.to_ne_bytes());
        message[6..8]
            .copy_from_slice(&((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
        message[20..24].copy_from_slice(&self.index.to_ne_bytes());
        // SAFETY: system calls on numbers and on a message of this stack.
        unsafe {
            let socket = ok(libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW,
                libc::NETLINK_ROUTE,
            ));
            let socket = OwnedFd::from_raw_fd(socket);
            assert_eq!(
                libc::send(socket.as_raw_fd(), message.as_ptr().cast(), 32, 0),
                32
            );
            let mut answer = [0_u8; 256];
            libc::recv(
                socket.as_raw_fd(),
                answer.as_mut_ptr().cast(),
                answer.len(),
                0,
            );
            assert_eq!(answer[16..20], [0; 4], "the interface is deleted");
        }
    }
}

/// Headers (VIRTIO 1.2 §5.1.6) that no driver may put before a frame of 100 bytes: checksums behind its end, a segment size of 0,
/// a kind of segments that there is not, headers that are longer than the frame.
pub(super) const BAD_HEADERS: [[u8; 12]; 5] = [
    [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0],
    [1, 0, 0, 0, 0, 0, 90, 0, 9, 0, 0, 0],
    [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0],
    [1, 2, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0],
    [1, 1, 0xff, 0xff, 0xa8, 5, 34, 0, 16, 0, 0, 0],
];

/// A frame of an experimental type, which no stack answers.
pub(super) fn frame(length: usize, seed: u8) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..length)
        .map(|at| {
            (at as u8)
                .wrapping_mul(31)
                .wrapping_add((at >> 8) as u8)
                .wrapping_add(seed)
        })
        .collect();
    frame[..6].copy_from_slice(&[0xff; 6]);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    frame[12..14].copy_from_slice(&0x88b5_u16.to_be_bytes());
    frame
}
