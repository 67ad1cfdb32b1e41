use serde::{Deserialize, Serialize};

/// How a guest ended (docs/operations.md has the table of exit codes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestEnd {
    /// The agent announced power-off and the machine stopped.
    PowerOff,
    /// The agent announced a reboot and the machine reset.
    Reboot,
    /// The kernel panicked: its record is in the ramoops region.
    Panic,
    /// The machine reset or shut down unannounced and without a panic record.
    TripleFault,
    /// The shim asked for it, or its end of the control socket closed.
    Stopped,
    /// The shim asked for it, and the machine is in the files of a template.
    Saved,
    /// KVM could not go on running the guest (internal error, failed entry, unhandled exit).
    KvmError,
}

/// Exit codes of `bulkhead-vmm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Power-off, or stopped by the shim.
    Ok = 0,
    /// The VMM failed; [`Event::Failed`](crate::Event::Failed) has the reason.
    Failed = 1,
    /// Wrong use on the command line.
    Usage = 2,
    /// Reboot.
    Reboot = 10,
    /// Guest kernel panic.
    Panic = 11,
    /// Triple fault.
    TripleFault = 12,
    /// KVM error.
    KvmError = 13,
    /// A thread made a system call that its filter refuses ([`Blocked`](crate::Blocked)).
    Blocked = 14,
    /// A Rust panic in the VMM, a bug.
    Bug = 70,
}

impl GuestEnd {
    /// The exit code of a VMM whose guest ended so.
    pub fn exit_code(self) -> ExitCode {
        match self {
            GuestEnd::PowerOff | GuestEnd::Stopped | GuestEnd::Saved => ExitCode::Ok,
            GuestEnd::Reboot => ExitCode::Reboot,
            GuestEnd::Panic => ExitCode::Panic,
            GuestEnd::TripleFault => ExitCode::TripleFault,
            GuestEnd::KvmError => ExitCode::KvmError,
        }
    }
}
