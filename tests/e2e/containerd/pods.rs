//! Pods, by the annotations and the namespace paths that CRI gives to their containers.

mod agent;
mod vsock;

use std::fs;
use std::process::Command;

use bulkhead_tests::{BULKHEAD, Engine, Host, IMAGE, RUNC, Ran, fresh_id, must, run, soak};
use tempfile::TempDir;

use crate::{Running, eventually, processes, pss_kib, shim_of, shims_end};

/// A pod: the container that holds it.
pub(super) struct Pod {
    runtime: &'static str,
    holder: Running,
    pid: u32,
}

fn annotations(kind: &str, sandbox: &str) -> Vec<String> {
    let pair = |name: &str, value: &str| {
        [
            "--annotation".to_owned(),
            format!("io.kubernetes.cri.{name}={value}"),
        ]
    };
    [pair("container-type", kind), pair("sandbox-id", sandbox)].concat()
}

impl Pod {
    #[track_caller]
    pub(super) fn start(runtime: &'static str, words: &[&str]) -> Pod {
        let id = fresh_id();
        let mut all: Vec<String> = ["run", "--detach", "--runtime", runtime]
            .map(String::from)
            .into();
        all.extend(annotations("sandbox", &id));
        all.extend(words.iter().map(|word| (*word).to_owned()));
        all.extend([IMAGE, &id, "/bin/sleep", "1000000"].map(String::from));
        Engine::get().ok(&all);
        let holder = Running { id };
        let pid = holder.pid();
        Pod {
            runtime,
            holder,
            pid,
        }
    }

    /// The container that holds it.
    pub(super) fn holder(&self) -> &Running {
        &self.holder
    }

    /// The words of `ctr run` for a member that shares these namespaces.
    fn words(&self, first: &[&str], shared: &[&str], id: &str, script: &str) -> Vec<String> {
        let mut all: Vec<String> = ["run", "--runtime", self.runtime].map(String::from).into();
        all.extend(first.iter().map(|word| (*word).to_owned()));
        all.extend(annotations("container", &self.holder.id));
        for kind in shared {
            let file = if *kind == "network" { "net" } else { kind };
            all.push("--with-ns".into());
            all.push(format!("{kind}:/proc/{}/ns/{file}", self.pid));
        }
        all.extend([IMAGE, id, "/bin/sh", "-c", script].map(String::from));
        all
    }

    /// Runs a member to its end.
    pub(super) fn run(&self, first: &[&str], script: &str) -> Ran {
        let first = [&["--rm"], first].concat();
        let words = self.words(&first, &["ipc", "uts", "network"], &fresh_id(), script);
        Engine::get().run(&words)
    }

    /// Starts a member.
    #[track_caller]
    pub(super) fn member(&self, shared: &[&str], script: &str) -> Running {
        let id = fresh_id();
        Engine::get().ok(&self.words(&["--detach"], shared, &id, script));
        Running { id }
    }

    #[track_caller]
    pub(super) fn remove(self) {
        self.holder.remove();
        shims_end();
    }
}

#[test]
fn a_pod_goes_on_from_the_template_that_was_built() {
    let engine = Engine::get();
    let template = |words: &[&str]| run(Command::new("bulkhead").arg("template").args(words)).ok();
    // Whoever runs the suite on templates has made it.
    let is_ours = template(&["build"]).ends_with(": made");
    let host = Host::now();
    let logged = engine.log().len();
    let pod = Pod::start(BULKHEAD, &[]);
    let ran = pod.run(&[], "uname -r; exit 7");
    assert_eq!(ran.status, 7, "{ran}");
    assert!(ran.text().ends_with("-bulkhead"), "{ran}");
    pod.remove();
    host.assert_nothing_left();
    if is_ours {
        // Other tests' pods boot.
        template(&["drop", "--all"]);
    }
    let log = engine.log()[logged..].to_owned();
    assert!(log.contains("template=true"), "{log}");
}

