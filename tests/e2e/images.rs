//! `bulkhead run IMAGE`: what people have without an engine, an archive, becomes a container in one command.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use bulkhead_tests::{Host, Netns, Ran, Started, busybox_root, eventually, run, save_image};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A data directory of its own, and an archive.
struct Node {
    dir: TempDir,
}

impl Node {
    fn new() -> Node {
        // The lab's root is an overlay, over which another cannot lie.
        let dir = TempDir::with_prefix_in("bulkhead-images-", "/run").expect("a tmpfs");
        let node = Node { dir };
        let text = format!("data_dir = {:?}\n", node.path("data"));
        fs::write(node.path("config.toml"), text).expect("writable");
        let root = node.path("root");
        busybox_root(&root);
        for (name, text) in [
            (
                "passwd",
                "root:x:0:0::/root:/bin/sh\nwww:x:33:34::/var/www:/bin/sh\n",
            ),
            ("group", "root:x:0:\nwww:x:34:\nweb:x:40:www\n"),
        ] {
            fs::create_dir_all(root.join("etc")).expect("writable");
            fs::write(root.join("etc").join(name), text).expect("writable");
        }
        fs::create_dir_all(root.join("var/www")).expect("writable");
        let config = json!({
            "Env": ["PATH=/bin", "FROM=the image", "OVER=old"],
            "Entrypoint": ["/bin/sh", "-c"],
            "Cmd": ["echo $FROM; exit 3"],
            "WorkingDir": "/var/www",
        });
        save_image(&node.path("image.tar"), "some/image:1", &root, &config);
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("bulkhead");
        command.arg("--config").arg(self.path("config.toml"));
        command.args(words);
        command
    }

    /// Runs the image with options and a command.
    fn run(&self, options: &[&str], words: &[&str]) -> Ran {
        let image = self.path("image.tar");
        let mut command = self.command(&[&["run"], options].concat());
        run(command.arg(image).args(words))
    }

    fn json(&self, words: &[&str]) -> Value {
        let text = run(&mut self.command(words)).ok();
        serde_json::from_str(&text).expect("JSON")
    }

    fn containers(&self) -> usize {
        fs::read_dir(self.path("data/containers")).map_or(0, Iterator::count)
    }
}

#[test]
fn an_archive_is_a_container_in_one_command() {
    let node = Node::new();
    let host = Host::now();
    let ran = node.run(&[], &[]);
    assert_eq!((ran.status, ran.text().as_str()), (3, "the image"), "{ran}");
    assert!(ran.errors().contains("unpacking layer 1 of 1"), "{ran}");
    // What the image says, what the user says over it, and what every container has.
    let script =
        "echo $OVER $NEW $PATH; pwd; id; hostname; cat /etc/hosts; ls -l /proc/self/exe >/dev/null
        touch /written && cat /given; uname -r; ls /sys/class/net";
    fs::write(node.path("given"), "given\n").expect("writable");
    let volume = format!("{}:/given:ro", node.path("given").display());
    let options = [
        &["--name", "by-name", "-e", "OVER=new", "-e", "NEW=1"][..],
        &["-v", &volume, "-w", "/etc"],
    ];
    let ran = node.run(&options.concat(), &[script]);
    let text = ran.ok();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["new 1 /bin", "/etc"], "{text}");
    assert_eq!(lines[2], "uid=0(root) gid=0(root)", "{text}");
    assert_eq!(
        lines[3..6],
        [
            "by-name",
            "127.0.0.1 localhost by-name",
            "::1 localhost by-name"
        ]
    );
    assert_eq!(lines[6], "given", "{text}");
    assert!(lines[7].ends_with("-bulkhead"), "{text}");
    assert_eq!(lines[8..], ["lo"], "{text}");
    // It was unpacked once, and a container's writes go with it.
    let ran = node.run(
        &["-u", "www"],
        &["id; echo $HOME; ls /written; touch /no; exit 0"],
    );
    let text = ran.text();
    assert!(
        text.starts_with("uid=33(www) gid=34(www) groups=40(web)\n/var/www"),
        "{ran}"
    );
    assert!(
        ran.errors().contains("/written") && ran.errors().contains("Permission denied"),
        "{ran}"
    );
    assert!(!ran.errors().contains("unpacking"), "{ran}");
    let ran = node.run(&["--read-only", "--entrypoint", "/bin/touch"], &["/no"]);
    assert!(
        ran.status == 1 && ran.errors().contains("Read-only"),
        "{ran}"
    );
    assert_eq!(node.containers(), 0);
    let listed = node.json(&["image", "ls", "--json"]);
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
    let key = listed[0]["key"].as_str().expect("a key").to_owned();
    assert_eq!(listed[0]["in_use"], json!(false));
    let table = run(&mut node.command(&["image", "ls"])).ok();
    assert!(
        table.contains(&key[..12]) && table.contains("image.tar"),
        "{table}"
    );
    run(&mut node.command(&["image", "rm", &key[..8]])).ok();
    assert_eq!(
        fs::read_dir(node.path("data/images"))
            .expect("there")
            .count(),
        0
    );
    host.assert_nothing_left();
}

