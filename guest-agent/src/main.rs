//! `bulkhead-agent`: PID 1 of the guest, and the stages of the processes that it makes.
//!
//! The C entry point instead of Rust's: Rust's start-up code wants descriptors 0 to 2 or /dev/null, and a guest without
//! a console driver has neither before the agent has mounted /dev; and the announcement comes before anything else.

// Under test the entry point is the test harness'; what has tests is in the library.
#![cfg_attr(not(test), no_main)]

use std::ffi::{CStr, OsStr, c_char, c_int};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use bulkhead_agent::announce::{Announcement, announce};
use bulkhead_agent::stage;
use bulkhead_agent::{Host, init};

const USAGE: &str = "usage: bulkhead-agent (as PID 1 of a guest)
       bulkhead-agent --host DIR   serve the host whose port N is the Unix socket DIR/N
       bulkhead-agent --version";

/// The entry point.
///
/// # Safety
///
/// Called once, by the C start-up code, with `argc` C strings in `argv`.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    // SAFETY: takes no arguments.
    let first = unsafe { libc::getpid() } == 1;
    let arguments: Vec<&CStr> = (1..argc as usize)
        // SAFETY: the caller passes argc pointers to C strings, which live as long as the process.
        .map(|index| unsafe { CStr::from_ptr(*argv.add(index)) })
        .collect();
    // The init stage of a container is pid 1 as well, of another namespace: its argument tells.
    if let [name] = arguments.as_slice()
        && let Some(never) = stage::dispatch(name)
    {
        match never {}
    }
    bulkhead_agent::install_panic_hook();
    match arguments.as_slice() {
        [option, directory] if *option == c"--host" => serve_directory(directory),
        [option] if *option == c"--version" => {
            println!("bulkhead-agent {}", bulkhead_agent::VERSION);
            0
        }
        // The kernel passes PID 1 what it does not know of its own command line.
        _ if first => {
            announce(Announcement::Init);
            init::run()
        }
        _ => {
            eprintln!("{USAGE}");
            2
        }
    }
}

fn serve_directory(directory: &CStr) -> c_int {
    let host = Host::Unix(PathBuf::from(OsStr::from_bytes(directory.to_bytes())));
    match init::serve(host, "/proc/self/exe", 0, false) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("bulkhead-agent: {error}");
            1
        }
    }
}
