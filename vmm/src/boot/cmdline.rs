//! The kernel's command line.

use thiserror::Error;

use crate::arch::x86_64::layout;
use crate::ramoops;

/// Why a command line cannot be made.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// A word that would become several or none.
    #[error(
        "{0:?} is no word of a kernel command line: it needs to be printable ASCII without blanks"
    )]
    BadWord(String),
    /// Too many words.
    #[error("the kernel command line has {0} bytes, Linux takes {max}", max = layout::CMDLINE_SIZE - 1)]
    TooLong(usize),
}

/// What every guest is told. guest-kernel-config/README.md has the reasons at length.
const ALWAYS: [&str; 12] = [
    // Fewer lines to a console that somebody pays for; the log still has them.
    "quiet",
    // The machine has no other way to reset than a triple fault: do not try the others first.
    "reboot=t",
    // A panic ends the guest at once; its record is in ramoops by then.
    "panic=-1",
    // KVM gives the frequency: no watchdog.
    "tsc=reliable",
    // Rewriting every lock prefix takes longer than the prefixes ever will.
    "noreplace-smp",
    // Drivers that make devices of their own would put them into the pod's network: dummy0, ifb0, bond0, and tunl0, gre0,
    // sit0 and the like in each network namespace.
    "dummy.numdummies=0",
    "ifb.numifbs=0",
    "bonding.max_bonds=0",
    "fb_tunnels=none",
    // No bounce buffers for devices with narrow addresses: there are none.
    "swiotlb=noforce",
    // Per-processor memory in units of what is used: with 2 MiB units the first container costs a 4 MiB table.
    "percpu_alloc=page",
    // Processors are started one by one: started at once they spin until it is their turn, and take the time of the one that
    // is to call them (32 vCPUs on 2 busy host processors were not up after 60 s; one by one they were).
    "cpuhp.parallel=0",
];

/// Words in order, checked, at most [`layout::CMDLINE_SIZE`] with the final NUL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cmdline(String);

impl Cmdline {
    /// A command line for a machine with or without a serial console.
    pub fn new(serial: bool) -> Cmdline {
        let mut line = Cmdline(ALWAYS.join(" "));
        let mut words: Vec<String> = ramoops::cmdline_words();
        if serial {
            // The kernel has a driver but, so that it probes none, no port unless told.
            words.extend(["8250.nr_uarts=1".into(), "console=ttyS0".into()]);
        }
        for word in words {
            line.push(&word).expect("our own words are short and clean");
        }
        line
    }

    /// Announces a virtio-mmio device (Linux's virtio_mmio.device parameter).
    ///
    /// # Errors
    /// The line is full.
    pub fn push_virtio(&mut self, window: u64, pin: u32) -> Result<(), CmdlineError> {
        let size = layout::VIRTIO_MMIO_SIZE >> 10;
        self.push(&format!("virtio_mmio.device={size}K@{window:#x}:{pin}"))
    }

    /// Tells from which size on the guest reports free blocks of pages to its balloon.
    ///
    /// # Errors
    /// The line is full.
    pub fn push_page_reporting(&mut self) -> Result<(), CmdlineError> {
        /// 2^4 pages. docs/adr/0016-memory-that-returns.md has the figures.
        const ORDER: u32 = 4;
        self.push(&format!("page_reporting.page_reporting_order={ORDER}"))
    }

    /// Tells how many of its processors the guest starts by itself.
    ///
    /// # Errors
    /// The line is full.
    pub fn push_processors(&mut self, count: u8) -> Result<(), CmdlineError> {
        self.push(&format!("maxcpus={count}"))
    }

    /// Tells which zone takes memory that is plugged. The kernel keeps its own data out of that
    /// zone, so that the memory can be unplugged again; beyond three times what its data may use, it
    /// puts them there, too. Without a policy they may lie in all of it.
    ///
    /// # Errors
    /// The line is full.
    pub fn push_plugging(&mut self) -> Result<(), CmdlineError> {
        self.push("memory_hotplug.online_policy=auto-movable")
    }

    /// Appends one word.
    ///
    /// # Errors
    /// It is empty, has blanks or other than printable ASCII characters, or the line is full.
    pub fn push(&mut self, word: &str) -> Result<(), CmdlineError> {
        if word.is_empty() || !word.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(CmdlineError::BadWord(word.to_owned()));
        }
        let length = self.0.len() + 1 + word.len();
        if length as u64 >= layout::CMDLINE_SIZE {
            return Err(CmdlineError::TooLong(length));
        }
        self.0.push(' ');
        self.0.push_str(word);
        Ok(())
    }

    /// The line with its final NUL.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.0.clone().into_bytes();
        bytes.push(0);
        bytes
    }

    /// The line.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_words_are_appended_in_order() {
        let mut line = Cmdline::new(false);
        line.push_virtio(layout::virtio_window(1), 2).unwrap();
        line.push("agent.debug=1").unwrap();
        assert!(
            line.as_str()
                .ends_with(" virtio_mmio.device=4K@0xd0001000:2 agent.debug=1")
        );
        assert!(!line.as_str().contains("console="));
        assert!(Cmdline::new(true).as_str().contains(" console=ttyS0"));
        assert_eq!(line.to_bytes().last(), Some(&0));
    }

    #[test]
    fn words_that_are_none_are_refused() {
        let mut line = Cmdline::new(false);
        for word in ["", "a b", "a\n", "a\0", "ä", "\t"] {
            assert!(matches!(line.push(word), Err(CmdlineError::BadWord(_))));
        }
    }

    #[test]
    fn a_line_longer_than_linux_takes_is_refused() {
        let mut line = Cmdline::new(false);
        let room = layout::CMDLINE_SIZE as usize - 2 - line.as_str().len();
        assert!(matches!(
            line.push(&"x".repeat(room + 1)),
            Err(CmdlineError::TooLong(_))
        ));
        line.push(&"x".repeat(room)).unwrap();
        assert_eq!(line.to_bytes().len() as u64, layout::CMDLINE_SIZE);
    }
}
