use serde::{Deserialize, Serialize};

use crate::{Blocked, Fd, GuestEnd, Layer};

/// Everything that `bulkhead-vmm run` needs, in one packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// [`WIRE_VERSION`](crate::WIRE_VERSION).
    pub version: u32,
    /// The sandbox's id, for log lines only.
    pub sandbox_id: String,
    /// Number of vCPUs that the guest starts by itself, 1 to 32.
    pub vcpus: u32,
    /// vCPUs beyond [`VmConfig::vcpus`] that wait until the guest's agent starts them; 32 are the
    /// most together.
    #[serde(default)]
    pub spare_vcpus: u32,
    /// Guest memory in MiB, at least 48.
    pub memory_mib: u64,
    /// MiB that [`Request::PlugMemory`] may add to that; 0: the machine cannot grow. A machine has
    /// 256 GiB at most, with these.
    #[serde(default)]
    pub spare_memory_mib: u64,
    /// `/dev/kvm`, opened read-write.
    pub kvm: Fd,
    /// Uncompressed ELF `vmlinux`, read-only.
    pub kernel: Fd,
    /// Initial RAM file system with the agent as `/init`, read-only.
    pub initrd: Fd,
    /// Words appended to the command line that the VMM builds.
    #[serde(default)]
    pub extra_cmdline: Vec<String>,
    /// vsock connections that the guest may make from the start.
    #[serde(default)]
    pub ports: Vec<PortOffer>,
    /// virtio-fs devices.
    #[serde(default)]
    pub fs: Vec<FsDevice>,
    /// Network devices.
    #[serde(default)]
    pub net: Vec<NetDevice>,
    /// Network devices that the machine has room for beyond [`VmConfig::net`], for
    /// [`Request::PlugNet`].
    #[serde(default)]
    pub net_slots: u32,
    /// Whether the machine has a balloon, by which the guest gives memory back that it does not
    /// use.
    #[serde(default)]
    pub balloon: bool,
    /// A serial console, for debugging only: each character costs an exit.
    #[serde(default)]
    pub serial: Option<SerialConsole>,
    /// Where log lines go: one JSON object a line; written without blocking, dropped when full.
    pub log: Fd,
    /// The user and the group that the process becomes before the guest's first instruction.
    pub uid: u32,
    /// See [`VmConfig::uid`].
    pub gid: u32,
    /// Layers of the jail without which the process starts where the kernel lacks them.
    #[serde(default)]
    pub accept_missing: Vec<Layer>,
    /// A machine that was saved, from which this one goes on in the place of booting. It was made
    /// by this VMM, on this host, from the same configuration but for the descriptors. If it cannot
    /// be used, [`Event::TemplateRefused`] says why, and the machine boots.
    #[serde(default)]
    pub template: Option<TemplateFiles>,
    /// The VMM's end of the socketpair of packets by which the fs process asks for pages that the
    /// template lends. A machine with a template and a share needs it; one that boots after all
    /// says on it that nothing is lent.
    #[serde(default)]
    pub lender: Option<Fd>,
    /// Where the VMM writes at the end of a machine with a template what that has touched of it: an
    /// empty file.
    #[serde(default)]
    pub learn: Option<Fd>,
    /// Where [`Request::Save`] puts the machine: empty files, open for reading and writing.
    #[serde(default)]
    pub save: Option<TemplateFiles>,
}

/// The two files of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateFiles {
    /// Processors and devices, some 20 KiB.
    pub state: Fd,
    /// RAM, sparse: pages that are zero are holes.
    pub memory: Fd,
    /// Of a machine that goes on: what another one has touched first ([`VmConfig::learn`]).
    #[serde(default)]
    pub touched: Option<Fd>,
}

/// Permission for one guest connection to one host port, and what it is joined to.
///
/// The guest may dial [`PortOffer::port`] once; a dial to a port that is not offered is reset. The
/// bytes flow between the guest's connection and the descriptor until each direction has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortOffer {
    /// Port number at CID 2.
    pub port: u32,
    /// One end of an `AF_UNIX` `SOCK_STREAM` socketpair.
    pub fd: Fd,
}

