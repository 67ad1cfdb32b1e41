//! clone3 and execveat of a process that starts with almost nothing.
//!
//! The child begins in namespaces and in a cgroup of its own, with its control socket at a fixed descriptor, its standard
//! streams where the caller says, an empty session keyring, and every other descriptor closed by the exec. Its program lies on
//! a mount that nobody can write through ([`ReadOnlyFile`]).
#![cfg_attr(not(test), forbid(unsafe_code))] // the tests attack by raw system calls

use std::{
    ffi::{CStr, CString},
    fs::{File, Metadata},
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

pub use linux::process::Child;
use linux::process::Place;

use super::{mount::ReadOnlyFile, process};

const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP) as u64;

/// What to execute.
#[derive(Debug)]
pub struct Executable {
    path: PathBuf,
    file: ReadOnlyFile,
}

impl Executable {
    /// Takes the program at `path`.
    pub fn at(path: &Path) -> io::Result<Executable> {
        Ok(Executable {
            path: path.into(),
            file: ReadOnlyFile::at(path)?,
        })
    }

    /// What the program's file is.
    pub fn metadata(&self) -> io::Result<Metadata> {
        File::from(self.file.as_fd().try_clone_to_owned()?).metadata()
    }

    /// Where it was found.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// What to start.
pub struct Program<'a> {
    /// The executable.
    pub executable: &'a Executable,
    /// Arguments after the program's name.
    pub arguments: &'a [&'a str],
    /// Becomes descriptor [`bulkhead_vmm_config::CONTROL_FD`].
    pub control: BorrowedFd<'a>,
    /// Becomes standard input and output.
    pub null: BorrowedFd<'a>,
    /// Becomes standard error.
    pub stderr: BorrowedFd<'a>,
    /// Directory of the cgroup v2 to start in.
    pub cgroup: BorrowedFd<'a>,
}

/// Starts it in new namespaces of every kind but user, in its cgroup, and returns when its execve has succeeded.
pub fn spawn(program: &Program<'_>) -> io::Result<Child> {
    let c_string =
        |bytes: &[u8]| CString::new(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let path = program.executable.path.as_os_str();
    let mut words = vec![c_string(path.as_bytes())?];
    for word in program.arguments {
        words.push(c_string(word.as_bytes())?);
    }
    let arguments: Vec<&CStr> = words.iter().map(|word| &**word).collect();
    let (mut failure, report) = pipe()?;
    const { assert!(bulkhead_vmm_config::CONTROL_FD == 3) };
    let started = linux::process::Program {
        file: program.executable.file.as_fd(),
        arguments: &arguments,
        descriptors: &[program.null, program.null, program.stderr, program.control],
        mapped: None,
        // A terminal's Ctrl-C goes to its foreground process group: not to the machine, which ends
        // by its socket. The session keyring of whoever started us may hold keys of root's, or lead
        // to them.
        fresh: true,
        report: Some(report.as_fd()),
    };
    let place = Place {
        namespaces: NAMESPACES,
        cgroup: Some(program.cgroup),
    };
    let child = linux::process::spawn(place, &started)?;
    // Drop our copy now: the pipe reaches its end only when the child's copy is closed by the exec.
    drop(report);
    let mut errno = [0; 4];
    match failure.read_exact(&mut errno) {
        Ok(()) => {
            let _ = process::wait_gone(child.pidfd.as_fd(), Duration::from_secs(10));
            process::collect(child.pidfd.as_fd());
            Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
        }
        Err(_) => Ok(child),
    }
}

pub(super) fn pipe() -> io::Result<(File, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    Ok((File::from(read), write))
}

#[cfg(test)]
pub(crate) mod tests;
