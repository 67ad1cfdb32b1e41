use std::io::{Read, Write};

use super::*;

const OWNER: Owner<'_> = Owner {
    namespace: "ns",
    container: "c",
    handed: None,
};

fn fifo(dir: &tempfile::TempDir, name: &str) -> String {
    let path = dir.path().join(name);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    path.to_str().unwrap().into()
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 31 % 251) as u8).collect()
}

/// The guest's ends of stdin, stdout and stderr, and the running streams.
async fn joined(names: &Names) -> ([UnixStream; 3], Streams) {
    let ends = Ends::open(names, OWNER).await.unwrap();
    let wanted = ends.wanted();
    let pairs = [(); 3].map(|()| UnixStream::pair().unwrap());
    let mut guest = Vec::new();
    let mut ours = Vec::new();
    for ((theirs, own), wanted) in pairs.into_iter().zip(wanted) {
        guest.push(theirs);
        ours.push(wanted.then_some(own));
    }
    let ours = <[Option<UnixStream>; 3]>::try_from(ours).unwrap();
    let mut streams = ends.join(ours).unwrap();
    streams.open_input().unwrap();
    (guest.try_into().unwrap(), streams)
}

#[test]
fn names_are_parsed() {
    assert_eq!(parse("").unwrap(), Name::Null);
    assert_eq!(parse("/a?b").unwrap(), Name::Fifo("/a?b".into()));
    assert_eq!(parse("fifo:///a").unwrap(), Name::Fifo("/a".into()));
    assert_eq!(parse("file:///a?x=y").unwrap(), Name::File("/a".into()));
    let logger = Name::Binary("/bin/l".into(), vec!["k".into(), "v".into()]);
    assert_eq!(parse("binary:///bin/l?k=v").unwrap(), logger);
    for bad in ["relative", "ttrpc+unix:///s?streaming_id=1", "file://a"] {
        parse(bad).unwrap_err();
    }
}

#[tokio::test]
async fn input_ends_by_close_io_and_not_by_a_client_that_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let stdin = fifo(&dir, "in");
    let names = Names {
        stdin: stdin.clone(),
        ..Names::default()
    };
    let ([mut guest, ..], mut streams) = joined(&names).await;
    let reader = tokio::task::spawn_blocking(move || {
        let mut all = Vec::new();
        guest.read_to_end(&mut all).unwrap();
        all
    });
    for text in ["first ", "second"] {
        // A client comes, writes and goes.
        let stdin = stdin.clone();
        tokio::task::spawn_blocking(move || {
            let mut client = OpenOptions::new().write(true).open(&stdin).unwrap();
            client.write_all(text.as_bytes()).unwrap();
        })
        .await
        .unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!reader.is_finished());
    }
    streams.close_input();
    assert_eq!(reader.await.unwrap(), b"first second");
}

