//! `bulkhead`: runs an OCI bundle in a microVM, says what a host can do, and tidies up after the dead.

mod check;
mod diff;
mod events;
mod failure;
mod gc;
mod image;
mod install;
mod layers;
mod network;
mod oci;
mod probe;
mod run;
mod signals;
mod streams;
mod template;
mod terminal;
mod uids;
mod version;

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use bulkhead_shim::{config::Config, pod::timeline::now_ns, sys::own};
use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};

use failure::Failure;

const ABOUT: &str =
    "Runs OCI containers, each in a small virtual machine with a kernel of its own.";

const EXIT_CODES: &str = "\
Commands for engines, with runc's flags and words:
  create, start, state, kill, delete, exec, run --detach, list, ps, pause, resume, update,
  events --stats ID, features, spec

Exit codes:
  0..255   of `run`: the container's; 128 + N when signal N ended it
  125      Bulkhead itself failed; one line on standard error says why
  1        the same of a command for engines; 255 of `exec`
  126      the container's program cannot be executed
  127      the container's program was not found
  1        of `check`: this host lacks something; of `gc`: something is left

Files:
  /etc/bulkhead/config.toml            configuration, optional
  /run/bulkhead/NAMESPACE/SANDBOX      ledger and mounts of a pod
  /run/bulkhead/.templates             templates
  /run/bulkhead-oci/ID                 a container of an engine; --root is another place
  /var/lib/bulkhead                    unpacked images, and what their containers write
  /var/log/bulkhead/audit.jsonl        audit log of all pods
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
    #[command(flatten)]
    engine: oci::Globals,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run a container in a new microVM, from an OCI bundle or an image, and exit with its status
    Run(run::Arguments),
    /// Say what this host can do, with a remedy for each missing thing; runs a small guest
    Check(check::Arguments),
    /// Give back what pods held whose owner is dead, and templates that nobody can use any more
    Gc(gc::Arguments),
    /// Show what has passed through the pods' network interfaces, and what was dropped
    Network(network::Arguments),
    /// Make, show and remove templates: machines from which pods go on in the place of booting
    Template(template::Arguments),
    /// Show and remove the images that `run` has unpacked
    Image(image::Arguments),
    /// Show the audit log and what comes: refusals, layers in force, blocked calls, limits, ends
    Events(events::Arguments),
    /// Make Bulkhead known to containerd and write a RuntimeClass for Kubernetes
    Install(install::Arguments),
    /// Undo what `install` has done
    Uninstall(install::Arguments),
    /// Print the versions and build ids of all parts
    Version(version::Arguments),
    #[command(flatten)]
    Engine(oci::Verb),
    /// Look after a container of an engine
    #[command(hide = true)]
    Monitor(oci::Monitor),
}

fn main() -> ExitCode {
    let began_ns = now_ns();
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => return explain(&error),
    };
    let kept = match cli.command {
        // It has descriptors of its own, and another log.
        Some(Command::Monitor(_)) => Ok(()),
        _ => {
            log_to_stderr(cli.debug);
            own::keep_inherited(3).map_err(Failure::from)
        }
    };
    let code = match kept.and_then(|()| act(cli, began_ns)) {
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
            .filter(|command| !command.is_hide_set())
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
    let engine = oci::Engine::new(&cli.engine, path, cli.debug);
    match cli.command {
        _ if cli.version => version::print(&version::Arguments { json: cli.json }, path),
        Some(Command::Version(arguments)) => version::print(&arguments, path),
        Some(Command::Run(arguments)) => match arguments.detached()? {
            Some(words) => engine.run(|engine| oci::run_detached(engine, &words)),
            None => run::run(arguments, &load()?, began_ns),
        },
        Some(Command::Engine(verb)) => engine.run(|engine| engine.act(verb)),
        Some(Command::Monitor(arguments)) => oci::monitor(&engine, &arguments),
        Some(Command::Check(arguments)) => {
            own::narrow()?;
            check::check(&arguments, &load()?)
        }
        Some(Command::Gc(arguments)) => {
            own::narrow()?;
            gc::gc(&arguments, &load()?)
        }
        Some(Command::Template(arguments)) => {
            own::narrow()?;
            template::template(&arguments, &load()?)
        }
        Some(Command::Image(arguments)) => {
            own::narrow()?;
            image::image(&arguments, &load()?)
        }
        Some(Command::Network(arguments)) => network::network(&arguments, &load()?),
        Some(Command::Events(arguments)) => match arguments.of_container()? {
            Some((id, interval)) => engine.run(|engine| oci::of_container(engine, id, interval)),
            None => events::events(&arguments, &load()?),
        },
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Words, one a line: they are understood, or refused in words.
    fn words(data: &[u8]) {
        let text = String::from_utf8_lossy(data);
        let words = ["bulkhead"].into_iter().chain(text.split('\n'));
        if let Err(error) = Cli::try_parse_from(words) {
            let told = error.to_string();
            assert!(!told.is_empty());
        }
    }

    #[test]
    fn fuzz_bulkhead_words() {
        bulkhead_fuzz::run("bulkhead_words", words);
    }
}
