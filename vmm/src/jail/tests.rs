use super::*;
use std::os::fd::AsRawFd;

use bulkhead_vmm_config::Layer;
use nix::sched::CloneFlags;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// What tests of other layers do without on a kernel that lacks it.
pub(crate) const ACCEPTED: &[Layer] = &[Layer::Landlock];

/// Runs `inside` as PID 1 of namespaces of its own, as the shim starts us; it must succeed. `false`
/// where this may not be done, said loudly.
pub(crate) fn isolated(inside: fn() -> Result<(), String>) -> bool {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    // Not clone(2) at once: fork(3) alone leaves the child an allocator whose locks no other thread
    // of the test program holds.
    // SAFETY: the child works on what it has a copy of, and leaves by _exit.
    let pid = match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            keep_only(writer.as_raw_fd());
            let code = match nix::sched::unshare(namespaces) {
                Ok(()) => in_namespaces(inside, &writer),
                Err(_) => NO_NAMESPACES,
            };
            // SAFETY: ends the fork without running the test harness' own end.
            unsafe { libc::_exit(code) }
        }
    };
    drop(writer);
    let text = io::read_to_string(std::fs::File::from(reader)).unwrap();
    let ended = waitpid(pid, None);
    if ended == Ok(WaitStatus::Exited(pid, NO_NAMESPACES)) {
        eprintln!("SKIPPED: namespaces cannot be made");
        return false;
    }
    assert_eq!(ended, Ok(WaitStatus::Exited(pid, 0)), "{text}");
    assert_eq!(text, "");
    true
}

/// Closes what other tests have open at this moment: a copy of it would keep their mounts busy.
fn keep_only(kept: std::os::fd::RawFd) {
    for (first, last) in [(3, kept - 1), (kept + 1, libc::c_int::MAX)] {
        if first <= last {
            // SAFETY: whoever owns the descriptors is a thread that this process has no copy of.
            unsafe { libc::close_range(first as u32, last as u32, 0) };
        }
    }
}

/// What the child that could not make namespaces exits with.
const NO_NAMESPACES: i32 = 42;

/// Runs it in a child, which is PID 1 there; its exit code.
fn in_namespaces(inside: fn() -> Result<(), String>, output: &std::os::fd::OwnedFd) -> i32 {
    // SAFETY: as in `isolated`; this process has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            let text = inside().err().unwrap_or_default();
            // SAFETY: the pointer and the length are those of `text`; the rest of this process is
            // not run.
            unsafe {
                libc::write(output.as_raw_fd(), text.as_ptr().cast(), text.len());
                libc::_exit(0)
            }
        }
        Ok(ForkResult::Parent { child }) => match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, code)) => code,
            _ => 1,
        },
        Err(_) => 1,
    }
}

pub(crate) fn expect(condition: bool, what: &str) -> Result<(), String> {
    condition.then_some(()).ok_or_else(|| what.to_owned())
}

/// Whether this kernel has Landlock; said loudly if not.
pub(crate) fn has_landlock() -> bool {
    let has = linux::landlock::abi();
    if let Err(errno) = has {
        eprintln!("SKIPPED: no Landlock in this kernel ({errno}); the lab's has it");
    }
    has.is_ok()
}

/// From now on the kernel answers this thread as one that was booted without Landlock.
pub(crate) fn as_without_landlock() -> Result<(), String> {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
    let filter = SeccompFilter::new(
        [(libc::SYS_landlock_create_ruleset, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EOPNOTSUPP as u32),
        TargetArch::x86_64,
    );
    let filter = filter.map_err(|error| error.to_string())?;
    let program = BpfProgram::try_from(filter).map_err(|error| error.to_string())?;
    seccompiler::apply_filter(&program).map_err(|error| error.to_string())
}

#[test]
fn only_the_kept_descriptor_survives() {
    isolated(|| {
        for _ in 0..20 {
            // SAFETY: the call takes plain numbers.
            expect(unsafe { libc::dup(1) } >= 0, "dup")?;
        }
        // The test's pipe is behind it: report through a kept copy.
        // SAFETY: this is a process of its own that ends without using any other descriptor.
        unsafe {
            close_inherited(5).map_err(|error| error.to_string())?;
            for fd in 0..64 {
                let open = libc::fcntl(fd, libc::F_GETFD) >= 0;
                if open != (fd < 3 || fd == 5) {
                    libc::_exit(100 + fd);
                }
            }
        }
        Ok(())
    });
}
