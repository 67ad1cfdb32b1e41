//! Images of OCI and of Docker as root file systems.
//!
//! ```text
//! reference ──► source: a layout's directory, an archive, what an engine exports
//!                 └─► manifest: of this platform, its configuration, the names of its layers
//!                       └─► layers, one over the other, beneath one directory ──► store
//! ```
//!
//! Whoever made an image is not trusted: all of it is read with bounds, contents are what their
//! digests say, and no entry of a layer leaves the directory that it is unpacked to.

mod engine;
mod entries;
mod error;
mod layer;
mod manifest;
mod reference;
mod source;
mod store;
mod tree;
mod user;

pub use error::Error;
pub use reference::Reference;
pub use store::{Image, Listed, Scratch, Store, Swept};
pub use user::User;

#[cfg(test)]
mod tests;
