//! A pod's network on the host: what is redirected, what the guest is told, and what is given back, in fresh network namespaces.
//!
//! The test is the guest: it reads and writes the tap's descriptor. It needs root, /dev/net/tun and iproute2; without root it says so.

mod description;
mod interfaces;
mod release;
mod repeat;
mod traffic;
mod world;
