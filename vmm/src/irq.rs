//! What a device knows of interrupts: a line that it can raise.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line.
pub trait Interrupt: Send {
    /// Raises the line once.
    ///
    /// # Errors
    /// The host's fault: the write to the irqfd failed.
    fn raise(&self) -> io::Result<()>;
}

/// A line wired to a GSI by KVM_IRQFD: raising it costs the VMM one write and the guest no exit.
pub struct IrqFd(EventFd);

impl IrqFd {
    /// Wraps an eventfd that is, or will be, registered with KVM.
    pub fn new(fd: EventFd) -> IrqFd {
        IrqFd(fd)
    }

    /// The eventfd, for registration and for handing to a vhost-user back end.
    pub fn event_fd(&self) -> &EventFd {
        &self.0
    }
}

impl Interrupt for IrqFd {
    fn raise(&self) -> io::Result<()> {
        self.0.write(1)
    }
}
