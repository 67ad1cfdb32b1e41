//! `bulkhead check`: what this host can do, proven where it can be.

use std::path::Path;

use bulkhead_shim::{
    cgroup,
    config::Config,
    pod::{Parts, Request, Sandbox, Size},
};
use serde::Serialize;

use crate::{
    failure::{self, Failure},
    layers, probe, uids,
};

/// mount_setattr(2), cgroup.kill and CLONE_INTO_CGROUP need 5.7 to 5.14; 6.1 is what is tested.
const OLDEST_KERNEL: (u32, u32) = (6, 1);
/// KVM_GET_API_VERSION of every kernel since 2007.
const KVM_API_VERSION: i32 = 12;
/// The guest that proves a boot.
const PROOF_MIB: u64 = 128;

#[derive(clap::Args)]
pub struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One thing that a host must have, or, where it is fine and yet has a remedy, should be without.
#[derive(Debug, Serialize)]
pub struct Item {
    pub name: &'static str,
    pub ok: bool,
    pub found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

type Found = Result<String, (String, &'static str)>;

fn item(name: &'static str, found: Found) -> Item {
    match found {
        Ok(found) => Item {
            name,
            ok: true,
            found,
            remedy: None,
        },
        Err((found, remedy)) => Item {
            name,
            ok: false,
            found,
            remedy: Some(remedy.into()),
        },
    }
}

pub fn check(arguments: &Arguments, config: &Config) -> Result<u8, Failure> {
    let mut items = vec![
        item("root", root()),
        item("kernel", kernel()),
        item("cgroup", cgroups()),
        item("namespaces", namespaces()),
        item("parts", parts(config)),
        item("kvm", kvm(&config.kvm_device)),
    ];
    // No hindrance to running pods, so it is no reason not to try.
    let uids = uids::item(config);
    if items.last().is_some_and(|kvm| kvm.ok) {
        items.push(item("kvm speed", speed(&config.kvm_device)));
    }
    // A guest that is interpreted takes minutes to fail, and without the rest it cannot begin.
    let (guest, layers) = match items.iter().all(|item| item.ok) {
        true => guest(config),
        false => (
            Err(("not tried".into(), "mend the above first")),
            Vec::new(),
        ),
    };
    items.push(item("guest", guest));
    items.extend(layers);
    items.push(uids);
    let missing = items.iter().any(|item| !item.ok);
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&items)?);
    } else {
        for item in &items {
            let verdict = match (item.ok, &item.remedy) {
                (true, None) => "ok",
                (true, Some(_)) => "WARNING",
                (false, _) => "MISSING",
            };
            println!("{:<12}{verdict:<9}{}", item.name, item.found);
            if let Some(remedy) = &item.remedy {
                println!("{:<21}-> {remedy}", "");
            }
        }
    }
    Ok(u8::from(missing))
}

fn root() -> Found {
    match nix::unistd::geteuid().is_root() {
        true => Ok("running as root".into()),
        false => Err((
            "not running as root".into(),
            "run it as root: mounts, cgroups and namespaces need it",
        )),
    }
}

fn kernel() -> Found {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    let version = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => (0, 0),
    };
    match version >= OLDEST_KERNEL {
        true => Ok(format!("Linux {release}")),
        false => Err((format!("Linux {release}"), "install Linux 6.1 or newer")),
    }
}

fn cgroups() -> Found {
    cgroup::require_v2().map_err(|error| {
        (
            error.to_string(),
            "boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 on /sys/fs/cgroup",
        )
    })?;
    let path = Path::new(cgroup::ROOT).join("cgroup.controllers");
    let controllers = std::fs::read_to_string(path).unwrap_or_default();
    let missing: Vec<&str> = ["cpu", "memory", "io", "pids"]
        .into_iter()
        .filter(|name| {
            !controllers
                .split_ascii_whitespace()
                .any(|word| word == *name)
        })
        .collect();
    match missing.is_empty() {
        true => Ok(format!("version 2 with {}", controllers.trim())),
        false => Err((
            format!("version 2 without {}", missing.join(", ")),
            "enable these controllers in the host's kernel, or hand them down to this cgroup",
        )),
    }
}

fn namespaces() -> Found {
    let needed = ["mnt", "pid", "net", "ipc", "uts", "cgroup"];
    let is_missing = |name: &&str| !Path::new("/proc/self/ns").join(name).exists();
    match needed.iter().find(|name| is_missing(name)) {
        None => Ok(needed.join(" ")),
        Some(name) => Err((
            format!("the kernel has no {name} namespaces"),
            "use a kernel that is built with all namespaces",
        )),
    }
}

