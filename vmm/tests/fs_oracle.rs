//! The quick oracle, `make oracle`: containers of runc on the fs process's engine, behind the
//! host's `/dev/fuse`.
//!
//! The same container runs on the bare file system and on the engine, root and volume alike, and
//! what its programs print is compared: most of what a share does otherwise shows here within
//! seconds, without a virtual machine. What belongs to the guest's kernel does not: submounts, its
//! version, virtio.
//!
//! Needs root, `/dev/fuse`, runc and python3; ignored otherwise.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

mod fs_support;
use fs_support::{CACHED, Mounted};

/// What runs in the container, in a directory of the root and in a volume. `$posix` has the
/// programs of the suite `files`.
const CASES: [(&str, &str); 6] = [
    ("POSIX", "python3 $posix/checks.py . 400"),
    (
        "access control lists",
        "mkdir acl; python3 $posix/acl.py outside acl; python3 $posix/acl.py inside acl",
    ),
    ("set-id bits", "python3 $posix/set_id.py ."),
    ("overlays", "python3 $posix/overlay.py ."),
    (
        "symbolic links stay in the container",
        "ln -s /etc/shadow a; ln -s ../../../../../../../../canary b; cat b 2>&1; readlink a b; echo x > t; ln -s t c; cat c",
    ),
    (
        "a waiter for a lock is killed",
        "python3 -c '
import fcntl, os, signal, time
holder = open(\"lock\", \"w\")
fcntl.flock(holder, fcntl.LOCK_EX)
waiter = os.fork()
if waiter == 0:
    fcntl.flock(open(\"lock\"), fcntl.LOCK_EX)
    os._exit(0)
time.sleep(0.2)
os.kill(waiter, signal.SIGKILL)
print(os.WTERMSIG(os.waitpid(waiter, 0)[1]))'",
    ),
];

const CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETUID",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETFCAP",
    "CAP_MKNOD",
    "CAP_SYS_ADMIN",
];

/// How long one container may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// The host's programs, read-only, over a root of its own.
fn make_root(root: &Path) {
    for name in [
        "data", "dev", "etc", "posix", "proc", "run", "sys", "tmp", "usr", "volume",
    ] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    for name in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{name}"), root.join(name)).unwrap();
    }
    for name in ["data", "volume"] {
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(0o777)).unwrap();
    }
}

/// What a case prints in a container with this root and volume.
fn run(case: &str, script: &str, root: &Path, volume: &Path) -> String {
    let bundle = tempfile::tempdir().unwrap();
    let made = Command::new("runc")
        .arg("spec")
        .current_dir(bundle.path())
        .status();
    assert!(made.expect("runc is needed: make oracle").success());
    let path = bundle.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let posix = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/e2e/posix");
    let posix = posix
        .canonicalize()
        .expect("the programs are in the checkout");
    let bind = |source: &Path, destination: &str, way: &str| json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", way]});
    config["root"] = json!({"path": root, "readonly": false});
    config["process"]["terminal"] = json!(false);
    config["process"]["cwd"] = json!("/");
    let both = format!(
        "posix=/posix; (cd /data; {script}) 2>&1; echo '== the volume'; (cd /volume; {script}) 2>&1"
    );
    config["process"]["args"] = json!(["/bin/sh", "-c", both]);
    config["process"]["env"]
        .as_array_mut()
        .unwrap()
        .push(json!("PYTHONDONTWRITEBYTECODE=1"));
    for set in ["bounding", "effective", "permitted"] {
        config["process"]["capabilities"][set] = json!(CAPABILITIES);
    }
    config["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 8192, "hard": 8192}]);
    config["mounts"].as_array_mut().unwrap().extend([
        bind(Path::new("/usr"), "/usr", "ro"),
        bind(Path::new("/etc"), "/etc", "ro"),
        bind(&posix, "/posix", "ro"),
        bind(volume, "/volume", "rw"),
    ]);
    fs::write(&path, config.to_string()).unwrap();
    let id = format!(
        "oracle-{}",
        bundle.path().file_name().unwrap().to_str().unwrap()
    );
    let output = fs::File::create(bundle.path().join("output")).unwrap();
    let mut child = Command::new("runc")
        .args(["run", "--bundle"])
        .arg(bundle.path())
        .arg(&id)
        .stdin(std::process::Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .spawn()
        .unwrap();
    let since = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if since.elapsed() > PATIENCE {
            let _ = Command::new("runc").args(["kill", &id, "KILL"]).status();
            let _ = child.wait();
            panic!("{case}: no end after {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let text = fs::read(bundle.path().join("output")).unwrap();
    String::from_utf8_lossy(&text).into_owned()
}

/// The places of a case on one file system.
fn places(above: &Path, number: usize) -> (PathBuf, PathBuf) {
    let (root, volume) = (
        above.join(format!("root{number}")),
        above.join(format!("volume{number}")),
    );
    make_root(&root);
    fs::create_dir(&volume).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o777)).unwrap();
    (root, volume)
}

#[test]
#[ignore = "needs runc and python3: make oracle"]
fn containers_on_the_engine_see_the_bare_file_system() {
    let bare = tempfile::tempdir().unwrap();
    fs::set_permissions(bare.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let m = Mounted::new(CACHED);
    let since = Instant::now();
    let mut differing = 0;
    for (number, (case, script)) in CASES.iter().enumerate() {
        let (root, volume) = places(bare.path(), number);
        let control = run(case, script, &root, &volume);
        let (root, volume) = places(m.point.path(), number);
        let ours = run(case, script, &root, &volume);
        let fails = ["FAILED", "Traceback"]
            .iter()
            .any(|word| control.contains(word));
        assert!(
            !fails && control.lines().count() > 1,
            "{case}: the bare file system fails it, a bad test: {control}"
        );
        let mut lines = 0;
        let (mut bare, mut share) = (control.lines(), ours.lines());
        loop {
            match (bare.next(), share.next()) {
                (None, None) => break,
                (bare, share) if bare != share => {
                    println!("{case}: bare  {}", bare.unwrap_or("nothing"));
                    println!("{case}: share {}", share.unwrap_or("nothing"));
                    differing += 1;
                }
                _ => lines += 1,
            }
        }
        println!("{case}: {lines} lines are the same");
    }
    println!("{} s, {differing} lines differ", since.elapsed().as_secs());
    assert_eq!(differing, 0, "lines differ");
}
