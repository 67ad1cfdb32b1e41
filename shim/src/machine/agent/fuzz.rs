//! An agent that is not ours any more.

use std::io::Write;

use super::*;

/// Answers, decoded: what comes out is no more than what came in is worth.
fn answers(data: &[u8]) {
    fn decoded<A: answer::Answer>(bytes: &[u8]) {
        if let Ok(answer) = answer::decode::<A>(bytes) {
            let again = answer.write_to_bytes().expect("it was decoded");
            assert!(again.len() <= 2 * bytes.len() + 16);
        }
    }
    let Some((kind, bytes)) = data.split_first() else {
        return;
    };
    let _ = answer::check_envelope(bytes);
    match kind % 8 {
        0 => decoded::<Empty>(bytes),
        1 => decoded::<StartSandboxResponse>(bytes),
        2 => decoded::<CreateProcessResponse>(bytes),
        3 => decoded::<StartProcessResponse>(bytes),
        4 => decoded::<WaitProcessResponse>(bytes),
        5 => decoded::<SocketConnection>(bytes),
        6 => decoded::<Listeners>(bytes),
        _ => decoded::<ContainerStatsResponse>(bytes),
    }
}

/// Bytes in place of answers: every call returns, and its error can be shown.
fn stream(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().unwrap();
    runtime.block_on(async {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let agent = Agent::new(ours, &crate::audit::Audit::default()).unwrap();
        theirs.set_nonblocking(true).unwrap();
        // A socket holds more than any input.
        theirs.write_all(data).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let limit = Duration::from_secs(10);
        let asked = async {
            let started = agent.start("c").await.map(drop);
            let stats = agent.stats("c").await.map(drop);
            (started, stats, agent.lost().await)
        };
        let asked = tokio::time::timeout(limit, asked).await;
        let (started, stats, lost) = asked.expect("a call waits for an agent that has gone");
        for error in [started.err(), stats.err(), Some(lost)]
            .into_iter()
            .flatten()
        {
            let text = error.to_string();
            assert!(text.len() <= 2 * MAX_TEXT && !text.contains('\n'), "{text}");
        }
    });
}

#[test]
fn fuzz_agent_answers() {
    bulkhead_fuzz::run("agent_answers", answers);
}

#[test]
fn fuzz_agent_stream() {
    bulkhead_fuzz::run("agent_stream", stream);
}
