//! In the place of `installed.rs` in unit tests: nothing need be installed.

use std::path::Path;

use super::error::Error;
use crate::{
    config::Config,
    template::{Basis, Host, Identity, Shape},
};

/// What no machine is made from.
#[derive(Debug)]
pub struct Parts;

impl Parts {
    /// Opens nothing.
    pub fn open(_: &Config) -> Result<Parts, Error> {
        Ok(Parts)
    }

    /// Made from the program that runs the tests, thrice.
    pub fn basis(&self, _: &Config, shape: Shape) -> Result<Basis, Error> {
        let path = Path::new("/proc/self/exe");
        let file = Identity::of(path, &path.metadata().expect("it runs"));
        let host = Host::here().map_err(Error::Host)?;
        Ok(Basis::new([file.clone(), file.clone(), file], host, shape))
    }
}
