//! Taps: network interfaces whose frames a program reads and writes
//! (Documentation/networking/tuntap.rst).

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::Result;
use nix::errno::Errno;

use crate::done;

/// Where taps are opened.
const DEVICE: &str = "/dev/net/tun";

/// Opens a queue of the tap `name` in the thread's network namespace; `flags` are those of
/// TUNSETIFF, and say whether it may exist already. Frames have a `struct virtio_net_hdr` of
/// `header` bytes. The descriptor does not block.
///
/// # Errors
/// `EBUSY`: it exists; `EINVAL`: the name is too long for an interface.
pub fn open_queue(name: &str, flags: libc::c_int, header: libc::c_int) -> std::io::Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(DEVICE)?;
    set_up(&file, name, flags, header)?;
    Ok(file.into())
}

fn set_up(file: &File, name: &str, flags: libc::c_int, header: libc::c_int) -> Result<()> {
    // SAFETY: all zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // A NUL ends it.
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::EINVAL);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short; // the flags of TUNSETIFF have 16 bits
    // SAFETY: TUNSETIFF reads and writes an ifreq that outlives the call.
    done(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    // SAFETY: TUNSETVNETHDRSZ reads an int that outlives the call.
    done(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })
}
