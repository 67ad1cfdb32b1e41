//! What PID 1 of the guest does before it serves: an environment that containers can be made in.
//!
//! The root of an initramfs cannot be pivoted away from: it has no parent mount (pivot_root(2)). So the agent puts a
//! bind mount of it over it and chroots there. Every container's mount namespace begins as a copy of that, pivots to the
//! container's root, and detaches the rest. The bind is read-only, and processes of containers are started from it, so
//! that a container that gets hold of the agent's binary (/proc/PID/exe) cannot write to it.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, chroot};

use crate::clock;
use crate::container::Launcher;
use crate::reaper::Reaper;
use crate::sandbox::Sandbox;
use crate::stream::Host;
use crate::{log, machine, rpc};

/// vsock port of the host that the agent serves on.
pub(crate) const AGENT_PORT: u32 = 1024;

/// Index of lo in every network namespace.
const LO: u32 = 1;

/// Open files of the agent: a dozen for each process with streams.
const AGENT_NOFILE: u64 = 1 << 16;
/// Hard limit that containers inherit.
const MAX_NOFILE: u64 = 1 << 20;

/// What containers find on a host.
///
/// Open files of a process and of the guest: systemd sets a host's to these numbers, so that
/// containers ask for them; what they cost is the container's memory, which has limits of its own.
///
/// Memory that is asked for and not touched: kubelet lets a node give any amount, and a large host
/// gives more than a small guest has. A container that uses more than its limit is killed for it,
/// with a reason that the engine is told.
const LIKE_A_HOST: [(&str, &str); 3] = [
    ("/proc/sys/fs/nr_open", "1073741816"),
    ("/proc/sys/fs/file-max", "9223372036854775807"),
    ("/proc/sys/vm/overcommit_memory", "1"),
];

/// The agent's own cgroup, beside those of the containers.
const AGENT_CGROUP: &str = "/sys/fs/cgroup/agent";

/// The environment could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
pub struct InitError {
    what: String,
    #[source]
    source: io::Error,
}

fn tried<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> InitError {
    let what = what.into();
    move |source| InitError {
        what,
        source: source.into(),
    }
}

/// A mount of the guest: source and type, target, flags, options.
type GuestMount = (&'static str, &'static str, MsFlags, Option<&'static str>);

const NOTHING: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);
const NO_SETUID: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);

/// In order. /run holds the share and what containers are built from, so that it executes and has devices.
const MOUNTS: [GuestMount; 8] = [
    ("proc", "/proc", NOTHING, None),
    ("sysfs", "/sys", NOTHING, None),
    ("devtmpfs", "/dev", NO_SETUID, Some("mode=0755")),
    (
        "devpts",
        "/dev/pts",
        NO_SETUID,
        Some("newinstance,ptmxmode=0666,mode=0620,gid=5"),
    ),
    ("tmpfs", "/dev/shm", NOTHING, Some("mode=1777")),
    ("mqueue", "/dev/mqueue", NOTHING, None),
    ("tmpfs", "/run", MsFlags::empty(), Some("mode=0755")),
    (
        "cgroup2",
        "/sys/fs/cgroup",
        NOTHING,
        Some("nsdelegate,memory_recursiveprot"),
    ),
];

/// Runs the guest until the host ends it. Never returns.
pub fn run() -> ! {
    let began = clock::monotonic_ns();
    log::use_kernel_log();
    if let Err(error) = prepare() {
        panic!("{}", crate::error::chain(&error));
    }
    let result = serve(Host::Vsock, "/init", began, true);
    if let Err(error) = result {
        panic!("{}", crate::error::chain(&error));
    }
    // The host is gone.
    machine::power_off()
}

/// Serves a host on its port 1024 until it closes the connection. `exe` is the path of this binary.
pub fn serve(host: Host, exe: &str, began_ns: u64, owns_machine: bool) -> Result<(), InitError> {
    linux::process::ignore_broken_pipes();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(tried("make the event loop"))?;
    runtime.block_on(async {
        let connection = host
            .dial(AGENT_PORT)
            .await
            .map_err(tried(format!("connect to port {AGENT_PORT} of the host")))?;
        let log_host = host.clone();
        tokio::spawn(async move { log::connect(&log_host).await });
        let reaper = Reaper::start().map_err(tried("watch children"))?;
        let launcher =
            Launcher::new(exe, host, reaper).map_err(tried("open what processes are made of"))?;
        let sandbox = Arc::new(Sandbox::new(launcher, began_ns, owns_machine));
        rpc::serve(connection, sandbox)
            .await
            .map_err(|error| InitError {
                what: "serve the host".to_owned(),
                source: io::Error::other(error.to_string()),
            })
    })
}

