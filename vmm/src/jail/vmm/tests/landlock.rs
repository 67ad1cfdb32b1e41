//! Landlock around the VMM: nothing opens, nothing outside is spoken to, and its own threads are
//! kicked.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::thread::JoinHandleExt;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, Pid, fork, pause};

use super::*;
use crate::jail::JailError;
use crate::jail::tests::{as_without_landlock, expect, has_landlock, isolated};

const USER: u32 = 54321;

/// What a VMM that a guest has taken tries.
#[derive(Debug, PartialEq, Eq)]
struct Tried {
    open: Result<(), Errno>,
    tcp: Result<(), Errno>,
    abstract_socket: Result<(), Errno>,
    signal: Result<(), Errno>,
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// A process of the same user, outside of what the next steps restrict.
fn sibling() -> Result<Pid, String> {
    // SAFETY: this process has one thread; the child does nothing but change its user and wait.
    match unsafe { fork() }.map_err(|error| error.to_string())? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let user = Uid::from_raw(USER);
            let _ = setresuid(user, user, user);
            loop {
                pause();
            }
        }
    }
}

fn attack(accepted: &[Layer]) -> Result<(Option<u32>, Tried), String> {
    let text = |error: std::io::Error| error.to_string();
    let directory = File::open("/usr").map_err(text)?;
    let name = SocketAddr::from_abstract_name("outside").map_err(text)?;
    let _listener = UnixListener::bind_addr(&name).map_err(text)?;
    let victim = sibling()?;
    let landlock = enter((USER, USER), 0, 8, accepted).map_err(|error| format!("{error:?}"))?;
    let flags = nix::fcntl::OFlag::O_RDONLY;
    let opened = nix::fcntl::openat(&directory, "bin", flags, nix::sys::stat::Mode::empty());
    let tried = Tried {
        open: opened.map(|_: OwnedFd| ()),
        tcp: TcpListener::bind("0.0.0.0:4711").map(drop).map_err(errno),
        abstract_socket: UnixStream::connect_addr(&name).map(drop).map_err(errno),
        signal: patiently(|| kill(victim, Signal::SIGKILL)),
    };
    // As a vCPU is kicked: a thread that started after the restriction.
    let thread = std::thread::spawn(std::thread::park);
    // SAFETY: the thread is there until it is joined, and SIGURG does nothing.
    let kicked = unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGURG) };
    thread.thread().unpark();
    thread.join().map_err(|_| "the thread panicked")?;
    expect(kicked == 0, "a thread of our own cannot be kicked")?;
    Ok((landlock, tried))
}

/// The other process may not have changed its user yet.
fn patiently(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    for _ in 0..100 {
        if call().is_ok() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    call()
}

#[test]
fn with_landlock_nothing_opens_and_nobody_outside_is_reached() {
    if !has_landlock() {
        return;
    }
    isolated(|| {
        let (landlock, tried) = attack(&[])?;
        let abi = landlock.ok_or("there is no Landlock")?;
        // The first kernel with each: 6.7 and 6.12.
        let since = |first, errno| if abi >= first { Err(errno) } else { Ok(()) };
        let expected = Tried {
            open: Err(Errno::EACCES),
            tcp: since(4, Errno::EACCES),
            abstract_socket: since(6, Errno::EPERM),
            signal: since(6, Errno::EPERM),
        };
        expect(tried == expected, &format!("version {abi}: {tried:?}"))
    });
}

/// So that the test above proves something.
#[test]
fn without_landlock_all_of_it_is_reached() {
    isolated(|| {
        as_without_landlock()?;
        let (landlock, tried) = attack(&[Layer::Landlock])?;
        expect(landlock.is_none(), "there is Landlock")?;
        let all = Tried {
            open: Ok(()),
            tcp: Ok(()),
            abstract_socket: Ok(()),
            signal: Ok(()),
        };
        expect(tried == all, &format!("{tried:?}"))?;
        let root: Vec<_> = std::fs::read_dir("/").map_err(|e| e.to_string())?.collect();
        expect(root.is_empty(), "the root is not empty")
    });
}

#[test]
fn a_kernel_without_landlock_is_refused() {
    isolated(|| {
        as_without_landlock()?;
        match enter((USER, USER), 0, 1, &[]) {
            Err(JailError::NoLandlock(_)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}
