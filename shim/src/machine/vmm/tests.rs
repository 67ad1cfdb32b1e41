use std::{fs::File, time::Duration};

use bulkhead_vmm_config::RateLimit;

use super::*;
use crate::machine::control::Control;

/// The machine, and the VMM's end of its control socket: the test is the VMM.
fn machine() -> (Vm, Control) {
    let (peer, theirs) = peer::tests::idle();
    (Vm::of(Arc::new(peer)), theirs)
}

fn nic(taps: usize) -> Nic {
    let tap = || OwnedFd::from(File::open("/dev/null").unwrap());
    Nic {
        taps: (0..taps).map(|_| tap()).collect(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        receive: RateLimit::default(),
        transmit: RateLimit::default(),
    }
}

/// Asks for the counters and answers with some that are known.
async fn is_in_step(vm: &Vm, theirs: &Control) {
    let told = VmStats {
        user_exits: [("told".to_string(), 7)].into(),
        ..VmStats::default()
    };
    let answer = async {
        let request = theirs.receive::<Request>().await.unwrap();
        assert_eq!(request, Some(Request::Stats));
        theirs.send(&Event::Stats(told.clone()), &[]).await.unwrap();
    };
    let asked = tokio::time::timeout(Duration::from_secs(10), vm.stats());
    let (stats, ()) = tokio::join!(asked, answer);
    assert_eq!(stats.expect("no answer").unwrap(), told);
}

#[tokio::test]
async fn a_request_that_cannot_be_sent_takes_nobodys_answer() {
    let (vm, theirs) = machine();
    let refused = vm.plug(nic(bulkhead_vmm_config::MAX_FDS + 1)).await;
    let error = refused.unwrap_err();
    assert!(
        matches!(error, Error::Control(control::Error::TooLarge(..))),
        "{error}"
    );
    is_in_step(&vm, &theirs).await;
    vm.kill();
}

#[tokio::test]
async fn a_request_given_up_while_it_is_sent_takes_nobodys_answer() {
    let (vm, theirs) = machine();
    // Until the socket takes no more.
    let soon = Duration::from_millis(100);
    let mut sent = 0;
    while let Ok(sent_one) =
        tokio::time::timeout(soon, vm.peer.control.send(&Request::Pause, &[])).await
    {
        sent_one.unwrap();
        sent += 1;
    }
    let given_up = tokio::time::timeout(soon, vm.set_link(0, true)).await;
    given_up.unwrap_err();
    for _ in 0..sent {
        let request = theirs.receive::<Request>().await.unwrap();
        assert_eq!(request, Some(Request::Pause));
    }
    is_in_step(&vm, &theirs).await;
    vm.kill();
}

#[tokio::test]
async fn a_request_given_up_once_it_is_sent_keeps_its_answer() {
    let (vm, theirs) = machine();
    let soon = Duration::from_millis(100);
    let given_up = tokio::time::timeout(soon, vm.set_link(0, true)).await;
    given_up.unwrap_err();
    let request = theirs.receive::<Request>().await.unwrap();
    assert!(matches!(request, Some(Request::SetLink { .. })));
    theirs.send(&Event::Done, &[]).await.unwrap();
    is_in_step(&vm, &theirs).await;
    vm.kill();
}

#[tokio::test]
async fn what_a_machine_says_of_its_devices_is_told_and_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let (mut peer, theirs) = peer::tests::idle();
    let audit = Audit::in_directory(dir.path());
    peer.audit = audit.clone();
    let vm = Vm::of(Arc::new(peer));
    let reset = |number: usize| Event::NeedsReset {
        device: format!("net{number}"),
        reason: "ring\nforged".into(),
    };
    for number in 0..MAX_RESETS {
        theirs.send(&reset(number), &[]).await.unwrap();
    }
    is_in_step(&vm, &theirs).await;
    theirs.send(&reset(MAX_RESETS), &[]).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), vm.ended()).await;
    assert!(matches!(ended.expect("it goes on"), End::Failed { .. }));
    let told = audit.told();
    assert_eq!(told.len(), MAX_RESETS + 1);
    let first = audit::Event::NeedsReset {
        device: "net0".into(),
        reason: "ring\\nforged".into(),
    };
    assert_eq!(told[0], first);
    assert!(
        matches!(&told[MAX_RESETS], audit::Event::Limit { of, limit, .. } if of == "vmm" && limit == "packet"),
        "{told:?}"
    );
}