fn prepare() -> Result<(), InitError> {
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    cover_root()?;
    for (kind, target, flags, options) in MOUNTS {
        if !Path::new(target).is_dir() {
            std::fs::create_dir_all(target).map_err(tried(format!("make {target}")))?;
        }
        mount(Some(kind), target, Some(kind), flags, options)
            .map_err(tried(format!("mount {kind} at {target}")))?;
    }
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, "/", None::<&str>, read_only, None::<&str>)
        .map_err(tried("make the root read-only"))?;
    standard_streams()?;
    device_links()?;
    for (name, value) in LIKE_A_HOST {
        std::fs::write(name, value).map_err(tried(format!("write {value} to {name}")))?;
    }
    setrlimit(Resource::RLIMIT_NOFILE, AGENT_NOFILE, MAX_NOFILE)
        .map_err(tried("raise the limit of open files"))?;
    delegate_controllers()?;
    linux::netlink::bring_up(LO).map_err(|refusal| InitError {
        what: "bring lo up".to_owned(),
        source: io::Error::other(refusal),
    })?;
    machine::set_hostname("localhost").map_err(|error| InitError {
        what: "set the host name".to_owned(),
        source: io::Error::other(error),
    })
}

/// Puts a bind mount of the initramfs over itself and makes it the root.
fn cover_root() -> Result<(), InitError> {
    for target in MOUNTS
        .map(|(_, target, ..)| target)
        .into_iter()
        .filter(|target| target.matches('/').count() == 1)
    {
        std::fs::create_dir_all(target).map_err(tried(format!("make {target}")))?;
    }
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(
        Some("/"),
        "/run",
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .map_err(tried("bind the root"))?;
    mount(None::<&str>, "/run", None::<&str>, private, None::<&str>)
        .map_err(tried("make the root private"))?;
    chdir("/run").map_err(tried("enter the bound root"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(tried("move the bound root"))?;
    chroot(".").map_err(tried("make the bound root the root"))?;
    chdir("/").map_err(tried("enter the root"))
}

/// A kernel without a console driver starts PID 1 without descriptors 0 to 2: nothing else may get these numbers.
fn standard_streams() -> Result<(), InitError> {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(tried("open /dev/null"))?;
    linux::descriptor::as_standard_streams(null.as_fd())
        .map_err(tried("open the standard streams"))?;
    // It is one of them itself, and stays open for good.
    if null.as_raw_fd() <= 2 {
        std::mem::forget(null);
    }
    Ok(())
}

fn device_links() -> Result<(), InitError> {
    const LINKS: [(&str, &str); 5] = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
        ("pts/ptmx", "/dev/ptmx"),
    ];
    for (target, link) in LINKS {
        // devtmpfs has a ptmx of its own, which belongs to the first instance of devpts.
        let _ = std::fs::remove_file(link);
        std::os::unix::fs::symlink(target, link).map_err(tried(format!("link {link}")))?;
    }
    Ok(())
}

/// Enables every controller for the containers' cgroups and moves the agent out of their way.
fn delegate_controllers() -> Result<(), InitError> {
    let root = Path::new("/sys/fs/cgroup");
    let controllers = std::fs::read_to_string(root.join("cgroup.controllers"))
        .map_err(tried("read the cgroup controllers"))?;
    // One write: each rebuilds the sets of all processes.
    let all: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    std::fs::write(root.join("cgroup.subtree_control"), all.join(" ")).map_err(tried(format!(
        "enable the cgroup controllers {}",
        controllers.trim()
    )))?;
    std::fs::create_dir(AGENT_CGROUP).map_err(tried(format!("make {AGENT_CGROUP}")))?;
    std::fs::write(format!("{AGENT_CGROUP}/cgroup.procs"), "1")
        .map_err(tried("enter the agent's cgroup"))
}
