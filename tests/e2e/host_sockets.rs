//! Sockets of host servers in what a container binds (docs/adr/0009).

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use bulkhead_tests::{Bundle, Host, Ran, Runtime};
use nix::sys::socket::{getsockopt, sockopt};
use tempfile::TempDir;

/// Servers of the host, on sockets in a directory: `s` answers with what it has heard, and starts again when it is told to.
struct Servers {
    dir: TempDir,
    datagrams: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Who has connected.
    peers: Arc<Mutex<Vec<u32>>>,
}

impl Servers {
    fn start() -> Servers {
        let servers = Servers {
            dir: TempDir::with_prefix("sockets-").expect("a directory"),
            datagrams: Arc::default(),
            peers: Arc::default(),
        };
        fs::set_permissions(servers.dir.path(), fs::Permissions::from_mode(0o755)).expect("a mode");
        fs::create_dir(servers.at("sub")).expect("a directory");
        for (name, mode) in [("s", 0o666), ("sub/deep", 0o666), ("private", 0o600)] {
            servers.answer(name, mode);
        }
        let log = UnixDatagram::bind(servers.at("log")).expect("a socket");
        let heard = servers.datagrams.clone();
        thread::spawn(move || {
            let mut bytes = vec![0; 1 << 18];
            while let Ok(length) = log.recv(&mut bytes) {
                heard
                    .lock()
                    .expect("no panic")
                    .push(bytes[..length].to_vec());
            }
        });
        servers
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn answer(&self, name: &str, mode: u32) {
        let listener = listen(&self.at(name), mode);
        let (path, peers) = (self.at(name), self.peers.clone());
        thread::spawn(move || serve(listener, &path, &peers));
    }
}

fn listen(path: &Path, mode: u32) -> UnixListener {
    let listener = UnixListener::bind(path).expect("a socket");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
    listener
}

fn serve(mut listener: UnixListener, path: &Path, peers: &Arc<Mutex<Vec<u32>>>) {
    loop {
        let Ok((mut client, _)) = listener.accept() else {
            return;
        };
        let peer = getsockopt(&client, sockopt::PeerCredentials).expect("a peer");
        peers.lock().expect("no panic").push(peer.uid());
        let mut heard = Vec::new();
        let _ = client.read_to_end(&mut heard);
        // Who only asks whether somebody listens says nothing.
        if heard.is_empty() {
            continue;
        }
        let _ = client
            .write_all(b"pong ")
            .and_then(|()| client.write_all(&heard));
        drop(client);
        match heard.as_slice() {
            b"again" => {
                fs::remove_file(path).expect("the socket is there");
                listener = listen(path, 0o666);
            }
            b"late" => {
                let path = path.with_file_name("late");
                let (listener, peers) = (listen(&path, 0o666), peers.clone());
                thread::spawn(move || serve(listener, &path, &peers));
            }
            b"go" => {
                let _ = fs::remove_file(path);
                return;
            }
            _ => {}
        }
    }
}

const CLIENT: &str = r#"
import os, socket, sys, threading, time
D = '/mnt/d/'
def ask(path, text=b'hi'):
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(60)
        s.connect(path)
        s.sendall(text)
        s.shutdown(socket.SHUT_WR)
        got = b''
        while True:
            part = s.recv(1 << 16)
            if not part:
                return got.decode()
            got += part
def within(what):
    # A server that has just begun is served after a moment.
    end = time.monotonic() + 60
    while True:
        try:
            answer = what()
            if answer:
                return answer
        except OSError:
            pass
        if time.monotonic() > end:
            return 'never'
        time.sleep(0.05)
def errno(work):
    try:
        work()
        return 0
    except OSError as error:
        return error.errno
"#;

fn bundle(servers: &Servers, script: &str) -> Bundle {
    Bundle::tools()
        .capabilities(&["CAP_SETUID", "CAP_SETGID"])
        .bind(servers.dir.path(), "/mnt/d", &["rbind", "rw"])
        .args(&["/usr/bin/python3", "-I", "-c", &format!("{CLIENT}{script}")])
}

/// Runs it under Bulkhead with the relay.
fn allowed(bundle: &Bundle) -> Ran {
    let config = tempfile::NamedTempFile::new().expect("a file");
    fs::write(config.path(), "host_sockets = true\n").expect("writable");
    let path = config.path().to_str().expect("a plain path");
    bundle.run_with(Runtime::Bulkhead, &["--config", path])
}

/// Prints the same under both.
#[track_caller]
fn same(bundle: impl Fn(&Servers) -> Bundle, check: impl Fn(&Servers, Runtime)) {
    let mut told = Vec::new();
    for runtime in [Runtime::Runc, Runtime::Bulkhead] {
        let servers = Servers::start();
        let host = Host::now();
        let bundle = bundle(&servers);
        let ran = match runtime {
            Runtime::Bulkhead => allowed(&bundle),
            other => bundle.run_with(other, &[]),
        };
        assert_eq!(ran.status, 0, "{runtime:?}: {ran}");
        check(&servers, runtime);
        told.push(ran.text());
        drop(bundle);
        if runtime == Runtime::Bulkhead {
            host.assert_nothing_left();
        }
    }
    assert_eq!(told[1], told[0], "left: Bulkhead, right: runc");
}

#[test]
fn a_server_of_the_host_answers_by_its_directory_and_by_itself() {
    let script = r"
print(ask(D + 's'), ask('/mnt/s'), ask(D + 'sub/deep'))
print(oct(os.stat(D + 's').st_mode), os.stat('/mnt/s').st_uid)
# Both directions, one ended before the other.
big = 'x' * (3 << 20)
print(ask(D + 's', big.encode()) == 'pong ' + big)
# Many at once.
got = []
threads = [threading.Thread(target=lambda n=n: got.append(ask(D + 's', b'%d' % n) == f'pong {n}')) for n in range(100)]
for t in threads: t.start()
for t in threads: t.join()
print(len(got), all(got))
# Modes count, and a file is no socket.
pid = os.fork()
if pid == 0:
    os.setgid(1000); os.setuid(1000)
    os._exit(errno(lambda: ask(D + 'private')))
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), ask(D + 'private'))
open(D + 'file', 'w').close()
print(errno(lambda: ask(D + 'file')), errno(lambda: ask(D + 'none')))
";
    let with_single = |servers: &Servers| {
        let bundle = bundle(servers, script);
        bundle.bind(&servers.at("s"), "/mnt/s", &["bind", "rw"])
    };
    same(with_single, |servers, runtime| {
        let peers = servers.peers.lock().expect("no panic");
        let is_root = peers.contains(&0);
        assert_eq!(is_root, runtime == Runtime::Runc, "{runtime:?}: {peers:?}");
    });
}

