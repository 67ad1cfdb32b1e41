use std::{
    collections::BTreeMap,
    fs,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{PermissionsExt, symlink},
            net::{UnixDatagram, UnixListener, UnixStream},
        },
    },
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bulkhead_agent_protocol::{
    agent as wire,
    agent_ttrpc::{self, create_agent},
};
use nix::sys::{
    inotify::{InitFlags, Inotify},
    socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockopt, listen, socket,
        sockopt,
    },
};
use tokio::io::AsyncWriteExt;

use super::{dial::dial, relay::pass_datagrams, *};
use crate::{audit::Audit, machine::agent::Agent, oci::HostPropagation};

/// Nobody's.
const UID: u32 = 1_900_000_007;
/// How long the guest trusts a name.
const TRUST: Duration = Duration::from_millis(100);

fn host_bind(source: &Path) -> HostBind {
    HostBind {
        mount: 0,
        source: source.into(),
        directory: source.is_dir(),
        recursive: true,
        read_only: false,
        read_only_whole: false,
        propagation: HostPropagation::Private,
    }
}

fn paths(place: &Place) -> Vec<String> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
    let look = place.look(&inotify).unwrap();
    let mut paths: Vec<_> = look.sockets.into_iter().map(|found| found.path).collect();
    paths.sort();
    paths
}

fn packets_socket(path: &Path) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    let server = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    bind(server.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&server, Backlog::new(1).unwrap()).unwrap();
    server
}

#[test]
fn sockets_are_found_beneath_a_place_and_nothing_outside_is_reached() {
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join(path);
    fs::create_dir_all(at("volume/a/b/c/too-deep")).unwrap();
    fs::write(at("volume/file"), "").unwrap();
    symlink("..", at("volume/up")).unwrap();
    symlink("../outside", at("volume/link")).unwrap();
    let _servers = [
        "outside",
        "volume/s",
        "volume/a/b/c/s",
        "volume/a/b/c/too-deep/s",
    ]
    .map(|path| UnixListener::bind(at(path)).unwrap());
    let place = Place::of(&at("volume")).unwrap().unwrap();
    assert_eq!(paths(&place), ["a/b/c/s", "s"]);
    place.socket("a/b/c/s").unwrap();
    for (path, errno) in [
        ("link", libc::ENOTSOCK),
        ("up/outside", libc::ELOOP),
        ("../outside", libc::EXDEV),
        ("/etc/passwd", libc::EXDEV),
        ("file", libc::ENOTSOCK),
        ("none", libc::ENOENT),
    ] {
        let error = place.socket(path).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno), "{path}");
    }
    // A single socket is found again when its server has made it anew, and is the only one of its directory.
    let link = at("by-link");
    symlink(at("volume/s"), &link).unwrap();
    let single = Place::of(&link).unwrap().unwrap();
    assert_eq!(
        (single.only(), paths(&single)),
        (Some("s"), vec!["s".into()])
    );
    fs::remove_file(at("volume/s")).unwrap();
    assert!(paths(&single).is_empty());
    let _again = UnixListener::bind(at("volume/s")).unwrap();
    single.socket("s").unwrap();
    // Another directory by the same name is not the one that the pod has.
    fs::rename(at("volume"), at("moved")).unwrap();
    fs::create_dir(at("volume")).unwrap();
    let error = place.socket("s").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
    assert!(Place::of(&at("moved/file")).unwrap().is_none());
}

#[test]
fn what_a_guest_can_make_is_looked_at_within_bounds() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..200 {
        fs::create_dir(dir.path().join(format!("d{number}"))).unwrap();
    }
    let servers: Vec<_> = (0..100)
        .map(|number| UnixListener::bind(dir.path().join(format!("s{number}"))).unwrap())
        .collect();
    let place = Place::of(dir.path()).unwrap().unwrap();
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
    let look = place.look(&inotify).unwrap();
    assert!(look.sockets.len() <= place::MOST_SOCKETS && !look.sockets.is_empty());
    assert!(look.watches.len() <= 64);
    drop(servers);
    for number in 0..5000 {
        fs::write(dir.path().join(format!("f{number}")), "").unwrap();
    }
    place.look(&inotify).unwrap();
}

#[test]
fn a_server_sees_the_pods_uid_and_no_root() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = UnixListener::bind(&path).unwrap();
    // The uid could not connect by itself.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let place = Place::of(&path).unwrap().unwrap();
    let (target, _) = place.socket("s").unwrap();
    let _client = dial(UID, &target, Kind::Stream).unwrap();
    let (client, _) = server.accept().unwrap();
    let peer = getsockopt(&client, sockopt::PeerCredentials).unwrap();
    assert_eq!((peer.uid(), peer.gid()), (UID, UID));
    // And this thread is root's as before.
    assert!(nix::unistd::geteuid().is_root());
}

