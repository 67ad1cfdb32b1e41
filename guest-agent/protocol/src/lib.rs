//! The agent's RPC contract, generated from `agent.proto`; the comments there are the documentation. And what both sides need to
//! serve ttrpc.

mod watched;

pub use watched::Watched;

/// Version of `agent.proto`, sent in `StartSandboxRequest`. Shim and agent are installed together.
pub const PROTOCOL_VERSION: u32 = 12;

/// Bytes of the seed in `StartSandboxRequest`.
pub const SEED: usize = 64;

/// Largest RPC message that either side accepts, in bytes (ttrpc's own limit).
pub const MAX_MESSAGE: usize = 4 << 20;

/// Longest datagram that is relayed to a socket of the host, in bytes: Linux sends none that is longer, unless somebody raises
/// net.core.wmem_default (212,992).
pub const MAX_DATAGRAM: usize = 256 << 10;

/// The files of a cgroup that tell what is used in it. x86-64 has huge pages of 2 MiB and, on most
/// processors, 1 GiB.
pub const CGROUP_STATS: [&str; 21] = [
    "cpu.stat",
    "memory.current",
    "memory.events",
    "memory.max",
    "memory.peak",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.max",
    "memory.swap.peak",
    "memory.pressure",
    "cpu.pressure",
    "io.stat",
    "io.pressure",
    "pids.current",
    "pids.max",
    "hugetlb.2MB.current",
    "hugetlb.2MB.max",
    "hugetlb.2MB.events",
    "hugetlb.1GB.current",
    "hugetlb.1GB.max",
    "hugetlb.1GB.events",
];

#[allow(
    missing_docs,
    clippy::all,
    rustdoc::all,
    non_upper_case_globals,
    unused
)] // generated code
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

/// The messages.
pub use generated::agent;
/// The service: `AgentClient` for the shim, the `Agent` trait and `create_agent` for the agent.
pub use generated::agent_ttrpc;
