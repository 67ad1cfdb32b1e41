//! After a test has failed: what the machine looked like, and a clean one for the next test.
//!
//! Without this a pod that a failed test leaves behind fails the tests after it, each after
//! minutes.

use std::panic;
use std::process::Command;
use std::sync::{Mutex, Once};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::engine::Engine;
use crate::process::run;

/// Looks and cleans up whenever a test panics, from the first call on.
pub(crate) fn watch() {
    static WATCH: Once = Once::new();
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    WATCH.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            usual(info);
            let _one = ONE_AT_A_TIME.lock();
            let processes =
                run(Command::new("ps").args(["-eo", "pid=,ppid=,stat=,wchan=,etime=,args="]));
            let processes = processes.text();
            let user = processes
                .lines()
                .filter(|line| !line.contains(" ["))
                .collect::<Vec<_>>();
            eprintln!("--- processes when it failed\n{}", user.join("\n"));
            end_pods(&processes);
            if let Some(engine) = Engine::started() {
                engine.start_afresh();
            }
        }));
    });
}

/// Ends every shim: its pod goes with it.
fn end_pods(processes: &str) {
    for line in processes
        .lines()
        .filter(|line| line.contains("containerd-shim-"))
    {
        let pid = line
            .split_whitespace()
            .next()
            .and_then(|word| word.parse().ok());
        if let Some(pid) = pid {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}