/// A virtio-fs device whose back end is another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsDevice {
    /// The name by which the guest mounts it, 1 to 36 bytes (VIRTIO 1.2 §5.11.4).
    pub tag: String,
    /// The front end's end of the vhost-user socketpair.
    pub socket: Fd,
    /// Number of request queues, at least 1.
    pub queues: u32,
}

/// A network device whose back end is a tap interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetDevice {
    /// A queue of the tap each, one for each pair of queues of the device: opened with IFF_TAP,
    /// IFF_NO_PI and IFF_VNET_HDR, and with IFF_MULTI_QUEUE if there are several.
    pub taps: Vec<Fd>,
    /// The guest's own address.
    pub mac: [u8; 6],
    /// Largest packet in bytes, at least 68.
    pub mtu: u16,
    /// What the guest may receive.
    #[serde(default)]
    pub receive_limit: RateLimit,
    /// What the guest may send.
    #[serde(default)]
    pub transmit_limit: RateLimit,
}

/// Token buckets, full at the start; 0: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes a second.
    #[serde(default)]
    pub bytes: u64,
    /// Packets a second.
    #[serde(default)]
    pub packets: u64,
    /// Milliseconds of the rate that may come at once after silence; 0: 100.
    #[serde(default)]
    pub burst_ms: u32,
}

/// Where the serial console's output goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConsole {
    /// Written without blocking.
    pub output: Fd,
}

/// shim → VMM, after the config.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Offer one more vsock port.
    OfferPort(PortOffer),
    /// Take an offer back; a connection already made on it is reset.
    WithdrawPort {
        /// The port of the offer.
        port: u32,
    },
    /// Put a network device into a free slot; the guest finds it when it looks again. Answered as
    /// the others are.
    PlugNet(NetDevice),
    /// Tell the guest whether the link of a network device is up.
    SetLink {
        /// Which, in the order in which they were given, from 0.
        device: u32,
        /// Whether it is.
        up: bool,
    },
    /// Ask the guest to have so much memory plugged beyond [`VmConfig::memory_mib`]: more than now,
    /// or less. Done at once; the guest acts later, and [`VmStats::plugged`] tells what it has
    /// done. Refused where the machine cannot grow, or not so far.
    PlugMemory {
        /// MiB in all, rounded up to blocks of 2.
        mib: u64,
    },
    /// Stop all vCPUs until [`Request::Resume`].
    Pause,
    /// Let the vCPUs run again.
    Resume,
    /// Ask for [`Event::Stats`].
    Stats,
    /// End the machine and write it to [`VmConfig::save`]: [`Event::Ended`] with
    /// [`GuestEnd::Saved`] follows, or [`Event::Failed`] if a device was not at rest.
    Save,
    /// End the machine now: vCPUs stop, [`Event::Ended`] with [`GuestEnd::Stopped`] follows.
    Stop,
}

/// VMM → shim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The vCPUs run. Sent once, after the jail is closed.
    Running {
        /// The version of Landlock's interface that the process is restricted by; none where it is
        /// missing, and that is accepted.
        landlock: Option<u32>,
    },
    /// The machine boots, as its template cannot be used. Sent before [`Event::Running`].
    TemplateRefused {
        /// Why, for a person.
        reason: String,
    },
    /// The last [`Request`] other than [`Request::Stats`] is done. Requests are answered in order.
    Done,
    /// The last [`Request`] could not be done.
    Refused {
        /// Why, for a person.
        reason: String,
    },
    /// Answer to [`Request::Stats`].
    Stats(VmStats),
    /// The guest reached a phase of its boot. Sent as it happens.
    Reached(Stamp),
    /// A device stands still until the guest resets it. Told once for each device and reason, and
    /// [`MAX_RESETS`] times at most.
    NeedsReset {
        /// The device.
        device: String,
        /// The rule that the guest has broken, or that the host failed it.
        reason: String,
    },
    /// The machine has ended; the last packet. The process exits with [`GuestEnd::exit_code`].
    Ended {
        /// How.
        end: GuestEnd,
        /// Last lines of the guest's console, oldest first; untrusted text, cut to fit the packet.
        console: Vec<String>,
        /// Counters at the end.
        stats: VmStats,
    },
    /// A thread of the VMM broke its rules; the last packet.
    Blocked(Blocked),
    /// The VMM cannot start or go on; the last packet.
    Failed {
        /// What failed, on what, and what to do.
        reason: String,
    },
}

