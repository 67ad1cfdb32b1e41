//! Bytes in, bytes out, terminals, and ends of file.

use std::time::Duration;

use crate::guest::{Guest, context, in_time, shell};
use bulkhead_agent_protocol::agent;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn sixty_four_mebibytes_go_through_unchanged() {
    const SIZE: usize = 64 << 20;
    let guest = Guest::start().await;
    let streams = guest
        .create("one", guest.spec("one", "exec cat"))
        .await
        .unwrap();
    guest.start_process("one", "").await.unwrap();
    let (mut stdin, mut stdout) = (streams.stdin, streams.stdout);
    let byte = |n: usize| (n.wrapping_mul(2_654_435_761) >> 13) as u8;
    let bytes: Vec<u8> = (0..SIZE).map(byte).collect();
    let began = std::time::Instant::now();
    let feed = tokio::spawn(async move {
        stdin.write_all(&bytes).await.unwrap();
        // Dropping it is the end of file that cat waits for.
    });
    let mut got = Vec::with_capacity(SIZE);
    let read = in_time("all bytes come back", stdout.read_to_end(&mut got)).await;
    read.unwrap();
    in_time("all bytes are taken", feed).await.unwrap();
    println!(
        "64 MiB through stdin and stdout: {:.0} MB/s",
        SIZE as f64 / began.elapsed().as_secs_f64() / 1e6
    );
    assert_eq!(got.len(), SIZE);
    assert!(
        got.iter().enumerate().all(|(n, &b)| b == byte(n)),
        "the bytes differ"
    );
    assert_eq!(guest.wait("one", "").await.exit_status, 0);
    guest.delete("one", "").await.unwrap();
}

/// A line for who reads /tmp/go in the container, now or later: it is there as long as what this returns.
fn let_go(guest: &Guest) -> std::fs::File {
    use std::io::Write;
    // For both directions, since a writer alone would wait for the reader.
    let mut fifo = std::fs::File::options()
        .read(true)
        .write(true)
        .open(guest.root.join("tmp/go"))
        .unwrap();
    fifo.write_all(b"\n").unwrap();
    fifo
}

#[tokio::test]
async fn a_grandchild_with_stdout_holds_the_stream_and_not_the_status() {
    let guest = Guest::start().await;
    let _streams = guest.sleeper("one", guest.spec("one", "")).await;
    // The grandchild holds the stream until the test lets it go.
    let script = "mkfifo /tmp/go; (read x < /tmp/go; echo late) & echo early; exit 3";
    let mut streams = guest.exec("one", "e", shell(script)).await.unwrap();
    guest.start_process("one", "e").await.unwrap();
    assert_eq!(guest.wait("one", "e").await.exit_status, 3);
    guest.delete("one", "e").await.unwrap();
    streams.expect("early").await;
    let _go = let_go(&guest);
    let (rest, _) = streams.collect().await;
    assert_eq!(rest, "late\n");
    guest.end("one").await;
}

#[tokio::test]
async fn with_the_exit_comes_how_much_had_been_written_read_or_not() {
    let guest = Guest::start().await;
    // What the smallest pipe and the connection hold, since nobody reads before the exit; and somebody who writes later, from another process.
    let script = "mkfifo /tmp/go; head -c 200000 /dev/zero; printf 7bytes. >&2; (read x < /tmp/go; echo late) & exit 0";
    let _streams = guest.sleeper("one", guest.spec("one", "")).await;
    let streams = guest.exec("one", "e", shell(script)).await.unwrap();
    guest.start_process("one", "e").await.unwrap();
    let exit = guest.wait("one", "e").await;
    assert_eq!((exit.stdout_bytes, exit.stderr_bytes), (200_000, 7));
    let _go = let_go(&guest);
    let (out, err) = streams.collect().await;
    assert_eq!((out.len(), err.len()), (200_005, 7));
    let later = guest.wait("one", "e").await;
    assert_eq!((later.stdout_bytes, later.stderr_bytes), (200_005, 7));
    guest.end("one").await;
}

#[tokio::test]
async fn output_of_a_process_that_ends_at_once_is_whole() {
    let guest = Guest::start().await;
    let _streams = guest.sleeper("one", guest.spec("one", "")).await;
    for n in 0..50 {
        let output = guest
            .run_exec("one", &format!("e{n}"), shell("seq 1 500"))
            .await;
        assert_eq!(output.text().lines().count(), 500);
    }
    guest.end("one").await;
}

#[tokio::test]
async fn a_closed_stdin_of_the_process_closes_the_connection() {
    let guest = Guest::start().await;
    let mut streams = guest
        .create(
            "one",
            guest.spec("one", "exec <&-; echo closed; sleep 1000"),
        )
        .await
        .unwrap();
    guest.start_process("one", "").await.unwrap();
    streams.expect("closed").await;
    let mut buffer = [0u8; 1];
    let what = "the agent notices that nobody reads";
    let read = in_time(what, streams.stdin.read(&mut buffer)).await;
    assert_eq!(read.unwrap_or(0), 0);
    guest.end("one").await;
}

