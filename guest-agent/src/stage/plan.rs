//! Which namespaces a container gets, and who makes each: clone3, the stage, or the pod, which has it already.
#![forbid(unsafe_code)]

use bulkhead_agent_protocol::agent;
use nix::sched::CloneFlags;
use protobuf::EnumOrUnknown;

/// The namespace types of a container, as CLONE_NEW* masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Made by clone3.
    pub clone: u64,
    /// Made by the stage with unshare.
    pub unshare: u64,
    /// The pod's, joined by the agent around clone3.
    pub sandbox: u64,
}

pub(crate) const PID: u64 = libc::CLONE_NEWPID as u64;
pub(crate) const MOUNT: u64 = libc::CLONE_NEWNS as u64;
pub(crate) const UTS: u64 = libc::CLONE_NEWUTS as u64;
pub(crate) const IPC: u64 = libc::CLONE_NEWIPC as u64;
pub(crate) const NETWORK: u64 = libc::CLONE_NEWNET as u64;
pub(crate) const CGROUP: u64 = libc::CLONE_NEWCGROUP as u64;
pub(crate) const USER: u64 = libc::CLONE_NEWUSER as u64;
pub(crate) const TIME: u64 = libc::CLONE_NEWTIME as u64;

/// A mask as setns(2) and unshare(2) take it.
pub fn clone_flags(mask: u64) -> CloneFlags {
    CloneFlags::from_bits_retain(mask as libc::c_int)
}

/// The types that the containers of a pod can share.
const SHAREABLE: u64 = PID | UTS | IPC;

impl Plan {
    /// Plans the namespaces of a container; an error says what cannot be.
    pub fn new(spec: &agent::Namespaces) -> Result<Self, String> {
        use agent::namespaces::Kind;
        let kinds: [(&str, u64, EnumOrUnknown<Kind>); 8] = [
            ("pid", PID, spec.pid),
            ("mount", MOUNT, Kind::NEW.into()),
            ("uts", UTS, spec.uts),
            ("ipc", IPC, spec.ipc),
            ("network", NETWORK, spec.network),
            ("cgroup", CGROUP, spec.cgroup),
            ("user", USER, spec.user),
            ("time", TIME, spec.time),
        ];
        let mut plan = Self::default();
        for (name, flag, kind) in kinds {
            match kind.enum_value() {
                Ok(Kind::AGENT) => {}
                Ok(Kind::SANDBOX) if flag == NETWORK => {}
                Ok(Kind::NEW) if flag & (CGROUP | TIME) != 0 => plan.unshare |= flag,
                Ok(Kind::NEW) => plan.clone |= flag,
                Ok(Kind::SANDBOX) if flag & SHAREABLE != 0 => plan.sandbox |= flag,
                Ok(Kind::SANDBOX) => {
                    return Err(format!(
                        "a {name} namespace cannot be shared by the pod: ask for a new one"
                    ));
                }
                Err(number) => {
                    return Err(format!("unknown kind {number} of the {name} namespace"));
                }
            }
        }
        if plan.clone & USER != 0 && (spec.uid_mappings.is_empty() || spec.gid_mappings.is_empty())
        {
            return Err("a new user namespace needs uid and gid mappings".to_owned());
        }
        if plan.unshare & TIME == 0 && (spec.monotonic.is_some() || spec.boottime.is_some()) {
            return Err("time offsets need a new time namespace".to_owned());
        }
        Ok(plan)
    }

    /// True when a namespace of this type is the container's own, made at creation.
    pub fn is_new(&self, flag: u64) -> bool {
        (self.clone | self.unshare) & flag != 0
    }

    /// True when the container has a user namespace of its own.
    pub fn new_user(&self) -> bool {
        self.is_new(USER)
    }

    /// True when the container's network namespace is its own.
    pub fn new_network(&self) -> bool {
        self.is_new(NETWORK)
    }

    /// True when the host name is not the guest's own.
    pub fn own_uts(&self) -> bool {
        (self.clone | self.sandbox) & UTS != 0
    }

    /// What the stage of an exec process joins by the pidfd of the container's init. The pid namespace is the agent's
    /// part, and one that the agent is in already must not be named: joining one's own user namespace is an error.
    pub fn exec_joins(&self) -> u64 {
        (self.clone | self.unshare | self.sandbox) & !PID
    }

    /// Whether an exec process is born in another pid namespace than the agent's.
    pub fn exec_pid(&self) -> bool {
        (self.clone | self.sandbox) & PID != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent::namespaces::Kind;

    fn spec() -> agent::Namespaces {
        agent::Namespaces {
            pid: Kind::NEW.into(),
            uts: Kind::SANDBOX.into(),
            ipc: Kind::SANDBOX.into(),
            network: Kind::SANDBOX.into(),
            cgroup: Kind::NEW.into(),
            ..Default::default()
        }
    }

    #[test]
    fn each_kind_goes_to_its_maker() {
        let plan = Plan::new(&spec()).unwrap();
        assert_eq!(plan.clone, PID | MOUNT);
        assert_eq!(plan.unshare, CGROUP);
        assert_eq!(plan.sandbox, UTS | IPC);
        assert_eq!(plan.exec_joins(), MOUNT | CGROUP | UTS | IPC);
        assert!(plan.exec_pid() && !plan.new_user());
    }

    #[test]
    fn what_cannot_be_shared_is_refused_by_name() {
        let error = Plan::new(&agent::Namespaces {
            user: Kind::SANDBOX.into(),
            ..spec()
        })
        .unwrap_err();
        assert!(error.contains("user namespace"), "{error}");
    }

    #[test]
    fn a_user_namespace_without_mappings_is_refused() {
        let error = Plan::new(&agent::Namespaces {
            user: Kind::NEW.into(),
            ..spec()
        })
        .unwrap_err();
        assert!(error.contains("mappings"), "{error}");
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        let error = Plan::new(&agent::Namespaces {
            ipc: EnumOrUnknown::from_i32(7),
            ..spec()
        })
        .unwrap_err();
        assert!(error.contains("kind 7"), "{error}");
    }
}
