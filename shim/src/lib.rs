//! The pod on the host: one sandbox library under the front ends (the `bulkhead` command, and the containerd shim to come).

pub mod cgroup;
pub mod config;
pub mod control;
pub mod ids;
pub mod ledger;
pub mod oci;
pub mod sys;
