//! What listens in the pod's network, and connections to it. The sockets are the test's own, in the agent's namespace.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use bulkhead_agent_protocol::agent;
use bulkhead_agent_protocol::agent::namespaces::Kind;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, UnixListener};

use crate::guest::{Guest, PATIENCE, context, in_time, status};

/// Runs on a thread in the agent's network namespace, to which the sockets made there belong.
fn inside<T: Send + 'static>(guest: &Guest, work: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", guest.pid())).unwrap();
    let thread = std::thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    });
    thread.join().unwrap()
}

fn listener(guest: &Guest, address: &str) -> TcpListener {
    let address = address.to_owned();
    inside(guest, move || TcpListener::bind(address).unwrap())
}

/// An IPv6 socket that is bound and does not listen; with `only` it has no IPv4.
fn bound(guest: &Guest, address: &str, only: bool) -> TcpSocket {
    let address = address.parse().unwrap();
    inside(guest, move || {
        let socket = TcpSocket::new_v6().unwrap();
        let only = i32::from(only).to_ne_bytes();
        set(&socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &only);
        socket.bind(address).unwrap();
        socket
    })
}

fn listen(socket: &impl AsRawFd, queue: i32) {
    // SAFETY: takes numbers only.
    assert_eq!(unsafe { libc::listen(socket.as_raw_fd(), queue) }, 0);
}

fn set(socket: &impl AsRawFd, level: i32, option: i32, value: &[u8]) {
    // SAFETY: the kernel reads the bytes of a slice that outlives the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            value.as_ptr().cast(),
            value.len() as u32,
        )
    };
    assert_eq!(set, 0);
}

/// An agent whose lo is up and has 10.9.8.7.
async fn pod() -> Guest {
    let guest = Guest::start().await;
    let network = crate::network::network(0, ("net.ipv4.ip_default_ttl", "64"));
    guest
        .client
        .configure_network(context(), &network)
        .await
        .unwrap();
    guest
}

fn ports(ipv4: &[u32], ipv6: &[u32]) -> agent::Listeners {
    agent::Listeners {
        ipv4: ipv4.to_vec(),
        ipv6: ipv6.to_vec(),
        ..Default::default()
    }
}

/// Asks until the answer is the wanted one: a change may be told in parts.
async fn expect(guest: &Guest, wanted: &agent::Listeners) {
    let mut known = agent::Listeners::default();
    let told = async {
        while known != *wanted {
            known = guest
                .client
                .watch_listeners(context(), &known)
                .await
                .unwrap();
        }
    };
    let told = tokio::time::timeout(PATIENCE, told).await;
    assert!(
        told.is_ok(),
        "after {PATIENCE:?} {known:?} and not {wanted:?}"
    );
}

/// Nothing but these for a while.
async fn stays(guest: &Guest, known: &agent::Listeners) {
    let asked = guest.client.watch_listeners(context(), known);
    let told = tokio::time::timeout(Duration::from_millis(300), asked).await;
    assert!(told.is_err(), "{told:?}");
}

#[tokio::test]
async fn each_port_is_told_with_the_addresses_that_reach_it() {
    let guest = pod().await;
    let _before = listener(&guest, "0.0.0.0:80");
    expect(&guest, &ports(&[80], &[])).await;
    let kept = [
        listener(&guest, "127.0.0.1:81"),
        listener(&guest, "[::]:82"),
        listener(&guest, "[::1]:83"),
        listener(&guest, "[::ffff:127.0.0.1]:84"),
        // Out of reach for loopback's own address.
        listener(&guest, "127.0.0.2:85"),
        listener(&guest, "10.9.8.7:86"),
    ];
    let only = bound(&guest, "[::]:87", true);
    listen(&only, 1);
    let bound = bound(&guest, "[::]:88", false);
    let all = ports(&[80, 81, 82, 84], &[82, 83, 87]);
    expect(&guest, &all).await;
    // One that is only bound.
    stays(&guest, &all).await;
    listen(&bound, 1);
    expect(&guest, &ports(&[80, 81, 82, 84, 88], &[82, 83, 87, 88])).await;
    drop((kept, only, bound));
    expect(&guest, &ports(&[80], &[])).await;
}