#[test]
fn who_listens_is_asked_by_kind() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let place = Place::of(dir.path()).unwrap().unwrap();
    let kind = |name: &str| probe(UID, &place.socket(name).unwrap().0);
    let stream = UnixListener::bind(at("stream")).unwrap();
    let _datagrams = UnixDatagram::bind(at("datagrams")).unwrap();
    let _packets = packets_socket(&at("packets"));
    assert_eq!(kind("stream"), Some(Kind::Stream));
    assert_eq!(kind("datagrams"), Some(Kind::Datagrams));
    assert_eq!(kind("packets"), Some(Kind::Packets));
    drop(stream);
    assert_eq!(kind("stream"), None);
}

#[test]
fn a_socket_is_refused_by_name_unless_it_can_be_served() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _server = UnixListener::bind(&path).unwrap();
    let packets = dir.path().join("p");
    let _packets = packets_socket(&packets);
    let mounts = [Mount {
        destination: "/run/s".into(),
        ..Mount::default()
    }];
    let checked = |path: &Path, allowed| {
        let checked = check(&[host_bind(path)], &mounts, allowed, UID);
        checked.map_err(|error| {
            assert!(error.is_refusal());
            error.to_string()
        })
    };
    let error = checked(&path, false).unwrap_err();
    for word in [
        "mounts[0] (/run/s)",
        "host_sockets = true",
        path.to_str().unwrap(),
    ] {
        assert!(error.contains(word), "{error}");
    }
    assert_eq!(checked(&path, true), Ok(()));
    let error = checked(&packets, true).unwrap_err();
    assert!(error.contains("SOCK_SEQPACKET"), "{error}");
    // What is in a directory is another matter, and a file is a file.
    assert_eq!(checked(dir.path(), false), Ok(()));
    fs::write(dir.path().join("f"), "").unwrap();
    assert_eq!(checked(&dir.path().join("f"), false), Ok(()));
}

#[tokio::test]
async fn datagrams_pass_whole_and_what_is_no_datagram_ends_the_stream() {
    let dir = tempfile::tempdir().unwrap();
    let server = tokio::net::UnixDatagram::bind(dir.path().join("s")).unwrap();
    let pair = || {
        let host = tokio::net::UnixDatagram::unbound().unwrap();
        host.connect(dir.path().join("s")).unwrap();
        let (guest, inside) = tokio::net::UnixStream::pair().unwrap();
        (guest, tokio::spawn(pass_datagrams(inside, host)))
    };
    let (mut guest, passing) = pair();
    for bytes in [&b"one"[..], b"", &[7; 50_000]] {
        guest.write_u32_le(bytes.len() as u32).await.unwrap();
        guest.write_all(bytes).await.unwrap();
        let mut heard = vec![0; 60_000];
        let length = server.recv(&mut heard).await.unwrap();
        assert!(heard[..length] == *bytes);
    }
    drop(guest);
    passing.await.unwrap().unwrap();
    let (mut guest, passing) = pair();
    guest.write_u32_le(u32::MAX).await.unwrap();
    let error = passing.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("4294967295"), "{error}");
}

/// An agent that only notes what it is told.
#[derive(Clone, Default)]
struct Guest(Arc<Mutex<BTreeMap<u64, wire::ServeSocketRequest>>>);

#[async_trait::async_trait]
impl agent_ttrpc::Agent for Guest {
    async fn serve_socket(
        &self,
        _: &ttrpc::r#async::TtrpcContext,
        request: wire::ServeSocketRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.0.lock().unwrap().insert(request.socket, request);
        Ok(wire::Empty::default())
    }

    async fn stop_socket(
        &self,
        _: &ttrpc::r#async::TtrpcContext,
        request: wire::SocketRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.0.lock().unwrap().remove(&request.socket);
        Ok(wire::Empty::default())
    }

    async fn end_sockets(
        &self,
        _: &ttrpc::r#async::TtrpcContext,
        request: wire::EndSocketsRequest,
    ) -> ttrpc::Result<wire::Empty> {
        let mut served = self.0.lock().unwrap();
        served.retain(|_, served| served.place != request.place);
        Ok(wire::Empty::default())
    }
}

impl Guest {
    /// What is served, as directory and name, and whether by datagrams.
    fn served(&self) -> Vec<(String, bool)> {
        let served = self.0.lock().unwrap();
        let one = |request: &wire::ServeSocketRequest| {
            let name = request
                .name
                .strip_suffix(bulkhead_vmm_config::LISTEN_SUFFIX);
            let name = name.expect("the fs process knows it by its suffix");
            (format!("{}/{name}", request.directory), request.datagrams)
        };
        let mut all: Vec<_> = served.values().map(one).collect();
        all.sort();
        all
    }

    fn number_of(&self, path: &str) -> u64 {
        let served = self.0.lock().unwrap();
        let name = format!("{path}{}", bulkhead_vmm_config::LISTEN_SUFFIX);
        let is = |request: &wire::ServeSocketRequest| {
            format!("{}/{}", request.directory, request.name) == name
        };
        let mut found = served.iter().filter(|(_, request)| is(request));
        *found.next_back().unwrap().0
    }

