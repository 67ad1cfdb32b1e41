//! The few Linux calls that neither std nor nix offers, each behind a safe function.

pub mod files;
pub mod mount;
pub mod process;
pub mod spawn;
