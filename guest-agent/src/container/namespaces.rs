//! Which namespaces a process is made in, joined to, or moved into, and in what order.
//!
//! | kind | who | when |
//! | --- | --- | --- |
//! | NEW | clone3 | all at once, the user namespace first, so that it owns the others |
//! | NEW cgroup, time | the stage, unshare | in its cgroup already; before the offsets can no longer be set |
//! | SANDBOX | the agent, setns around clone3 | the child is born in them, which is the only way into a pid namespace |
//! | SANDBOX network | nobody | it is the guest's initial one, where the machine's network devices are |
//! | exec | the agent for pid, the stage for the rest | by the pidfd of the container's init |

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_agent_protocol::agent;
use protobuf::EnumOrUnknown;

use crate::sys::{self, Child, Spawned};

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

const PID: u64 = libc::CLONE_NEWPID as u64;
const MOUNT: u64 = libc::CLONE_NEWNS as u64;
const UTS: u64 = libc::CLONE_NEWUTS as u64;
const IPC: u64 = libc::CLONE_NEWIPC as u64;
const NETWORK: u64 = libc::CLONE_NEWNET as u64;
const CGROUP: u64 = libc::CLONE_NEWCGROUP as u64;
const USER: u64 = libc::CLONE_NEWUSER as u64;
const TIME: u64 = libc::CLONE_NEWTIME as u64;

/// The types that the containers of a pod can share.
const SHAREABLE: u64 = PID | UTS | IPC;

/// Type and name in /proc/PID/ns of what a sandbox can share without a process in it.
const UNSHARED_BY_THREAD: [(u64, &str); 2] = [(UTS, "uts"), (IPC, "ipc")];

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

/// A namespace to be born in: a namespace descriptor or a pidfd, and the type.
pub struct Join<'a> {
    /// The descriptor.
    pub fd: BorrowedFd<'a>,
    /// CLONE_NEW*.
    pub flag: u64,
}

/// Descriptors of the agent's own namespaces, to come back to.
#[derive(Debug)]
pub struct Home(HashMap<u64, OwnedFd>);

impl Home {
    /// Opens them; for the thread that will call [`Home::spawn_in`].
    pub fn open() -> io::Result<Self> {
        let mut fds = HashMap::new();
        for (flag, name) in UNSHARED_BY_THREAD.into_iter().chain([(PID, "pid")]) {
            fds.insert(flag, File::open(format!("/proc/self/ns/{name}"))?.into());
        }
        Ok(Self(fds))
    }

    /// Makes a process that is born in the namespaces of `joins`.
    ///
    /// The calling thread visits them and comes back before anything else can run on it: there is no await in here.
    ///
    /// # Panics
    ///
    /// When it cannot come back, because a thread left in a container's namespaces must not serve another request.
    pub fn spawn_in(
        &self,
        joins: &[Join<'_>],
        namespaces: u64,
        cgroup: Option<BorrowedFd<'_>>,
        child: &Child<'_>,
    ) -> io::Result<Spawned> {
        let mut visited = Vec::new();
        let mut result = Ok(());
        for join in joins {
            result = sys::setns(join.fd, join.flag);
            if result.is_err() {
                break;
            }
            visited.push(join.flag);
        }
        let spawned = result.and_then(|()| sys::spawn(namespaces, cgroup, child));
        for flag in visited {
            let home = self
                .0
                .get(&flag)
                .expect("only shareable types are joined, and all of them are held");
            sys::setns(home.as_fd(), flag)
                .expect("the way back to a namespace that the process belongs to is always open");
        }
        spawned
    }
}

/// The namespaces that containers of the pod share, each made when the first container asks for it.
#[derive(Debug, Default)]
pub struct SandboxNamespaces(HashMap<u64, OwnedFd>);

impl SandboxNamespaces {
    /// Makes those of `wanted` that do not exist yet; `pause` makes the process that holds a new pid namespace.
    pub fn ensure(
        &mut self,
        wanted: u64,
        pause: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<()> {
        for (flag, name) in UNSHARED_BY_THREAD {
            if wanted & flag != 0 && !self.0.contains_key(&flag) {
                self.0.insert(flag, unshare_in_thread(flag, name)?);
            }
        }
        if wanted & PID != 0 && !self.0.contains_key(&PID) {
            self.0.insert(PID, pause()?);
        }
        Ok(())
    }

    /// What a member of the pod joins. [`SandboxNamespaces::ensure`] has made them.
    pub fn joins(&self, wanted: u64) -> Vec<Join<'_>> {
        self.0
            .iter()
            .filter(|(flag, _)| wanted & **flag != 0)
            .map(|(flag, fd)| Join {
                fd: fd.as_fd(),
                flag: *flag,
            })
            .collect()
    }
}

/// A thread that unshares leaves its process' other threads where they are, and the descriptor outlives it.
fn unshare_in_thread(flag: u64, name: &'static str) -> io::Result<OwnedFd> {
    let thread = std::thread::spawn(move || -> io::Result<OwnedFd> {
        sys::unshare(flag)?;
        Ok(File::open(format!("/proc/thread-self/ns/{name}"))?.into())
    });
    thread
        .join()
        .map_err(|_| io::Error::other("the thread that makes a namespace panicked"))?
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
