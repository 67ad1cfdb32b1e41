use std::fmt;

use serde::{Deserialize, Serialize};

/// What a thread of the VMM or of the fs process is for; each has its own list of system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The VMM's event loop: the shim, vsock, entropy.
    Vmm,
    /// The VMM's event loop in a machine that becomes a template: no pod is in it.
    Template,
    /// Starts and resets the VMM's devices.
    Device,
    /// Runs a vCPU.
    Vcpu,
    /// Moves frames between a guest and its taps.
    Net,
    /// The fs process' answers to the shim.
    FsControl,
    /// The fs process' end of vhost-user.
    FsVhost,
    /// Serves a queue of file requests.
    FsQueue,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 8] = [
        Role::Vmm,
        Role::Template,
        Role::Device,
        Role::Vcpu,
        Role::Net,
        Role::FsControl,
        Role::FsVhost,
        Role::FsQueue,
    ];
}

/// As it is written in packets.
impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Vmm => "vmm",
            Role::Template => "template",
            Role::Device => "device",
            Role::Vcpu => "vcpu",
            Role::Net => "net",
            Role::FsControl => "fs-control",
            Role::FsVhost => "fs-vhost",
            Role::FsQueue => "fs-queue",
        })
    }
}

/// A thread made a system call that its list does not have; the last packet of its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blocked {
    /// The thread.
    pub role: Role,
    /// The number of the call on this architecture.
    pub call: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_displayed_as_it_is_written() {
        for role in Role::ALL {
            assert_eq!(serde_json::to_value(role).unwrap(), role.to_string());
        }
    }
}