#[test]
fn members_come_and_go_in_a_live_pod() {
    Engine::get();
    for runtime in [RUNC, BULKHEAD] {
        let host = Host::now();
        let pod = Pod::start(runtime, &[]);
        let within = Host::now();
        let mut shim_kib = 0;
        for n in 0..if soak() { 50 } else { 5 } {
            // What its allocator keeps is there after the second one.
            if n == 2 && runtime == BULKHEAD {
                shim_kib = pss_kib(shim_of(&pod.holder));
            }
            let ran = pod.run(&[], &format!("echo {n}; exit {n}"));
            assert_eq!(
                (ran.status, ran.text()),
                (n, n.to_string()),
                "{runtime}: {ran}"
            );
        }
        // A container that goes leaves nothing behind in the pod.
        within.assert_nothing_left();
        if runtime == BULKHEAD {
            let grown = pss_kib(shim_of(&pod.holder)).saturating_sub(shim_kib);
            assert!(grown <= 256, "the shim grew by {grown} KiB");
            assert_eq!(
                processes(&["bulkhead-vmm run"]).len(),
                1,
                "one machine a pod"
            );
            assert_eq!(
                pod.member(&["ipc", "uts", "network"], "sleep 1000").pid(),
                pod.pid
            );
        }
        let holder = pod.holder.id.clone();
        for line in Engine::get()
            .ok(&["task", "ls", "-q"])
            .lines()
            .filter(|id| **id != *holder)
        {
            Running {
                id: line.to_owned(),
            }
            .remove();
        }
        pod.remove();
        host.assert_nothing_left();
    }
}

#[test]
fn namespaces_are_shared_as_asked() {
    for runtime in [RUNC, BULKHEAD] {
        let pod = Pod::start(runtime, &[]);
        let all = ["ipc", "uts", "network", "pid"];
        let [first, second] = [(); 2].map(|()| pod.member(&all, "exec sleep 1234"));
        let other = pod.member(&["ipc", "network"], "exec sleep 1000");
        let spaces = |member: &Running| -> [String; 4] {
            let script = "cd /proc/self/ns; for kind in ipc net uts pid; do readlink $kind; done";
            let text = member.exec(script).ok();
            let lines: Vec<String> = text.lines().map(String::from).collect();
            lines.try_into().expect("four lines")
        };
        let [of_first, of_second, of_other] = [&first, &second, &other].map(spaces);
        assert_eq!(of_first, of_second, "{runtime}");
        assert_eq!(of_first[..2], of_other[..2], "{runtime}");
        assert_ne!(of_first[2], of_other[2], "{runtime}");
        assert_ne!(of_first[3], of_other[3], "{runtime}");
        let sleeping = first.exec("ps | grep -c '[s]leep 1234'").ok();
        assert_eq!(sleeping, "2", "{runtime}");
        // Killing all of one container spares the other one.
        Engine::get().ok(&["task", "kill", "--all", "--signal", "SIGKILL", &first.id]);
        eventually("it stops", || first.status().as_deref() == Some("STOPPED"));
        assert_eq!(second.status().as_deref(), Some("RUNNING"), "{runtime}");
        for member in [first, second, other] {
            member.remove();
        }
        pod.remove();
    }
}

#[test]
fn shared_memory_is_the_pods_and_has_its_size() {
    for runtime in [RUNC, BULKHEAD] {
        let dir = TempDir::new().expect("a temporary directory");
        let shm = dir.path().join("shm");
        fs::create_dir(&shm).expect("a directory");
        let mount = |words: &[&str]| {
            must(Command::new(words[0]).args(&words[1..]).arg(&shm));
        };
        mount(&["mount", "-t", "tmpfs", "-o", "size=8m", "shm"]);
        let volume = format!(
            "type=bind,src={},dst=/dev/shm,options=rbind:rw",
            shm.display()
        );
        let pod = Pod::start(runtime, &["--mount", &volume]);
        let wrote = pod.run(
            &["--mount", &volume],
            "echo here > /dev/shm/file; df -m /dev/shm | tail -n 1 | awk '{print $2}'",
        );
        assert_eq!(wrote.ok(), "8", "{runtime}");
        assert_eq!(
            pod.run(&["--mount", &volume], "cat /dev/shm/file").ok(),
            "here",
            "{runtime}"
        );
        pod.remove();
        mount(&["umount"]);
    }
}

