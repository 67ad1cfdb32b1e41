//! The port to which the agent announces what it is about to do ([`ANNOUNCE_PORT`]).
//!
//! Without ACPI, UART and watchdog a machine that is powered off looks like one that is idle, so the agent says it first. A
//! container that may write to ports can say the same: it has the guest by then, and the guest is all that it can end.

use std::sync::Arc;

#[cfg(doc)]
use bulkhead_vmm_config::ANNOUNCE_PORT;
use bulkhead_vmm_config::announce;

use crate::bus::BusDevice;

/// What was announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announcement {
    /// PID 1 runs.
    Init,
    /// The machine is about to be powered off.
    PowerOff,
    /// The machine is about to be reset.
    Reboot,
    /// A byte that means nothing.
    Unknown,
}

/// Hears announcements, on the vCPU's thread.
pub type Listener = Arc<dyn Fn(Announcement) + Send + Sync>;

/// The device: write-only, one port.
pub struct AnnouncePort {
    listener: Listener,
}

impl AnnouncePort {
    /// A port that tells `listener`.
    pub fn new(listener: Listener) -> AnnouncePort {
        AnnouncePort { listener }
    }
}

impl BusDevice for AnnouncePort {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let announcement = match data {
            [announce::INIT] => Announcement::Init,
            [announce::POWER_OFF] => Announcement::PowerOff,
            [announce::REBOOT] => Announcement::Reboot,
            _ => Announcement::Unknown,
        };
        (self.listener)(announcement);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn bytes_become_announcements() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let log = heard.clone();
        let mut port = AnnouncePort::new(Arc::new(move |what| log.lock().unwrap().push(what)));
        for data in [&[1][..], &[0x10], &[0x11], &[0], &[1, 0], &[]] {
            port.write(0, data);
        }
        use Announcement::*;
        assert_eq!(
            *heard.lock().unwrap(),
            [Init, PowerOff, Reboot, Unknown, Unknown, Unknown]
        );
    }
}
