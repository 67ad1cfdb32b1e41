//! `delete`: what a dead shim has left. It asks no guest; the ledger says what there is.

use std::{
    fs,
    io::{self, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use bulkhead_shim::{
    config::Config,
    containerd::{CONFIG_NAME, bootstrap},
    ledger::{self, Reclaimed},
    oci::{self, Bundle, Role},
    sys::process,
};

use crate::flags::Flags;

/// containerd gives this command 5 s altogether.
const PATIENCE: Duration = Duration::from_secs(2);

/// Gives back a pod, when the id is a pod's; a member's own traces go with its pod.
pub fn delete(flags: &Flags) -> Result<()> {
    let bundle = match flags.bundle.as_os_str().is_empty() {
        true => PathBuf::from("."),
        false => flags.bundle.clone(),
    };
    let pid = fs::read_to_string(bundle.join("init.pid")).ok();
    let pid = pid.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    if !is_member(&bundle, &flags.id) {
        give_back(flags, &bundle)?;
        remove_socket(&bundle);
    }
    io::stdout()
        .write_all(&bootstrap::delete_reply(pid, SystemTime::now()))
        .context("cannot write the answer")
}

fn is_member(bundle: &Path, id: &str) -> bool {
    let Ok(bundle) = Bundle::load(bundle) else {
        return false;
    };
    let annotations = bundle.spec.annotations().clone().unwrap_or_default();
    matches!(oci::role(&annotations, id), Role::Member(_))
}

fn give_back(flags: &Flags, bundle: &Path) -> Result<()> {
    let named = fs::read_to_string(bundle.join(CONFIG_NAME)).ok();
    let config = Config::load(named.as_deref().map(Path::new))?;
    let reclaim = || ledger::reclaim(&config.state_dir, &flags.namespace, &flags.id);
    let mut reclaimed = reclaim()?;
    if let Reclaimed::Alive(owner) = reclaimed {
        // containerd has given up on a shim that does not answer: it must not go on.
        if let Some(pidfd) = owner.and_then(|owner| owner.open().ok().flatten()) {
            process::send_signal(pidfd.as_fd(), libc::SIGKILL).context("cannot kill the shim")?;
            process::wait_gone(pidfd.as_fd(), PATIENCE).context("cannot wait for the shim")?;
        }
        reclaimed = reclaim()?;
    }
    match reclaimed {
        Reclaimed::Nothing => Ok(()),
        Reclaimed::Done(left) if left.is_empty() => Ok(()),
        Reclaimed::Done(left) => {
            let left: Vec<String> = left.iter().map(ToString::to_string).collect();
            anyhow::bail!("cannot give back {}; try `bulkhead gc`", left.join("; "))
        }
        Reclaimed::Alive(_) => anyhow::bail!("the shim of pod {:?} does not end", flags.id),
    }
}

/// By the file that `start` has written.
fn remove_socket(bundle: &Path) {
    let Ok(address) = fs::read_to_string(bundle.join("address")) else {
        return;
    };
    if let Some(path) = address.trim().strip_prefix("unix://") {
        // Its daemon may have removed it.
        let _ = fs::remove_file(path);
    }
}
