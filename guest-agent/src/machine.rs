//! The guest as a whole: what it is, its name, clock and sysctls, the share, and its end.

use std::io;
use std::path::{Path, PathBuf};

use linux::process::collect_any;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::announce::{Announcement, announce};
use crate::clock;

/// Where the share is mounted.
pub const SHARE: &str = "/run/bulkhead/share";

/// Where the pod's shared memory is mounted (agent.proto, `shm_bytes`).
pub const SHM: &str = "/run/bulkhead/shm";

/// Something of the guest could not be set.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A sysctl.
    #[error("{0}")]
    Sysctl(String),
    /// Anything else.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn system(what: impl Into<String>) -> impl FnOnce(nix::Error) -> MachineError {
    let what = what.into();
    move |errno| MachineError::System {
        what,
        source: errno.into(),
    }
}

/// Sets the host name of the guest, which new UTS namespaces begin with.
pub fn set_hostname(name: &str) -> Result<(), MachineError> {
    nix::unistd::sethostname(name).map_err(system(format!("set host name \"{name}\"")))
}

/// Sets the wall clock to the host's; `passed_ns` (since the epoch) is a time that the host has passed not long ago.
pub fn set_clock(passed_ns: u64) -> Result<(), MachineError> {
    clock::set(passed_ns).map_err(|source| MachineError::System {
        what: "set the clock by the host's".to_owned(),
        source,
    })
}

/// Mounts the virtio-fs share with this tag.
pub fn mount_share(tag: &str) -> Result<(), MachineError> {
    std::fs::create_dir_all(SHARE).map_err(|source| MachineError::System {
        what: format!("make {SHARE}"),
        source,
    })?;
    // No nodev or nosuid: a container's root is a copy of this mount, and its set-uid programs must work.
    mount(
        Some(tag),
        SHARE,
        Some("virtiofs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .map_err(system(format!("mount the share \"{tag}\" at {SHARE}")))
}

/// Mounts the tmpfs that the containers of the pod share as /dev/shm.
pub fn mount_shm(bytes: u64) -> Result<(), MachineError> {
    std::fs::create_dir_all(SHM).map_err(|source| MachineError::System {
        what: format!("make {SHM}"),
        source,
    })?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let data = format!("mode=1777,size={bytes}");
    mount(Some("shm"), SHM, Some("tmpfs"), flags, Some(data.as_str()))
        .map_err(system(format!("mount the pod's shared memory at {SHM}")))
}

/// The running kernel's release.
pub fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Bytes of memory that the kernel manages.
pub fn memory_bytes() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = meminfo.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?
            .trim()
            .strip_suffix(" kB")?
            .parse::<u64>()
            .ok()
    });
    kib.unwrap_or(0) * 1024
}

/// CPUs that the kernel runs on.
pub fn vcpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u32)
}

/// Writes a sysctl by its dotted name.
pub fn write_sysctl(name: &str, value: &str) -> Result<(), String> {
    let path = sysctl_path(name).ok_or_else(|| format!("\"{name}\" is no name of a sysctl"))?;
    std::fs::write(&path, value)
        .map_err(|error| format!("cannot set sysctl {name} to \"{value}\": {error}"))
}

/// The file of a sysctl. Dots and slashes change places when a slash comes first, so that an interface's name may
/// hold a dot (sysctl(8)).
fn sysctl_path(name: &str) -> Option<PathBuf> {
    let relative = match name.find(['.', '/']) {
        Some(first) if name.as_bytes()[first] == b'/' => name.to_owned(),
        _ => name
            .chars()
            .map(|c| {
                if c == '.' {
                    '/'
                } else if c == '/' {
                    '.'
                } else {
                    c
                }
            })
            .collect(),
    };
    let plain = relative
        .split('/')
        .all(|part| !part.is_empty() && part != "." && part != "..");
    plain.then(|| Path::new("/proc/sys").join(relative))
}

/// Ends the machine: kills everything, writes everything back, unmounts, tells the VMM and stops. Only for PID 1.
pub fn power_off() -> ! {
    // As PID 1, -1 names every process but this one. None is no failure.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    wait_for_all();
    nix::unistd::sync();
    unmount_all();
    announce(Announcement::PowerOff);
    // A restart and not a power-off: without ACPI the kernel turns the latter into a halt that no VMM can see, while a
    // restart ends the machine even if nobody listened to the announcement.
    let Err(errno) = reboot(RebootMode::RB_AUTOBOOT);
    panic!("reboot failed: {errno}");
}

/// Reaps until no child is left. Killed processes end unless the kernel waits for a device on their behalf; those must not
/// keep the machine up, so that the wait has an end.
fn wait_for_all() {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(2);
    loop {
        match collect_any() {
            Ok(None) if std::time::Instant::now() < deadline => {
                std::thread::sleep(std::time::Duration::from_millis(1))
            }
            Ok(Some(_)) => {}
            _ => return,
        }
    }
}

/// Unmounts in reverse order of mounting; what is busy has been synced.
fn unmount_all() {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut targets: Vec<&str> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .collect();
    targets.reverse();
    for target in targets {
        let _ = umount2(target, MntFlags::MNT_FORCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names_become_paths() {
        let path = |name| sysctl_path(name).map(|path| path.display().to_string());
        assert_eq!(
            path("net.ipv4.ip_forward").as_deref(),
            Some("/proc/sys/net/ipv4/ip_forward")
        );
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding").as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding")
        );
        assert_eq!(
            path("net.ipv4.conf.eth0/1.forwarding").as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding")
        );
    }

    #[test]
    fn a_sysctl_name_cannot_leave_its_directory() {
        for name in [
            "",
            ".",
            "..",
            "kernel..x",
            "/../etc/passwd",
            "kernel/../../x",
            "/kernel",
            "kernel.//.x",
        ] {
            assert_eq!(sysctl_path(name), None, "{name}");
        }
    }
}
