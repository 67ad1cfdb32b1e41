//! How long things take beside runc, in one run of the lab. Printed, not judged: an emulated host is no place for limits.
//! `make bench` reads the lines that begin with "figure".

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bulkhead_tests::{BULKHEAD, Engine, IMAGE, RUNC, fresh_id, samples};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::cri::{self, Pod};
use crate::{Running, pss_kib, shim_of};

/// The median of some samples in ms, after one that warms up.
fn median(mut sample: impl FnMut()) -> f64 {
    sample();
    middle((0..samples()).map(|_| {
        let since = Instant::now();
        sample();
        since.elapsed().as_secs_f64() * 1e3
    }))
}

fn middle(taken: impl Iterator<Item = f64>) -> f64 {
    let mut taken: Vec<f64> = taken.collect();
    taken.sort_by(f64::total_cmp);
    taken[taken.len() / 2]
}

/// A line that `make bench` reads.
pub(crate) fn figure(name: &str, unit: &str, ours: f64, peer: Option<f64>) {
    let figure = json!({"name": name, "unit": unit, "ours": ours, "peer": peer});
    println!("\nfigure {figure}");
}

#[test]
fn a_run_and_its_parts_beside_runcs() {
    let [peer, ours] = [RUNC, BULKHEAD].map(|runtime| {
        run(runtime, false);
        let runs: Vec<Run> = (0..samples()).map(|_| run(runtime, false)).collect();
        middle(runs.iter().map(|run| run.whole))
    });
    figure("ctr run --rm true", "ms", ours, Some(peer));
    // Apart, for somebody who listens costs time.
    let [peer, ours] = [RUNC, BULKHEAD].map(|runtime| -> Vec<Run> {
        run(runtime, true);
        (0..samples()).map(|_| run(runtime, true)).collect()
    });
    for (n, name) in PARTS.iter().enumerate() {
        let part = |runs: &[Run]| middle(runs.iter().map(|run| run.parts[n]));
        figure(name, "ms", part(&ours), Some(part(&peer)));
    }
    for (n, (_, name)) in BOOT.iter().enumerate() {
        let boot = middle(ours.iter().map(|run| run.boot[n]));
        figure(name, "ms", boot, None);
    }
}

/// From which moment to which, of those that containerd tells of.
const PARTS: [&str; 4] = [
    "  command to created (shim, machine, container)",
    "  created to started",
    "  started to exited",
    "  exited to the command's end (teardown)",
];

/// What the shim's log says of a machine's boot: its word, and the figure's name.
const BOOT: [(&str, &str); 2] = [
    ("boot_ms", "    of it: VMM start to the agent's call"),
    ("ready_ms", "    of it: the pod, until it is ready"),
];

struct Run {
    whole: f64,
    parts: Vec<f64>,
    boot: Vec<f64>,
}

/// One `ctr run`; with its parts, if somebody is to listen.
fn run(runtime: &str, listen: bool) -> Run {
    let engine = Engine::get();
    let id = fresh_id();
    let listener = listen.then(|| engine.listen());
    let logged = engine.log().len();
    let began = now();
    engine.ok(&["run", "--rm", "--runtime", runtime, IMAGE, &id, "/bin/true"]);
    let ended = now();
    let mut moments = vec![began];
    if let Some(listener) = listener {
        listener.wait_for_output("/tasks/delete");
        listener.signal(Signal::SIGINT);
        let told = listener.finish().text();
        let at = |topic: &str| {
            let line = told.lines().find(|line| line.contains(topic));
            moment(line.unwrap_or_else(|| panic!("{topic} is missing: {told}")))
        };
        moments.extend(["/tasks/create", "/tasks/start", "/tasks/exit"].map(at));
    }
    moments.push(ended);
    let log = engine.log();
    let boot = |(word, _): &(&str, &str)| {
        let (_, rest) = log[logged..].rsplit_once(&format!("{word}="))?;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    };
    let boot: Vec<f64> = BOOT.iter().filter_map(boot).collect();
    assert!(runtime == RUNC || boot.len() == BOOT.len(), "{log}");
    let since = |pair: &[f64]| (pair[1] - pair[0]).rem_euclid(86400.0) * 1e3;
    Run {
        whole: since(&[began, ended]),
        parts: moments.windows(2).map(since).collect(),
        boot,
    }
}

/// Seconds of this day, UTC.
fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("after 1970").as_secs_f64() % 86400.0
}

/// The same of a line of `ctr events`: "2026-01-31 12:34:56.789 +0000 UTC …".
fn moment(line: &str) -> f64 {
    let clock = line.split(' ').nth(1).expect("a time of day");
    let parts = clock.split(':').map(|part| part.parse::<f64>());
    parts.fold(0.0, |sum, part| sum * 60.0 + part.expect("a number"))
}

#[test]
fn an_exec_beside_runcs() {
    let [peer, ours] = [RUNC, BULKHEAD].map(|runtime| {
        let running = Running::start(runtime, &[], "sleep 1000");
        let exec = median(|| assert_eq!(running.exec("true").status, 0));
        running.remove();
        exec
    });
    figure("ctr task exec true", "ms", ours, Some(peer));
}

#[test]
fn a_second_container_beside_runcs() {
    let cri = cri::connect();
    let taken: Value = cri::handlers()
        .iter()
        .map(|handler| {
            let pod = Pod::start(&cri, handler, cri::private_pids());
            pod.container("sleep 1000", &[]);
            let took = median(|| drop(pod.container("sleep 1000", &[])));
            pod.remove();
            ((*handler).to_owned(), json!(took))
        })
        .collect();
    let name = "second container of a pod, CRI create + start";
    let ours = taken["bulkhead"].as_f64().expect("it was measured");
    figure(name, "ms", ours, taken["runc"].as_f64());
}

#[test]
fn the_shims_memory() {
    let running = Running::start(BULKHEAD, &[], "sleep 1000");
    for _ in 0..5 {
        assert_eq!(running.exec("true").status, 0);
    }
    let shim = pss_kib(shim_of(&running));
    // The contract of this project, the only figure that is judged: it does not depend on the emulation.
    assert!(shim <= 6 << 10, "{shim} KiB");
    figure(
        "the shim of an idle pod, PSS",
        "MiB",
        shim as f64 / 1024.0,
        None,
    );
    running.remove();
}