#[test]
fn an_image_has_the_network_that_it_is_given() {
    let (pod, peer) = (Netns::new(), Netns::new());
    pod.wire("eth0", &peer, "peer0");
    pod.ip("addr add 10.9.7.2/24 dev eth0");
    let node = Node::new();
    let path = pod.path();
    let options = ["--network", path.to_str().expect("plain")];
    let ran = node.run(&options, &["ip -o -4 addr show eth0; cat /etc/resolv.conf"]);
    let text = ran.ok();
    assert!(text.contains("inet 10.9.7.2/24"), "{text}");
    let resolv = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    assert!(text.ends_with(resolv.trim_end()), "{text}");
}

#[test]
fn what_cannot_be_run_is_said_and_leaves_nothing() {
    let node = Node::new();
    let host = Host::now();
    let path = |name: &str| node.path(name).display().to_string();
    fs::write(node.path("text"), "no archive\n").expect("writable");
    let mut bytes = fs::read(node.path("image.tar")).expect("there");
    // Within the one file of the layer that is large.
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(node.path("damaged.tar"), bytes).expect("writable");
    fs::create_dir(node.path("empty")).expect("writable");
    let image = path("image.tar");
    let overlay = TempDir::with_prefix_in("bulkhead-images-", "/var/lib").expect("writable");
    let text = format!("data_dir = {:?}\n", overlay.path());
    fs::write(node.path("overlay.toml"), text).expect("writable");
    let cases: &[(&[&str], u8, &str)] = &[
        (&["run", &path("none.tar")], 125, "there is no such file"),
        (&["run", &path("text")], 125, "is no image"),
        (&["run", &path("empty")], 125, "is no image"),
        (&["run", &path("damaged.tar")], 125, "is damaged"),
        (&["run", "quay.io/some/image:1"], 125, "podman:NAME"),
        (&["run", "docker:none"], 125, "is it installed?"),
        (
            &["--config", &path("overlay.toml"), "run", &image],
            125,
            "is on an overlay itself",
        ),
        (&["run", &format!("{image}:other")], 125, "some/image:1"),
        (
            &["run", "--detach", &image],
            125,
            "--detach does not go with an image",
        ),
        (
            &["run", "--user", "nobody", &image],
            125,
            "no user \"nobody\"",
        ),
        (
            &["run", "--volume", "/nowhere:/x", &image],
            125,
            "No such file",
        ),
        (&["run", "--workdir", "etc", &image], 125, "not absolute"),
        (&["run", "--name", "a/b", &image], 125, "character '/'"),
        (&["run", "--network", "/nowhere", &image], 125, "/nowhere"),
        (&["run", "--entrypoint", "/none", &image], 127, "/none"),
        (
            &["run", "--env", "A=1", "a-container"],
            125,
            "--env goes with an image",
        ),
        (
            &["run", "a-container", "echo"],
            125,
            "a command goes with an image",
        ),
        (&["image", "rm", "unknown"], 125, "no image \"unknown\""),
    ];
    for (words, status, why) in cases {
        let mut command = match words[0] {
            "--config" => Command::new("bulkhead"),
            _ => node.command(&[]),
        };
        let ran = run(command.args(*words));
        assert_eq!(ran.status, i32::from(*status), "{words:?}: {ran}");
        assert!(ran.errors().contains(why), "{words:?}: {ran}");
        assert_eq!(node.containers(), 0, "{words:?}");
    }
    let kept = fs::read_dir(node.path("data/images")).expect("there");
    let kept: Vec<_> = kept
        .map(|entry| entry.expect("there").file_name())
        .collect();
    assert_eq!(kept.len(), 2, "the whole image and its lock: {kept:?}");
    host.assert_nothing_left();
}

#[test]
fn one_that_is_killed_leaves_what_gc_removes() {
    let node = Node::new();
    let host = Host::now();
    let image = path_of(&node);
    let mut command = node.command(&["run", "--name", "killed", &image]);
    command.arg("echo runs; sleep 1000");
    let running = Started::spawn(command);
    running.wait_for_output("runs");
    // The name is taken, and the image in use.
    let ran = node.run(&["--name", "killed"], &["true"]);
    assert!(
        ran.status == 125 && ran.errors().contains("choose another --name"),
        "{ran}"
    );
    let listed = node.json(&["image", "ls", "--json"]);
    assert_eq!(listed[0]["in_use"], json!(true), "{listed}");
    let key = listed[0]["key"].as_str().expect("a key");
    let ran = run(&mut node.command(&["image", "rm", key]));
    assert!(
        ran.status == 125 && ran.errors().contains("in use"),
        "{ran}"
    );
    running.signal(Signal::SIGKILL);
    running.finish();
    assert_eq!(node.containers(), 1);
    eventually(
        "gc gives all back",
        || run(&mut node.command(&["gc"])).status == 0 && node.containers() == 0,
        String::new,
    );
    assert_eq!(node.json(&["gc", "--json"]), json!([]));
    host.assert_nothing_left();
}

fn path_of(node: &Node) -> String {
    node.path("image.tar").display().to_string()
}
