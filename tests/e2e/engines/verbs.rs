//! The life of a container by the verbs that Podman and conmon call, and what is refused.

use std::fs;

use bulkhead_tests::{Bundle, Host, eventually};
use serde_json::Value;

use crate::caller::Caller;

/// Both: a case that runc fails is a bad test.
const RUNTIMES: [&str; 2] = ["runc", "bulkhead"];

/// Ends by SIGTERM, with a status of its own.
const WAITS: &str = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done";

#[test]
fn a_life_by_podmans_verbs_is_runcs() {
    for program in RUNTIMES {
        let host = Host::now();
        let caller = Caller::new(program);
        let bundle = Bundle::busybox().script("echo out; echo err >&2; exit 42");
        let container = caller.create(&bundle);
        let state = container.state();
        assert_eq!(state["status"], "created", "{program}");
        assert_eq!(state["id"], container.id);
        assert_eq!(state["pid"], container.pid());
        assert_eq!(state["bundle"].as_str(), bundle.path().to_str());
        let created = state["created"].as_str().expect("a time");
        assert!(created.contains('T') && created.ends_with('Z'), "{created}");
        assert!(
            state["ociVersion"]
                .as_str()
                .expect("text")
                .starts_with("1.")
        );
        assert_eq!(container.text("out"), "");
        container.verb("start").ok();
        assert_eq!(container.wait(), 42, "{program}");
        eventually(
            "it stops",
            || container.state()["status"] == "stopped",
            || container.state().to_string(),
        );
        assert_eq!(
            (
                container.text("out").as_str(),
                container.text("err").as_str()
            ),
            ("out\n", "err\n")
        );
        container.verb("delete").ok();
        container.verb("state").refused(&["does not exist"]);
        caller.collect();
        drop(caller);
        host.assert_nothing_left();
    }
}

#[test]
fn signals_go_to_the_process_by_the_verb_and_by_its_pid() {
    for program in RUNTIMES {
        let caller = Caller::new(program);
        let bundle = Bundle::busybox().script(WAITS);
        for by in ["15", "SIGTERM", "TERM", "pid"] {
            let container = caller.create(&bundle);
            container.verb("start").ok();
            eventually(
                "it runs",
                || container.text("out") == "ready\n",
                String::new,
            );
            container.is("running");
            match by {
                "pid" => {
                    let pid = nix::unistd::Pid::from_raw(container.pid());
                    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)
                        .expect("it lives");
                }
                word => drop(container.verb_with("kill", &[word]).ok()),
            }
            assert_eq!(container.wait(), 7, "{program} {by}");
            container.delete();
        }
        let container = caller.create(&bundle);
        container.verb("start").ok();
        container.verb_with("kill", &["KILL"]).ok();
        assert_eq!(container.wait(), 137, "{program}");
        container.delete();
        caller.collect();
    }
}

#[test]
fn delete_by_force_ends_whatever_there_is() {
    for program in RUNTIMES {
        let host = Host::now();
        let caller = Caller::new(program);
        let bundle = Bundle::busybox().script(WAITS);
        caller.call(&["delete", "--force", "nobody"]).ok();
        for start in [false, true] {
            let container = caller.create(&bundle);
            if start {
                container.verb("start").ok();
                container.verb("delete").refused(&["not stopped"]);
            }
            caller.call(&["delete", "--force", &container.id]).ok();
            container.verb("state").refused(&["does not exist"]);
            assert_eq!(container.wait(), 137, "{program}");
        }
        caller.collect();
        drop(caller);
        host.assert_nothing_left();
    }
}

