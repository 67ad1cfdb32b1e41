//! What the guest is told, done in another namespace.

use super::world::with_world;

/// Applied to another namespace with the same devices, the requests make the same network.
#[test]
fn a_namespace_made_of_the_requests_is_the_same() {
    with_world(|world| {
        world.join();
        world.setup(
            "pod ip link set lo up
             pod ip addr add 10.88.0.5/16 brd + dev eth0
             pod ip addr add 10.99.0.5/24 dev eth0
             pod ip route del 10.99.0.0/24 dev eth0
             pod ip route add 10.99.0.1 dev eth0 scope link src 10.99.0.5
             pod ip route add 10.99.0.0/24 via 10.99.0.1 src 10.99.0.5
             pod ip addr add fd00::5/64 dev eth0 nodad
             pod ip route add default via 10.88.0.1 metric 7
             pod ip route add 10.77.0.0/16 nexthop via 10.88.0.1 weight 2 nexthop via 10.88.0.2
             pod ip route add blackhole 10.66.0.0/16
             pod ip -6 route add default via fd00::1
             pod ip -6 route add fd77::/64 nexthop via fd00::1 nexthop via fd00::2
             pod ip neigh add 10.88.0.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent
             pod ip rule add from 10.99.0.0/24 to 10.88.0.0/16 fwmark 0x7/0xff lookup 100 priority 500
             pod ip rule add not iif eth0 lookup 100 suppress_prefixlength 0 priority 501",
        );
        let mut ledger = world.ledger("a");
        let mut network = world.attach("pod", &mut ledger).unwrap();
        let requests = network.for_guest().requests;
        // The same index 2 for the first device as in the requests, whose index in a real guest the agent looks up.
        world.add("copy");
        let path = world.path("copy").display().to_string();
        world.setup(&format!(
            "peer ip link add eth0 netns {path} type veth peer name other
             peer ip link set other up"
        ));
        let apply = move || {
            let errors = requests.iter().map(|request| send(request));
            errors.collect::<Vec<_>>()
        };
        let results = world.inside("copy", apply.clone());
        assert!(results.iter().all(|errno| *errno == 0), "{results:?}");
        for what in [
            "-4 addr show up",
            "-6 addr show up scope global",
            "route",
            "-6 route",
            "rule",
            "-6 rule",
            "neigh show nud permanent",
        ] {
            let [pod, copy] =
                ["pod", "copy"].map(|at| lines(&world.run(at, &format!("ip {what}"))));
            assert_eq!(pod, copy, "ip {what}");
        }
        // Once more: what exists already stays.
        let again = world.inside("copy", apply);
        assert!(
            again.iter().all(|errno| [0, -libc::EEXIST].contains(errno)),
            "{again:?}"
        );
    });
}

/// What iproute2 says, but for links and what the namespaces differ in.
fn lines(text: &str) -> Vec<String> {
    let is_link = |line: &&str| line.contains(": <") || line.contains("link/");
    let mut lines: Vec<String> = text
        .lines()
        .filter(|line| !is_link(line))
        // Where somebody has removed the kernel's route, the guest's kernel must not make it.
        .map(|line| line.replace(" noprefixroute", ""))
        .collect();
    lines.sort();
    lines
}

/// What the kernel answers to one request.
fn send(request: &[u8]) -> i32 {
    use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
    let kind = SockType::Raw;
    let socket = socket(
        AddressFamily::Netlink,
        kind,
        SockFlag::empty(),
        SockProtocol::NetlinkRoute,
    );
    let mut socket = std::fs::File::from(socket.unwrap());
    std::io::Write::write_all(&mut socket, request).unwrap();
    let mut answer = [0; 4096];
    std::io::Read::read(&mut socket, &mut answer).unwrap();
    i32::from_ne_bytes(answer[16..20].try_into().unwrap())
}
