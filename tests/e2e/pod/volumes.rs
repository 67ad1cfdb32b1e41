//! A volume that two containers of a pod use: one file system for both.

use std::fs;
use std::path::Path;
use std::process::Command;

use bulkhead_tests::{Bundle, must, run};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::pod::{Driven, Pod};

/// Takes or tries a lock of each kind: `take(kind, path, wait)` keeps it, `drop(kind)` gives it up.
const LOCKS: &str = r"
import fcntl, os, struct, mmap, signal, time
held = {}
def take(kind, path, wait, write=True):
    # A file for each kind: fcntl's and OFD locks exclude each other.
    fd = os.open(path + kind, os.O_RDWR if write else os.O_RDONLY)
    try:
        how = fcntl.LOCK_EX if write else fcntl.LOCK_SH
        if kind == 'flock':
            fcntl.flock(fd, how | (0 if wait else fcntl.LOCK_NB))
        elif kind == 'fcntl':
            fcntl.lockf(fd, how | (0 if wait else fcntl.LOCK_NB))
        else:
            # fcntl(2): F_OFD_SETLK 37, F_OFD_SETLKW 38
            data = struct.pack('hhqqi4x', fcntl.F_WRLCK if write else fcntl.F_RDLCK, 0, 0, 0, 0)
            fcntl.fcntl(fd, 38 if wait else 37, data)
    except OSError as error:
        os.close(fd)
        return 'busy' if error.errno == 11 else str(error)
    held[kind] = fd
    return 'taken'
def drop(kind):
    os.close(held.pop(kind))
def blocked(pid):
    while open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0] != 'S':
        time.sleep(0.01)
    time.sleep(0.2)
    return open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0] == 'S'
def waiter(kind, path):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if take(kind, path, True) == 'taken' else 1)
    return pid if blocked(pid) else None
";

const KINDS: [&str; 3] = ["flock", "fcntl", "ofd"];

/// A tmpfs of its own: the same inode numbers as every other one.
struct Volume(TempDir);