#[tokio::test]
async fn a_host_that_stops_reading_breaks_the_pipe() {
    let guest = Guest::start().await;
    let streams = guest
        .create(
            "one",
            guest.spec("one", "while echo line; do :; done 2>/tmp/err; exit 9"),
        )
        .await
        .unwrap();
    drop(streams);
    guest.start_process("one", "").await.unwrap();
    let exit = guest.wait("one", "").await;
    assert!(
        exit.exit_status == 9 || exit.signal == libc::SIGPIPE as u32,
        "{exit:?}"
    );
    guest.delete("one", "").await.unwrap();
}

#[tokio::test]
async fn streams_without_a_port_are_dev_null() {
    let guest = Guest::start().await;
    let spec = guest.spec(
        "one",
        "readlink /proc/self/fd/0 > /tmp/fds; readlink /proc/$$/fd/2 >> /tmp/fds; cat",
    );
    let request = agent::CreateContainerRequest {
        container_id: "one".into(),
        spec: Some(spec).into(),
        ..Default::default()
    };
    guest
        .client
        .create_container(context(), &request)
        .await
        .unwrap();
    guest.start_process("one", "").await.unwrap();
    assert_eq!(guest.wait("one", "").await.exit_status, 0);
    assert_eq!(
        std::fs::read_to_string(guest.root.join("tmp/fds")).unwrap(),
        "/dev/null\n/dev/null\n"
    );
    guest.delete("one", "").await.unwrap();
}

fn terminal(script: &str) -> agent::Process {
    agent::Process {
        terminal: true,
        rows: 24,
        columns: 80,
        ..shell(script)
    }
}

#[tokio::test]
async fn a_terminal_has_a_name_a_size_and_signals() {
    let guest = Guest::start().await;
    let mut spec = guest.spec("one", "");
    spec.process = Some(terminal(
        "tty; stty size; test /proc/self/fd/0 -ef /dev/console && echo console; \
         trap 'echo winch; stty size' WINCH; trap 'echo int; exit 5' INT; while :; do read line; echo got $line; \
         test \"$line\" = wait && sh -c 'echo waiting; exec sleep 1000'; done",
    ))
    .into();
    let mut streams = guest.create("one", spec).await.unwrap();
    guest.start_process("one", "").await.unwrap();
    let seen = streams.expect("24 80").await;
    assert!(seen.contains("/dev/pts/0"), "{seen}");
    streams.type_in("hello\n").await;
    streams.expect("got hello").await;
    let size = agent::ResizeTerminalRequest {
        container_id: "one".into(),
        rows: 50,
        columns: 132,
        ..Default::default()
    };
    guest
        .client
        .resize_terminal(context(), &size)
        .await
        .unwrap();
    streams.type_in("\n").await;
    streams.expect("50 132").await;
    // A shell looks for signals before it reads: one that comes between the two waits for the next key. A child that says so
    // itself has no such moment.
    streams.type_in("wait\n").await;
    streams.expect("waiting").await;
    streams.type_in("\u{3}").await;
    streams.expect("int").await;
    assert_eq!(guest.wait("one", "").await.exit_status, 5);
    let (_, _) = streams.collect().await;
    guest.delete("one", "").await.unwrap();
}

#[tokio::test]
async fn an_exec_process_has_a_terminal_of_its_own() {
    let guest = Guest::start().await;
    let _streams = guest.sleeper("one", guest.spec("one", "")).await;
    let output = guest
        .run_exec(
            "one",
            "a",
            terminal("tty; stty size; ps -o tty,args | grep 'ps -o' | head -1"),
        )
        .await;
    assert!(
        output.out.contains("/dev/pts/0") && output.out.contains("24 80"),
        "{}",
        output.out
    );
    guest.end("one").await;
}

#[tokio::test]
async fn the_end_of_the_hosts_input_says_nothing_to_a_terminal() {
    let guest = Guest::start().await;
    let mut spec = guest.spec("one", "");
    spec.process = Some(terminal(
        "echo ready; read -t 2 line; echo status $?; sleep 0.1",
    ))
    .into();
    let mut streams = guest.create("one", spec).await.unwrap();
    // From before the 2 s begin: it must be all of them.
    let began = std::time::Instant::now();
    guest.start_process("one", "").await.unwrap();
    streams.expect("ready").await;
    let (rest, _) = streams.collect().await;
    assert!(
        rest.contains("status 1") && began.elapsed() >= Duration::from_secs(2),
        "{rest} after {:?}",
        began.elapsed()
    );
    guest.wait("one", "").await;
    guest.delete("one", "").await.unwrap();
}

#[tokio::test]
async fn output_before_a_hang_up_is_not_lost() {
    let guest = Guest::start().await;
    for n in 0..20 {
        let id = format!("c{n}");
        let mut spec = guest.spec(&id, "");
        spec.process = Some(terminal("seq 1 300")).into();
        let output = guest.run(&id, spec).await;
        assert_eq!(output.out.lines().count(), 300, "{n}");
        assert_eq!(output.exit.stdout_bytes, output.out.len() as u64, "{n}");
    }
}