#[tokio::test]
async fn a_listener_ends_with_its_process_and_other_namespaces_are_not_told_of() {
    let guest = pod().await;
    stays(&guest, &ports(&[], &[])).await;
    let server = |id: &str, kind: Kind| {
        let mut spec = guest.spec(id, "/bin/busybox nc -l -p 8080; sleep 1000");
        spec.namespaces.as_mut().unwrap().network = kind.into();
        spec
    };
    let _elsewhere = guest
        .create("elsewhere", server("elsewhere", Kind::NEW))
        .await
        .unwrap();
    guest.start_process("elsewhere", "").await.unwrap();
    stays(&guest, &ports(&[], &[])).await;
    let _member = guest
        .create("member", server("member", Kind::SANDBOX))
        .await
        .unwrap();
    guest.start_process("member", "").await.unwrap();
    // Busybox listens on [::].
    expect(&guest, &ports(&[8080], &[8080])).await;
    guest.end("member").await;
    expect(&guest, &ports(&[], &[])).await;
    guest.end("elsewhere").await;
}

#[tokio::test]
async fn no_change_is_missed_among_thousands() {
    let guest = pod().await;
    stays(&guest, &ports(&[], &[])).await;
    let left: Vec<Vec<TcpListener>> = (0..4u16)
        .map(|thread| {
            let runtime = tokio::runtime::Handle::current();
            inside(&guest, move || {
                let _entered = runtime.enter();
                let bind = |n| shared_listener(1000 + thread * 1000 + n);
                // More than the ring holds; the last round keeps every tenth.
                for _ in 0..4 {
                    (0..500).for_each(|n| drop(bind(n)));
                }
                (0..500).step_by(10).map(bind).collect()
            })
        })
        .collect();
    let mut wanted: Vec<u32> = left
        .iter()
        .flatten()
        .map(|listener| listener.local_addr().unwrap().port().into())
        .collect();
    wanted.sort_unstable();
    expect(&guest, &ports(&wanted, &[])).await;
    drop(left);
    expect(&guest, &ports(&[], &[])).await;
}

/// A listener on a port that another may still have: a program that another test starts has copies of all our descriptors between
/// fork and exec.
fn shared_listener(port: u16) -> TcpListener {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_reuseport(true).unwrap();
    socket.bind(([127, 0, 0, 1], port).into()).unwrap();
    socket.listen(1).unwrap().into_std().unwrap()
}

#[tokio::test]
async fn of_too_many_ports_the_lowest_are_told() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let guest = pod().await;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 14), hard).unwrap();
    let _many = inside(&guest, || {
        (2000..3100u16)
            .rev()
            .map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap())
            .collect::<Vec<_>>()
    });
    expect(&guest, &ports(&(2000..3024).collect::<Vec<_>>(), &[])).await;
}

/// Connects through the agent; the host's end.
async fn connect(guest: &Guest, port: u16, ipv6: bool) -> tokio::net::UnixStream {
    let (stream_port, host) = guest.listen();
    let request = agent::ConnectListenerRequest {
        port: port.into(),
        ipv6,
        stream_port,
        ..Default::default()
    };
    let connected = guest.client.connect_listener(context(), &request).await;
    connected.unwrap();
    let accepted = in_time("the agent dials the host", UnixListener::accept(&host)).await;
    accepted.unwrap().0
}

/// The server's end of a connection that the agent makes, with an end to each of its waits.
fn accept(listener: TcpListener) -> tokio::task::JoinHandle<TcpStream> {
    tokio::task::spawn_blocking(move || {
        let mut polled = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(PATIENCE).unwrap();
        let came = poll(&mut polled, patience).unwrap();
        assert_eq!(
            came, 1,
            "waited {PATIENCE:?} in vain: the agent dials the server"
        );
        let server = listener.accept().unwrap().0;
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        server.set_write_timeout(Some(PATIENCE)).unwrap();
        server
    })
}

#[tokio::test]
async fn bytes_pass_both_ways_and_each_direction_ends_by_itself() {
    let guest = pod().await;
    for (address, ipv6) in [("127.0.0.1:8080", false), ("[::1]:8080", true)] {
        let server = accept(listener(&guest, address));
        let mut client = connect(&guest, 8080, ipv6).await;
        let mut server = server.await.unwrap();
        let sent: Vec<u8> = (0..4u32 << 20).map(|n| (n % 251) as u8).collect();
        let expected = sent.clone();
        let serving = tokio::task::spawn_blocking(move || {
            let mut received = Vec::new();
            server.read_to_end(&mut received).unwrap();
            // The client has ended its direction; ours goes on.
            server.write_all(&received).unwrap();
            server.shutdown(Shutdown::Write).unwrap();
            received
        });
        let mut answer = Vec::new();
        let exchange = async {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            client.read_to_end(&mut answer).await.unwrap();
        };
        in_time("all bytes come back", exchange).await;
        assert!(answer == expected && serving.await.unwrap() == expected);
    }
}

