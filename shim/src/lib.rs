//! The pod on the host: one library under the front ends, which are the `bulkhead` command and containerd's shim.
//!
//! ```text
//! command_line     a front end: runc's command line; a monitor for each container, over containerd's tasks, and keepers, whose pids are told
//!   │
//! containerd       a front end: containerd's tasks and sandboxes as one state machine, events in one ordered queue, FIFOs
//!   └► pod         one virtual machine with everything that it takes on the host, and the containers in it
//!        ├► share            what the guest may see of the host's files, each volume once
//!        ├► kubelet_volume   configMaps and the like: in the guest's memory, following the host
//!        ├► host_sockets     sockets of host servers in what a pod binds: relayed, where the operator allows it
//!        ├► machine          the two processes and the agent: what they are sent, what they say, how they end
//!        ├► network          the pod's interfaces ─► taps for the VMM, and what the agent is told of addresses and routes
//!        ├► cgroup           the pod's processes start in it
//!        └► ledger           every host resource, written down before it is taken
//!             └► netns       a network namespace: links, taps, redirects
//! template         machines that were saved when their agents were idle, by what they were made of
//! audit            what only Bulkhead knows of a pod, for the operator's log
//! oci              config.json, and Kubernetes' words about a pod (cri) ─► what the agent is told, or a refusal by name
//! io, logs, hooks, config, ids, error, text, sys   what several of them need
//! ```
#![deny(unsafe_code)] // what it needs of Linux is in `linux`; each exception says why

pub mod audit;
pub mod cgroup;
pub mod command_line;
pub mod config;
pub mod containerd;
pub mod error;
pub mod hooks;
pub mod host_sockets;
pub mod ids;
pub mod io;
pub mod kubelet_volume;
pub mod ledger;
pub mod logs;
pub mod machine;
pub mod netns;
pub mod network;
pub mod oci;
pub mod pod;
pub mod share;
#[allow(unsafe_code)] // glibc's heap, bpf(2), the stub of a pod, what a daemon was started with
pub mod sys;
pub mod template;
pub mod text;
