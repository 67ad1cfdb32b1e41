//! A VMM and an fs process that a guest has taken, and what they say to the shim.

use bulkhead_vmm_config::FsEvent;

use super::*;

/// Packets, one a line. No more is kept of them than a machine has a use for.
fn events(data: &[u8]) {
    let shared = Mutex::new(Shared::default());
    let mut asked = Vec::new();
    for packet in data.split(|&byte| byte == b'\n') {
        // A request now and then, so that there is something to be answered.
        if packet.len() % 2 == 0 {
            let (answer, answered) = oneshot::channel();
            locked(&shared).waiting.push_back(answer);
            asked.push(answered);
        }
        if let Ok(event) = serde_json::from_slice::<FsEvent>(packet) {
            // As an answer to the wrong question is told.
            let told = brief(&format!("{event:?}"), MAX_TEXT);
            assert!(told.len() <= MAX_TEXT && !told.contains(char::is_control));
        }
        let Ok(event) = serde_json::from_slice::<Event>(packet) else {
            continue;
        };
        match on_event(event, &shared, &crate::audit::Audit::default()) {
            Ok(None) => {}
            // Nothing is heard after that.
            Err(_) => break,
            Ok(Some(End::Failed { reason })) => {
                assert!(reason.len() <= MAX_TEXT && !reason.contains(char::is_control));
            }
            Ok(Some(end)) => {
                if let End::Guest { console, .. } = &end {
                    assert!(console.iter().all(|line| line.len() <= MAX_LINE));
                }
                let told = end.to_string();
                assert!(!told.contains(['\x1b', '\u{202e}']), "{told:?}");
            }
        }
    }
    let phases = locked(&shared).stamps.len();
    assert!(phases <= 16, "{phases} phases");
    for mut answered in asked {
        if let Ok(Err(reason)) = answered.try_recv() {
            assert!(reason.len() <= MAX_TEXT && !reason.contains(char::is_control));
        }
    }
}

#[test]
fn fuzz_vmm_events() {
    bulkhead_fuzz::run("vmm_events", events);
}
