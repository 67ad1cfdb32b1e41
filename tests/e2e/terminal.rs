//! An interactive terminal: `script` gives the command a terminal, tmux resizes one.

use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bulkhead_tests::{Bundle, Host, PATIENCE, Runtime, Started, run};
use serde_json::json;

fn terminal_bundle(script: &str) -> Bundle {
    let bundle = Bundle::busybox()
        .edit(|config| config["process"]["terminal"] = json!(true))
        .script(script);
    bundle.write();
    bundle
}

#[test]
fn a_terminal_under_script_has_a_size_and_job_control() {
    let host = Host::now();
    let bundle =
        terminal_bundle("tty; test -t 0 -a -t 1 -a -t 2 && echo terminal; stty size; exit 5");
    let command = format!(
        "stty rows 33 cols 101; bulkhead run --bundle {} term1",
        bundle.path().display()
    );
    let mut script = Command::new("script");
    script.args([
        "--quiet",
        "--return",
        "--echo",
        "never",
        "--command",
        &command,
        "/dev/null",
    ]);
    let mut started = Started::spawn(script);
    let stdin = started.stdin();
    let ran = started.finish();
    drop(stdin);
    let text = ran.text().replace('\r', "");
    assert_eq!(
        (ran.status, text.as_str()),
        (5, "/dev/pts/0\nterminal\n33 101"),
        "{ran}"
    );
    host.assert_nothing_left();
}

#[test]
fn a_terminal_inside_needs_none_outside() {
    let bundle = terminal_bundle("tty; exit 6");
    let ran = bundle.start(Runtime::Bulkhead, &[]).finish();
    assert_eq!(
        (ran.status, ran.text().as_str()),
        (6, "/dev/pts/0\r"),
        "{ran}"
    );
}

struct Tmux(String);

impl Tmux {
    fn start(name: &str, command: &str) -> Tmux {
        let tmux = Tmux(format!("bulkhead-{name}"));
        tmux.run(&["new-session", "-d", "-x", "80", "-y", "24", command]);
        tmux
    }

    fn run(&self, words: &[&str]) -> String {
        let mut command = Command::new("tmux");
        run(command.args(["-L", &self.0]).args(words)).text()
    }

    fn keys(&self, keys: &[&str]) {
        let mut words = vec!["send-keys"];
        words.extend(keys);
        self.run(&words);
    }

    /// Waits until the screen shows `text`.
    #[track_caller]
    fn shows(&self, text: &str) {
        let until = Instant::now() + PATIENCE;
        loop {
            let screen = self.run(&["capture-pane", "-p"]);
            if screen.contains(text) {
                return;
            }
            assert!(
                Instant::now() < until,
                "{text:?} is not on the screen:\n{screen}"
            );
            sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        self.run(&["kill-server"]);
    }
}

#[test]
fn keys_interrupts_and_resizes_reach_the_shell() {
    let bundle = terminal_bundle("exec sh -i");
    // The shell stays after bulkhead, so that the screen does.
    let tmux = Tmux::start(
        "keys",
        &format!(
            "bulkhead run --bundle {} term2; echo \"status=$?\"; sleep 1000",
            bundle.path().display()
        ),
    );
    tmux.shows("#");
    tmux.keys(&["echo $((6*7))", "Enter"]);
    tmux.shows("42");
    tmux.keys(&["sleep 500; echo after=$?", "Enter"]);
    tmux.shows("sleep 500");
    tmux.keys(&["C-c"]);
    tmux.keys(&["stty size", "Enter"]);
    tmux.shows("24 80");
    tmux.run(&["resize-window", "-x", "100", "-y", "30"]);
    // The new size travels beside the keys: asked again until it is there, as a person would.
    let until = Instant::now() + PATIENCE;
    while !tmux.run(&["capture-pane", "-p"]).contains("30 100") {
        assert!(
            Instant::now() < until,
            "the size did not arrive: {}",
            tmux.run(&["capture-pane", "-p"])
        );
        tmux.keys(&["stty size", "Enter"]);
        sleep(Duration::from_millis(300));
    }
    tmux.keys(&["exit 3", "Enter"]);
    tmux.shows("status=3");
}

#[test]
fn control_c_without_a_terminal_inside_ends_the_container() {
    let bundle = Bundle::busybox()
        .script("trap 'echo interrupted; exit 4' INT; echo ready; while :; do sleep 0.1; done");
    bundle.write();
    let tmux = Tmux::start(
        "ctrl-c",
        &format!(
            "bulkhead run --bundle {} term3; echo \"status=$?\"; sleep 1000",
            bundle.path().display()
        ),
    );
    tmux.shows("ready");
    tmux.keys(&["C-c"]);
    tmux.shows("interrupted");
    tmux.shows("status=4");
}
