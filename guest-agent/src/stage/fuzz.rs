//! What a stage is told, and what it says.

use std::os::fd::AsFd;

use linux::packet;

use super::*;

/// A container as it comes over the wire: what is planned of it before a process is made.
fn spec(data: &[u8]) {
    let Ok(container) = agent::Container::parse_from_bytes(data) else {
        return;
    };
    let bytes = encode_spec(7, &container).expect("it was decoded");
    let (number, rest) = bytes.split_first_chunk::<8>().unwrap();
    assert_eq!(u64::from_ne_bytes(*number), 7);
    let again = agent::Container::parse_from_bytes(rest).expect("it was just written");
    assert_eq!(again, container);
    if let Ok(plan) = Plan::new(container.namespaces.get_or_default()) {
        let (clone, unshare, sandbox) = (plan.clone, plan.unshare, plan.sandbox);
        assert_eq!((clone & unshare, (clone | unshare) & sandbox), (0, 0));
        assert!(
            plan.is_new(libc::CLONE_NEWNS as u64),
            "a container has its own mounts"
        );
    }
    let _ = Program::new(container.process.get_or_default());
    for mount in &container.mounts {
        mounts::is_bind(mount);
    }
}

/// A stage's last words, which a container's process may have written: they are cut, and a
/// descriptor that nobody asked for is not kept.
fn words(data: &[u8]) {
    let (agent, stage) = packet::pair().unwrap();
    let Some((first, bytes)) = data.split_first() else {
        return;
    };
    let given = [stage.as_fd(), stage.as_fd()];
    let given: Vec<RawFd> = given.iter().map(std::os::fd::AsRawFd::as_raw_fd).collect();
    let count = usize::from(*first) % (given.len() + 1);
    packet::send(stage.as_fd(), bytes, &given[..count]).unwrap();
    match message::receive_from_stage(agent.as_fd()) {
        Ok(FromStage::Failed(failure)) => assert!(failure.text.len() <= 3 * 4098),
        // The others are closed.
        Ok(FromStage::Terminal(_)) => assert!(count > 0),
        Ok(FromStage::Ready) => assert_eq!(bytes, b"R"),
        Ok(FromStage::Closed) => assert!(bytes.is_empty()),
        Err(_) => {}
    }
}

#[test]
fn fuzz_agent_spec() {
    bulkhead_fuzz::run("agent_spec", spec);
}

#[test]
fn fuzz_stage_words() {
    bulkhead_fuzz::run("stage_words", words);
}
