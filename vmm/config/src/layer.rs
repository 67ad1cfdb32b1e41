use serde::{Deserialize, Serialize};

/// A layer of the jails that a host's kernel may lack. A process refuses to start without it unless
/// the operator accepts that, by this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// Landlock: access to files; TCP, abstract sockets and signals as far as the kernel has them.
    Landlock,
}