fn parts(config: &Config) -> Found {
    const REMEDY: &str = "install all parts of bulkhead, or name them in the configuration";
    let installed = config
        .installed()
        .map_err(|error| (failure::line(&error), REMEDY))?;
    for path in [&installed.vmm, &installed.kernel, &installed.initramfs] {
        if !path.is_file() {
            return Err((format!("no file {}", path.display()), REMEDY));
        }
    }
    let directory = installed.vmm.parent().unwrap_or(Path::new("/"));
    Ok(format!("in {}", directory.display()))
}

fn kvm(device: &Path) -> Found {
    let is_root = nix::unistd::geteuid().is_root();
    match probe::version(device) {
        Ok(KVM_API_VERSION) => Ok(format!("{} opens", device.display())),
        Ok(_) => Err((
            format!("{} is not KVM", device.display()),
            "name the KVM device as kvm_device in the configuration",
        )),
        Err(error) => Err((
            format!("{}: {error}", device.display()),
            remedy(error.errno(), is_root),
        )),
    }
}

/// What helps against an errno of opening the device.
fn remedy(errno: i32, is_root: bool) -> &'static str {
    match errno {
        libc::EACCES if !is_root => {
            "join the group kvm (usermod -aG kvm USER, then log in again), or run as root"
        }
        // Root is past the file's mode: something above it says no.
        libc::EACCES | libc::EPERM => {
            "allow the device where it is denied: in the container that this runs in (--device /dev/kvm), or in AppArmor or SELinux"
        }
        _ => {
            "load kvm_intel or kvm_amd, turn on virtualisation in the firmware, or choose a machine with nested virtualisation"
        }
    }
}

fn speed(device: &Path) -> Found {
    let speed = probe::measure(device).map_err(|error| {
        const REMEDY: &str = "KVM could not run a guest of three instructions: see `dmesg`; another hypervisor may hold the processor";
        (error, REMEDY)
    })?;
    let text = format!(
        "kernel mode runs at {:.3} M loops/s in a guest, {:.3} M here",
        speed.guest / 1e6,
        speed.host / 1e6
    );
    match speed.is_native() {
        true => Ok(text),
        false => Err((
            text,
            "this host's KVM interprets a guest's kernel instead of executing it; use a machine with hardware virtualisation",
        )),
    }
}

/// Boots the product's kernel and agent, and looks at the jails meanwhile.
fn guest(config: &Config) -> (Found, Vec<Item>) {
    let boot = || -> Result<(String, Vec<Item>), String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| error.to_string())?;
        runtime.block_on(boot(config))
    };
    const REMEDY: &str = "see `bulkhead run --debug --serial FILE` for what the guest did";
    match boot() {
        Ok((found, layers)) => (Ok(found), layers),
        Err(error) => (Err((error, REMEDY)), Vec::new()),
    }
}

async fn boot(config: &Config) -> Result<(String, Vec<Item>), String> {
    let line = |error: bulkhead_shim::pod::Error| failure::line(&error);
    let parts = Parts::open(config).map_err(line)?;
    let id = format!("check-{}", std::process::id());
    let size = Size {
        vcpus: 1,
        memory_mib: PROOF_MIB,
    };
    let request = Request::plain("check", &id, size);
    let start = std::time::Instant::now();
    let mut sandbox = Sandbox::launch(config, &parts, request)
        .await
        .map_err(line)?;
    let ready = sandbox.ready("check").await;
    let took = start.elapsed();
    let mut layers = Vec::new();
    if ready.is_ok() {
        layers = layers::items(&sandbox.jailed().await);
        sandbox.power_off().await;
    }
    let left = sandbox.give_back();
    let ready = ready.map_err(line)?;
    if let Some(leftover) = left.first() {
        return Err(format!("it ran, but left {leftover}"));
    }
    let found = format!(
        "Linux {} was ready in {} ms",
        ready.kernel_release,
        took.as_millis()
    );
    Ok((found, layers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_why_kvm_does_not_open_has_its_own_remedy() {
        for (errno, is_root, word) in [
            (libc::EACCES, false, "group kvm"),
            (libc::EACCES, true, "AppArmor"),
            (libc::EPERM, false, "--device"),
            (libc::EPERM, true, "--device"),
            (libc::ENOENT, false, "kvm_intel"),
            (libc::ENODEV, true, "kvm_intel"),
            (libc::ENXIO, true, "kvm_intel"),
        ] {
            let remedy = remedy(errno, is_root);
            assert!(remedy.contains(word), "{errno} {is_root}: {remedy}");
        }
    }
}
