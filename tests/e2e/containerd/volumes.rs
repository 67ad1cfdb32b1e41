//! What containers are given of the host: loggers and volumes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::thread;

use bulkhead_tests::{BULKHEAD, Engine, Host, IMAGE, RUNC, fresh_id, must, run};
use tempfile::TempDir;

use crate::cri::{self, Pod};
use crate::{Running, eventually, processes, shims_end};

/// A mount that goes with this.
struct Mounted(String);

impl Mounted {
    fn new(words: &[&str], target: &Path) -> Mounted {
        let target = target.to_str().expect("plain").to_owned();
        mount("mount", &[words, &[&target]].concat());
        Mounted(target)
    }
}

impl Mounted {
    /// Unmounts it although somebody may hold it.
    fn detach(self) {
        mount("umount", &["--lazy", &self.0]);
        std::mem::forget(self);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if thread::panicking() {
            run(Command::new("umount").args(["--lazy", &self.0]));
        } else {
            mount("umount", &[&self.0]);
        }
    }
}

#[track_caller]
fn mount(program: &str, words: &[&str]) {
    must(Command::new(program).args(words));
}

fn path(dir: &Path) -> &str {
    dir.to_str().expect("plain")
}

#[test]
fn mounts_of_the_host_appear_in_a_slave_volume_only() {
    Engine::get();
    for runtime in [RUNC, BULKHEAD] {
        let host = Host::now();
        let dir = TempDir::new().expect("a temporary directory");
        let volume = dir.path().join("volume");
        fs::create_dir_all(volume.join("inner")).expect("directories");
        let shared = Mounted::new(&["--bind", path(&volume)], &volume);
        mount("mount", &["--make-shared", path(&volume)]);
        let [slave, private] = ["rslave", "rprivate"].map(|propagation| {
            let source = path(&volume);
            let words = format!("type=bind,src={source},dst=/v,options=rbind:{propagation}");
            Running::start(runtime, &["--mount", &words], "sleep 1000")
        });
        let late = Mounted::new(&["-t", "tmpfs", "late"], &volume.join("inner"));
        fs::write(volume.join("inner/file"), "late").expect("writable");
        assert_eq!(slave.exec("cat /v/inner/file").ok(), "late", "{runtime}");
        assert_eq!(private.exec("ls /v/inner").ok(), "", "{runtime}");
        // And it goes when the host takes it away: lazily, for the pod holds what its guest has looked at.
        late.detach();
        let gone = "n=0; while ls /v/inner | grep -q .; do n=$((n+1)); [ $n -lt 600 ] || exit 1; sleep 0.1; done";
        assert_eq!(slave.exec(gone).status, 0, "{runtime}");
        slave.remove();
        private.remove();
        drop(shared);
        shims_end();
        host.assert_nothing_left();
    }
}

#[test]
fn mounts_of_the_guest_cannot_appear_on_the_host() {
    Engine::get();
    let host = Host::now();
    // As critest has it: a mount that is shared already. It must be free again after the refusal, and nothing of it anywhere.
    let dir = TempDir::new().expect("a temporary directory");
    let shared = Mounted::new(&["--bind", path(dir.path())], dir.path());
    mount("mount", &["--make-shared", path(dir.path())]);
    let words = format!(
        "type=bind,src={},dst=/v,options=rbind:rshared",
        path(dir.path())
    );
    let id = fresh_id();
    let ran = Engine::get().run(&[
        "run",
        "--rm",
        "--runtime",
        BULKHEAD,
        // Who cannot mount has nothing that could appear.
        "--cap-add",
        "CAP_SYS_ADMIN",
        "--mount",
        &words,
        IMAGE,
        &id,
        "true",
    ]);
    assert!(
        ran.status != 0 && ran.errors().contains("shared propagation"),
        "{ran}"
    );
    shims_end();
    drop(shared);
    host.assert_nothing_left();
}

