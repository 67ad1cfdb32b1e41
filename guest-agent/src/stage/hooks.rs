//! startContainer hooks: run in the container's namespaces by its init, just before it executes its program.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_agent_protocol::agent;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::message::Failure;
use super::step::Step;

/// How much of a failed hook's standard error is quoted, in bytes.
const MAX_QUOTE: usize = 1024;

/// Runs the hooks in order; the first that fails ends the start (OCI runtime.md#lifecycle).
pub fn run(hooks: &[agent::Hook], state: &[u8]) -> Result<(), Failure> {
    hooks.iter().try_for_each(|hook| run_one(hook, state))
}

fn run_one(hook: &agent::Hook, state: &[u8]) -> Result<(), Failure> {
    let name = &hook.path;
    let mut command = Command::new(&hook.path);
    if let Some((arg0, rest)) = hook.args.split_first() {
        command.arg0(arg0).args(rest);
    }
    command
        .env_clear()
        .envs(hook.env.iter().filter_map(|pair| pair.split_once('=')));
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // The hook gets a group of its own, so that a timeout ends whatever it has started.
    command.process_group(0);
    linux::process::default_signals(&mut command);
    let mut child = command
        .spawn()
        .step(|| format!("cannot run the startContainer hook {name}"))?;
    let deadline = (hook.timeout_secs != 0)
        .then(|| Instant::now() + Duration::from_secs(hook.timeout_secs.into()));
    let result = converse(&mut child, state, deadline);
    let errors = match result {
        Ok(errors) => errors,
        Err(error) => {
            // The group that the child was started in; it is not reaped yet.
            let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
            let _ = child.wait();
            return Err(Failure::internal(format!(
                "startContainer hook {name}: {error}"
            )));
        }
    };
    let status = child
        .wait()
        .step(|| format!("cannot wait for the startContainer hook {name}"))?;
    if status.success() {
        return Ok(());
    }
    Err(Failure::internal(format!(
        "startContainer hook {name} failed ({status}): {}",
        String::from_utf8_lossy(&errors).trim()
    )))
}

/// Feeds the state and collects standard error until the hook closes it or the deadline passes, whichever is first.
fn converse(child: &mut Child, mut state: &[u8], deadline: Option<Instant>) -> io::Result<Vec<u8>> {
    let pidfd = linux::process::open_pidfd(child.id() as i32)?;
    let mut stdin = child.stdin.take();
    let mut stderr = child.stderr.take();
    for pipe in [
        stdin.as_ref().map(AsFd::as_fd),
        stderr.as_ref().map(AsFd::as_fd),
    ]
    .into_iter()
    .flatten()
    {
        nix::fcntl::fcntl(
            pipe,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )?;
    }
    let mut errors = Vec::new();
    let mut exited = false;
    loop {
        // What is written before the exit is in the pipe by then: after it, one last pass without waiting.
        let timeout = match (exited, deadline) {
            (true, _) => PollTimeout::ZERO,
            (false, None) => PollTimeout::NONE,
            (false, Some(deadline)) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "it did not end within its timeout",
                    ));
                }
                // Rounded up, or the last millisecond would be spent polling.
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut fds = vec![PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        if let Some(stderr) = &stderr {
            fds.push(PollFd::new(stderr.as_fd(), PollFlags::POLLIN));
        }
        if let Some(stdin) = &stdin {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLOUT));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ended = fds[0].any().unwrap_or(false);
        drop(fds);
        feed(&mut stdin, &mut state);
        collect(&mut stderr, &mut errors);
        if exited {
            return Ok(errors);
        }
        exited = ended;
    }
}

/// Writes what the pipe takes; a hook that does not read its state is not at fault.
fn feed(stdin: &mut Option<std::process::ChildStdin>, state: &mut &[u8]) {
    let Some(pipe) = stdin else { return };
    let done = match pipe.write(state) {
        Ok(written) => {
            *state = &state[written..];
            state.is_empty()
        }
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    };
    if done {
        *stdin = None;
    }
}

fn collect(stderr: &mut Option<std::process::ChildStderr>, errors: &mut Vec<u8>) {
    let Some(pipe) = stderr else { return };
    let mut buffer = [0u8; 1024];
    loop {
        match pipe.read(&mut buffer) {
            Ok(0) => {
                *stderr = None;
                return;
            }
            Ok(length) => {
                let room = MAX_QUOTE.saturating_sub(errors.len());
                errors.extend(&buffer[..length.min(room)]);
            }
            Err(_) => return,
        }
    }
}
