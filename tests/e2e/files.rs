//! The share as a container sees it: POSIX by a Python program in the Debian root, and what only virtio-fs can get wrong.

use std::fs;
use std::path::Path;
use std::process::Command;

use bulkhead_tests::{Bundle, Host, Runtime, must, run, soak};
use serde_json::json;
use tempfile::TempDir;

/// The program, in the repository's copy that the lab has at /src.
const POSIX: &str = "/src/tests/e2e/posix";

fn posix(volume: &Path) -> Bundle {
    Bundle::debian()
        .bind(Path::new(POSIX), "/posix", &["rbind", "ro"])
        .bind(volume, "/volume", &["rbind"])
        .edit(|config| {
            // Checks of ownership and of special files need what a build container has.
            for set in ["bounding", "effective", "permitted"] {
                config["process"]["capabilities"][set] = json!([
                    "CAP_CHOWN",
                    "CAP_DAC_OVERRIDE",
                    "CAP_FOWNER",
                    "CAP_FSETID",
                    "CAP_SETUID",
                    "CAP_SETGID",
                    "CAP_MKNOD",
                    "CAP_SYS_ADMIN",
                    "CAP_SETFCAP"
                ]);
            }
            config["process"]["rlimits"] =
                json!([{"type": "RLIMIT_NOFILE", "soft": 8192, "hard": 8192}]);
        })
        .args(&[
            "/usr/bin/python3",
            "/posix/checks.py",
            "/volume",
            // A file made costs several requests, each some milliseconds in emulation.
            if soak() { "100000" } else { "4000" },
        ])
}

/// A volume on a file system that has all that the checks need (tmpfs lacks some).
struct Disk(TempDir);

impl Disk {
    fn new() -> Disk {
        let dir = TempDir::new().expect("a temporary directory");
        let script = "truncate -s 600M $0/disk && mkfs.ext4 -q -N 150000 $0/disk && mkdir $0/mnt && mount -o loop $0/disk $0/mnt";
        must(Command::new("sh").args(["-c", script]).arg(dir.path()));
        Disk(dir)
    }

    fn root(&self) -> std::path::PathBuf {
        self.0.path().join("mnt")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run(Command::new("umount").arg(self.root()));
    }
}

#[test]
fn posix_holds_on_a_volume_as_it_does_under_runc() {
    let control = Disk::new();
    let ran = posix(&control.root()).run_with(Runtime::Runc, &[]);
    assert_eq!(ran.status, 0, "runc fails it: a bad test: {ran}");
    let host = Host::now();
    let disk = Disk::new();
    let ours = posix(&disk.root()).run();
    assert_eq!(ours.status, 0, "{ours}");
    assert_eq!(ours.text(), ran.text());
    drop(disk);
    host.assert_nothing_left();
}

#[test]
fn two_volumes_with_equal_inode_numbers_are_told_apart() {
    let (one, two) = (Disk::new(), Disk::new());
    fs::write(one.root().join("same"), "one").expect("writable");
    fs::write(two.root().join("same"), "two").expect("writable");
    let bundle = Bundle::busybox()
        .bind(&one.root(), "/one", &["rbind"])
        .bind(&two.root(), "/two", &["rbind"])
        .script("stat -c %i /one/same; stat -c %i /two/same; cat /one/same /two/same; [ $(stat -c %d /one/same) != $(stat -c %d /two/same) ] && echo apart");
    let text = bundle.run().ok();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], lines[1], "the test needs equal inode numbers");
    assert_eq!(lines[2..], ["onetwoapart"], "{text}");
}

#[test]
fn a_killed_waiter_for_a_lock_ends() {
    let program = "
import fcntl, os, signal, time
holder = open('/lock', 'w')
fcntl.flock(holder, fcntl.LOCK_EX)
waiter = os.fork()
if waiter == 0:
    fcntl.flock(open('/lock'), fcntl.LOCK_EX)
    os._exit(0)
while 'flock' not in open(f'/proc/{waiter}/wchan').read() and open(f'/proc/{waiter}/stat').read().split()[2] != 'S':
    time.sleep(0.01)
since = time.monotonic()
os.kill(waiter, signal.SIGKILL)
status = os.waitpid(waiter, 0)[1]
print(os.WTERMSIG(status), time.monotonic() - since)
";
    let ran = Bundle::debian()
        .args(&["/usr/bin/python3", "-c", program])
        .run();
    let text = ran.ok();
    let took = text.strip_prefix("9 ").expect("killed by signal 9");
    let took: f64 = took.parse().expect("seconds");
    println!("it ended after {took} s");
    // Not for ever, as one would whose request waits on the host. A quiet machine takes milliseconds.
    assert!(took < 10.0, "{took} s");
}

#[test]
fn symbolic_links_out_of_a_volume_stay_in_the_container() {
    let volume = TempDir::new().expect("a temporary directory");
    std::os::unix::fs::symlink("/etc/hostname", volume.path().join("absolute")).expect("a link");
    std::os::unix::fs::symlink(
        "../../../../../../../../etc/shadow",
        volume.path().join("relative"),
    )
    .expect("a link");
    let bundle = Bundle::busybox()
        .bind(volume.path(), "/data", &["rbind"])
        .script("cat /data/absolute 2>&1; cat /data/relative 2>&1; echo mine > /etc/hostname; cat /data/absolute");
    let text = bundle.run().ok();
    assert!(
        text.contains("absolute") && text.contains("No such file") && text.ends_with("mine"),
        "{text}"
    );
}
