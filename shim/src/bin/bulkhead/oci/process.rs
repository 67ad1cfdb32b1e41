//! The process on the host that stands for one in the guest, and the file that tells its pid.

use std::{
    fs::{self, File},
    io::{stderr, stdin, stdout},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use bulkhead_shim::{
    cgroup,
    command_line::{Connection, Room, ticket},
    sys::{keeper::Keeper, view::View},
};

use crate::failure::Failure;

/// Introduces the keeper of a process to the monitor, with the process' streams: a terminal, or
/// this command's own.
pub fn introduce(
    room: &Room,
    exec_id: &str,
    terminal: Option<BorrowedFd<'_>>,
) -> Result<Connection, Failure> {
    let (input, output, errors) = (stdin(), stdout(), stderr());
    let streams = match terminal {
        None => [input.as_fd(), output.as_fd(), errors.as_fd()],
        Some(terminal) => [terminal; 3],
    };
    let ticket = ticket(&room.id, exec_id);
    Ok(Connection::begin(room.connect_keeper()?, &ticket, streams)?)
}

/// Forks the keeper of a process beside the pod's stub; its pid.
pub fn keep(
    connection: &Connection,
    terminal: Option<BorrowedFd<'_>>,
    stub: u32,
    view: Option<&View>,
    title: &str,
) -> Result<i32, Failure> {
    let failed = |error| Failure::new(format!("cannot start the container's keeper: {error}"));
    let cgroup = cgroup::of_process(stub).map_err(failed)?;
    let cgroup = File::open(cgroup).map_err(failed)?;
    let network = File::open(format!("/proc/{stub}/ns/net")).map_err(failed)?;
    let keeper = Keeper {
        monitor: connection.as_fd(),
        terminal,
        network: network.as_fd(),
        cgroup: cgroup.as_fd(),
        view,
        title,
    };
    keeper.start().map_err(failed)
}

/// Writes a pid file, whole or not at all: who waits for it reads it as soon as it is there.
pub fn write_pid(path: Option<&Path>, pid: i32) -> Result<(), Failure> {
    let Some(path) = path else { return Ok(()) };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new: PathBuf = path.with_file_name(format!(".{name}"));
    let written = fs::write(&new, pid.to_string()).and_then(|()| fs::rename(&new, path));
    written.map_err(|error| {
        let path = path.display();
        Failure::new(format!("cannot write --pid-file {path}: {error}"))
    })
}