#[test]
fn servers_that_start_again_or_later_or_go_are_followed() {
    let script = r"
print(ask(D + 's', b'again'))
print(within(lambda: ask(D + 's')))
print(ask(D + 's', b'late'), within(lambda: ask(D + 'late')))
print(ask(D + 'late', b'go'))
print(within(lambda: errno(lambda: ask(D + 'late')) == 2))
";
    same(|servers| bundle(servers, script), |_, _| {});
}

#[test]
fn what_a_container_listens_on_stays_its_own() {
    let script = r"
own = socket.socket(socket.AF_UNIX)
own.bind(D + 'own')
time.sleep(0.3)
own.listen()
time.sleep(1)
client = socket.socket(socket.AF_UNIX)
client.connect(D + 'own')
client.sendall(b'me')
print(own.accept()[0].recv(2))
own.close()
print(errno(lambda: ask(D + 'own')))
os.unlink(D + 'own')
print(sorted(os.listdir(D)))
";
    same(|servers| bundle(servers, script), |_, _| {});
}

#[test]
fn datagrams_reach_a_log() {
    let script = r"
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
log.connect(D + 'log')
for text in [b'<13>one', b'', b'y' * 50000, b'last']: log.send(text)
# They are on their way when the container ends, as with any log.
time.sleep(2)
print('sent')
";
    same(
        |servers| bundle(servers, script),
        |servers, runtime| {
            let heard = servers.datagrams.lock().expect("no panic");
            // A server may be asked whether it listens, which sends nothing.
            let heard: Vec<usize> = heard.iter().map(Vec::len).collect();
            assert_eq!(heard, [7, 0, 50000, 4], "{runtime:?}");
        },
    );
}

#[test]
fn what_is_not_allowed_is_refused_by_name_and_in_a_directory_by_the_kernel() {
    let servers = Servers::start();
    let host = Host::now();
    let refused = bundle(&servers, "print('ran')").bind(&servers.at("s"), "/mnt/s", &["bind"]);
    let source = servers.at("s");
    let source = source.to_str().expect("a plain path");
    refused
        .run()
        .refused(&["mounts[", "/mnt/s", source, "host_sockets = true"]);
    let ran = bundle(&servers, "print(errno(lambda: ask(D + 's')))").run();
    assert_eq!(ran.text(), nix::libc::ECONNREFUSED.to_string());
    assert!(servers.peers.lock().expect("no panic").is_empty());
    drop(refused);
    host.assert_nothing_left();
}

/// The harness's own servers behave: a bad test would show here first.
#[test]
fn the_servers_answer_a_client_of_the_host() {
    let servers = Servers::start();
    let mut client = UnixStream::connect(servers.at("s")).expect("it listens");
    client.write_all(b"hi").expect("it reads");
    client.shutdown(std::net::Shutdown::Write).expect("an end");
    let (mut heard, since) = (String::new(), Instant::now());
    client.read_to_string(&mut heard).expect("it answers");
    assert_eq!(heard, "pong hi", "after {:?}", since.elapsed());
}
