//! Further processes, terminals, and programs that are not there.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;

use bulkhead_tests::{Bundle, eventually};
use serde_json::json;

use crate::caller::{Caller, Container, pid_of, wait};

const RUNTIMES: [&str; 2] = ["runc", "bulkhead"];
const WAITS: &str = "echo ready; while :; do sleep 1; done";

fn running<'a>(caller: &'a Caller, bundle: &'a Bundle) -> Container<'a> {
    let container = caller.create(bundle);
    container.verb("start").ok();
    eventually(
        "it runs",
        || container.text("out") == "ready\n",
        String::new,
    );
    container
}

fn end(container: &Container<'_>) {
    let caller = container.caller;
    caller.call(&["delete", "--force", &container.id]).ok();
    container.wait();
    caller.collect();
}

#[test]
fn processes_are_added_as_conmon_and_cri_o_do() {
    for program in RUNTIMES {
        let caller = Caller::new(program);
        let bundle = Bundle::busybox().script(WAITS);
        let container = running(&caller, &bundle);
        let file = caller.file("process.json");
        let process = json!({
            "args": ["/bin/sh", "-c", "echo out; echo err >&2; exit 9"], "cwd": "/tmp",
            "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
        });
        fs::write(&file, process.to_string()).expect("writable");
        let (file, pid_file) = (file.to_str().expect("plain"), caller.file("exec.pid"));
        let pid_flag = pid_file.to_str().expect("plain");
        let words = [
            "exec",
            "--pid-file",
            pid_flag,
            "--process",
            file,
            "--detach",
            &container.id,
        ];
        caller.call(&words).ok();
        assert_eq!(wait(pid_of(&pid_file)), 9, "{program}");
        // Attached: kubectl exec by CRI-O.
        let said = caller.call(&["exec", "--process", file, &container.id]);
        assert_eq!(
            (said.status, said.output.as_str(), said.errors.as_str()),
            (9, "out\n", "err\n")
        );
        // By words, as people do.
        let words = [
            "exec",
            "--env",
            "A=b",
            "--cwd",
            "/bin",
            "--user",
            "1:2",
            &container.id,
            "sh",
            "-c",
            "echo $A $PWD $(id -u):$(id -g)",
        ];
        assert_eq!(caller.call(&words).ok(), "b /bin 1:2\n", "{program}");
        let said = caller.call(&["exec", &container.id, "no-such-program"]);
        assert!(
            said.errors.contains("executable file not found in $PATH"),
            "{program}: {said:?}"
        );
        end(&container);
    }
}

#[test]
fn a_missing_program_fails_at_create() {
    for program in RUNTIMES {
        let caller = Caller::new(program);
        for (name, word) in [
            ("no-such-program", "executable file not found in $PATH"),
            ("/no/such/program", "no such file or directory"),
            ("/etc/passwd", "ermission denied"),
        ] {
            let bundle = Bundle::busybox().args(&[name]);
            caller.name(&bundle).create().refused(&[word]);
        }
        caller.collect();
    }
}

/// Receives a terminal's master as conmon does.
fn master(listener: &UnixListener) -> File {
    let (stream, _) = listener.accept().expect("the runtime connects");
    let mut name = [0; 64];
    let packet = linux::packet::receive(stream.as_fd(), &mut name, 1).expect("a message");
    let mut descriptors = packet.descriptors;
    File::from(descriptors.pop().expect("a terminal"))
}

/// Reads until `word` has come, or the terminal has hung up.
fn read_until(master: &mut File, word: &str) -> String {
    let mut text = String::new();
    let mut bytes = [0; 256];
    while !text.contains(word) {
        match master.read(&mut bytes) {
            Ok(0) | Err(_) => break,
            Ok(count) => text += &String::from_utf8_lossy(&bytes[..count]),
        }
    }
    text
}

#[test]
fn a_terminal_comes_over_the_console_socket_and_has_its_size() {
    for program in RUNTIMES {
        let caller = Caller::new(program);
        let script = "stty size; read line; echo got $line; stty size; exit 5";
        let bundle = Bundle::busybox()
            .script(script)
            .edit(|config| config["process"]["terminal"] = true.into());
        let socket = caller.file("console");
        let listener = UnixListener::bind(&socket).expect("a short path");
        let container = caller.name(&bundle);
        let mut create = container.create_command();
        create.arg("--console-socket").arg(&socket);
        let mut create = create.spawn().expect("installed");
        let mut master = master(&listener);
        assert!(
            create.wait().expect("our child").success(),
            "{}",
            container.text("err")
        );
        linux::terminal::resize(master.as_fd(), 33, 99).expect("a terminal");
        container.verb("start").ok();
        let first = read_until(&mut master, "99\r\n");
        assert_eq!(first, "33 99\r\n", "{program}");
        linux::terminal::resize(master.as_fd(), 44, 111).expect("a terminal");
        // The new size goes into the guest beside what is typed.
        std::thread::sleep(std::time::Duration::from_secs(1));
        master.write_all(b"word\n").expect("writable");
        let rest = read_until(&mut master, "111\r\n");
        assert_eq!(rest, "word\r\ngot word\r\n44 111\r\n", "{program}");
        assert_eq!(container.wait(), 5);
        container.delete();
        caller.collect();
    }
}