#[tokio::test]
async fn a_server_that_speaks_first_and_hangs_up_is_heard() {
    let guest = pod().await;
    let server = accept(listener(&guest, "0.0.0.0:8080"));
    let mut client = connect(&guest, 8080, false).await;
    let mut server = server.await.unwrap();
    server.write_all(b"bye").unwrap();
    drop(server);
    let mut answer = Vec::new();
    let read = in_time("the connection ends", client.read_to_end(&mut answer)).await;
    read.unwrap();
    assert_eq!(answer, b"bye");
}

#[tokio::test]
async fn a_side_that_breaks_ends_the_other() {
    let guest = pod().await;
    let server = accept(listener(&guest, "127.0.0.1:8080"));
    let mut client = connect(&guest, 8080, false).await;
    let server = server.await.unwrap();
    // A reset.
    set(
        &server,
        libc::SOL_SOCKET,
        libc::SO_LINGER,
        &[1, 0, 0, 0, 0, 0, 0, 0],
    );
    drop(server);
    let read = async { client.read(&mut [0; 8]).await };
    let read = in_time("the host's end hears of the reset", read).await;
    assert_eq!(read.unwrap_or(0), 0);
    let gone = async { while client.write_all(b"x").await.is_ok() {} };
    in_time("the host's end is closed", gone).await;

    // The host's end goes while the server has something to say.
    let server = accept(listener(&guest, "127.0.0.1:8081"));
    let client = connect(&guest, 8081, false).await;
    let mut server = server.await.unwrap();
    drop(client);
    let ended = tokio::task::spawn_blocking(move || {
        while server.write_all(&[0; 4096]).is_ok() {}
        server.read(&mut [0; 8]).map_err(|error| error.kind())
    });
    let ended = in_time("the server's end is closed", ended).await;
    ended.unwrap().ok();
}

#[tokio::test]
async fn what_nobody_listens_on_is_unavailable() {
    let guest = pod().await;
    let call = async |port, ipv6| {
        let request = agent::ConnectListenerRequest {
            port,
            ipv6,
            stream_port: 9,
            ..Default::default()
        };
        status(guest.client.connect_listener(context(), &request).await)
    };
    let (code, text) = call(8080, false).await;
    assert_eq!(code, ttrpc::Code::UNAVAILABLE);
    assert!(
        text.contains("cannot connect to 127.0.0.1:8080 in the pod: Connection refused"),
        "{text}"
    );
    assert_eq!(call(8080, true).await.0, ttrpc::Code::UNAVAILABLE);
    // Its own port and itself are what a socket would get here, were it let.
    inside(&guest, || {
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40001").unwrap();
    });
    for _ in 0..20 {
        assert_eq!(call(40000, false).await.0, ttrpc::Code::UNAVAILABLE);
    }
    for port in [0, 65536] {
        assert_eq!(call(port, false).await.0, ttrpc::Code::INVALID_ARGUMENT);
    }
    // A listener, but no host.
    let _listener = listener(&guest, "127.0.0.1:8080");
    let (code, text) = call(8080, false).await;
    assert_eq!(code, ttrpc::Code::INTERNAL);
    assert!(
        text.contains("cannot connect to port 9 of the host for 127.0.0.1:8080"),
        "{text}"
    );
}

#[tokio::test]
async fn a_listener_whose_queue_is_full_is_unavailable_in_time() {
    let guest = pod().await;
    let (full, _waiting) = inside(&guest, || {
        let full = TcpListener::bind("127.0.0.1:8080").unwrap();
        // Once more: the length of the queue changes.
        listen(&full, 0);
        let waiting = TcpStream::connect("127.0.0.1:8080").unwrap();
        (full, waiting)
    });
    let request = agent::ConnectListenerRequest {
        port: 8080,
        stream_port: 9,
        ..Default::default()
    };
    let began = std::time::Instant::now();
    let (code, _) = status(guest.client.connect_listener(context(), &request).await);
    assert_eq!(code, ttrpc::Code::UNAVAILABLE);
    // Linux itself would try for over two minutes.
    let took = began.elapsed();
    assert!(took < Duration::from_secs(60), "{took:?}");
    drop(full);
}
