//! `start`: a socket, a daemon that serves it, an address on standard output. Nothing on standard error unless it fails.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::{
        fs::DirBuilderExt,
        net::{UnixListener, UnixStream},
    },
    path::Path,
};

use anyhow::{Context, Result, bail};
use bulkhead_shim::{
    containerd::{
        CONFIG_NAME,
        bootstrap::{self, Greeting},
    },
    oci::{self, Bundle, Role},
    sys::daemon,
};
use nix::sys::stat::{Mode, umask};

use crate::{daemon::EVENTS_ADDRESS, flags::Flags};

/// Largest greeting, in bytes.
const MAX_GREETING: u64 = 4 << 20;

/// Starts or finds the shim of the pod that the container belongs to. The working directory is its bundle.
pub fn start(flags: &Flags) -> Result<()> {
    let mut greeting = Vec::new();
    io::stdin()
        .take(MAX_GREETING)
        .read_to_end(&mut greeting)
        .context("cannot read the standard input")?;
    let greeting = Greeting::parse(&greeting, &flags.id, &flags.namespace);
    let group = group(&flags.id)?;
    let directory = greeting.socket_dir();
    let path = bootstrap::socket_path(&directory, &flags.address, &flags.namespace, &group);
    let address = format!("unix://{}", path.display());
    if group == flags.id {
        note_config(&greeting)?;
        if let Some(listener) = bind(&directory, &path)? {
            let started = launch(flags, &greeting, &listener);
            if started.is_err() {
                let _ = fs::remove_file(&path);
            }
            started?;
        }
    } else if UnixStream::connect(&path).is_err() {
        bail!("the shim of pod {group:?}, which this container belongs to, does not run");
    }
    // containerd 1.7 and CRI-O find the shim again by this file, and by nothing else.
    fs::write("address", &address).context("cannot write the file \"address\" of the bundle")?;
    io::stdout()
        .write_all(&greeting.reply(&address))
        .context("cannot write the address")
}

/// Writes down which configuration the runtime options name: CreateSandbox is not told again.
fn note_config(greeting: &Greeting) -> Result<()> {
    let named = bootstrap::config_path(greeting.options()).map_err(anyhow::Error::msg)?;
    let Some(path) = named else { return Ok(()) };
    fs::write(CONFIG_NAME, path.as_os_str().as_encoded_bytes())
        .with_context(|| format!("cannot write the file {CONFIG_NAME:?} of the bundle"))
}

/// The pod: by the annotations of config.json, which a sandbox of containerd 2's own kind does not have.
fn group(id: &str) -> Result<String> {
    if !Path::new("config.json").exists() {
        return Ok(id.into());
    }
    let bundle = Bundle::load(Path::new("."))?;
    let annotations = bundle.spec.annotations().clone().unwrap_or_default();
    Ok(match oci::role(&annotations, id) {
        Role::Member(sandbox) => sandbox,
        Role::Alone | Role::Sandbox => id.into(),
    })
}

/// The listening socket; `None`: a shim listens there already.
fn bind(directory: &Path, path: &Path) -> Result<Option<UnixListener>> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("cannot make the directory {}", directory.display()))?;
    let bound = match bind_private(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            // A dead shim's.
            fs::remove_file(path)
                .with_context(|| format!("cannot remove the socket {}", path.display()))?;
            bind_private(path)
        }
        other => other,
    };
    let listener = bound.with_context(|| format!("cannot listen at {}", path.display()))?;
    Ok(Some(listener))
}

/// A socket that nobody else could connect to at any moment: a mode that is set later comes too late.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    // The mask is the process': this one has a single thread.
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    umask(before);
    bound
}

fn launch(flags: &Flags, greeting: &Greeting, listener: &UnixListener) -> Result<()> {
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let mut arguments = vec!["-namespace", &flags.namespace, "-id", &flags.id];
    arguments.extend(["-address", &flags.address]);
    let mut debug = flags.debug;
    if let Greeting::Bootstrap(params) = greeting {
        // INFO is 0, and more talkative is less.
        debug |= params.log_level.value() < 0;
    }
    let events = greeting.events_address(std::env::var(EVENTS_ADDRESS).ok());
    let environment = [(EVENTS_ADDRESS, events.as_str())];
    if debug {
        arguments.push("-debug");
    }
    let listener = listener.try_clone().context("cannot copy the socket")?;
    let pid = daemon::spawn(&own, &arguments, &environment, vec![listener.into()])
        .context("cannot start the daemon")?;
    adjust_oom_score(pid);
    Ok(())
}

/// One more than containerd's own, so that the kernel takes the shim before it takes containerd.
fn adjust_oom_score(pid: u32) {
    let parent = std::os::unix::process::parent_id();
    let Ok(text) = fs::read_to_string(format!("/proc/{parent}/oom_score_adj")) else {
        return;
    };
    if let Ok(score) = text.trim().parse::<i32>() {
        let score = (score + 1).min(1000).to_string();
        // Without it the kernel's choice is a little worse.
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), score);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_socket_is_roots_from_its_first_moment() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = bind_private(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
