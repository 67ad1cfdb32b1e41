//! A thread that is another user to whoever asks.
#![forbid(unsafe_code)]

use std::io;

use linux::{capability, thread};

/// CAP_DAC_OVERRIDE.
const DAC_OVERRIDE: u64 = 1 << 1;

/// Does `work` with this effective uid and gid, no supplementary groups, and the right to reach every file.
///
/// Real and saved uid stay root's: nobody who has `uid` may signal or trace the thread.
pub fn as_user<T: Send + 'static>(
    uid: u32,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let inside = move || {
        become_user(uid)?;
        work()
    };
    let thread = std::thread::Builder::new().spawn(inside)?;
    let result = thread.join();
    result.unwrap_or_else(|_| Err(io::Error::other("the thread that dials panicked")))
}

/// These change this thread alone, which ends right after.
fn become_user(uid: u32) -> io::Result<()> {
    thread::set_groups(&[])?;
    thread::set_gids(None, Some(uid), None)?;
    thread::set_uids(None, Some(uid), None)?;
    // Leaving uid 0 has cleared the effective set, not the permitted one (capabilities(7)).
    let sets = capability::Sets {
        effective: DAC_OVERRIDE,
        ..capability::get()?
    };
    Ok(capability::set(sets)?)
}
