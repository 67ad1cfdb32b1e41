//! A containerd of the tests' own: its root, state and sockets are beside nobody else's. Which one: Debian's, or what
//! `make test-containerd2` has built, in the directory that `BULKHEAD_CONTAINERD` names, and there the way to make pods that
//! `BULKHEAD_SANDBOXER` names.

use serde_json::json;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread;

use crate::bundle::{busybox_root, debian_root};
use crate::image::save_image;
use crate::process::{Ran, Started};
use crate::{eventually, failure};

/// How containerd names the runtimes.
pub const BULKHEAD: &str = "io.containerd.bulkhead.v1";
/// The control.
pub const RUNC: &str = "io.containerd.runc.v2";
/// The image that [`Engine::get`] imports.
pub const IMAGE: &str = "docker.io/library/busybox:test";

static ENGINE: OnceLock<Engine> = OnceLock::new();

/// A running containerd.
pub struct Engine {
    programs: Option<PathBuf>,
    root: PathBuf,
    state: PathBuf,
    daemon: Mutex<Child>,
}

impl Engine {
    /// The one of this test program; started at the first call, with [`IMAGE`] imported.
    pub fn get() -> &'static Engine {
        failure::watch();
        ENGINE.get_or_init(|| {
            // overlayfs cannot lie on the lab's root, which is one itself: this place is a tmpfs there.
            let root = PathBuf::from(format!("/var/lib/containerd/test-{}", std::process::id()));
            let state = PathBuf::from(format!("/run/containerd-test-{}", std::process::id()));
            fs::create_dir_all(&root).expect("a root for containerd");
            fs::create_dir_all(&state).expect("a state directory for containerd");
            // The parent that `ctr` names for every container, and that runc makes and leaves.
            for parent in ["default", "kubepods-test"] {
                fs::create_dir_all(Path::new("/sys/fs/cgroup").join(parent)).expect("cgroup v2");
            }
            write_network(&root);
            let programs = std::env::var_os("BULKHEAD_CONTAINERD").map(PathBuf::from);
            let config = match programs {
                None => configuration(&root, &state),
                Some(_) => configuration2(&root, &state, sandboxer()),
            };
            fs::write(root.join("config.toml"), config).expect("a configuration");
            let daemon = Mutex::new(start_daemon(&root, programs.as_deref()));
            let engine = Engine {
                programs,
                root,
                state,
                daemon,
            };
            engine.wait_until_it_serves();
            engine.import_busybox();
            engine
        })
    }

    /// The one of this test program, if there is one by now.
    pub(crate) fn started() -> Option<&'static Engine> {
        ENGINE.get()
    }

    /// Restarts containerd, which ends the tasks whose shims are gone, and removes the containers,
    /// for the next test.
    pub(crate) fn start_afresh(&self) {
        // It failed in the middle of a restart: nothing here would help.
        if matches!(self.daemon.try_lock(), Err(TryLockError::WouldBlock)) {
            return;
        }
        self.restart();
        for namespace in ["default", "k8s.io"] {
            let words = |words: &[&str]| self.run(&[&["--namespace", namespace], words].concat());
            for id in words(&["container", "ls", "-q"]).text().lines() {
                words(&["task", "rm", "--force", id]);
                words(&["container", "rm", id]);
            }
        }
    }

    fn wait_until_it_serves(&self) {
        let serves = || self.run(&["version"]).status == 0;
        eventually("containerd serves", serves, || self.log());
    }

    /// Ends containerd with SIGKILL and starts it again on the same directories.
    pub fn restart(&self) {
        let mut daemon = self.daemon();
        daemon.kill().expect("containerd is a child of ours");
        daemon.wait().expect("containerd is a child of ours");
        *daemon = start_daemon(&self.root, self.programs.as_deref());
        drop(daemon);
        self.wait_until_it_serves();
    }

    fn daemon(&self) -> MutexGuard<'_, Child> {
        // A test that failed meanwhile has left it as good as it was.
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What containerd, and with it the shims, have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.root.join("log")).unwrap_or_default()
    }

    /// containerd's socket.
    pub fn socket(&self) -> PathBuf {
        self.state.join("sock")
    }

    /// `ctr` with these words.
    pub fn ctr<W: AsRef<OsStr>>(&self, words: &[W]) -> Command {
        let mut command = match &self.programs {
            None => Command::new("ctr"),
            Some(programs) => Command::new(programs.join("ctr")),
        };
        command.arg("--address").arg(self.state.join("sock"));
        // Twenty at once on the lab's one emulated processor need more than the usual 10 s.
        command.args(["--connect-timeout", "300s"]);
        command.args(words);
        command
    }

    /// `crictl` with these words; `None`: it was not built, Debian's containerd is tested.
    pub fn crictl<W: AsRef<OsStr>>(&self, words: &[W]) -> Option<Command> {
        let mut command = Command::new(self.programs.as_ref()?.join("crictl"));
        let socket = format!("unix://{}", self.socket().display());
        command.args(["--runtime-endpoint", &socket, "--image-endpoint", &socket]);
        // An emulated host takes longer over a pod than the usual 2 s.
        command.args(["--timeout", "300s"]);
        command.args(words);
        Some(command)
    }

    /// `ctr` with these words, to its end.
    pub fn run<W: AsRef<OsStr>>(&self, words: &[W]) -> Ran {
        Started::spawn(self.ctr(words)).finish()
    }

    /// `ctr` with these words, which must succeed; its output.
    #[track_caller]
    pub fn ok<W: AsRef<OsStr>>(&self, words: &[W]) -> String {
        let ran = self.run(words);
        assert_eq!(
            ran.status,
            0,
            "{ran}\n--- containerd\n{}",
            tail(&self.log())
        );
        ran.text()
    }

    /// A running `ctr events` that hears what happens from now on. It says nothing when it has subscribed, so something is made to
    /// happen until it does.
    pub fn listen(&self) -> Started {
        let mut command = self.ctr(&["events"]);
        command.env("TZ", "UTC");
        let listener = Started::spawn(command);
        for count in 0..200 {
            if listener.output().contains("/namespaces/update") {
                return listener;
            }
            self.ok(&[
                "namespaces",
                "label",
                "default",
                &format!("listener={count}"),
            ]);
        }
        panic!("ctr events hears nothing: {}", listener.errors());
    }

    /// A container's bundle.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.state
            .join("io.containerd.runtime.v2.task/default")
            .join(id)
    }

    /// The socket of a container's shim.
    pub fn shim_socket(&self, id: &str) -> PathBuf {
        let address =
            fs::read_to_string(self.bundle(id).join("address")).expect("the shim wrote it");
        let path = address.trim().strip_prefix("unix://");
        path.expect("a plain address").into()
    }

    fn import_busybox(&self) {
        let root = tempfile::TempDir::with_prefix("root-").expect("a temporary directory");
        busybox_root(root.path());
        self.import(IMAGE, root.path());
    }

    /// An image with the whole root of a distribution (`debian.packages`), imported at the first call; its name.
    pub fn import_debian(&self) -> &'static str {
        static NAME: OnceLock<&str> = OnceLock::new();
        NAME.get_or_init(|| {
            let name = "docker.io/library/debian:test";
            self.import(name, &debian_root());
            name
        })
    }

    /// Makes an image of one layer.
    fn import(&self, name: &str, root: &Path) {
        let dir = tempfile::TempDir::with_prefix("image-").expect("a temporary directory");
        let image = dir.path().join("image.tar");
        let config = json!({"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/bin/sleep", "1000000"]});
        save_image(&image, name, root, &config);
        let image = image.to_str().expect("plain");
        self.ok(&["image", "import", image]);
        // CRI has a namespace of its own.
        self.ok(&["--namespace", "k8s.io", "image", "import", image]);
    }
}