#[tokio::test]
async fn a_burst_is_drained_though_its_writer_has_gone_and_the_client_is_late() {
    let dir = tempfile::tempdir().unwrap();
    let stdout = fifo(&dir, "out");
    let names = Names {
        stdout: stdout.clone(),
        ..Names::default()
    };
    let ([_, mut guest, _], streams) = joined(&names).await;
    let burst = bytes(8 << 20);
    let sent = burst.clone();
    let writer = tokio::task::spawn_blocking(move || guest.write_all(&sent).unwrap());
    let client = tokio::task::spawn_blocking(move || {
        let mut all = Vec::new();
        std::fs::File::open(stdout)
            .unwrap()
            .read_to_end(&mut all)
            .unwrap();
        all
    });
    writer.await.unwrap();
    assert!(streams.finish(Duration::from_secs(60)).await);
    assert!(client.await.unwrap() == burst);
}

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn output_is_heard_when_its_client_has_read_it() {
    let dir = tempfile::tempdir().unwrap();
    let stdout = fifo(&dir, "out");
    let names = Names {
        stdout: stdout.clone(),
        ..Names::default()
    };
    let ([_, mut guest, _], streams) = joined(&names).await;
    // What a FIFO, the relay and a socket hold, so that nobody waits but for the client.
    let burst = bytes(200_000);
    guest.write_all(&burst).unwrap();
    let heard = streams.heard([burst.len() as u64, 0], LIMIT);
    let mut heard = std::pin::pin!(heard);
    let mut client = tokio::net::unix::pipe::OpenOptions::new()
        .open_receiver(stdout)
        .unwrap();
    let mut read = 0;
    while read < burst.len() {
        let pause = tokio::time::timeout(Duration::from_millis(20), &mut heard);
        assert!(pause.await.is_err(), "told after {read} bytes");
        let mut part = [0; 10_000];
        read += tokio::io::AsyncReadExt::read(&mut client, &mut part)
            .await
            .unwrap();
    }
    // The process' output is still open: somebody else has it.
    heard.await;
    guest.write_all(b"more that nobody reads").unwrap();
    streams.heard([burst.len() as u64, 0], LIMIT).await;
    // Nor has the host to wait for what a guest only says, once the stream has ended.
    let reader = tokio::spawn(async move {
        let mut rest = Vec::new();
        tokio::io::AsyncReadExt::read_to_end(&mut client, &mut rest)
            .await
            .map(|_| rest)
    });
    drop(guest);
    streams.heard([u64::MAX, u64::MAX], LIMIT).await;
    assert_eq!(reader.await.unwrap().unwrap(), b"more that nobody reads");
}

#[tokio::test]
async fn a_client_that_does_not_read_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let names = Names {
        stdout: fifo(&dir, "out"),
        stderr: format!("file://{}", dir.path().join("log").display()),
        ..Names::default()
    };
    let ([_, mut out, mut err], streams) = joined(&names).await;
    // A file has no client.
    err.write_all(b"text").unwrap();
    let since = std::time::Instant::now();
    streams.heard([0, 4], LIMIT).await;
    assert!(since.elapsed() < super::progress::PATIENCE);
    for written in [4, u64::MAX] {
        out.write_all(b"text").unwrap();
        let since = std::time::Instant::now();
        streams.heard([written, 4], LIMIT).await;
        let took = since.elapsed();
        assert!(
            (super::progress::PATIENCE / 2..LIMIT).contains(&took),
            "{took:?}"
        );
    }
}

#[tokio::test]
async fn output_that_never_ends_does_not_hold_up_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let stdout = fifo(&dir, "out");
    let names = Names {
        stdout: stdout.clone(),
        ..Names::default()
    };
    let ([_, guest, _], streams) = joined(&names).await;
    assert!(!streams.finish(Duration::from_millis(50)).await);
    drop(guest);
}

#[tokio::test]
async fn output_is_appended_to_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/log");
    let name = format!("file://{}", path.display());
    let names = Names {
        stdout: name.clone(),
        stderr: name,
        ..Names::default()
    };
    let ([_, mut out, mut err], streams) = joined(&names).await;
    out.write_all(b"out\n").unwrap();
    drop(out);
    err.write_all(b"err\n").unwrap();
    drop(err);
    assert!(streams.finish(Duration::from_secs(60)).await);
    let mut lines: Vec<String> = std::fs::read_to_string(path)
        .unwrap()
        .lines()
        .map(String::from)
        .collect();
    lines.sort();
    assert_eq!(lines, ["err", "out"]);
}

