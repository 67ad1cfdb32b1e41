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

/// A root with the lab's programs that is a plain directory, what programs of [`POSIX`] need, and a
/// volume.
fn programs(disk: &Disk) -> Bundle {
    let bundle = Bundle::tools()
        .bind(Path::new(POSIX), "/posix", &["rbind", "ro"])
        .bind(&disk.root(), "/volume", &["rbind"])
        .capabilities(&[
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FOWNER",
            "CAP_FSETID",
            "CAP_SETUID",
            "CAP_SETGID",
            "CAP_SETPCAP",
            "CAP_SETFCAP",
            "CAP_MKNOD",
            "CAP_SYS_ADMIN",
        ]);
    fs::create_dir(bundle.root().join("data")).expect("a directory in the root");
    bundle
}

/// Runs `script` on `/data` in the root and on `/volume` under both, after `prepare` was run in
/// both on the host; what it prints is the same. What Bulkhead leaves in the volume is handed to
/// `look`.
fn as_under_runc(prepare: &str, script: &str, look: impl Fn(&Path)) {
    let host = Host::now();
    let run = |runtime| {
        let disk = Disk::new();
        let bundle = programs(&disk);
        for dir in [bundle.root().join("data"), disk.root()] {
            let prepared = Command::new("sh")
                .args(["-ec", prepare])
                .current_dir(&dir)
                .status();
            assert!(prepared.expect("sh").success(), "on the host: {prepare}");
        }
        let both = format!("cd /data && ({script}) && echo == volume && cd /volume && ({script})");
        let ran = bundle.script(&both).run_with(runtime, &[]);
        assert_eq!(ran.status, 0, "{runtime:?}: {ran}");
        if runtime == Runtime::Bulkhead {
            look(&disk.root());
        }
        ran.text()
    };
    let (control, ours) = (run(Runtime::Runc), run(Runtime::Bulkhead));
    let differ: Vec<_> = control
        .lines()
        .zip(ours.lines())
        .filter(|(a, b)| a != b)
        .collect();
    assert!(differ.is_empty(), "under runc and Bulkhead: {differ:#?}");
    assert_eq!(control, ours);
    host.assert_nothing_left();
}

#[test]
fn access_control_lists_decide_in_the_guest_as_on_the_host() {
    // As a user would say it, and then by many users and in many ways.
    let outside = "chmod 777 .; echo s > f; chmod 644 f; setfacl -m u:1000:- f; echo s > g; chmod 600 g; setfacl -m u:1000:r g;
        mkdir dir; chmod 777 dir; setfacl -m d:u:1000:rwx dir; mkdir more; python3 /src/tests/e2e/posix/acl.py outside more";
    let inside = "user() { setpriv --reuid $1 --regid $1 --groups $2 sh -c \"$3\" 2>&1; }
        user 1000 1000 'cat f'; user 1001 1001 'cat f'; user 1000 5 'cat g'; user 1001 5 'cat g'
        user 1001 1001 'umask 077; echo x > dir/new; mkdir dir/sub'; getfacl -n dir/new dir/sub; user 1000 1000 'cat dir/new'
        setfacl -m u:5:r,g:2000:rw f && getfacl -n f; user 7 2000,3 'cat f; echo more >> f'; user 7 3 'echo more >> f'
        chmod 600 f; getfacl -n f; setfacl -b f; getfacl -n f
        # On a loaded lab the rest takes a minute: on the volume only.
        [ $PWD != /volume ] || python3 /posix/acl.py few more";
    as_under_runc(outside, inside, |_| {});
}

#[test]
fn set_id_bits_go_when_content_changes() {
    as_under_runc("chmod 777 .", "python3 /posix/set_id.py . few", |_| {});
}

#[test]
fn overlays_mount_on_a_share() {
    let script = "python3 /posix/overlay.py .";
    as_under_runc("true", script, |volume| {
        let program = "import os, sys
for top, dirs, files in os.walk(sys.argv[1]):
    for name in dirs + files:
        print(*os.listxattr(os.path.join(top, name), follow_symlinks=False))";
        let listed = Command::new("python3")
            .args(["-c", program])
            .arg(volume)
            .output();
        let names = String::from_utf8_lossy(&listed.expect("python3").stdout).into_owned();
        assert!(
            names.contains("user.bulkhead.trusted.overlay.opaque"),
            "{names}"
        );
        assert!(
            !names
                .split_whitespace()
                .any(|name| name.starts_with("trusted.")),
            "{names}"
        );
    });
}

#[test]
fn a_mount_of_a_share_can_map_ids() {
    let script = "mkdir -p a b; chmod 755 a; echo of-root > a/f; python3 -c 'import os; os.chown(\"a/f\", 5, 6)'
        mount --bind -o X-mount.idmap='u:0:1000:10 g:0:1000:10' a b; stat -c '%u:%g' b/f; umask 022
        setpriv --reuid 1003 --regid 1004 --clear-groups sh -c 'echo x > b/n' 2>&1
        setpriv --reuid 1000 --regid 1000 --clear-groups sh -c 'echo x > b/new; mkdir b/dir; ln -s x b/link; stat -c %u:%g b/new b/dir b/link'
        stat -c %u:%g a/*";
    as_under_runc("chmod 777 .", script, |_| {});
}

/// Close to open: the container reads, the host changes, and the next open inside has it.
#[test]
fn what_the_host_changes_is_read_by_the_next_open() {
    let disk = Disk::new();
    let volume = disk.root();
    for name in ["rewritten", "grown", "shrunk", "replaced", "old-time"] {
        fs::write(volume.join(name), "old content").expect("writable");
    }
    let bundle = programs(&disk).script(
        "cd /volume; cat rewritten grown shrunk replaced old-time; echo
         stat -c %s rewritten grown shrunk replaced old-time > /dev/null; echo ready; read go
         cat rewritten; echo; cat grown; echo; cat shrunk; echo; cat replaced; echo; cat old-time; echo",
    );
    let mut started = bundle.start(Runtime::Bulkhead, &[]);
    started.wait_for_output("ready");
    let change =
        "printf 'NEW CONTENT' 1<> rewritten; printf ' and more' >> grown; printf o > shrunk
        printf 'NEW CONTENT' > new; mv new replaced
        touch -r old-time stamp; printf 'NEW CONTENT' 1<> old-time; touch -r stamp old-time";
    let changed = Command::new("sh")
        .args(["-ec", change])
        .current_dir(&volume)
        .status();
    assert!(changed.expect("sh").success());
    let mut stdin = started.stdin();
    std::io::Write::write_all(&mut stdin, b"go\n").expect("the container reads");
    let ran = started.finish_with(stdin);
    let text = ran.ok();
    let lines: Vec<&str> = text.lines().skip(2).collect();
    let new = "NEW CONTENT";
    assert_eq!(
        lines,
        [new, "old content and more", "o", new, new],
        "{text}"
    );
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
