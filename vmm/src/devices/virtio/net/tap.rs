//! A queue of a tap interface: where frames come from and go to.
//!
//! The interface was made, and is configured, by the shim, in a network namespace that this process cannot see. What is done
//! here, to the descriptor alone, needs no privilege.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use thiserror::Error;

use super::header;

/// The descriptor is not what the device needs.
#[derive(Debug, Error)]
pub enum TapError {
    /// No tap at all.
    #[error("not a queue of a tap interface")]
    NotATap(#[source] io::Error),
    /// Opened with other flags.
    #[error(
        "the tap was opened with the flags {0:#x}; it needs IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    )]
    Flags(libc::c_int),
    /// A step of its set-up.
    #[error("cannot {step} of the tap")]
    Setup {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// One queue.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// Takes a descriptor, after a look at what it is, and sets the size of the header before each frame.
    ///
    /// # Errors
    /// It is no tap, or one without the header.
    pub fn new(fd: OwnedFd) -> Result<Tap, TapError> {
        let tap = Tap(fd);
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let found = tap.flags().map_err(TapError::NotATap)?;
        if found & (flags | libc::IFF_TUN) != flags {
            return Err(TapError::Flags(found));
        }
        let failed = |step| move |source| TapError::Setup { step, source };
        let size = header::SIZE as libc::c_int;
        tap.ioctl(libc::TUNSETVNETHDRSZ, (&raw const size) as libc::c_ulong)
            .map_err(failed("set the size of the header"))?;
        let old = fcntl(&tap.0, FcntlArg::F_GETFL);
        old.and_then(|old| {
            let flags = OFlag::from_bits_retain(old) | OFlag::O_NONBLOCK;
            fcntl(&tap.0, FcntlArg::F_SETFL(flags))
        })
        .map_err(|errno| failed("change the mode")(errno.into()))?;
        Ok(tap)
    }

    /// Says which frames the guest takes unfinished: `TUN_F_*`. An interface that is gone has none.
    ///
    /// # Errors
    /// The host does not know one of them.
    pub fn set_offloads(&self, flags: libc::c_uint) -> io::Result<()> {
        match self.ioctl(libc::TUNSETOFFLOAD, flags.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Ok(()),
            other => other,
        }
    }

    /// Takes part in the interface's traffic, or does not, which is how a queue begins that the driver has not asked for.
    ///
    /// # Errors
    /// The interface has as many queues as it can have.
    pub fn attach_queue(&self, attached: bool) -> io::Result<()> {
        let mut request = empty_request();
        request.ifr_ifru.ifru_flags = match attached {
            true => libc::IFF_ATTACH_QUEUE as libc::c_short,
            false => libc::IFF_DETACH_QUEUE as libc::c_short,
        };
        match self.ioctl(libc::TUNSETQUEUE, (&raw const request) as libc::c_ulong) {
            // It is so already, or the interface is gone.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }

    fn flags(&self) -> io::Result<libc::c_int> {
        let mut request = empty_request();
        self.ioctl(libc::TUNGETIFF, (&raw mut request) as libc::c_ulong)?;
        // SAFETY: the call has filled in the flags; every bit pattern is a number.
        Ok(unsafe { request.ifr_ifru.ifru_flags }.into())
    }

    fn ioctl(&self, request: libc::Ioctl, argument: libc::c_ulong) -> io::Result<()> {
        // SAFETY: the callers pass what the request wants: a number, or the address of a value on their stack that has its
        // type. On a descriptor that is no tap, these numbers are unknown (ENOTTY).
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn empty_request() -> libc::ifreq {
    // SAFETY: all-zero bytes are an ifreq without a name.
    unsafe { std::mem::zeroed() }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}