#[tokio::test]
async fn a_thread_that_was_stopped_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (mut peer, theirs) = peer::tests::idle();
    let audit = Audit::in_directory(dir.path());
    peer.audit = audit.clone();
    let vm = Vm::of(Arc::new(peer));
    let blocked = bulkhead_vmm_config::Blocked {
        role: bulkhead_vmm_config::Role::Vcpu,
        call: libc::SYS_execve as i32,
    };
    theirs.send(&Event::Blocked(blocked), &[]).await.unwrap();
    drop(theirs);
    let ended = tokio::time::timeout(Duration::from_secs(10), vm.ended()).await;
    assert!(matches!(ended.expect("it goes on"), End::Failed { .. }));
    let told = audit::Event::Blocked {
        role: "vcpu".into(),
        call: "execve".into(),
        number: libc::SYS_execve as i32,
    };
    assert_eq!(audit.told(), [told]);
}

#[tokio::test]
async fn a_machine_that_is_not_understood_is_ended() {
    let (vm, theirs) = machine();
    theirs.send(&"no event", &[]).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), vm.ended()).await;
    let end = ended.expect("it goes on");
    assert!(matches!(end, End::Failed { .. }), "{end:?}");
}

#[tokio::test]
async fn a_request_that_the_kernel_refuses_is_told_and_not_waited_for() {
    let (vm, theirs) = machine();
    // EBADF.
    let refused = vm.request("nothing", &Request::Pause, &[-1]);
    let refused = tokio::time::timeout(Duration::from_secs(10), refused).await;
    let error = refused.expect("it waits").unwrap_err();
    assert!(
        matches!(error, Error::Control(control::Error::Io { .. })),
        "{error}"
    );
    is_in_step(&vm, &theirs).await;
    vm.kill();
}

#[tokio::test]
async fn a_machine_that_closes_its_socket_and_lives_on_is_ended() {
    let (vm, theirs) = machine();
    drop(theirs);
    let error = vm.set_link(0, true).await.unwrap_err();
    assert!(error.to_string().contains("did not end"), "{error}");
    // It is collected.
    assert!(!std::path::Path::new(&format!("/proc/{}", vm.peer.pid)).exists());
}

#[tokio::test]
async fn one_that_is_stopped_holds_up_no_request_and_can_be_killed() {
    let (mut vm, theirs) = machine();
    vm.patience = Duration::from_millis(100);
    let pid = nix::unistd::Pid::from_raw(vm.peer.pid);
    nix::sys::signal::kill(pid, nix::sys::signal::SIGSTOP).unwrap();
    let all = async {
        // Past what the socket holds: what comes then does not even get sent.
        let soon = Duration::from_millis(100);
        let pause = || vm.peer.control.send(&Request::Pause, &[]);
        while tokio::time::timeout(soon, pause()).await.is_ok() {}
        let asked = vm.set_link(0, true).await.unwrap_err();
        assert!(matches!(asked, Error::Silent { .. }), "{asked}");
        let stopped = vm.stop().await.unwrap_err();
        assert!(matches!(stopped, Error::Silent { .. }), "{stopped}");
        vm.kill();
        drop(theirs);
        vm.ended().await
    };
    let end = tokio::time::timeout(Duration::from_secs(20), all).await;
    assert!(matches!(end.expect("it waits"), End::Died { .. }));
}

#[tokio::test]
async fn a_machine_that_says_what_nothing_led_to_is_ended() {
    let stamp = |phase| {
        Event::Reached(Stamp {
            phase,
            at_ns: 1,
            exits: 0,
            irq_exits: 0,
        })
    };
    use bulkhead_vmm_config::Phase::{Init, VmmStart};
    let done = [Event::Done, Event::Done];
    let runs = Event::Running { landlock: Some(6) };
    let running = [runs.clone(), runs.clone()];
    let reached = [stamp(VmmStart), stamp(VmmStart)];
    for said in [&done[..], &running[..], &reached[..]] {
        let (vm, theirs) = machine();
        for event in said {
            // It may have been killed for the first one.
            let _ = theirs.send(event, &[]).await;
        }
        let ended = tokio::time::timeout(Duration::from_secs(10), vm.ended()).await;
        let end = ended.expect("it is still heard");
        assert!(matches!(end, End::Failed { .. }), "{said:?}: {end:?}");
        assert!(vm.stamps().len() <= 1);
    }
    // Each phase once is what a boot is.
    let (vm, theirs) = machine();
    for event in [stamp(VmmStart), runs, stamp(Init)] {
        theirs.send(&event, &[]).await.unwrap();
    }
    is_in_step(&vm, &theirs).await;
    assert_eq!(vm.stamps().len(), 2);
    vm.kill();
}