#[test]
fn a_container_is_frozen_and_thawed() {
    for program in RUNTIMES {
        let caller = Caller::new(program);
        let bundle = Bundle::busybox().script(WAITS);
        let container = caller.create(&bundle);
        container.verb("start").ok();
        container.verb("pause").ok();
        container.is("paused");
        container.verb("resume").ok();
        container.is("running");
        container.verb("resume").refused(&["not paused"]);
        let listed = caller.call(&["list", "--format=json"]).ok();
        let listed: Value = serde_json::from_str(&listed).expect("JSON");
        assert_eq!(listed[0]["id"], container.id);
        assert_eq!(listed[0]["status"], "running");
        let pids = caller.call(&["ps", "--format", "json", &container.id]).ok();
        let pids: Vec<i32> = serde_json::from_str(&pids).expect("JSON");
        assert!(pids.contains(&container.pid()), "{pids:?}");
        let stats = caller.call(&["events", "--stats", &container.id]).ok();
        let stats: Value = serde_json::from_str(&stats).expect("JSON");
        assert_eq!(
            (stats["type"].as_str(), &stats["id"]),
            (Some("stats"), &Value::from(&*container.id))
        );
        assert!(
            stats["data"]["cpu"]["usage"]["total"].as_u64() > Some(0),
            "{stats}"
        );
        assert!(
            stats["data"]["pids"]["current"].as_u64() > Some(0),
            "{stats}"
        );
        let limits = caller.file("limits");
        fs::write(&limits, r#"{"pids": {"limit": 77}}"#).expect("writable");
        let limits = format!("--resources={}", limits.display());
        caller.call(&["update", &limits, &container.id]).ok();
        let stats = caller.call(&["events", "--stats", &container.id]).ok();
        let stats: Value = serde_json::from_str(&stats).expect("JSON");
        assert_eq!(stats["data"]["pids"]["limit"], 77, "{program}");
        caller.call(&["delete", "--force", &container.id]).ok();
        container.wait();
        caller.collect();
    }
}

#[test]
fn bad_input_has_runcs_code_and_leaves_nothing() {
    for program in RUNTIMES {
        let host = Host::now();
        let caller = Caller::new(program);
        let bundle = Bundle::busybox().script("exit 0");
        for verb in ["state", "start", "kill", "delete", "pause", "resume"] {
            caller.call(&[verb, "nobody"]).refused(&["does not exist"]);
        }
        let gone = ["create", "--bundle", "/no/such/bundle", "x"];
        caller.call(&gone).refused(&["o such file or directory"]);
        let container = caller.create(&bundle);
        assert_eq!(container.create().status, 1, "two of one id");
        container
            .verb_with("kill", &["NONSENSE"])
            .refused(&["NONSENSE", "nonsense"]);
        container.verb("start").ok();
        assert_eq!(container.wait(), 0);
        eventually(
            "it stops",
            || container.state()["status"] == "stopped",
            String::new,
        );
        container.verb("start").refused(&["stopped"]);
        container
            .verb_with("kill", &["9"])
            .refused(&["not running"]);
        container
            .verb_with("exec", &["/bin/true"])
            .refused_with(255, &["stopped"]);
        container.verb("pause").refused(&["not running"]);
        container.verb("delete").ok();
        container.verb("delete").refused(&["does not exist"]);
        let terminal = bundle.edit(|config| config["process"]["terminal"] = true.into());
        caller.name(&terminal).create().refused(&["console socket"]);
        caller.collect();
        drop(caller);
        host.assert_nothing_left();
    }
}

#[test]
fn the_log_has_the_error_for_engines() {
    for program in RUNTIMES {
        let caller = Caller::new(program);
        let log = caller.file("log.json");
        let flag = log.to_str().expect("plain");
        // As go-runc has them, and after the verb's own.
        let words = ["--log", flag, "--log-format", "json", "start", "nobody"];
        caller.call(&words).refused(&["does not exist"]);
        let text = fs::read_to_string(&log).expect("it is there");
        let line: Value = serde_json::from_str(text.lines().last().expect("a line")).expect("JSON");
        assert_eq!(line["level"], "error", "{program}");
        assert!(
            line["msg"]
                .as_str()
                .expect("text")
                .contains("does not exist")
        );
    }
}

#[test]
fn features_are_runcs_kind_of_document() {
    for program in RUNTIMES {
        let document = Caller::new(program).call(&["features"]).ok();
        let document: Value = serde_json::from_str(&document).expect("JSON");
        assert!(document["ociVersionMax"].as_str().is_some(), "{program}");
        assert!(document["linux"]["namespaces"].as_array().is_some());
    }
}
