//! A user namespace of the process' own: what it may do, it may do to what is in there.
//!
//! The mounts are made before, by root of the host, and stay root's: nobody in the namespace has a
//! capability over them. Of the host's inodes those can be had whose owner is mapped. Root's
//! keyrings, and its limits of inotify instances and the like, are other users'
//! (user_namespaces(7), user-keyring(7)).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, pipe2};

use super::{JailError, step};

/// All users and groups, as themselves. An id of u32::MAX is nobody's (credentials(7)).
pub const EVERYONE: &str = "0 0 4294967295\n";

/// What of `/proc` it takes to make the namespace.
pub struct UserNamespace {
    /// `/proc/PID` of this process.
    this: OwnedFd,
    /// `/proc/sys/user`: most objects of a kind in the namespace of whoever opens a file there.
    limits: OwnedFd,
}

impl UserNamespace {
    /// Takes it while the host's `/proc` is there.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn prepare() -> Result<UserNamespace, JailError> {
        let directory = |path: &str| {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            open(path, flags, Mode::empty()).map_err(step(format!("open {path}")))
        };
        Ok(UserNamespace {
            this: directory("/proc/self")?,
            limits: directory("/proc/sys/user")?,
        })
    }

    /// Enters a new namespace with these lines of uid_map and gid_map, with all capabilities in it,
    /// and forbids it namespaces and watches of its own. The process has one thread.
    ///
    /// # Errors
    /// The host allows no user namespaces (`user.max_user_namespaces`), or the maps.
    pub fn enter(self, users: &str, groups: &str) -> Result<(), JailError> {
        self.until_alone()?;
        let (reader, writer) =
            pipe2(OFlag::O_CLOEXEC).map_err(step("make a pipe for the user namespace"))?;
        // Who is inside may map itself alone (user_namespaces(7)): a child that stays outside
        // writes the maps.
        // SAFETY: the process has one thread, so that the child finds no lock held; it leaves by
        // _exit.
        let child = match unsafe { fork() }.map_err(step("start a child for the user namespace"))? {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                drop(writer);
                let code = match self.map_when_told(reader, users, groups) {
                    Ok(()) => 0,
                    Err(errno) => errno as i32,
                };
                // SAFETY: ends the child without running what belongs to its parent.
                unsafe { libc::_exit(code) }
            }
        };
        let entered = unshare(CloneFlags::CLONE_NEWUSER);
        if entered.is_ok() {
            // The child reads it, or has ended, which is seen below.
            let _ = File::from(writer).write_all(b"!");
        } else {
            drop(writer);
        }
        let ended =
            waitpid(child, None).map_err(step("wait for the child of the user namespace"))?;
        entered.map_err(|errno| {
            let hint = match errno {
                Errno::ENOSPC => "user.max_user_namespaces is reached, or 0",
                Errno::EINVAL => "the kernel has none (CONFIG_USER_NS)",
                _ => "does a security module (SELinux, AppArmor) forbid it?",
            };
            step(format!("enter a user namespace: {hint}"))(errno)
        })?;
        let WaitStatus::Exited(_, code) = ended else {
            return Err(step("map users")(Errno::EPIPE));
        };
        if code != 0 {
            return Err(step("map users")(Errno::from_raw(code)));
        }
        self.forbid_more()
    }

    /// Waits until the process has one thread, as the kernel wants it of whoever enters a user
    /// namespace. The thread that helped to load the guest has done its work, but takes a moment
    /// longer to go.
    fn until_alone(&self) -> Result<(), JailError> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let threads = || -> nix::Result<usize> {
            let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let mut entries = Dir::openat(&self.this, "task", flags, Mode::empty())?;
            let names = entries.iter().filter_map(Result::ok);
            Ok(names
                .filter(|entry| !entry.file_name().to_bytes().starts_with(b"."))
                .count())
        };
        let limit = Instant::now() + PATIENCE;
        while threads().map_err(step("list the threads"))? > 1 {
            if Instant::now() > limit {
                return Err(step("enter a user namespace: other threads run")(
                    Errno::EBUSY,
                ));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    /// The child's part; the parent is in its namespace when it says so.
    fn map_when_told(&self, told: OwnedFd, users: &str, groups: &str) -> nix::Result<()> {
        let mut byte = [0];
        let told = File::from(told).read(&mut byte);
        if !matches!(told, Ok(1)) {
            return Err(Errno::ECANCELED);
        }
        write(&self.this, "gid_map", groups)?;
        write(&self.this, "uid_map", users)
    }

    /// No namespaces within this one, no inotify or fanotify.
    fn forbid_more(&self) -> Result<(), JailError> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut entries = Dir::openat(&self.limits, ".", flags, Mode::empty())
            .map_err(step("list /proc/sys/user"))?;
        for entry in entries.iter() {
            let entry = entry.map_err(step("list /proc/sys/user"))?;
            let Ok(name) = entry.file_name().to_str() else {
                continue;
            };
            if name.starts_with("max_") {
                write(&self.limits, name, "0").map_err(|errno| {
                    let hint = match errno {
                        Errno::EROFS => ": /proc/sys is read-only where the shim runs",
                        _ => "",
                    };
                    step(format!("set user.{name} to 0{hint}"))(errno)
                })?;
            }
        }
        Ok(())
    }
}

fn write(directory: &impl AsFd, name: &str, text: &str) -> nix::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let file = openat(directory, name, flags, Mode::empty())?;
    // In one call: the kernel takes a map once and whole.
    nix::unistd::write(file, text.as_bytes()).map(drop)
}
