//! OCI bundles, made by the tools that users have.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::netns::Netns;
use crate::process::{Ran, Runtime, Started, run};

/// Where `tests/run` puts the debootstrapped root (lab exec --share).
const DEBIAN_ROOT: &str = "/share";

/// A bundle in a directory of its own, removed with it.
pub struct Bundle {
    dir: TempDir,
    config: Value,
}

impl Bundle {
    /// `runc spec` over a root unpacked from Debian's busybox-static.
    pub fn busybox() -> Bundle {
        let dir = TempDir::with_prefix("bundle-").expect("a temporary directory");
        busybox_root(&dir.path().join("rootfs"));
        Bundle::spec(dir)
    }

    /// `runc spec` over a root with the lab's own programs: ping, nc, python3, iperf3, nft, iptables.
    pub fn tools() -> Bundle {
        let dir = TempDir::with_prefix("bundle-").expect("a temporary directory");
        let root = dir.path().join("rootfs");
        for made in ["dev", "etc", "proc", "run", "sys", "tmp", "usr", "var"] {
            fs::create_dir_all(root.join(made)).expect("a directory in the root");
        }
        for link in ["bin", "sbin", "lib", "lib64"] {
            symlink(format!("usr/{link}"), root.join(link)).expect("a link in the root");
        }
        let bundle = Bundle::spec(dir).capabilities(&["CAP_NET_RAW"]);
        ["/usr", "/etc"].into_iter().fold(bundle, |bundle, path| {
            bundle.bind(Path::new(path), path, &["rbind", "ro"])
        })
    }

    /// Lets the container have the interfaces of a network namespace.
    pub fn network(self, netns: &Netns) -> Bundle {
        self.network_at(&netns.path())
    }

    /// The same of one that somebody else has made.
    pub fn network_at(self, path: &Path) -> Bundle {
        self.edit(|config| {
            let listed = config["linux"]["namespaces"].as_array_mut();
            for namespace in listed.expect("runc spec lists namespaces") {
                if namespace["type"] == "network" {
                    namespace["path"] = json!(path);
                }
            }
        })
    }

    /// Gives the process capabilities beyond those of `runc spec`.
    pub fn capabilities(self, names: &[&str]) -> Bundle {
        self.edit(|config| {
            for set in ["bounding", "effective", "permitted"] {
                let set = config["process"]["capabilities"][set].as_array_mut();
                set.expect("runc spec lists them")
                    .extend(names.iter().map(|name| json!(name)));
            }
        })
    }

    /// `runc spec` over the whole Debian root, writable through an overlay that the host makes.
    pub fn debian() -> Bundle {
        let dir = TempDir::with_prefix("bundle-").expect("a temporary directory");
        let [root, upper, work] = ["rootfs", "upper", "work"].map(|name| dir.path().join(name));
        for made in [&root, &upper, &work] {
            fs::create_dir(made).expect("a directory in the bundle");
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            debian_root().display(),
            upper.display(),
            work.display()
        );
        must(
            Command::new("mount")
                .args(["-t", "overlay", "overlay", "-o", &options])
                .arg(&root),
        );
        Bundle::spec(dir)
    }

    /// A bundle that another tool has made.
    pub fn adopt(dir: TempDir) -> Bundle {
        let text =
            fs::read_to_string(dir.path().join("config.json")).expect("the tool wrote config.json");
        let mut config: Value = serde_json::from_str(&text).expect("the tool wrote JSON");
        config["process"]["terminal"] = json!(false);
        Bundle { dir, config }
    }

    fn spec(dir: TempDir) -> Bundle {
        must(Command::new("runc").arg("spec").current_dir(dir.path()));
        let mut bundle = Bundle::adopt(dir);
        bundle.config["root"]["readonly"] = json!(false);
        bundle
    }

    /// The bundle's directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The root file system on the host.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    /// Sets `process.args`.
    pub fn args(mut self, args: &[&str]) -> Bundle {
        self.config["process"]["args"] = json!(args);
        self
    }

    /// Runs a shell script as the container's process.
    pub fn script(self, script: &str) -> Bundle {
        self.args(&["/bin/sh", "-c", script])
    }

    /// Changes config.json.
    pub fn edit(mut self, change: impl FnOnce(&mut Value)) -> Bundle {
        change(&mut self.config);
        self
    }

    /// Adds a bind mount of `source`.
    pub fn bind(self, source: &Path, destination: &str, options: &[&str]) -> Bundle {
        let mount = json!({"destination": destination, "type": "bind", "source": source, "options": options});
        self.edit(|config| {
            config["mounts"]
                .as_array_mut()
                .expect("runc spec lists mounts")
                .push(mount)
        })
    }

    /// Writes config.json, for a command that the caller makes.
    pub fn write(&self) {
        let text = serde_json::to_vec_pretty(&self.config).expect("a JSON value");
        fs::write(self.path().join("config.json"), text).expect("config.json is writable");
    }

    /// Runs it to its end under Bulkhead.
    pub fn run(&self) -> Ran {
        self.run_with(Runtime::Bulkhead, &[])
    }

    /// Runs it to its end under `runtime`, with more words for the runtime's `run`.
    pub fn run_with(&self, runtime: Runtime, words: &[&str]) -> Ran {
        self.start(runtime, words).finish()
    }

    /// Runs it in a machine that boots, whatever templates there are.
    pub fn boot(&self, words: &[&str]) -> Ran {
        let config = self.dir.path().join("bulkhead.toml");
        fs::write(&config, "template = \"off\"\n").expect("writable");
        let config = config.to_str().expect("a plain path");
        self.run_with(Runtime::Bulkhead, &[&["--config", config], words].concat())
    }

    /// Starts it; stdin, stdout and stderr are pipes.
    pub fn start(&self, runtime: Runtime, words: &[&str]) -> Started {
        self.write();
        Started::spawn(runtime.run_command(self.path(), words, &fresh_id()))
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        // Only Bundle::debian mounts here; a failure shows in the temporary directory that then stays.
        run(Command::new("umount").arg("-q").arg(self.root()));
    }
}

/// The debootstrapped root that the suites share, read-only.
///
/// # Panics
/// When it is not there: `tests/run` brings it, see docs/testing.md.
pub fn debian_root() -> PathBuf {
    let root = PathBuf::from(DEBIAN_ROOT);
    assert!(
        root.join("usr/bin/python3").exists(),
        "no Debian root at {DEBIAN_ROOT}: run the suite by tests/run"
    );
    root
}

/// An id that no other container of this test run has.
pub fn fresh_id() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(
        "t{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// Unpacks busybox into a directory that becomes a root.
pub fn busybox_root(root: &Path) {
    for made in ["bin", "dev", "etc", "proc", "sys", "tmp", "root"] {
        fs::create_dir_all(root.join(made)).expect("a directory in the root");
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").expect("etc/passwd");
    fs::copy("/bin/busybox", root.join("bin/busybox"))
        .expect("Debian's busybox-static is installed");
    let list = run(Command::new("/bin/busybox").arg("--list")).ok();
    for applet in list.lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).expect("an applet's link");
    }
}

/// Runs a tool that has to succeed.
#[track_caller]
pub fn must(command: &mut Command) {
    let ran = run(command);
    assert_eq!(ran.status, 0, "{command:?}: {ran}");
}