    fn numbers(&self) -> Vec<u64> {
        self.0.lock().unwrap().keys().copied().collect()
    }

    async fn expect(&self, wanted: &[(&str, bool)]) {
        let since = Instant::now();
        let is_wanted = || {
            let served = self.served();
            let served = served
                .iter()
                .map(|(path, datagrams)| (path.as_str(), *datagrams));
            served.eq(wanted.iter().copied())
        };
        while !is_wanted() {
            assert!(
                since.elapsed() < Duration::from_secs(20),
                "{:?} and not {wanted:?}",
                self.served()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A pod's sockets with such an agent.
async fn pod(dir: &Path) -> (Owner, Guest, ttrpc::r#async::Server) {
    let guest = Guest::default();
    let path = dir.join("agent");
    let mut server = ttrpc::r#async::Server::new()
        .bind(&format!("unix://{}", path.display()))
        .unwrap()
        .register_service(create_agent(Arc::new(guest.clone())));
    server.start().await.unwrap();
    let agent = Agent::new(UnixStream::connect(&path).unwrap(), &Audit::default()).unwrap();
    let owner = Owner::new(agent, UID, true, TRUST);
    owner.sockets().watch().unwrap();
    (owner, guest, server)
}

#[tokio::test]
async fn the_guest_serves_what_listens_on_the_host_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("volume");
    fs::create_dir_all(volume.join("sub")).unwrap();
    let (owner, guest, _server) = pod(dir.path()).await;
    let sockets = owner.sockets();
    let first = UnixListener::bind(volume.join("s")).unwrap();
    let _log = UnixDatagram::bind(volume.join("log")).unwrap();
    // As a container of the pod makes them: nobody on the host listens.
    drop(UnixListener::bind(volume.join("its-own")).unwrap());
    let (whole, single) = (host_bind(&volume), host_bind(&volume.join("s")));
    let binds = [(3, &whole), (4, &single)];
    sockets.place("c1", binds.into_iter()).unwrap();
    for number in [3, 4] {
        sockets.refresh(number).await.unwrap();
    }
    let share = "/run/bulkhead/share";
    let names = ["4", "3/log", "3/s", "3/sub/late"].map(|name| format!("{share}/{name}"));
    let [by_itself, log, s, late] = names.each_ref().map(String::as_str);
    guest
        .expect(&[(log, true), (s, false), (by_itself, false)])
        .await;
    // One that comes later, and listens later still.
    let flags = SockFlag::SOCK_CLOEXEC;
    let server = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
    let path = UnixAddr::new(&volume.join("sub/late")).unwrap();
    bind(server.as_raw_fd(), &path).unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(guest.served().len(), 3);
    listen(&server, Backlog::new(1).unwrap()).unwrap();
    let all = [(log, true), (s, false), (late, false), (by_itself, false)];
    guest.expect(&all).await;
    // A server that starts again makes another socket, to which the guest gets another listener.
    let before = guest.numbers();
    fs::remove_file(volume.join("s")).unwrap();
    guest.expect(&[(log, true), (late, false)]).await;
    drop(first);
    let again = UnixListener::bind(volume.join("s")).unwrap();
    guest.expect(&all).await;
    assert_ne!(guest.numbers(), before);
    // One that takes the name over at once: as long as the guest may still find the old socket by
    // that name, it is listened at, and leads to the new server.
    let old = guest.number_of(s);
    let next = UnixListener::bind(volume.join("next")).unwrap();
    fs::rename(volume.join("next"), volume.join("s")).unwrap();
    let both = [s, s, late, by_itself, by_itself].map(|path| (path, false));
    let both = [&[(log, true)], &both[..]].concat();
    guest.expect(&both).await;
    assert_eq!(sockets.target(old).unwrap().path, "s");
    guest.expect(&all).await;
    assert!(sockets.target(old).is_none());
    drop(next);
    // A server that has died is found out by the next connection, and heard of when it listens again.
    drop(server);
    let number = *guest.numbers().last().unwrap();
    let dead = sockets.target(number).unwrap();
    sockets.lost(number).await;
    assert!(
        guest.numbers().iter().all(|served| *served != number),
        "{}",
        dead.path
    );
    assert!(sockets.target(number).is_none());
    drop(again);
    sockets.leave("c1").await;
    guest.expect(&[]).await;
    assert!(dead.alive.has_changed().is_err(), "its connections end");
}

#[tokio::test]
async fn nothing_is_looked_at_that_is_not_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let (owner, guest, _server) = pod(dir.path()).await;
    let agent = Agent::new(
        UnixStream::connect(dir.path().join("agent")).unwrap(),
        &Audit::default(),
    )
    .unwrap();
    drop(owner);
    let owner = Owner::new(agent, UID, false, TRUST);
    let bind = host_bind(dir.path());
    owner
        .sockets()
        .place("c1", [(1, &bind)].into_iter())
        .unwrap();
    owner.sockets().watch().unwrap();
    owner.sockets().refresh(1).await.unwrap();
    assert!(guest.served().is_empty());
}
