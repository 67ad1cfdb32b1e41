//! How the steps of a stage fail: with what was tried, on what, and the system's reason.
#![forbid(unsafe_code)]

use std::fmt::Display;
use std::io;

use super::message::Failure;

/// Adds what a step tried to an error of the system.
pub trait Step<T> {
    /// Turns the error into a failure that begins with `what`.
    fn step<S: Display>(self, what: impl FnOnce() -> S) -> Result<T, Failure>;
}

impl<T> Step<T> for io::Result<T> {
    fn step<S: Display>(self, what: impl FnOnce() -> S) -> Result<T, Failure> {
        self.map_err(|error| Failure::internal(format!("{}: {error}", what())))
    }
}

impl<T> Step<T> for nix::Result<T> {
    fn step<S: Display>(self, what: impl FnOnce() -> S) -> Result<T, Failure> {
        self.map_err(io::Error::from).step(what)
    }
}
