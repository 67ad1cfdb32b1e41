//! The pod on the host: one library under the front ends, which are the `bulkhead` command and containerd's shim.
//!
//! ```text
//! containerd       a front end: containerd's tasks and sandboxes as one state machine, events in one ordered queue, FIFOs
//!   └► pod         one virtual machine with everything that it takes on the host, and the containers in it
//!        ├► share            what the guest may see of the host's files, each volume once
//!        ├► kubelet_volume   configMaps and the like: in the guest's memory, following the host
//!        ├► host_sockets     sockets of host servers in what a pod binds: relayed, where the operator allows it
//!        ├► machine          the two processes and the agent: what they are sent, what they say, how they end
//!        ├► network          the pod's interfaces ─► taps for the VMM, and what the agent is told of addresses and routes
//!        ├► cgroup           the pod's processes start in it
//!        └► ledger           every host resource, written down before it is taken
//! oci              config.json, and Kubernetes' words about a pod (cri) ─► what the agent is told, or a refusal by name
//! io, logs, hooks, config, ids, error, sys   what several of them need
//! ```

pub mod cgroup;
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
pub mod network;
pub mod oci;
pub mod pod;
pub mod share;
pub mod sys;
