use std::{fs::File, time::Duration};

use bulkhead_vmm_config::RateLimit;

use super::*;
use crate::control::Control;

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
async fn a_machine_that_is_not_understood_is_ended() {
    let (vm, theirs) = machine();
    theirs.send(&"no event", &[]).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), vm.ended()).await;
    let end = ended.expect("it goes on");
    assert!(matches!(end, End::Failed { .. }), "{end:?}");
}
