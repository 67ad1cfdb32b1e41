//! `containerd-shim-bulkhead-v1`: runs pods for containerd and CRI-O. One process a pod.
//!
//! ```text
//! containerd ── start ──► binds the socket, leaves a daemon behind that serves it, prints its address
//!            ── ttrpc ──► the daemon: containerd's tasks over one sandbox
//!            ── delete ─► after a daemon's death: gives back what its ledger names
//! ```

mod daemon;
mod delete;
mod flags;
mod info;
mod log;
mod start;

use std::process::ExitCode;

use anyhow::Context;
use bulkhead_shim::sys::{daemon::LISTENER, own};

use flags::{Flags, Verb};

fn main() -> ExitCode {
    let flags = Flags::parse(std::env::args().skip(1)).and_then(|flags| {
        // The daemon's listening socket is one more than the standard streams.
        let first = match flags.verb {
            Verb::Daemon => LISTENER + 1,
            _ => LISTENER,
        };
        own::close_inherited(first).context("cannot close what was inherited")?;
        own::narrow().context("cannot give up capabilities")?;
        Ok(flags)
    });
    let done = flags.and_then(|flags| match flags.verb {
        Verb::Version => info::version(),
        Verb::Info => info::info(),
        Verb::Start => start::start(&flags),
        Verb::Delete => delete::delete(&flags),
        Verb::Daemon => daemon::run(&flags),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The one place that writes here: containerd shows it when a verb fails, and reads it with the address when one succeeds.
            eprintln!("containerd-shim-bulkhead-v1: {error:#}");
            ExitCode::FAILURE
        }
    }
}
