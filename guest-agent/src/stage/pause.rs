//! The process that holds the pod's shared pid namespace: its pid 1, which only reaps.
//!
//! Containers of the pod can see it, so it has nothing to give: an empty read-only root, no
//! capability, no descriptor but of /dev/null.
#![forbid(unsafe_code)]

use linux::{capability, thread};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{chdir, pivot_root};

use super::message::{self, Failure};
use super::security;
use super::step::Step;

/// The user "nobody".
const NOBODY: u32 = 65534;

/// Gives everything up and reaps until it is killed.
pub fn run() -> Result<std::convert::Infallible, Failure> {
    security::hide()?;
    security::new_session()?;
    empty_root()?;
    thread::set_groups(&[]).step(|| "cannot leave the groups")?;
    security::set_ids(NOBODY, NOBODY).step(|| "cannot become nobody")?;
    capability::set(capability::Sets::default()).step(|| "cannot drop the capabilities")?;
    prctl::set_no_new_privs().step(|| "cannot set no_new_privs")?;
    // After the change of user, which clears it: the namespace ends with the agent that made it.
    prctl::set_pdeathsig(Signal::SIGKILL).step(|| "cannot end with the agent")?;
    // Blocked, the signal of an orphan that ends between wait(2) and sigwait(3) stays pending.
    let mut child = SigSet::empty();
    child.add(Signal::SIGCHLD);
    child.thread_block().step(|| "cannot block SIGCHLD")?;
    // From here on there is nothing to tell the agent, and a container that may trace this process
    // finds nothing in it.
    for fd in [message::SPEC_FD, message::CONTROL_FD] {
        drop(super::take_fd(fd));
    }
    loop {
        // Every orphan of the namespace becomes a child of this process; the only error is that there is none now.
        while nix::sys::wait::wait().is_ok() {}
        child.wait().step(|| "cannot wait for SIGCHLD")?;
    }
}

fn empty_root() -> Result<(), Failure> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .step(|| "cannot make mounts private")?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("tmpfs"),
        "/dev",
        Some("tmpfs"),
        flags,
        Some("size=0,mode=555"),
    )
    .step(|| "cannot mount an empty root")?;
    chdir("/dev").step(|| "cannot enter the empty root")?;
    pivot_root(".", ".").step(|| "cannot pivot to the empty root")?;
    umount2(".", MntFlags::MNT_DETACH).step(|| "cannot detach the old root")?;
    chdir("/").step(|| "cannot enter the empty root")
}
