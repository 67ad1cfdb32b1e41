//! What a user of `ctr` sees.

use std::fs;
use std::process::Command;
use std::thread;

use bulkhead_tests::{BULKHEAD, Engine, Host, IMAGE, RUNC, Ran, Started, fresh_id, tail};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::{Running, eventually, run_once, shims_end};

#[test]
fn a_container_runs_and_nothing_is_left() {
    Engine::get();
    for runtime in [RUNC, BULKHEAD] {
        let host = Host::now();
        let ran = run_once(runtime, &[], "echo out; echo err >&2; exit 7");
        assert_eq!(
            (ran.status, ran.text().as_str(), ran.errors().as_str()),
            (7, "out", "err\n"),
            "{runtime}: {ran}\n{}",
            tail(&Engine::get().log())
        );
        // The shim ends a moment after it was let go.
        shims_end();
        host.assert_nothing_left();
    }
}

#[test]
fn the_last_output_of_a_short_container_is_not_lost() {
    for runtime in [RUNC, BULKHEAD] {
        let ran = run_once(
            runtime,
            &[],
            "dd if=/dev/zero bs=1M count=8 2>/dev/null; echo end",
        );
        assert_eq!(
            (ran.status, ran.stdout.len()),
            (0, (8 << 20) + 4),
            "{runtime}"
        );
    }
}

#[test]
fn input_reaches_the_container_and_ends() {
    for runtime in [RUNC, BULKHEAD] {
        let id = fresh_id();
        let words = [
            "run",
            "--rm",
            "--runtime",
            runtime,
            IMAGE,
            &id,
            "/bin/sh",
            "-c",
            "wc -c; echo after",
        ];
        let mut started = Started::spawn(Engine::get().ctr(&words));
        let writer = started.feed(vec![b'x'; 300_000]);
        let ran = started.finish();
        writer.join().expect("no panic").expect("all is read");
        assert_eq!(ran.ok(), "300000\nafter", "{runtime}");
    }
}

