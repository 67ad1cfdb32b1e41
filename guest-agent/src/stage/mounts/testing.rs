//! For tests that change namespaces: a forked child, because libtest's own process has many threads.
#![allow(unsafe_code)] // fork(2)

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, pipe};

/// Runs `test` in a forked child and returns its text; a panic there is a panic here.
pub(crate) fn in_child(test: impl FnOnce() -> String) -> String {
    let (read, write) = pipe().expect("pipe");
    // SAFETY: glibc's fork leaves its allocator usable in the child, and the child leaves by _exit, so that it runs
    // neither destructors nor test code of the parent.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            drop(read);
            let result = catch_unwind(AssertUnwindSafe(test));
            let (status, text) = match result {
                Ok(text) => (0, text),
                Err(panic) => (1, panic_text(panic.as_ref())),
            };
            let sent = File::from(write).write_all(text.as_bytes());
            // SAFETY: _exit ends the process.
            unsafe { nix::libc::_exit(if sent.is_ok() { status } else { 2 }) }
        }
        ForkResult::Parent { child } => {
            drop(write);
            let text = read_all(read);
            match waitpid(child, None).expect("wait") {
                WaitStatus::Exited(_, 0) => text,
                status => panic!("in the child: {text} ({status:?})"),
            }
        }
    }
}

/// `in_child` in a mount namespace of its own, from which nothing reaches the host's.
pub(crate) fn in_mount_namespace(test: impl FnOnce() -> String) -> String {
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests mount file systems: run them as root"
    );
    in_child(|| {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).expect("private mounts");
        test()
    })
}

fn read_all(fd: OwnedFd) -> String {
    let mut text = String::new();
    File::from(fd).read_to_string(&mut text).expect("read");
    text
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "a panic without a text".to_owned())
}