/// As kubelet gives a `subPath`: a mount of a part of the volume at a place of its own.
#[test]
fn a_part_of_a_volume_is_that_part() {
    let client = cri::connect();
    for &handler in cri::handlers() {
        let host = Host::now();
        let dir = TempDir::new().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("volume/part/deep")).expect("directories");
        fs::write(at("volume/part/deep/file"), "1").expect("writable");
        fs::write(at("volume/single"), "2").expect("writable");
        fs::create_dir(at("part")).expect("a directory");
        fs::write(at("single"), "").expect("a file");
        let part = Mounted::new(&["--bind", path(&at("volume/part"))], &at("part"));
        let single = Mounted::new(&["--bind", path(&at("volume/single"))], &at("single"));
        let pod = Pod::start(&client, handler, cri::private_pids());
        let [whole, some, one] = ["volume", "part", "single"].map(&at);
        let first = pod.container("sleep 1000", &[(path(&some), "/v"), (path(&one), "/f")]);
        let second = pod.container("sleep 1000", &[(path(&whole), "/w")]);
        let seen = pod.exec(
            &first,
            "cat /v/deep/file /f; ls /v; ls /v/..; echo new > /v/new",
        );
        let root = pod.exec(&first, "ls /").1;
        assert_eq!(seen, (0, format!("12deep\n{root}")), "{handler}");
        let seen = pod.exec(&second, "cat /w/part/new; echo 3 > /w/single");
        assert_eq!(seen, (0, "new".into()), "{handler}");
        // Two sources are two caches in the guest, which agree all the same: in content, length and names.
        assert_eq!(pod.exec(&first, "cat /f"), (0, "3".into()), "{handler}");
        // The length that was kept before the second name was known is good for its second.
        let script =
            "sleep 1; echo longer > /w/single; mv /w/part/deep /w/part/moved; rm /w/part/new";
        assert_eq!(pod.exec(&second, script).0, 0, "{handler}");
        let seen = pod.exec(&first, "cat /f; ls /v");
        assert_eq!(seen, (0, "longer\nmoved".into()), "{handler}");
        let host_sees = fs::read_to_string(at("volume/single"));
        assert_eq!(host_sees.expect("it is there"), "longer\n", "{handler}");
        pod.remove();
        // Nobody holds it: it can be unmounted, as kubelet does before it removes the pod's directory.
        drop((part, single));
        shims_end();
        host.assert_nothing_left();
    }
}

#[test]
fn output_goes_to_loggers_and_files() {
    Engine::get();
    for runtime in [RUNC, BULKHEAD] {
        let host = Host::now();
        let dir = TempDir::new().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        let logger = at("logger");
        // Of containerd's own contract: stdout is 3, stderr is 4, and whoever closes 5 is ready.
        let script = "#!/bin/sh\ncd ${0%/*}\necho $CONTAINER_NAMESPACE $CONTAINER_ID $1 > whose\nexec 5>&-\ncat <&3 > out &\ncat <&4 > err &\nwait\n";
        fs::write(&logger, script).expect("writable");
        fs::set_permissions(&logger, fs::Permissions::from_mode(0o755)).expect("ours");
        let read = |name: &str| fs::read_to_string(at(name)).unwrap_or_default();

        let uri = format!("binary://{}?first=word", logger.display());
        let script = "echo to out; echo to err >&2; sleep 1000";
        let running = Running::start(runtime, &["--log-uri", &uri], script);
        eventually("the logger has both", || {
            read("out") == "to out\n" && read("err") == "to err\n"
        });
        let whose = format!("default {} first\n", running.id);
        assert_eq!(read("whose"), whose, "{runtime}");
        running.remove();
        eventually("the logger ends", || processes(&[path(&logger)]).is_empty());

        let uri = format!("file://{}", at("file").display());
        let running = Running::start(runtime, &["--log-uri", &uri], script);
        eventually("the file has both", || {
            let text = read("file");
            text.contains("to out\n") && text.contains("to err\n")
        });
        running.remove();

        let missing = format!("binary://{}", at("no-such-logger").display());
        let words = ["run", "--rm", "--runtime", runtime, "--log-uri", &missing];
        let id = fresh_id();
        let ran = Engine::get().run(&[&words[..], &[IMAGE, &id, "true"]].concat());
        assert_ne!(ran.status, 0, "{runtime}: {ran}");
        if runtime == BULKHEAD {
            assert!(ran.errors().contains("no-such-logger"), "{ran}");
        }
        Engine::get().run(&["container", "delete", &id]);
        shims_end();
        host.assert_nothing_left();
    }
}