impl Volume {
    fn new() -> Volume {
        let dir = TempDir::with_prefix("volume-").expect("a directory");
        let mut mount = Command::new("mount");
        must(
            mount
                .args(["-t", "tmpfs", "-o", "size=16m", "volume"])
                .arg(dir.path()),
        );
        for name in ["lock", "lockflock", "lockfcntl", "lockofd"] {
            fs::write(dir.path().join(name), vec![0; 4096]).expect("writable");
        }
        Volume(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        run(Command::new("umount").arg(self.path()));
    }
}

fn driven(pod: &mut Pod, id: &str, volume: &Path, options: &[&str]) -> Driven {
    let bundle = Bundle::debian().bind(volume, "/volume", options);
    let mut container = pod.driven(id, bundle);
    assert_eq!(container.ask(LOCKS), Value::Null);
    container
}

fn take(container: &mut Driven, kind: &str) -> Value {
    container.ask(&format!("answer = take({kind:?}, '/volume/lock', False)"))
}

#[test]
fn locks_exclude_between_two_containers_and_go_with_their_holder() {
    let volume = Volume::new();
    let mut pod = Pod::start(512);
    let mut one = driven(&mut pod, "one", volume.path(), &["rbind", "rw"]);
    let mut two = driven(&mut pod, "two", volume.path(), &["rbind", "rw"]);
    assert_eq!(pod.shared_mounts(), (3, 3), "two roots and one volume");
    for kind in KINDS {
        assert_eq!(take(&mut one, kind), "taken", "{kind}");
        assert_eq!(take(&mut two, kind), "busy", "{kind} excludes");
        let waiter = format!("pid = waiter({kind:?}, '/volume/lock'); answer = pid is not None");
        assert_eq!(two.ask(&waiter), true, "{kind} waits");
        let killed = two.ask(
            "since = time.monotonic(); os.kill(pid, 9); status = os.waitpid(pid, 0)[1]; answer = [os.WTERMSIG(status), time.monotonic() - since]",
        );
        assert_eq!(killed[0], 9, "{kind}");
        let took = killed[1].as_f64().expect("seconds");
        assert!(took < 10.0, "a killed waiter for {kind} took {took} s");
        // A waiter gets it when the holder gives it up.
        assert_eq!(two.ask(&waiter), true);
        one.ask(&format!("drop({kind:?})"));
        assert_eq!(two.ask("answer = os.waitpid(pid, 0)[1]"), 0, "{kind}");
        // And, in the other direction, when the process that holds it is killed.
        let holder = format!(
            "r, w = os.pipe()\npid = os.fork()\nif pid == 0:\n    os.write(w, take({kind:?}, '/volume/lock', False).encode())\n    time.sleep(1000)\nanswer = os.read(r, 9).decode()"
        );
        assert_eq!(two.ask(&holder), "taken");
        assert_eq!(take(&mut one, kind), "busy");
        two.ask("os.kill(pid, 9); os.waitpid(pid, 0)");
        assert_eq!(take(&mut one, kind), "taken", "{kind} goes with its holder");
    }
    // All three are held by `one`, whose end gives them up.
    for kind in KINDS {
        assert_eq!(take(&mut two, kind), "busy", "{kind}");
    }
    pod.kill("one");
    for kind in KINDS {
        assert_eq!(
            take(&mut two, kind),
            "taken",
            "{kind} goes with a container"
        );
    }
    pod.remove("one").expect("it has exited");
    assert_eq!(pod.shared_mounts(), (2, 2), "the volume is used still");
    assert_eq!(two.ask("answer = len(open('/volume/lock').read())"), 4096);
    pod.kill("two");
    pod.remove("two").expect("it has exited");
    assert_eq!(pod.shared_mounts(), (0, 0));
    pod.end();
}

#[test]
fn a_shared_mapping_reaches_from_one_container_to_the_other() {
    let volume = Volume::new();
    let mut pod = Pod::start(512);
    let mut one = driven(&mut pod, "one", volume.path(), &["rbind", "rw"]);
    let mut two = driven(&mut pod, "two", volume.path(), &["rbind", "rw"]);
    let map = "file = open('/volume/lock', 'r+b'); map = mmap.mmap(file.fileno(), 4096)";
    one.ask(map);
    two.ask(map);
    assert_eq!(two.ask("answer = map[:5].hex()"), "0000000000");
    one.ask("map[:5] = b'first'");
    assert_eq!(two.ask("answer = map[:5].decode()"), "first");
    two.ask("map[4090:4096] = b'second'");
    assert_eq!(one.ask("answer = map[4090:4096].decode()"), "second");
    one.ask("map.flush()");
    let text = fs::read(volume.path().join("lock")).expect("readable");
    assert_eq!((&text[..5], &text[4090..]), (&b"first"[..], &b"second"[..]));
    pod.end();
}

#[test]
fn a_socket_in_a_volume_joins_two_containers() {
    let volume = Volume::new();
    let mut pod = Pod::start(512);
    let mut one = driven(&mut pod, "one", volume.path(), &["rbind", "rw"]);
    let mut two = driven(&mut pod, "two", volume.path(), &["rbind", "rw"]);
    one.ask(
        "import socket; s = socket.socket(socket.AF_UNIX); s.bind('/volume/socket'); s.listen()",
    );
    assert_eq!(
        two.ask("import socket; c = socket.socket(socket.AF_UNIX); c.connect('/volume/socket'); c.send(b'hello')"),
        Value::Null
    );
    assert_eq!(one.ask("answer = s.accept()[0].recv(9).decode()"), "hello");
    pod.end();
}

#[test]
fn read_only_is_each_containers_own_and_other_names_of_a_volume_are_the_same() {
    let volume = Volume::new();
    let alias = TempDir::with_prefix("alias-").expect("a directory");
    let mut bind = Command::new("mount");
    must(bind.arg("--bind").args([volume.path(), alias.path()]));
    let mut pod = Pod::start(512);
    let mut writer = driven(&mut pod, "writer", volume.path(), &["rbind", "rw"]);
    let mut reader = driven(&mut pod, "reader", volume.path(), &["rbind", "ro"]);
    // As kubelet does for subPath: a bind mount for each container.
    let mut other = driven(&mut pod, "other", alias.path(), &["rbind", "rw"]);
    assert_eq!(pod.shared_mounts(), (4, 4), "three roots and one volume");
    assert_eq!(take(&mut writer, "flock"), "taken");
    let shared = "answer = take('flock', '/volume/lock', False, write=False)";
    assert_eq!(reader.ask(shared), "busy");
    assert_eq!(take(&mut other, "flock"), "busy");
    let write = "open('/volume/new', 'w')";
    let refused = reader.ask(write);
    assert!(
        refused
            .as_str()
            .is_some_and(|text| text.contains("Read-only")),
        "{refused}"
    );
    assert_eq!(writer.ask(write), Value::Null);
    pod.end();
    run(Command::new("umount").arg(alias.path()));
}

#[test]
fn two_volumes_with_equal_inode_numbers_stay_apart() {
    let (red, blue) = (Volume::new(), Volume::new());
    fs::write(red.path().join("name"), "red").expect("writable");
    fs::write(blue.path().join("name"), "blue").expect("writable");
    let mut pod = Pod::start(512);
    let both = |bundle: Bundle| {
        bundle
            .bind(red.path(), "/volume", &["rbind"])
            .bind(blue.path(), "/blue", &["rbind"])
    };
    let mut one = pod.driven("one", both(Bundle::debian()));
    let mut two = driven(&mut pod, "two", blue.path(), &["rbind"]);
    one.ask(LOCKS);
    assert_eq!(pod.shared_mounts(), (4, 4), "two roots and two volumes");
    let names = "answer = [os.stat('/volume/lock').st_ino, os.stat('/blue/lock').st_ino, os.stat('/volume/lock').st_dev != os.stat('/blue/lock').st_dev, open('/volume/name').read(), open('/blue/name').read()]";
    let found = one.ask(names);
    assert_eq!(found[0], found[1], "the test needs equal inode numbers");
    assert_eq!(
        [&found[2], &found[3], &found[4]],
        [&json!(true), &json!("red"), &json!("blue")]
    );
    for kind in KINDS {
        // `two` has blue at /volume: red's lock is nothing to it, blue's is.
        assert_eq!(take(&mut one, kind), "taken");
        assert_eq!(take(&mut two, kind), "taken", "{kind}");
        let blue = format!("answer = take({kind:?}, '/blue/lock', False)");
        assert_eq!(one.ask(&blue), "busy", "{kind}");
    }
    pod.end();
}
