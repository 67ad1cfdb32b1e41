//! `bulkhead-vmm`: one process, one microVM; or, as `bulkhead-vmm fs`, the process that serves its files.
//!
//! It is started by the shim, which leaves a control socket as file descriptor 3; there is no other way to configure it.

use std::panic::PanicHookInfo;
use std::process::exit;

use anyhow::{Context, Result};
use bulkhead_vmm::build_id::build_id;
use bulkhead_vmm::control::ControlSocket;
use bulkhead_vmm::jail;
use bulkhead_vmm::log::Log;
use bulkhead_vmm::reports::monotonic_ns;
use bulkhead_vmm::seccomp;
use bulkhead_vmm::spec::VmSpec;
use bulkhead_vmm::vm::Vm;
use bulkhead_vmm_config::{CONTROL_FD, Event, ExitCode, GuestEnd, VmConfig};

const HELP: &str = "\
usage: bulkhead-vmm run | fs | calls | --version | --help

Both roles are started by Bulkhead's shim, with a control socket as file descriptor 3:
  run        run one microVM
  fs         serve one directory tree to a microVM

  calls      print the system calls that each thread of the two may make, and why

exit codes: 0 power-off or stopped, 1 failed, 2 usage, 10 reboot, 11 guest kernel panic, 12 triple fault,
            13 KVM error, 14 refused system call, 70 bug in this program
";

fn main() {
    let started_ns = monotonic_ns();
    seccomp::one_heap();
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let word = match arguments.as_slice() {
        [word] => word.to_str().unwrap_or_default(),
        _ => "",
    };
    let code = match word {
        "run" => run(started_ns),
        "fs" => serve_files(),
        "calls" => {
            print!("{}", seccomp::calls::table());
            ExitCode::Ok
        }
        "--version" | "-V" => {
            println!(
                "bulkhead-vmm {} build {}",
                env!("CARGO_PKG_VERSION"),
                build_id()
            );
            ExitCode::Ok
        }
        "--help" | "-h" => {
            print!("{HELP}");
            ExitCode::Ok
        }
        _ => {
            eprint!("{HELP}");
            ExitCode::Usage
        }
    };
    exit(code as i32);
}

/// Takes the control socket and closes everything else that was inherited.
fn control_socket() -> Result<ControlSocket> {
    // SAFETY: the first thing that this process does; standard streams aside nothing was opened yet.
    let control = unsafe { ControlSocket::inherited() }?;
    // SAFETY: only `control` owns a descriptor, and that one is kept.
    unsafe { jail::close_inherited(CONTROL_FD) }?;
    Ok(control)
}

fn run(started_ns: u64) -> ExitCode {
    jail::set_name(c"bulkhead-vmm");
    let control = match control_socket() {
        Ok(control) => control,
        Err(error) => {
            // Nobody listens but, perhaps, a person who started it by hand.
            eprintln!("bulkhead-vmm: {error:#}");
            return ExitCode::Failed;
        }
    };
    match run_machine(&control, started_ns) {
        Ok(end) => end.exit_code(),
        Err(error) => {
            let reason = format!("{error:#}");
            // The shim has gone if this fails.
            let _ = control.send(&Event::Failed { reason });
            ExitCode::Failed
        }
    }
}

fn run_machine(control: &ControlSocket, started_ns: u64) -> Result<GuestEnd> {
    let (config, fds) = control.receive::<VmConfig>()?;
    let spec = VmSpec::new(config, fds)?;
    let log = Log::new(spec.log.try_clone()?.into(), "vmm", &spec.sandbox_id);
    let hook_log = log.clone();
    std::panic::set_hook(Box::new(move |info| bug(&hook_log, info)));
    let (uid, gid) = (spec.uid, spec.gid);
    let (file_limit, threads) = (spec.file_limit(), spec.thread_limit());
    let accepted = spec.accept_missing.clone();
    let vm = Vm::build(spec, log)?;
    // From here on there are no paths, no privileges and no way back.
    let landlock = jail::enter((uid, gid), file_limit, threads, &accepted)?;
    let ours = control
        .try_clone()
        .context("copying the control socket failed")?;
    Ok(vm.run(ours, started_ns, landlock)?)
}

/// A panic is a bug: say where, and end the process without unwinding into code that assumes there are none.
fn bug(log: &Log, info: &PanicHookInfo<'_>) {
    log.error(&format!("bug: {info}"));
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(ExitCode::Bug as i32) };
}

fn serve_files() -> ExitCode {
    jail::set_name(c"bulkhead-fs");
    match control_socket() {
        Ok(control) => bulkhead_vmm::fs::main(&control),
        Err(error) => {
            eprintln!("bulkhead-vmm: {error:#}");
            ExitCode::Failed
        }
    }
}
