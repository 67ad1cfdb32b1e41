//! The guest as a whole: what it is, its name, clock and sysctls, the share, and its end.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::SEED;
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

/// Has the kernel draw its random numbers from these bytes of the host's from now on.
pub fn reseed(seed: &[u8; SEED]) -> Result<(), MachineError> {
    let failed = |source| MachineError::System {
        what: "seed the kernel's random numbers".to_owned(),
        source,
    };
    let device = std::fs::File::open("/dev/urandom").map_err(failed)?;
    linux::entropy::reseed(device.as_fd(), seed).map_err(|errno| failed(errno.into()))
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

/// Has the kernel run on its first `count` processors (Documentation/core-api/cpu_hotplug.rst).
///
/// # Errors
/// There are not so many, or the kernel does not change one; those before it have changed.
pub fn set_processors(count: u32) -> Result<(), MachineError> {
    run_on(Path::new("/sys/devices/system/cpu"), count)
}

/// The first one is always online, and has no file that says so.
fn run_on(directory: &Path, count: u32) -> Result<(), MachineError> {
    let online = |number: u32| directory.join(format!("cpu{number}/online"));
    let last = (1..).find(|number| !online(*number).exists()).unwrap_or(1);
    let refuse = |what: String, source| MachineError::System { what, source };
    if !(1..=last).contains(&count) {
        let reason = format!("the machine has {last}, and one is the least");
        return Err(refuse(
            format!("run on {count} processors"),
            io::Error::new(io::ErrorKind::InvalidInput, reason),
        ));
    }
    let set = |number: u32, wanted: &str, verb: &str| {
        let file = online(number);
        let fail = |source| refuse(format!("take processor {number} {verb}"), source);
        match std::fs::read_to_string(&file).map_err(fail)?.trim() == wanted {
            true => Ok(()),
            false => std::fs::write(&file, wanted).map_err(fail),
        }
    };
    (1..count).try_for_each(|number| set(number, "1", "online"))?;
    (count..last)
        .rev()
        .try_for_each(|number| set(number, "0", "offline"))
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
    fn the_first_processors_are_online_and_no_others() {
        let directory = tempfile::tempdir().unwrap();
        let path = |number: u32| directory.path().join(format!("cpu{number}"));
        for number in 0..4 {
            std::fs::create_dir(path(number)).unwrap();
            if number > 0 {
                std::fs::write(path(number).join("online"), "0\n").unwrap();
            }
        }
        let now = || {
            let files = (1..4).map(|number| std::fs::read_to_string(path(number).join("online")));
            files
                .map(|text| text.unwrap().trim().to_owned())
                .collect::<String>()
        };
        for (count, states) in [(3, "110"), (4, "111"), (2, "100"), (1, "000"), (1, "000")] {
            run_on(directory.path(), count).unwrap();
            assert_eq!(now(), states, "{count}");
        }
        for count in [0, 5, u32::MAX] {
            let error = run_on(directory.path(), count).unwrap_err();
            assert!(error.to_string().contains(&count.to_string()), "{error}");
            assert_eq!(now(), "000");
        }
        std::fs::remove_file(path(2).join("online")).unwrap();
        assert!(run_on(directory.path(), 3).is_err(), "there are two");
    }

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
