//! What users of other runtimes of virtual machines have met, and should not meet here.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::{BULKHEAD, Engine, Host, RUNC, SOON, soak};
use containerd_shim_protos::api;

use crate::pods::Pod;
use crate::rpc::{block_on, context, shim};
use crate::{Running, eventually, pods_cgroup, pss_kib, shim_of, shims_end};

/// A container in CrashLoopBackOff must not grow what its pod takes.
#[test]
fn containers_that_cannot_be_made_leave_the_pod_as_it_was() {
    Engine::get();
    let host = Host::now();
    let pod = Pod::start(BULKHEAD, &[]);
    let within = Host::now();
    let mut shim_kib = 0;
    let missing = ["--mount", "type=bind,src=/no/such,dst=/v,options=rbind"];
    for n in 0..if soak() { 200 } else { 12 } {
        // What its allocator keeps is there after some of both kinds.
        if n == 4 {
            shim_kib = pss_kib(shim_of(pod.holder()));
        }
        let ran = match n % 2 {
            0 => pod.run(&missing, "true"),
            _ => pod.run(&["--cwd", "/no/such/directory"], "exec /no/such/program"),
        };
        assert_ne!(ran.status, 0, "{ran}");
    }
    let grown = pss_kib(shim_of(pod.holder())).saturating_sub(shim_kib);
    assert!(grown <= 256, "the shim grew by {grown} KiB");
    within.assert_nothing_left();
    assert_eq!(pod.run(&[], "echo alive").ok(), "alive");
    pod.remove();
    host.assert_nothing_left();
}

/// Whoever reads statistics without pause holds nobody up.
#[test]
fn a_storm_of_statistics_does_not_hold_up_a_kill() {
    let running = Running::start(BULKHEAD, &[], "sleep 1000");
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                block_on(async {
                    let shim = shim(&running).await;
                    let request = api::StatsRequest {
                        id: running.id.clone(),
                        ..Default::default()
                    };
                    while !over.load(Ordering::Relaxed) {
                        // Of a container that is deleted by then there are none.
                        let _ = shim.stats(context(), &request).await;
                    }
                });
            });
        }
        thread::sleep(Duration::from_secs(1));
        let since = Instant::now();
        Engine::get().ok(&["task", "kill", "--signal", "SIGKILL", &running.id]);
        eventually("it stops", || {
            running.status().as_deref() == Some("STOPPED")
        });
        let took = since.elapsed();
        over.store(true, Ordering::Relaxed);
        println!("it stopped after {took:?}");
        assert!(took < SOON, "{took:?}");
    });
    assert_eq!(running.delete_task(), 137);
    running.remove();
}

#[test]
fn processes_lead_sessions_of_their_own() {
    for runtime in [RUNC, BULKHEAD] {
        let running = Running::start(runtime, &[], "sleep 1000");
        // proc(5): pid, process group, session.
        let ids = |pid: &str| {
            running
                .exec(&format!("cut -d' ' -f1,5,6 /proc/{pid}/stat"))
                .ok()
        };
        assert_eq!(ids("1"), "1 1 1", "{runtime}");
        let own = ids("$$");
        let mut own = own.split(' ');
        let pid = own.next();
        assert!(own.all(|id| Some(id) == pid), "{runtime}");
        running.remove();
    }
}

/// Not to the engine's, where no limit of the pod's would see it.
#[test]
fn the_guests_memory_is_charged_to_the_pod() {
    let running = Running::start(BULKHEAD, &[], "sleep 1000");
    let file = pods_cgroup().join("memory.current");
    let charged = || -> u64 {
        let text = fs::read_to_string(&file).expect("a pod's cgroup");
        text.trim().parse().expect("bytes")
    };
    let before = charged();
    let filled = running.exec("dd if=/dev/zero of=/dev/shm/file bs=1M count=50 2>/dev/null");
    assert_eq!(filled.status, 0);
    let grown = charged().saturating_sub(before);
    assert!(grown >= 45 << 20, "{grown} bytes of 50 MiB");
    running.remove();
    shims_end();
}