#[tokio::test]
async fn a_logger_gets_everything_and_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("logger");
    let log = dir.path().join("log");
    let text = "#!/bin/sh\nexec 5>&-\ncat <&3 >$1\ncat <&4 >>$1\necho $CONTAINER_NAMESPACE/$CONTAINER_ID >>$1\n";
    // By another process: a test that forks in another thread would keep our descriptor for writing, and the exec find
    // the file busy.
    let write = "printf %s \"$1\" >\"$0\" && chmod 0755 \"$0\"";
    let written = std::process::Command::new("sh")
        .args(["-c", write])
        .arg(&script)
        .arg(text)
        .status();
    assert!(written.unwrap().success());
    let names = Names {
        stdout: format!("binary://{}?{}", script.display(), log.display()),
        ..Names::default()
    };
    let ([_, mut out, mut err], streams) = joined(&names).await;
    out.write_all(b"out ").unwrap();
    err.write_all(b"err ").unwrap();
    drop((out, err));
    assert!(streams.finish(Duration::from_secs(60)).await);
    assert_eq!(std::fs::read_to_string(log).unwrap(), "out err ns/c\n");
}

/// All three by the ticket "t".
fn handed_names() -> Names {
    let [stdin, stdout, stderr] = [(); 3].map(|()| "keeper:t".into());
    Names {
        stdin,
        stdout,
        stderr,
        terminal: false,
    }
}

/// Streams of all kinds that an engine gives, handed over by a ticket.
#[tokio::test]
async fn descriptors_that_were_handed_over_are_streams() {
    let dir = tempfile::tempdir().unwrap();
    let handed = Handed::default();
    let owner = Owner {
        handed: Some(&handed),
        ..OWNER
    };
    let file = dir.path().join("in");
    std::fs::write(&file, "from a file").unwrap();
    let (out_reader, out) = nix::unistd::pipe().unwrap();
    let (err_reader, err) = UnixStream::pair().unwrap();
    let input = File::open(&file).unwrap();
    assert!(handed.put("t", [input.into(), out, err.into()]));
    let names = handed_names();
    let ends = Ends::open(&names, owner).await.unwrap();
    assert_eq!(ends.wanted(), [true; 3]);
    // Each is given out once.
    assert!(matches!(
        Ends::open(&names, owner).await,
        Err(Error::Ticket(_))
    ));
    let pairs = [(); 3].map(|()| UnixStream::pair().unwrap());
    let [(mut stdin, a), (mut stdout, b), (mut stderr, c)] = pairs;
    let mut streams = ends.join([Some(a), Some(b), Some(c)]).unwrap();
    streams.open_input().unwrap();
    let read = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        stdin.read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(read.await.unwrap(), "from a file");
    stdout.write_all(b"out").unwrap();
    stderr.write_all(b"err").unwrap();
    drop((stdout, stderr));
    assert!(streams.finish(LIMIT).await);
    let mut text = [String::new(), String::new()];
    File::from(out_reader).read_to_string(&mut text[0]).unwrap();
    let mut err_reader = err_reader;
    err_reader.read_to_string(&mut text[1]).unwrap();
    assert_eq!(text, ["out", "err"]);
}

#[tokio::test]
async fn dev_null_is_no_stream() {
    let handed = Handed::default();
    let owner = Owner {
        handed: Some(&handed),
        ..OWNER
    };
    let null = || File::options().read(true).write(true).open("/dev/null");
    handed.put("t", [(); 3].map(|()| null().unwrap().into()));
    let names = handed_names();
    let ends = Ends::open(&names, owner).await.unwrap();
    assert_eq!(ends.wanted(), [false; 3]);
    assert!(!handed.put("t", [(); 3].map(|()| null().unwrap().into())));
    handed.forget("t");
    assert!(handed.put("t", [(); 3].map(|()| null().unwrap().into())));
}

#[test]
fn the_pids_by_which_an_engine_knows_a_pod_are_the_pods() {
    let handed = Handed::default();
    handed.stand_in(42);
    let of = |path: &str| handed.of_pod(Path::new(path), 7);
    assert_eq!(of("/proc/42/ns/net"), Some("/proc/7/ns/net".into()));
    for other in [
        "/proc/43/ns/net",
        "/proc",
        "/proc/self/ns/net",
        "/run/42",
        "",
    ] {
        assert_eq!(of(other), None, "{other}");
    }
    handed.leave(42);
    assert_eq!(of("/proc/42/ns/net"), None);
}