#[test]
fn processes_are_added_to_a_running_container() {
    for runtime in [RUNC, BULKHEAD] {
        let host = Host::now();
        let running = Running::start(runtime, &["--env", "NAME=value"], "sleep 1000");
        assert_eq!(running.status().as_deref(), Some("RUNNING"), "{runtime}");
        let ran = running.exec("echo $NAME; echo err >&2; exit 3");
        assert_eq!(
            (ran.status, ran.text().as_str(), ran.errors().as_str()),
            (3, "value", "err\n"),
            "{runtime}: {ran}"
        );
        // All at once.
        let together: Vec<Ran> = thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|n| {
                    scope.spawn({
                        let running = &running;
                        move || running.exec(&format!("echo {n}; exit {n}"))
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"))
                .collect()
        });
        for (n, ran) in together.iter().enumerate() {
            assert_eq!(
                (ran.status, ran.text()),
                (n as i32, n.to_string()),
                "{runtime}: {ran}"
            );
        }
        let burst = running.exec("dd if=/dev/zero bs=1M count=8 2>/dev/null");
        assert_eq!(burst.stdout.len(), 8 << 20, "{runtime}");
        // A program that is not there: an error, and the container goes on.
        let words = [
            "task",
            "exec",
            "--exec-id",
            "none",
            &running.id,
            "/no/such/program",
        ];
        let missing = Engine::get().run(&words);
        assert!(
            missing.status != 0 && missing.errors().contains("no such file"),
            "{runtime}: {missing}"
        );
        assert_eq!(running.status().as_deref(), Some("RUNNING"), "{runtime}");
        running.remove();
        shims_end();
        host.assert_nothing_left();
    }
}

#[test]
fn a_grandchild_that_keeps_stdout_does_not_hold_up_the_exit() {
    let running = Running::start(BULKHEAD, &[], "sleep 1000");
    let words = [
        "task",
        "exec",
        "--detach",
        "--exec-id",
        "grand",
        &running.id,
        "/bin/sh",
        "-c",
        "sleep 1000 & exit 4",
    ];
    let ran = Engine::get().run(&words);
    assert_eq!(ran.status, 0, "{ran}");
    let events = || Engine::get().log();
    eventually("the exit is told", || {
        events().contains("process=grand status=4")
    });
    running.remove();
}

#[test]
fn a_terminal_has_a_size_and_echoes() {
    for runtime in [RUNC, BULKHEAD] {
        let id = fresh_id();
        let ctr = Engine::get().ctr(&[
            "run",
            "--rm",
            "--tty",
            "--runtime",
            runtime,
            IMAGE,
            &id,
            "/bin/sh",
            "-c",
            // The size comes a moment after the start.
            "until stty size | grep -q 77; do sleep 0.1; done; stty size; tty; exit 5",
        ]);
        let line: Vec<String> = std::iter::once(ctr.get_program())
            .chain(ctr.get_args())
            .map(|word| format!("'{}'", word.to_str().expect("plain")))
            .collect();
        let script = format!("stty rows 33 cols 77; {}", line.join(" "));
        let mut command = Command::new("script");
        command.args(["--quiet", "--return", "--command", &script, "/dev/null"]);
        let mut started = Started::spawn(command);
        let stdin = started.stdin();
        let ran = started.finish_with(stdin);
        assert!(
            ran.text().contains("33 77") && ran.text().contains("/dev/pts/"),
            "{runtime}: {ran}"
        );
        assert_eq!(ran.status, 5, "{runtime}: {ran}");
    }
}

#[test]
fn signals_end_it_with_their_number() {
    for runtime in [RUNC, BULKHEAD] {
        let id = fresh_id();
        let script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
        let words = [
            "run",
            "--rm",
            "--runtime",
            runtime,
            IMAGE,
            &id,
            "/bin/sh",
            "-c",
            script,
        ];
        let started = Started::spawn(Engine::get().ctr(&words));
        started.wait_for_output("ready");
        Engine::get().ok(&["task", "kill", "--signal", "SIGTERM", &id]);
        let ran = started.finish();
        assert_eq!(
            (ran.status, ran.text().as_str()),
            (9, "ready\ncaught"),
            "{runtime}: {ran}"
        );
        let id = fresh_id();
        let words = [
            "run",
            "--rm",
            "--runtime",
            runtime,
            IMAGE,
            &id,
            "/bin/sh",
            "-c",
            "echo ready; sleep 1000",
        ];
        let started = Started::spawn(Engine::get().ctr(&words));
        started.wait_for_output("ready");
        Engine::get().ok(&["task", "kill", "--all", "--signal", "SIGKILL", &id]);
        assert_eq!(started.finish().status, 137, "{runtime}");
    }
}

#[test]
fn it_stands_still_and_goes_on() {
    for runtime in [RUNC, BULKHEAD] {
        let running = Running::start(
            runtime,
            &[],
            "i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.1; done",
        );
        let engine = Engine::get();
        engine.ok(&["task", "pause", &running.id]);
        assert_eq!(running.status().as_deref(), Some("PAUSED"), "{runtime}");
        let refused = running.exec("true");
        assert_ne!(refused.status, 0, "{runtime}: {refused}");
        engine.ok(&["task", "resume", &running.id]);
        assert_eq!(running.status().as_deref(), Some("RUNNING"), "{runtime}");
        let count = || running.exec("cat /count").text();
        let before = count();
        eventually("it counts on", || count() != before);
        engine.ok(&["task", "pause", &running.id]);
        // Also when it stands still.
        running.remove();
    }
}

#[test]
fn metrics_are_those_of_the_container() {
    for runtime in [RUNC, BULKHEAD] {
        let running = Running::start(runtime, &["--memory-limit", "67108864"], "sleep 1000");
        let text = Engine::get().ok(&["task", "metrics", &running.id]);
        let value = |name: &str| {
            let line = text
                .lines()
                .find(|line| line.split_whitespace().next() == Some(name));
            let word = line.and_then(|line| line.split_whitespace().nth(1));
            word.unwrap_or_else(|| panic!("{runtime}: no {name} in {text}"))
                .parse::<u64>()
                .expect("a number")
        };
        assert_eq!(value("memory.usage_limit"), 67_108_864, "{runtime}");
        assert!(
            value("memory.usage") > 0 && value("memory.usage") < 67_108_864,
            "{runtime}"
        );
        assert!(
            value("pids.current") >= 1 && value("pids.current") < 10,
            "{runtime}"
        );
        assert!(value("cpu.usage_usec") > 0, "{runtime}");
        running.remove();
    }
}

#[test]
fn events_come_in_order() {
    for runtime in [RUNC, BULKHEAD] {
        let listener = Engine::get().listen();
        let running = Running::start(runtime, &[], "sleep 1000");
        assert_eq!(running.exec("exit 3").status, 3);
        let id = running.id.clone();
        running.remove();
        listener.wait_for_output("/tasks/delete");
        listener.wait_for_output("/containers/delete");
        listener.signal(nix::sys::signal::Signal::SIGINT);
        let text = listener.finish().text();
        let topics: Vec<&str> = text
            .lines()
            .filter(|line| line.contains(&id))
            .filter_map(|line| {
                line.split_whitespace()
                    .find(|word| word.starts_with("/tasks/"))
            })
            .collect();
        let wanted = [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exec-added",
            "/tasks/exec-started",
            "/tasks/exit",
            "/tasks/exit",
            "/tasks/delete",
        ];
        assert_eq!(topics, wanted, "{runtime}: {text}");
    }
}

#[test]
fn bad_input_is_refused_with_the_reason_and_nothing_is_left() {
    Engine::get();
    let host = Host::now();
    let cases: &[(&[&str], &str, &str)] = &[
        (
            &["--with-ns", "pid:/proc/1/ns/pid"],
            "true",
            "linux.namespaces: pid with a path",
        ),
        (&["--device", "/dev/kvm"], "true", "linux.devices"),
    ];
    for (words, script, reason) in cases {
        let ran = run_once(BULKHEAD, words, script);
        assert!(
            ran.status != 0 && ran.errors().contains(reason),
            "{words:?}: {ran}"
        );
    }
    let id = fresh_id();
    let missing =
        Engine::get().run(&["run", "--rm", "--runtime", BULKHEAD, IMAGE, &id, "/no/such"]);
    assert!(
        missing.status != 0 && missing.errors().contains("no such file"),
        "{missing}"
    );
    shims_end();
    host.assert_nothing_left();
}

#[test]
fn a_live_container_outlives_containerd() {
    for runtime in [RUNC, BULKHEAD] {
        let running = Running::start(
            runtime,
            &[],
            "trap 'exit 6' TERM; while :; do sleep 0.1; done",
        );
        let (pid, engine) = (running.pid(), Engine::get());
        engine.restart();
        assert_eq!(
            (running.status().as_deref(), running.pid()),
            (Some("RUNNING"), pid),
            "{runtime}"
        );
        assert_eq!(running.exec("exit 2").status, 2, "{runtime}");
        engine.ok(&["task", "kill", "--signal", "SIGTERM", &running.id]);
        eventually("it stops", || {
            running.status().as_deref() == Some("STOPPED")
        });
        assert_eq!(running.delete_task(), 6, "{runtime}");
        running.remove();
    }
}

#[test]
fn output_is_attached_to_again() {
    for runtime in [RUNC, BULKHEAD] {
        let script = "n=0; while :; do n=$((n+1)); echo line $n.; sleep 0.1; done";
        let running = Running::start(runtime, &[], script);
        let last = |text: &str| -> u32 {
            let line = text
                .lines()
                .rev()
                .find_map(|line| line.strip_prefix("line "));
            let number = line.and_then(|line| line.strip_suffix('.'));
            number.expect("a whole line").parse().expect("a number")
        };
        let attach = |least: u32| {
            let attached = Started::spawn(Engine::get().ctr(&["task", "attach", &running.id]));
            attached.wait_for_output(&format!("line {least}."));
            // Not a signal that ctr would pass on to the container.
            attached.signal(Signal::SIGKILL);
            last(&attached.finish().text())
        };
        let first = attach(5);
        let second = attach(first + 10);
        assert!(second > first, "{runtime}");
        assert_eq!(running.status().as_deref(), Some("RUNNING"), "{runtime}");
        running.remove();
    }
}

/// Programs of a distribution, not one static binary.
#[test]
fn an_image_of_debian_runs() {
    let image = Engine::get().import_debian();
    for runtime in [RUNC, BULKHEAD] {
        let script = "
            set -euo pipefail
            python3 -c 'import sys, hashlib; print(sys.version_info.major, hashlib.sha256(b\"x\").hexdigest()[:8])'
            seq 1000 | sort -rn | head -n 1
            printf '%s\\n' b a | tac > /tmp/list; paste -sd, /tmp/list
            find /usr/lib/python3* -name '*.py' | wc -l
            (sleep 0.1; exit 3) & wait $! || echo $?
            cp -a /usr/share/doc /tmp/copy; diff -r /usr/share/doc /tmp/copy; rm -r /tmp/copy /usr/share/doc; ls /usr/share/doc 2>&1 || true";
        let id = fresh_id();
        let words = ["run", "--rm", "--runtime", runtime, image, &id];
        let ran = Engine::get().run(&[&words[..], &["/bin/bash", "-c", script]].concat());
        let text = ran.ok();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..3],
            ["3 2d711642", "1000", "a,b"],
            "{runtime}: {ran}"
        );
        assert!(lines[3].parse::<u32>().expect("a count") > 0, "{runtime}");
        let gone = "ls: cannot access '/usr/share/doc': No such file or directory";
        assert_eq!(lines[4..], ["3", gone], "{runtime}");
    }
}

#[test]
fn bulkhead_runs_an_image_that_containerd_keeps() {
    let engine = Engine::get();
    let dir = TempDir::with_prefix_in("bulkhead-images-", "/run").expect("a tmpfs");
    let config = dir.path().join("config.toml");
    let text = format!("data_dir = {:?}\n", dir.path().join("data"));
    fs::write(&config, text).expect("writable");
    let mut command = Command::new("bulkhead");
    command.env("CONTAINERD_ADDRESS", engine.socket());
    command.arg("--config").arg(&config);
    let image = format!("containerd:{IMAGE}");
    let ran = bulkhead_tests::run(command.args(["run", &image, "echo", "hello"]));
    assert_eq!(ran.ok(), "hello");
}
