//! One process, one microVM.
//!
//! `main` reads the configuration and sequences; [`bus`], [`event_loop`] and [`irq`] are what devices are made of.
pub mod arch;
pub mod boot;
pub mod bus;
pub mod control;
pub mod devices;
pub mod event_loop;
pub mod fs;
pub mod irq;
pub mod memory;
pub mod ramoops;
pub mod jail;
pub mod log;
pub mod metrics;
pub mod spec;
#[cfg(test)]
mod test_kvm;
pub mod vcpu;
