//! What this process itself has of the host (docs/adr/0014-what-the-shim-keeps.md).

use std::{io, os::fd::RawFd};

use linux::capability;
use nix::sys::stat::{Mode, umask};

/// The capabilities that the shim uses, each with its use. All others are refused to its own system
/// calls; programs that it executes as root have the bounding set, as under runc.
const KEPT: &[(u32, &str)] = &[
    (
        0,
        "CAP_CHOWN: mount points belong to the container's root user",
    ),
    (
        1,
        "CAP_DAC_OVERRIDE: roots, bundles and streams that are other users'",
    ),
    (
        2,
        "CAP_DAC_READ_SEARCH: an overlay finds its files by handles with what its mounter has",
    ),
    (
        3,
        "CAP_FOWNER: modes of what is another user's; an overlay's copies",
    ),
    (4, "CAP_FSETID: set-id bits in an overlay's copies"),
    (5, "CAP_KILL: the VMM has a uid of its own"),
    (6, "CAP_SETGID: dials sockets of the host as the pod's uid"),
    (7, "CAP_SETUID: the same; inotify counts for the pod's uid"),
    (8, "CAP_SETPCAP: the pod's stub empties its bounding set"),
    (
        10,
        "CAP_NET_BIND_SERVICE: mirrors the guest's listeners on localhost",
    ),
    (
        12,
        "CAP_NET_ADMIN: taps, redirects, links; attaches the cgroup's device program",
    ),
    (
        19,
        "CAP_SYS_PTRACE: namespaces that a path in /proc names; the user namespaces of the jails",
    ),
    (
        21,
        "CAP_SYS_ADMIN: mounts, namespaces, cgroups, the cgroup's device program",
    ),
    (
        24,
        "CAP_SYS_RESOURCE: lowers oom_score_adj; names the pod's stub",
    ),
    (27, "CAP_MKNOD: device nodes in an overlay's copies"),
    (31, "CAP_SETFCAP: file capabilities in an overlay's copies"),
];

/// Modes of files that are made without one.
const UMASK: u32 = 0o022;

/// Closes what whoever has started this program left open from `first` on.
///
/// Call it first of all: nothing in the process may own such a descriptor.
pub fn close_inherited(first: RawFd) -> io::Result<()> {
    // SAFETY: the caller says that nobody owns them.
    let closed = unsafe { libc::close_range(first.unsigned_abs(), u32::MAX, 0) };
    nix::errno::Errno::result(closed)?;
    Ok(())
}

/// Keeps what whoever has started this program left open from `first` on for this process alone:
/// nothing that it executes has it. A user may name such a descriptor, `--config <(...)` does.
pub fn keep_inherited(first: RawFd) -> io::Result<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
    // SAFETY: a flag of descriptors changes, and nobody who owns one relies on its being inherited.
    let kept = unsafe { libc::close_range(first.unsigned_abs(), u32::MAX, flags) };
    nix::errno::Errno::result(kept)?;
    Ok(())
}

/// Gives up what the shim does not use. Of this thread and those that it starts: call it before
/// there are others.
pub fn narrow() -> io::Result<()> {
    umask(Mode::from_bits_truncate(UMASK));
    let kept = KEPT.iter().fold(0, |set, (number, _)| set | 1 << number);
    let has = capability::get()?;
    capability::clear_ambient()?;
    capability::set(capability::Sets {
        effective: has.permitted & kept,
        permitted: has.permitted & kept,
        // What is executed gets nothing by it, whatever its file says.
        inheritable: 0,
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// In a thread of its own, whose capabilities go with it.
    fn narrowed<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        let thread = std::thread::spawn(|| {
            // The mask is the process'.
            let before = umask(Mode::from_bits_truncate(UMASK));
            narrow().unwrap();
            umask(before);
            work()
        });
        thread.join().unwrap()
    }

    fn is_root() -> bool {
        let is_root = nix::unistd::geteuid().is_root();
        if !is_root {
            println!("NOT RUN: this needs root");
        }
        is_root
    }

    #[test]
    fn what_is_not_used_is_not_there() {
        let kept = KEPT.iter().fold(0u64, |set, (number, _)| set | 1 << number);
        let sets = narrowed(|| capability::get().unwrap());
        assert_eq!(sets.permitted & !kept, 0);
        assert_eq!((sets.effective, sets.inheritable), (sets.permitted, 0));
        for (number, words) in KEPT {
            assert!(
                words.starts_with("CAP_") && words.contains(": "),
                "{number}"
            );
        }
    }

    #[test]
    fn calls_that_the_shim_never_makes_are_refused() {
        if !is_root() {
            return;
        }
        let refused = narrowed(|| {
            // SAFETY: an empty module, a range of no ports, and a new socket; no pointer is
            // followed.
            let results = unsafe {
                [
                    libc::syscall(libc::SYS_init_module, 0, 0, c"".as_ptr()),
                    libc::syscall(libc::SYS_ioperm, 0x80, 1, 1),
                    libc::syscall(libc::SYS_socket, libc::AF_PACKET, libc::SOCK_RAW, 0),
                ]
                .map(|result| (result, io::Error::last_os_error()))
            };
            results.map(|(result, _)| result)
        });
        assert_eq!(refused, [-1; 3]);
    }

    #[test]
    fn a_hook_has_what_root_has() {
        if !is_root() {
            return;
        }
        let effective = || {
            let mut command = Command::new("/bin/grep");
            let output = command.args(["Cap[PE]", "/proc/self/status"]).output();
            String::from_utf8(output.unwrap().stdout).unwrap()
        };
        let before = effective();
        assert!(before.contains("CapEff"), "{before}");
        assert_eq!(narrowed(effective), before);
    }
}
