//! The pod on the host: one sandbox library under the front ends (the `bulkhead` command and containerd's shim).
//!
//! ```text
//! sandbox ─► ledger   every host resource, written down before it is taken
//!         ─► cgroup   the pod's processes start in it
//!         ─► rootfs   the share: what the guest may see of the host's files, each volume once
//!         ─► mount_points   what a read-only root lacks for its mounts
//!         ─► fs, vm   the two processes (peer, control), their requests and events
//!         ─► agent    the guest's side of a container
//! oci      config.json ─► what the agent is told, or a refusal by name
//! cri      Kubernetes' words about a pod ─► the same
//! kubelet_volume   configMaps and the like: in the guest's memory, following the host
//! network  the pod's interfaces ─► taps for the VMM, and what the agent is told of addresses and routes
//! io       a container's streams ─► anything
//!
//! task     containerd's tasks: one state machine over a sandbox ─► events (one ordered queue), stdio (FIFOs, files, loggers), layers
//! ```

pub mod agent;
pub mod bootstrap;
pub mod cgroup;
pub mod config;
pub mod control;
pub mod cri;
pub mod error;
pub mod events;
pub mod fs;
pub mod hooks;
pub mod ids;
pub mod io;
pub mod kubelet_volume;
pub mod layers;
pub mod ledger;
pub mod logs;
pub mod mount_points;
pub mod network;
pub mod oci;
pub mod peer;
pub mod rootfs;
pub mod sandbox;
pub mod stdio;
pub mod sys;
pub mod task;
pub mod timeline;
pub mod vm;
pub mod volume;
