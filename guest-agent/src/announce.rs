//! What the agent tells the VMM by writing one byte to an I/O port: it began, or it is about to end the machine.
//!
//! A port write is one exit and needs no driver, so that it works from the first instruction of PID 1 to the last. The
//! numbers are the VMM's (`ANNOUNCE_PORT` and `announce` of its configuration crate, which the agent does not depend on).

/// The port. Nothing but the VMM's listener answers port I/O in the machine.
pub const PORT: u16 = 0x8900;

/// What is announced, as the byte written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Announcement {
    /// PID 1 runs its first instructions.
    Init = 0x01,
    /// The machine is about to be powered off.
    PowerOff = 0x10,
    /// The machine is about to be rebooted.
    Reboot = 0x11,
}

/// Writes the byte to the port.
///
/// Only for PID 1 of a guest: on another machine the port may belong to something. Fails silently where the kernel
/// denies port access (no CAP_SYS_RAWIO, no ioperm): an announcement is a courtesy, never a condition.
pub fn announce(what: Announcement) {
    // SAFETY: ioperm changes only this thread's I/O permission bitmap; it touches no memory of ours.
    if unsafe { libc::ioperm(libc::c_ulong::from(PORT), 1, 1) } != 0 {
        return;
    }
    // SAFETY: ioperm has just allowed this port, so the instruction cannot fault; OUT writes no memory.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") PORT, in("al") what as u8, options(nomem, nostack, preserves_flags));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_vmm_config as vmm;

    #[test]
    fn numbers_are_the_vmms() {
        assert_eq!(PORT, vmm::ANNOUNCE_PORT);
        assert_eq!(Announcement::Init as u8, vmm::announce::INIT);
        assert_eq!(Announcement::PowerOff as u8, vmm::announce::POWER_OFF);
        assert_eq!(Announcement::Reboot as u8, vmm::announce::REBOOT);
        assert_eq!(crate::init::AGENT_PORT, vmm::port::AGENT);
        assert_eq!(crate::log::LOG_PORT, vmm::port::LOG);
    }
}
