//! The agent's RPC contract, generated from `agent.proto`; the comments there are the documentation.

/// Version of `agent.proto`, sent in `StartSandboxRequest`. Shim and agent are installed together.
pub const PROTOCOL_VERSION: u32 = 3;

/// Largest RPC message that either side accepts, in bytes (ttrpc's own limit).
pub const MAX_MESSAGE: usize = 4 << 20;

/// The messages.
#[allow(
    missing_docs,
    clippy::all,
    rustdoc::all,
    non_upper_case_globals,
    unused
)] // generated code
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The service: `AgentClient` for the shim, the `Agent` trait and `create_agent` for the agent.
#[allow(missing_docs, clippy::all, rustdoc::all, unused)] // generated code
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}