#[test]
fn the_pods_end_is_that_of_its_members() {
    Engine::get();
    let host = Host::now();
    let pod = Pod::start(BULKHEAD, &[]);
    let members = [(); 2].map(|()| pod.member(&["ipc"], "sleep 1000"));
    let vmm = processes(&["bulkhead-vmm run"]);
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(vmm[0]),
        nix::sys::signal::Signal::SIGKILL,
    )
    .expect("it runs");
    for member in members.iter().chain([&pod.holder]) {
        eventually("it stops", || member.status().as_deref() == Some("STOPPED"));
        assert_eq!(member.delete_task(), 137);
    }
    for member in members {
        member.remove();
    }
    pod.remove();
    host.assert_nothing_left();
}

#[test]
fn what_is_not_the_pods_is_refused() {
    Engine::get();
    let host = Host::now();
    let pod = Pod::start(BULKHEAD, &[]);
    let stranger = pod.words(
        &["--rm", "--with-ns", "ipc:/proc/1/ns/ipc"],
        &[],
        &fresh_id(),
        "true",
    );
    let ran = Engine::get().run(&stranger);
    assert!(
        ran.status != 0 && ran.errors().contains("linux.namespaces: ipc with a path"),
        "{ran}"
    );
    let member = pod.member(&["ipc"], "sleep 1000");
    let target = pod.words(&["--rm"], &["pid"], &fresh_id(), "true");
    let ran = Engine::get().run(&target);
    assert!(
        ran.status != 0 && ran.errors().contains("cannot join"),
        "{ran}"
    );
    member.remove();
    let holder = Engine::get().run(&["task", "exec", "--exec-id", "x", &pod.holder.id, "true"]);
    assert!(
        holder.status != 0 && holder.errors().contains("runs nothing"),
        "{holder}"
    );
    pod.remove();
    let orphan: Vec<String> = ["run", "--rm", "--runtime", BULKHEAD]
        .map(String::from)
        .into_iter()
        .chain(annotations("container", "no-such-pod"))
        .chain([IMAGE, &fresh_id(), "true"].map(String::from))
        .collect();
    let ran = Engine::get().run(&orphan);
    assert!(
        ran.status != 0 && ran.errors().contains("no-such-pod"),
        "{ran}"
    );
    host.assert_nothing_left();
}

#[test]
fn pods_one_after_another_and_ten_at_once_leave_nothing() {
    Engine::get();
    let host = Host::now();
    let count = if soak() { 100 } else { 4 };
    for _ in 0..count {
        let pod = Pod::start(BULKHEAD, &[]);
        assert_eq!(pod.run(&[], "echo ok").ok(), "ok");
        pod.remove();
    }
    std::thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| {
                let pod = Pod::start(BULKHEAD, &[]);
                assert_eq!(pod.run(&[], "echo ok").ok(), "ok");
                pod.holder.remove();
            });
        }
    });
    shims_end();
    host.assert_nothing_left();
}

#[test]
fn many_containers_live_in_one_pod() {
    Engine::get();
    let host = Host::now();
    let pod = Pod::start(BULKHEAD, &[]);
    let within = Host::now();
    let count = if soak() { 50 } else { 10 };
    let members: Vec<Running> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|_| scope.spawn(|| pod.member(&["ipc", "uts", "network"], "sleep 1000")))
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|member| member.expect("no panic")).collect()
    });
    for (n, member) in members.iter().enumerate() {
        assert_eq!(member.status().as_deref(), Some("RUNNING"));
        // Each exec costs seconds here.
        if soak() || n % 3 == 0 {
            assert_eq!(member.exec("exit 3").status, 3);
        }
    }
    for member in members {
        member.remove();
    }
    within.assert_nothing_left();
    pod.remove();
    host.assert_nothing_left();
}