fn configuration(root: &Path, state: &Path) -> String {
    let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
    format!(
        "version = 2
root = {root:?}
state = {state:?}
[grpc]
  address = {:?}
[{cri}]
  sandbox_image = {IMAGE:?}
[{cri}.cni]
  bin_dir = \"/usr/lib/cni\"
  conf_dir = {:?}
{}",
        state.join("sock"),
        root.join("cni"),
        runtimes(cri)
    ) + TIMEOUTS
}

/// containerd gives a shim 2 to 5 s for what costs it milliseconds: too little in an emulated lab
/// on a busy machine.
const TIMEOUTS: &str = "[timeouts]
  \"io.containerd.timeout.metrics.shimstats\" = \"60s\"
  \"io.containerd.timeout.shim.cleanup\" = \"60s\"
  \"io.containerd.timeout.shim.load\" = \"60s\"
  \"io.containerd.timeout.shim.shutdown\" = \"60s\"
  \"io.containerd.timeout.task.state\" = \"60s\"
";

/// The same for containerd 2, whose plugins have other names.
fn configuration2(root: &Path, state: &Path, sandboxer: &str) -> String {
    let cri = "plugins.\"io.containerd.cri.v1.runtime\"";
    format!(
        "version = 3
root = {root:?}
state = {state:?}
[grpc]
  address = {:?}
[plugins.\"io.containerd.cri.v1.images\".pinned_images]
  sandbox = {IMAGE:?}
[{cri}.cni]
  bin_dirs = [\"/usr/lib/cni\"]
  conf_dir = {:?}
{}  sandboxer = {sandboxer:?}
",
        state.join("sock"),
        root.join("cni"),
        runtimes(cri)
    ) + TIMEOUTS
}

/// The runtimes of both; what follows belongs to Bulkhead's.
fn runtimes(cri: &str) -> String {
    format!(
        "[{cri}.containerd]
  default_runtime_name = \"runc\"
[{cri}.containerd.runtimes.runc]
  runtime_type = {RUNC:?}
[{cri}.containerd.runtimes.bulkhead-with-host-devices]
  runtime_type = {BULKHEAD:?}
[{cri}.containerd.runtimes.bulkhead]
  runtime_type = {BULKHEAD:?}
  privileged_without_host_devices = true
"
    )
}

/// Who makes CRI's pods of the runtime `bulkhead`: "podsandbox", a pause container, or "shim", the sandbox service of the shim,
/// which containerd 1.7 does not use.
pub fn sandboxer() -> &'static str {
    match std::env::var("BULKHEAD_SANDBOXER").as_deref() {
        Err(_) | Ok("podsandbox") => "podsandbox",
        Ok("shim") => "shim",
        Ok(other) => panic!("BULKHEAD_SANDBOXER is {other:?}: podsandbox and shim are known"),
    }
}

/// A network for pods that needs nothing of the host.
fn write_network(root: &Path) {
    let network = json!({
        "cniVersion": "1.0.0", "name": "test",
        "plugins": [{"type": "ptp", "ipam": {
            "type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]], "dataDir": root.join("cni-data"),
        }}],
    });
    fs::create_dir_all(root.join("cni")).expect("a directory");
    fs::write(root.join("cni/test.conflist"), network.to_string()).expect("writable");
}

fn start_daemon(root: &Path, programs: Option<&Path>) -> Child {
    let log = fs::File::options()
        .append(true)
        .create(true)
        .open(root.join("log"))
        .expect("a log");
    let config = root.join("config.toml");
    // runc's shim is that of the same containerd.
    let usual = std::env::var("PATH").expect("every process has one here");
    let path = match programs {
        None => usual,
        Some(programs) => format!("{}:{usual}", programs.display()),
    };
    // Its parent's end is that of the thread that started it: one that stays.
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "containerd", "--config"])
            .arg(config)
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("util-linux and containerd are installed");
        sender.send(child).expect("somebody waits");
        loop {
            thread::park();
        }
    });
    receiver.recv().expect("the thread sends")
}

/// The last lines of a text.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
