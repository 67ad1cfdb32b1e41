//! What a guest can get wrong, and how it is reported.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Arc, Mutex};

use thiserror::Error;
use vm_memory::GuestAddress;

/// A guest's fault: the driver broke a rule of the specification.
///
/// Those of the queues stop the device until the driver resets it (VIRTIO 1.2 §2.1.2); those of the registers are ignored
/// and counted.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Fault {
    /// §2.7.13.3: more entries are available than the queue has.
    #[error("the available index is more than the queue's size ahead")]
    AvailableIndex,
    /// The available ring names a descriptor past the table.
    #[error("chain head {0} is past the descriptor table")]
    HeadOutOfRange(u16),
    /// The driver made a chain available that the device still holds.
    #[error("chain head {0} was made available twice")]
    HeadInFlight(u16),
    /// A descriptor continues past the table.
    #[error("next descriptor {0} is past the descriptor table")]
    NextOutOfRange(u16),
    /// §2.7.5.3.1: a chain is longer than the queue, thus a loop.
    #[error("a descriptor chain is longer than its queue")]
    ChainLoop,
    /// §2.7.5.3.1: VIRTQ_DESC_F_INDIRECT without the feature.
    #[error("an indirect descriptor, which was not negotiated")]
    Indirect,
    /// §2.7.4.2: a device-readable descriptor after a device-writable one.
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    /// §2.7.5.3.1: a chain of 4 GiB or more.
    #[error("the lengths of a descriptor chain overflow 32 bits")]
    LengthOverflow,
    /// A buffer that is not wholly in one region of guest RAM.
    #[error("buffer {0:?}+{1:#x} is not in guest memory")]
    OutsideMemory(GuestAddress, u32),
    /// A device-readable buffer on a queue that only the device writes.
    #[error("a readable descriptor where the device only writes")]
    UnexpectedReadable,
    /// A device-writable buffer on a queue that the device only reads.
    #[error("a writable descriptor where the device only reads")]
    UnexpectedWritable,
    /// A chain without room for what the device must read or write.
    #[error("a descriptor chain is too short for its header")]
    ChainTooShort,
    /// A packet's header announces more bytes than its chain holds.
    #[error("a packet is longer than its descriptor chain")]
    PacketPastChain,
    /// A network frame longer than any offload makes it.
    #[error("a network frame is too long")]
    FrameTooLong,
    /// §5.1.6.2.1: the header before a frame asks for what was not negotiated, or points past the frame.
    #[error("the header before a network frame is wrong")]
    NetHeader,
    /// A ring that left guest memory (refused at set-up, so a bug of ours if it is ever counted).
    #[error("a ring is not accessible")]
    Ring,
    /// DRIVER_OK without a queue that the device cannot do without.
    #[error("queue {0} was not made ready")]
    QueueMissing(u16),
    /// §3.1.1: a step back, a jump or a cleared bit in the status register.
    #[error("device status {1:#x} does not follow {0:#x}")]
    Status(u8, u8),
    /// §2.2.1: features that were not offered, or VERSION_1 missing.
    #[error("driver features {0:#x} cannot be accepted")]
    Features(u64),
    /// A write to a register that is frozen in this state.
    #[error("register {0:#x} is frozen")]
    Frozen(u16),
    /// QueueReady for a queue with a bad size, alignment or address.
    #[error("queue {0} has a bad size or address")]
    QueueLayout(u16),
    /// An access to a register that does not exist, or of the wrong width or direction.
    #[error("no such register or width at {0:#x}")]
    Register(u16),
    /// Memory that the guest gives back in other units than pages.
    #[error("memory at {0:?}+{1:#x} is given back, which is not whole pages")]
    PartOfPage(GuestAddress, u32),
    /// A vsock packet for a connection broke the connection's rules; only the connection ends.
    #[error("a vsock packet breaks its connection's rules")]
    Packet,
}

impl Fault {
    /// The name under which it is counted.
    pub fn name(&self) -> &'static str {
        match self {
            Fault::AvailableIndex => "available_index",
            Fault::HeadOutOfRange(_) => "head_out_of_range",
            Fault::HeadInFlight(_) => "head_in_flight",
            Fault::NextOutOfRange(_) => "next_out_of_range",
            Fault::ChainLoop => "chain_loop",
            Fault::Indirect => "indirect",
            Fault::ReadableAfterWritable => "readable_after_writable",
            Fault::LengthOverflow => "length_overflow",
            Fault::OutsideMemory(..) => "outside_memory",
            Fault::UnexpectedReadable => "unexpected_readable",
            Fault::UnexpectedWritable => "unexpected_writable",
            Fault::ChainTooShort => "chain_too_short",
            Fault::PacketPastChain => "packet_past_chain",
            Fault::FrameTooLong => "frame_too_long",
            Fault::NetHeader => "net_header",
            Fault::Ring => "ring",
            Fault::QueueMissing(_) => "queue_missing",
            Fault::Status(..) => "status",
            Fault::Features(_) => "features",
            Fault::Frozen(_) => "frozen",
            Fault::QueueLayout(_) => "queue_layout",
            Fault::Register(_) => "register",
            Fault::PartOfPage(..) => "part_of_page",
            Fault::Packet => "packet",
        }
    }
}

/// Why a device needs a reset that the guest has not caused.
pub const HOST: &str = "host";

/// Something that the machine, not the guest, wants to know of a device.
pub enum Notice<'a> {
    /// The guest's fault. A guest can cause any number of them: count, do not log each.
    Fault {
        /// The device's name.
        device: &'static str,
        /// What it did.
        fault: Fault,
    },
    /// The host's fault: the device cannot go on and asked the guest for a reset.
    Failed {
        /// The device's name.
        device: &'static str,
        /// What failed.
        error: &'a (dyn Error + 'a),
    },
    /// The device asks the guest for a reset, because of the one before.
    NeedsReset {
        /// The device's name.
        device: &'static str,
        /// The fault's name, or [`HOST`].
        reason: &'static str,
    },
    /// The guest's vsock connection to an offered host port is made.
    Connected {
        /// The host's port.
        port: u32,
    },
}

/// Called by devices, on the event loop's thread or a vCPU's; it must not block nor call back into a device.
pub type Observer = Arc<dyn Fn(Notice<'_>) + Send + Sync>;

/// Counts of guests' faults by `device.fault`; cheap to clone.
#[derive(Clone, Default)]
pub struct FaultCounters(Arc<Mutex<BTreeMap<(&'static str, &'static str), u64>>>);

impl FaultCounters {
    /// Adds one.
    pub fn count(&self, device: &'static str, fault: &Fault) {
        let mut counts = self.0.lock().expect("counting does not panic");
        let count = counts.entry((device, fault.name())).or_default();
        *count = count.saturating_add(1);
    }

    /// All counts until now.
    pub fn snapshot(&self) -> BTreeMap<String, u64> {
        let counts = self.0.lock().expect("counting does not panic");
        counts
            .iter()
            .map(|((device, fault), count)| (format!("{device}.{fault}"), *count))
            .collect()
    }
}
