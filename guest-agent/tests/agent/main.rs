//! The agent against real namespaces, cgroups and terminals, without a virtual machine.

mod guest;
mod lifecycle;
mod listeners;
mod network;
mod processes;
mod security;
mod sockets;
mod streams;
