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

use linux::process::{self, Child, Place, Program};
use nix::sched::{setns, unshare};

use crate::stage::plan::{IPC, PID, UTS, clone_flags};

/// Type and name in /proc/PID/ns of what a sandbox can share without a process in it.
const UNSHARED_BY_THREAD: [(u64, &str); 2] = [(UTS, "uts"), (IPC, "ipc")];

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
        place: Place<'_>,
        program: &Program<'_>,
    ) -> io::Result<Child> {
        let mut visited = Vec::new();
        let mut result = Ok(());
        for join in joins {
            result = setns(join.fd, clone_flags(join.flag));
            if result.is_err() {
                break;
            }
            visited.push(join.flag);
        }
        let spawned = result.and_then(|()| process::spawn(place, program));
        for flag in visited {
            let home = self
                .0
                .get(&flag)
                .expect("only shareable types are joined, and all of them are held");
            setns(home, clone_flags(flag))
                .expect("the way back to a namespace that the process belongs to is always open");
        }
        Ok(spawned?)
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
        unshare(clone_flags(flag))?;
        Ok(File::open(format!("/proc/thread-self/ns/{name}"))?.into())
    });
    thread
        .join()
        .map_err(|_| io::Error::other("the thread that makes a namespace panicked"))?
}
