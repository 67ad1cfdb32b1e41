//! What the kernel's random numbers come from (random(4)).

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::Result;

use crate::done;

/// `_IOW('R', 0x03, int[2])` of linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 0x07)`.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Bytes of a seed: twice what the kernel's generator is keyed with.
pub const SEED: usize = 64;

/// `struct rand_pool_info` with its bytes.
#[repr(C)]
struct Pool {
    /// Bits that they are worth.
    entropy_count: libc::c_int,
    /// How many bytes there are.
    buf_size: libc::c_int,
    buf: [u8; SEED],
}

/// Mixes a seed, each bit of it worth one, into what the kernel behind `device` (/dev/urandom)
/// draws from, and keys its generator anew from that.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN.
pub fn reseed(device: BorrowedFd<'_>, seed: &[u8; SEED]) -> Result<()> {
    let pool = Pool {
        entropy_count: 8 * SEED as libc::c_int,
        buf_size: SEED as libc::c_int,
        buf: *seed,
    };
    // SAFETY: the kernel reads a header and `buf_size` bytes of a struct that outlives the call.
    done(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY as _, &raw const pool) })?;
    // SAFETY: the ioctl takes no argument.
    done(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG as _) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use nix::errno::Errno;

    use super::*;

    #[test]
    fn the_kernel_takes_a_seed_from_root() {
        let device = File::open("/dev/urandom").unwrap();
        let done = reseed(device.as_fd(), &[7; SEED]);
        match nix::unistd::geteuid().is_root() {
            // A container's root may lack the capability.
            true => assert!(matches!(done, Ok(()) | Err(Errno::EPERM)), "{done:?}"),
            false => assert_eq!(done, Err(Errno::EPERM)),
        }
        let null = File::open("/dev/null").unwrap();
        assert_eq!(reseed(null.as_fd(), &[7; SEED]), Err(Errno::ENOTTY));
    }
}
