//! How a machine ended, and what is told of it.

use std::collections::BTreeMap;

use bulkhead_vmm_config::{Blocked, GuestEnd, VmStats};
use libseccomp::ScmpSyscall;

use crate::{audit::Event, sys::process::Death};

/// That a thread of a process of ours broke its rules, which ended the process.
pub fn blocked(blocked: Blocked) -> String {
    let (name, Blocked { role, call }) = (called(blocked), blocked);
    format!(
        "the {role} thread was stopped: it made the system call {name} ({call}), which its filter does not allow"
    )
}

/// The same for the audit log.
pub fn blocked_event(blocked: Blocked) -> Event {
    Event::Blocked {
        role: blocked.role.to_string(),
        call: called(blocked),
        number: blocked.call,
    }
}

fn called(blocked: Blocked) -> String {
    let name = ScmpSyscall::from_raw_syscall(blocked.call).get_name();
    name.unwrap_or_else(|_| "unknown".into())
}

/// How many of a guest's last console lines an error carries.
const SHOWN: usize = 20;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest ended.
    Guest {
        /// How.
        end: GuestEnd,
        /// Its last console lines, made printable.
        console: Vec<String>,
        /// Counters.
        stats: Box<VmStats>,
    },
    /// The VMM said why it could not go on.
    Failed {
        /// Its words.
        reason: String,
    },
    /// The VMM died without a word.
    Died {
        /// How, when we could collect it.
        death: Option<Death>,
        /// The last log line that tells of trouble.
        trouble: Option<String>,
        /// Its last log lines.
        log: Vec<String>,
    },
}

impl End {
    /// The last lines of the guest's console, or of the VMM's log.
    pub fn last_lines(&self) -> &[String] {
        match self {
            End::Guest { console, .. } => &console[console.len().saturating_sub(SHOWN)..],
            End::Failed { .. } => &[],
            End::Died { log, .. } => log,
        }
    }

    /// The word for it in the audit log.
    pub fn how(&self) -> &'static str {
        match self {
            End::Guest { end, .. } => match end {
                GuestEnd::PowerOff => "power_off",
                GuestEnd::Reboot => "reboot",
                GuestEnd::Panic => "panic",
                GuestEnd::TripleFault => "triple_fault",
                GuestEnd::Stopped => "stopped",
                GuestEnd::Saved => "saved",
                GuestEnd::KvmError => "kvm_error",
            },
            End::Failed { .. } => "vmm_failed",
            End::Died { .. } => "vmm_died",
        }
    }

    /// The guest's faults, as the VMM has counted them.
    pub fn faults(&self) -> BTreeMap<String, u64> {
        match self {
            End::Guest { stats, .. } => stats.guest_faults.clone(),
            _ => BTreeMap::new(),
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Guest { end, console, .. } => {
                f.write_str(match end {
                    GuestEnd::PowerOff => "the guest powered off",
                    GuestEnd::Reboot => "the guest rebooted",
                    GuestEnd::Panic => "the guest's kernel panicked",
                    GuestEnd::TripleFault => "the guest stopped by a triple fault",
                    GuestEnd::Stopped => "the virtual machine was stopped",
                    GuestEnd::Saved => "the virtual machine was saved as a template",
                    GuestEnd::KvmError => "KVM could not go on running the guest",
                })?;
                let telling = console
                    .iter()
                    .rev()
                    .find(|line| line.contains("Kernel panic"));
                match telling.or(console.last()) {
                    Some(line) => write!(f, ": {line}"),
                    None => Ok(()),
                }
            }
            End::Failed { reason } => write!(f, "{reason}"),
            End::Died { death, trouble, .. } => {
                f.write_str("the virtual machine's process died")?;
                if let Some(death) = death {
                    write!(f, " by {death}")?;
                }
                match trouble {
                    Some(line) => write!(f, ": {line}"),
                    None => Ok(()),
                }
            }
        }
    }
}
