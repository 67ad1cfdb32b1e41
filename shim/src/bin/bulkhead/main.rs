//! `bulkhead`: runs an OCI bundle in a microVM, says what a host can do, and tidies up after the dead.

mod check;
mod diff;
mod failure;
mod gc;
mod install;
mod network;
mod probe;
mod run;
mod signals;
mod streams;
mod terminal;
mod uids;
mod version;

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use bulkhead_shim::{config::Config, pod::timeline::now_ns};
use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};

use failure::Failure;

const ABOUT: &str =
    "Runs OCI containers, each in a small virtual machine with a kernel of its own.";

const EXIT_CODES: &str = "\
Exit codes:
  0..255   of `run`: the container's; 128 + N when signal N ended it
  125      Bulkhead itself failed; one line on standard error says why
  126      the container's program cannot be executed
  127      the container's program was not found
  1        of `check`: this host lacks something; of `gc`: something is left

Files:
  /etc/bulkhead/config.toml            configuration, optional
  /run/bulkhead/NAMESPACE/SANDBOX      ledger and mounts of a pod
  PREFIX/libexec/bulkhead              bulkhead-vmm, vmlinux, initramfs";

#[derive(Parser)]
#[command(name = "bulkhead", about = ABOUT, after_help = EXIT_CODES, disable_version_flag = true)]
struct Cli {
    /// Read this configuration instead of /etc/bulkhead/config.toml
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// Log what happens to standard error, with the lines of the VMM, the fs process and the agent
    #[arg(long, global = true)]
    debug: bool,
    /// As `bulkhead version`; the first line is for engines
    #[arg(long)]
    version: bool,
    /// With --version: print JSON
    #[arg(long, requires = "version", hide = true)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the container of an OCI bundle in a new microVM, and exit with its status
    Run(run::Arguments),
    /// Say what this host can do, with a remedy for each missing thing; runs a small guest
    Check(check::Arguments),
    /// Give back what pods held whose owner is dead
    Gc(gc::Arguments),
    /// Show what has passed through the pods' network interfaces, and what was dropped
    Network(network::Arguments),
    /// Make Bulkhead known to containerd and write a RuntimeClass for Kubernetes
    Install(install::Arguments),
    /// Undo what `install` has done
    Uninstall(install::Arguments),
    /// Print the versions and build ids of all parts
    Version(version::Arguments),
}

fn main() -> ExitCode {
    let began_ns = now_ns();
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => return explain(&error),
    };
    log_to_stderr(cli.debug);
    let code = match act(cli, began_ns) {
        Ok(code) => code,
        Err(failure) => {
            terminal::restore();
            failure.print();
            failure.code
        }
    };
    terminal::restore();
    // Not by returning: a thread may sit in a read of standard input for ever.
    std::process::exit(code.into());
}

/// What clap has to say, on the stream that it belongs to. Help is no failure.
fn explain(error: &clap::Error) -> ExitCode {
    if error.kind() == ErrorKind::InvalidSubcommand {
        // Engines and users try the verbs of other tools. What clap finds similar ("install" to "list") helps nobody.
        let command = Cli::command();
        let names: Vec<&str> = command
            .get_subcommands()
            .map(|command| command.get_name())
            .collect();
        let wrong = error.get(clap::error::ContextKind::InvalidSubcommand);
        let wrong = wrong.map(ToString::to_string).unwrap_or_default();
        let known = names.join(", ");
        Failure::new(format!("no command {wrong:?}; there are {known}")).print();
        return ExitCode::from(failure::OWN);
    }
    // There is nowhere to report a closed stream to.
    let _ = error.print();
    match error.use_stderr() {
        true => ExitCode::from(failure::OWN),
        false => ExitCode::SUCCESS,
    }
}

fn act(cli: Cli, began_ns: u64) -> Result<u8, Failure> {
    let path = cli.config.as_deref();
    let load = || Config::load(path);
    match cli.command {
        _ if cli.version => version::print(&version::Arguments { json: cli.json }, path),
        Some(Command::Version(arguments)) => version::print(&arguments, path),
        Some(Command::Run(arguments)) => run::run(&arguments, &load()?, began_ns),
        Some(Command::Check(arguments)) => check::check(&arguments, &load()?),
        Some(Command::Gc(arguments)) => gc::gc(&arguments, &load()?),
        Some(Command::Network(arguments)) => network::network(&arguments, &load()?),
        Some(Command::Install(arguments)) => install::install(&arguments),
        Some(Command::Uninstall(arguments)) => install::uninstall(&arguments),
        None => {
            Cli::command().print_help()?;
            Ok(0)
        }
    }
}

/// Warnings always; with `--debug` everything of ours.
fn log_to_stderr(debug: bool) {
    let filter = match debug {
        true => "warn,bulkhead_shim=debug,bulkhead=debug",
        // ttrpc logs what it also returns: the error is told once, by us.
        false => "error,ttrpc=off,bulkhead_shim=warn,bulkhead=warn",
    };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .init();
}
