//! A process' terminal: a new pair from the container's own devpts, so that its name means something inside.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_agent_protocol::agent;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fstat, major, minor};
use nix::sys::statfs::fstatfs;

use super::message::{self, Failure, FromStage};
use super::step::Step;

/// DEVPTS_SUPER_MAGIC of statfs(2).
const DEVPTS_MAGIC: i64 = 0x1cd1;
/// The device number of every ptmx node (Documentation/admin-guide/devices.txt).
const PTMX: (u64, u64) = (5, 2);

/// Where a container has its multiplexer; the second is a link to the first in most.
const MULTIPLEXERS: [&str; 2] = ["/dev/pts/ptmx", "/dev/ptmx"];

/// Makes the pair, makes it the controlling terminal and the three streams, and sends the master to the agent.
///
/// The container's file system is hostile to an exec process: what is opened must be a real multiplexer.
///
/// `announce` sees the terminal before it is used: the place to bind it to /dev/console.
pub fn set_up(
    process: &agent::Process,
    announce: impl FnOnce(BorrowedFd<'_>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let master = open_multiplexer()?;
    linux::terminal::unlock(master.as_fd()).step(|| "cannot unlock the terminal")?;
    let terminal = linux::terminal::peer(master.as_fd()).step(|| "cannot open the terminal")?;
    if process.rows != 0 || process.columns != 0 {
        let (rows, columns) = (clamp(process.rows), clamp(process.columns));
        linux::terminal::resize(master.as_fd(), rows, columns)
            .step(|| "cannot set the terminal's size")?;
    }
    announce(terminal.as_fd())?;
    linux::terminal::control(terminal.as_fd()).step(|| "cannot take the controlling terminal")?;
    linux::descriptor::as_standard_streams(terminal.as_fd())
        .step(|| "cannot make the terminal the standard streams")?;
    message::send_to_agent(super::channel(), &FromStage::Terminal(master))
        .step(|| "cannot hand the terminal to the agent")
}

/// A window size as the kernel stores it.
pub fn clamp(cells: u32) -> u16 {
    u16::try_from(cells).unwrap_or(u16::MAX)
}

fn open_multiplexer() -> Result<OwnedFd, Failure> {
    let mut last = None;
    for path in MULTIPLEXERS {
        // O_NONBLOCK: a FIFO in its place must not stop us.
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        match open(path, flags, Mode::empty()) {
            Ok(fd) if is_multiplexer(fd.as_fd()) => return Ok(fd),
            Ok(_) => last = Some(format!("{path} is no terminal multiplexer")),
            Err(errno) => last = Some(format!("{path}: {}", io::Error::from(errno))),
        }
    }
    Err(Failure::internal(format!(
        "cannot make a terminal, does the container mount devpts at /dev/pts? {}",
        last.unwrap_or_default()
    )))
}

fn is_multiplexer(fd: BorrowedFd<'_>) -> bool {
    let (Ok(file_system), Ok(stat)) = (fstatfs(fd), fstat(fd)) else {
        return false;
    };
    file_system.filesystem_type().0 == DEVPTS_MAGIC
        && (major(stat.st_rdev), minor(stat.st_rdev)) == PTMX
}
