//! Sockets of the host, for which the agent listens; the test is the host.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use bulkhead_agent_protocol::agent;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixDatagram, UnixStream};

use crate::guest::{Guest, context};

async fn serve(guest: &Guest, socket: u64, dir: &Path, datagrams: bool) -> ttrpc::Result<()> {
    let request = agent::ServeSocketRequest {
        socket,
        place: dir.to_str().unwrap().into(),
        directory: dir.to_str().unwrap().into(),
        name: format!("s{socket}"),
        datagrams,
        ..Default::default()
    };
    guest.client.serve_socket(context(), &request).await?;
    Ok(())
}

async fn next(guest: &Guest) -> (u64, u64) {
    let nothing = agent::Empty::new();
    let told = guest.client.next_connection(context(), &nothing).await;
    let told = told.unwrap();
    (told.socket, told.connection)
}

async fn answer(guest: &Guest, connection: u64, stream_port: u32) -> ttrpc::Result<()> {
    let request = agent::AnswerConnectionRequest {
        connection,
        stream_port,
        ..Default::default()
    };
    guest.client.answer_connection(context(), &request).await?;
    Ok(())
}

/// The host's end of a connection.
async fn join(guest: &Guest, connection: u64) -> UnixStream {
    let (port, listener) = guest.listen();
    let (accepted, answered) = tokio::join!(listener.accept(), answer(guest, connection, port));
    answered.unwrap();
    accepted.unwrap().0
}

#[tokio::test]
async fn many_clients_are_joined_and_each_direction_ends_by_itself() {
    let guest = Guest::start().await;
    let dir = tempfile::tempdir().unwrap();
    serve(&guest, 7, dir.path(), false).await.unwrap();
    let mut joined = Vec::new();
    // More than wait at once.
    for number in 0..100u8 {
        let mut client = UnixStream::connect(dir.path().join("s7")).await.unwrap();
        client.write_all(&[number]).await.unwrap();
        joined.push(client);
    }
    for number in 0..100u8 {
        let (socket, connection) = next(&guest).await;
        assert_eq!(socket, 7);
        let mut host = join(&guest, connection).await;
        let client = &mut joined[usize::from(number)];
        client.shutdown().await.unwrap();
        let mut heard = Vec::new();
        host.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, [number], "the oldest first");
        // 1 MiB comes back after the other direction's end.
        let big = vec![number; 1 << 20];
        let mut back = Vec::new();
        let send = async {
            host.write_all(&big).await.unwrap();
            host.shutdown().await.unwrap();
        };
        tokio::join!(send, async { client.read_to_end(&mut back).await.unwrap() });
        assert!(back == big);
    }
}

#[tokio::test]
async fn who_is_not_answered_is_closed_and_a_stopped_socket_refuses() {
    let guest = Guest::start().await;
    let dir = tempfile::tempdir().unwrap();
    serve(&guest, 1, dir.path(), false).await.unwrap();
    let error = serve(&guest, 1, dir.path(), false).await.unwrap_err();
    assert!(error.to_string().contains("socket 1"), "{error}");
    let path = dir.path().join("s1");
    let mut client = UnixStream::connect(&path).await.unwrap();
    let (_, connection) = next(&guest).await;
    answer(&guest, connection, 0).await.unwrap();
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    let error = answer(&guest, connection, 0).await.unwrap_err();
    assert!(error.to_string().contains("no connection"), "{error}");
    // One that is joined goes on, and ends with its place.
    let mut client = UnixStream::connect(&path).await.unwrap();
    let mut host = join(&guest, next(&guest).await.1).await;
    let stop = agent::SocketRequest {
        socket: 1,
        ..Default::default()
    };
    for _ in 0..2 {
        guest.client.stop_socket(context(), &stop).await.unwrap();
    }
    let refused = UnixStream::connect(&path).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    host.write_all(b"x").await.unwrap();
    assert_eq!(client.read(&mut [0]).await.unwrap(), 1);
    let end = agent::EndSocketsRequest {
        place: dir.path().to_str().unwrap().into(),
        ..Default::default()
    };
    guest.client.end_sockets(context(), &end).await.unwrap();
    assert_eq!(host.read(&mut [0]).await.unwrap_or(0), 0);
    assert_eq!(client.read(&mut [0]).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn datagrams_keep_their_bounds_and_a_new_stream_follows_one_that_ended() {
    let guest = Guest::start().await;
    let dir = tempfile::tempdir().unwrap();
    serve(&guest, 3, dir.path(), true).await.unwrap();
    let client = UnixDatagram::unbound().unwrap();
    client.connect(dir.path().join("s3")).unwrap();
    for round in 0..2 {
        client.send(b"first").await.unwrap();
        let (socket, connection) = next(&guest).await;
        assert_eq!(socket, 3);
        let mut host = join(&guest, connection).await;
        let big = vec![7; 100_000];
        client.send(&big).await.unwrap();
        client.send(b"").await.unwrap();
        for expected in [&b"first"[..], &big, b""] {
            let length = host.read_u32_le().await.unwrap();
            let mut heard = vec![0; length as usize];
            host.read_exact(&mut heard).await.unwrap();
            assert!(heard == expected, "round {round}: {length} bytes");
        }
        drop(host);
        // The agent notices before the next datagram.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(std::fs::metadata(dir.path().join("s3")).unwrap().ino() > 0);
}