/// Most [`Event::NeedsReset`] of a machine: what a guest can make it say is bounded.
pub const MAX_RESETS: usize = 32;

/// A moment of the boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    /// Which.
    pub phase: Phase,
    /// `CLOCK_MONOTONIC` of the host, in nanoseconds.
    pub at_ns: u64,
    /// KVM's count of exits of all vCPUs until then (`exits` of KVM_GET_STATS_FD); 0 when the host
    /// does not tell.
    pub exits: u64,
    /// The part of `exits` that host interrupts caused (`irq_exits`).
    pub irq_exits: u64,
}

/// The phases that the VMM sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// `main` of the VMM began.
    VmmStart,
    /// Memory, kernel and devices are ready and the jail is closed: the next step is the first
    /// `KVM_RUN`.
    FirstInstruction,
    /// The agent's first instructions ([`announce::INIT`](crate::announce::INIT)).
    Init,
    /// The guest's connection to [`port::AGENT`](crate::port::AGENT) is made.
    AgentDialled,
}

/// Counters of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmStats {
    /// KVM's own counters, summed over vCPUs (`exits`, `irq_exits`, `io_exits`, `mmio_exits`,
    /// `halt_exits`, …).
    pub kvm: std::collections::BTreeMap<String, u64>,
    /// Exits that reached user space, by reason (`io_in`, `io_out`, `mmio_read`, `mmio_write`,
    /// `hlt`, …).
    pub user_exits: std::collections::BTreeMap<String, u64>,
    /// Guest's faults that a device refused, by `device.fault` (`vsock.bad_chain`).
    pub guest_faults: std::collections::BTreeMap<String, u64>,
    /// Of each network device, in the order in which they were given.
    #[serde(default)]
    pub net: Vec<NetStats>,
    /// Of the balloon; none where the machine has none.
    #[serde(default)]
    pub balloon: Option<BalloonStats>,
    /// Memory that was plugged; none where the machine cannot grow.
    #[serde(default)]
    pub plugged: Option<PluggedStats>,
}

/// Memory beyond what the machine began with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PluggedStats {
    /// Bytes that the guest is to have plugged ([`Request::PlugMemory`]).
    pub requested_bytes: u64,
    /// Bytes that it has plugged.
    pub plugged_bytes: u64,
    /// Requests of the guest that the device refused: for more than it is to have, or against a
    /// rule.
    pub refused: u64,
}

/// Counters of the balloon, and what the guest says of its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStats {
    /// Requests of the guest that gave memory back.
    pub requests: u64,
    /// Bytes that they named. Memory that the guest takes again and gives back again counts again.
    pub returned_bytes: u64,
    /// The guest's own words: `free`, `available`, `caches` and `total` in bytes; `major_faults`,
    /// `minor_faults`, `oom_kills` and the like as counts since its boot. They are those of the
    /// question before: each [`Request::Stats`] asks the guest for new ones. Empty until it has
    /// said any.
    pub guest: std::collections::BTreeMap<String, u64>,
}

/// Counters of a network device, from the guest's point of view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetStats {
    /// Packets that the guest got; one that its kernel will cut up counts once.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Packets for which the guest's buffers were too small.
    pub receive_dropped: u64,
    /// Packets that the tap took.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Packets that the tap refused.
    pub send_dropped: u64,
    /// Times that a rate limit held packets back.
    pub throttled: u64,
}
