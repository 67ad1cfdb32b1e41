//! runc's command line: what engines call is called here as they do it, with runc as the control,
//! and then by engines.

mod caller;
mod deaths;
mod podman;
mod processes;
mod verbs;
