//! One process, one microVM.
//!
//! `main` reads the configuration and sequences; [`bus`], [`event_loop`] and [`irq`] are what devices are made of.
pub mod bus;
pub mod control;
pub mod devices;
pub mod event_loop;
pub mod irq;
