//! Packets: both ways, of every size and kind.

use bulkhead_tests::soak;

use super::*;

/// Waits for its own interface to be served by somebody: the peer's first packet may come before the guest listens.
const READY: &str = "echo ready; ";

#[test]
fn pings_from_both_ends_and_through_the_gateway() {
    for runtime in BOTH {
        let pair = Pair::new();
        let far = Netns::new();
        pair.peer.wire("far0", &far, "eth0");
        pair.peer.address("far0", &["10.200.0.1/24", "fd20::1/64"]);
        far.address("eth0", &["10.200.0.2/24", "fd20::2/64"]);
        far.ip("route add default via 10.200.0.1");
        far.ip("route add default via fd20::1");
        let forward = pair
            .peer
            .run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        forward.ok();
        let targets = format!("{PEER} {PEER6} 10.200.0.2 fd20::2");
        let script = format!(
            "for to in {targets}; do ping -q -c2 -W60 $to >/dev/null && echo $to; done; {READY} read line; true"
        );
        let mut inside = pair.start(runtime, &script);
        inside.started.wait_for_output("ready");
        for (from, to) in [
            (&pair.peer, POD),
            (&pair.peer, POD6),
            (&far, POD),
            (&far, POD6),
        ] {
            let ran = from.run(&format!("ping -q -c2 -W60 {to}"));
            assert_eq!(ran.status, 0, "{runtime:?} {to}: {ran}");
        }
        drop(inside.started.stdin());
        let ran = inside.finish();
        assert_eq!(
            ran.text(),
            format!("{}\nready", targets.replace(' ', "\n")),
            "{runtime:?} {ran}"
        );
    }
}

/// A transfer's receiver prints the sha256 of what came.
const RECEIVE: &str = "python3 -c 'import socket,hashlib,sys
socket.setdefaulttimeout(200)
s=socket.create_server((\"\",int(sys.argv[1])),family=socket.AF_INET6,dualstack_ipv6=True)
print(\"ready\",flush=True)
c,_=s.accept(); h=hashlib.sha256()
while b:=c.recv(1<<18): h.update(b)
print(h.hexdigest())'";
const SEND: &str = "python3 -c 'import socket,hashlib,sys
socket.setdefaulttimeout(200)
n=int(sys.argv[3])<<20; s=socket.create_connection((sys.argv[1],int(sys.argv[2]))); h=hashlib.sha256()
b=bytes((i*i>>7)&255 for i in range(1<<20))
for i in range(n>>20): h.update(b); s.sendall(b)
s.shutdown(socket.SHUT_WR); s.recv(1); print(h.hexdigest())'";

#[test]
fn a_transfer_is_intact_both_ways() {
    let mib = if soak() { 1024 } else { 64 };
    for runtime in BOTH {
        for (mtu, pod, peer) in [(1500, POD, PEER), (9000, POD6, PEER6)] {
            let pair = Pair::new().mtu(mtu);
            let inside = pair.start(runtime, &format!("{RECEIVE} 5000"));
            inside.started.wait_for_output("ready");
            let sent = pair.peer.run(&format!("{SEND} {pod} 5000 {mib}"));
            assert_eq!(
                inside.finish().ok(),
                format!("ready\n{}", sent.ok()),
                "{runtime:?} {mtu}"
            );

            let outside = pair.peer.start(&format!("{RECEIVE} 5000"));
            outside.wait_for_output("ready");
            let sent = pair.run(runtime, &format!("{SEND} {peer} 5000 {mib}"));
            assert_eq!(
                outside.finish().ok(),
                format!("ready\n{}", sent.ok()),
                "{runtime:?} {mtu}"
            );
        }
    }
}

#[test]
fn packets_larger_than_the_wire_are_cut_and_those_that_may_not_be_are_refused() {
    for runtime in BOTH {
        for (mtu, fits) in [(1280, 1252), (1500, 1472), (9000, 8972)] {
            let pair = Pair::new().mtu(mtu);
            let script = format!(
                "ping -q -c1 -W60 -M do -s {fits} {PEER} >/dev/null && echo fits
                 ping -q -c1 -W60 -M do -s {} {PEER} >/dev/null 2>&1 || echo refused
                 ping -q -c1 -W60 -M dont -s 20000 {PEER} >/dev/null && echo cut
                 ping -q -c1 -W60 -s 20000 {PEER6} >/dev/null && echo cut6; {READY} read line; true",
                fits + 1
            );
            let mut inside = pair.start(runtime, &script);
            inside.started.wait_for_output("ready");
            for to in [POD, POD6] {
                let ran = pair.peer.run(&format!("ping -q -c1 -W60 -s 20000 {to}"));
                assert_eq!(ran.status, 0, "{runtime:?} {to}: {ran}");
            }
            drop(inside.started.stdin());
            assert_eq!(
                inside.finish().ok(),
                "fits\nrefused\ncut\ncut6\nready",
                "{runtime:?} {mtu}"
            );
        }
    }
}

#[test]
fn a_smaller_path_behind_the_router_is_found_out() {
    for runtime in BOTH {
        let pair = Pair::new();
        let far = Netns::new();
        pair.peer.wire("far0", &far, "eth0");
        pair.peer.address("far0", &["10.200.0.1/24"]);
        far.address("eth0", &["10.200.0.2/24"]);
        far.ip("route add default via 10.200.0.1");
        pair.peer.ip("link set far0 mtu 1300");
        pair.peer.run("sysctl -qw net.ipv4.ip_forward=1").ok();
        let outside = far.start(&format!("{RECEIVE} 5000"));
        outside.wait_for_output("ready");
        let script =
            format!("{SEND} 10.200.0.2 5000 4; ip route get 10.200.0.2 | grep -o 'mtu [0-9]*'");
        let sent = pair.run(runtime, &script).ok();
        let (digest, mtu) = sent.split_once('\n').expect("two lines");
        assert_eq!(
            outside.finish().ok(),
            format!("ready\n{digest}"),
            "{runtime:?}"
        );
        assert_eq!(mtu, "mtu 1300", "{runtime:?}");
    }
}

#[test]
fn udp_errors_broadcast_and_names() {
    for runtime in BOTH {
        let pair = Pair::new();
        let echo = &format!(
            "python3 -c '{UNTIL_EOF}import socket
s=socket.socket(socket.AF_INET6,socket.SOCK_DGRAM); s.bind((\"::\",6000)); print(\"ready\",flush=True)
while True:
  b,a=s.recvfrom(70000); s.sendto(b,a)'"
        );
        let ask = |to: &str, port: u16| {
            format!(
                "python3 -c 'import socket
f=socket.AF_INET6 if \":\" in \"{to}\" else socket.AF_INET
s=socket.socket(f,socket.SOCK_DGRAM); s.settimeout(60); s.connect((\"{to}\",{port}))
s.send(b\"x\"*{})
try: print(len(s.recv(70000)))
except ConnectionRefusedError: print(\"refused\")'",
                if to.contains(':') { 30000 } else { 1000 }
            )
        };
        let outside = pair.peer.start(echo);
        outside.wait_for_output("ready");
        let script = format!(
            "{}; {}; {}; {}
             ping -q -c1 -t1 -W60 10.0.0.1 | grep -c 'exceeded\\|errors'
             ping -b -q -c1 -W2 192.168.50.255 2>&1 | grep -c 'bytes of data\\|broadcast' >/dev/null && echo broadcast
             arping -c1 -w60 -I eth0 {PEER} >/dev/null 2>&1; ip neigh show {PEER} | grep -c lladdr",
            ask(PEER, 6000),
            ask(PEER6, 6000),
            ask(PEER, 6001),
            ask(PEER6, 6001),
        );
        let ran = pair.run(runtime, &script);
        let text = ran.text();
        assert!(
            text.starts_with("1000\n30000\nrefused\nrefused\n"),
            "{runtime:?} {ran}"
        );
        assert!(text.ends_with("broadcast\n1"), "{runtime:?} {ran}");
        let inside = pair.start(runtime, echo);
        inside.started.wait_for_output("ready");
        for (to, size) in [(POD, "1000"), (POD6, "30000")] {
            assert_eq!(pair.peer.run(&ask(to, 6000)).ok(), size, "{runtime:?}");
        }
        assert_eq!(
            pair.peer.run(&ask(POD, 6001)).ok(),
            "refused",
            "{runtime:?}"
        );
        assert_eq!(pair.peer.run(&ask(POD, 6000)).ok(), "1000", "{runtime:?}");
        inside.finish().ok();
        outside.finish().ok();
    }
}

#[test]
fn many_connections_short_and_at_once() {
    let short = if soak() { 10_000 } else { 500 };
    let serve = &format!(
        "python3 -c '{UNTIL_EOF}import socket
s=socket.create_server((\"\",7000),backlog=512); print(\"ready\",flush=True)
def one(c):
  while b:=c.recv(100): c.sendall(b)
  c.close()
while True: threading.Thread(target=one,args=(s.accept()[0],),daemon=True).start()'"
    );
    let client = |to: &str| {
        format!(
            "python3 -c 'import socket
socket.setdefaulttimeout(200)
for i in range({short}):
  c=socket.create_connection((\"{to}\",7000)); c.sendall(b\"a\"); assert c.recv(1)==b\"a\"; c.close()
all=[socket.create_connection((\"{to}\",7000)) for i in range(200)]
for i,c in enumerate(all): c.sendall(b\"%d\"%i)
assert all and [c.recv(9) for c in all]==[b\"%d\"%i for i in range(200)]
print(\"good\")'"
        )
    };
    for runtime in BOTH {
        let pair = Pair::new();
        let inside = pair.start(runtime, serve);
        inside.started.wait_for_output("ready");
        // What the server has to say explains a client that waits in vain.
        let good = |ran: Ran, server: &Started| {
            let errors = server.errors();
            assert_eq!(ran.text(), "good", "{runtime:?}: {ran}\nserver: {errors}");
        };
        good(pair.peer.run(&client(POD)), &inside.started);
        inside.finish().ok();
        let outside = pair.peer.start(serve);
        outside.wait_for_output("ready");
        good(pair.run(runtime, &client(PEER)), &outside);
        outside.finish().ok();
    }
}

#[test]
fn packet_filters_inside_and_outside() {
    for runtime in BOTH {
        let pair = Pair::new();
        let script = format!(
            "ping -q -c1 -W60 {PEER} >/dev/null && echo open
             nft add table inet t && nft add chain inet t out '{{ type filter hook output priority 0; }}' &&
             nft add rule inet t out ip daddr {PEER} counter drop && echo nft
             ping -q -c1 -W1 {PEER} >/dev/null 2>&1 || echo dropped
             nft delete table inet t; ping -q -c1 -W60 {PEER} >/dev/null && echo open
             iptables -A OUTPUT -p icmp -d {PEER} -j DROP && ip6tables -A INPUT -p ipv6-icmp -j ACCEPT && echo iptables
             ping -q -c1 -W1 {PEER} >/dev/null 2>&1 || echo dropped
             iptables -t nat -A OUTPUT -p tcp --dport 81 -j REDIRECT --to-ports 82 && iptables -t nat -S OUTPUT | grep -c REDIRECT"
        );
        let ran = pair.run(runtime, &script);
        assert_eq!(
            ran.ok(),
            "open\nnft\ndropped\nopen\niptables\ndropped\n1",
            "{runtime:?} {ran}"
        );

        // A NetworkPolicy's rule is on the host, at the other end of the wire.
        let mut inside = pair.start(
            runtime,
            &format!("{READY} read line; ping -q -c1 -W1 {PEER} >/dev/null || echo dropped"),
        );
        inside.started.wait_for_output("ready");
        pair.peer.run(&format!(
            "nft add table ip p && nft add chain ip p i '{{ type filter hook input priority 0; }}' && nft add rule ip p i ip saddr {POD} drop"
        )).ok();
        drop(inside.started.stdin());
        assert!(inside.finish().text().ends_with("dropped"), "{runtime:?}");
    }
}

#[test]
fn a_name_is_resolved_by_a_server_on_the_network() {
    let server = format!(
        "python3 -c '{UNTIL_EOF}import socket
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind((\"{PEER}\",53)); print(\"ready\",flush=True)
while True:
  q,a=s.recvfrom(512); end=q.index(0,12)+5
  kind=q[end-4:end-2]; answer=b\"\\xc0\\x0c\"+kind+b\"\\0\\1\\0\\0\\0\\1\\0\\4\\x0a\\1\\2\\3\" if kind==b\"\\0\\1\" else b\"\"
  s.sendto(q[:2]+b\"\\x81\\x80\\0\\1\"+(b\"\\0\\1\" if answer else b\"\\0\\0\")+b\"\\0\\0\\0\\0\"+q[12:end]+answer,a)'"
    );
    for runtime in BOTH {
        let pair = Pair::new();
        let outside = pair.peer.start(&server);
        outside.wait_for_output("ready");
        let ran = pair.run(runtime, &format!("busybox nslookup service.example {PEER}"));
        assert!(ran.ok().contains("10.1.2.3"), "{runtime:?} {ran}");
        outside.finish().ok();
    }
}

#[test]
fn limits_of_the_configuration_hold_in_both_directions() {
    let pair = Pair::new();
    let config = std::env::temp_dir().join(pair.pod.name());
    let limit = "bytes = 1000000\nburst_ms = 100\n";
    let text = format!("[network.receive]\n{limit}[network.transmit]\n{limit}");
    std::fs::write(&config, text).expect("a configuration");
    let config = config.to_str().expect("plain");
    // Bytes of a packet are those of its frame, so that 3 MiB take a little more than 3 s.
    let least = std::time::Duration::from_millis(2900);
    let script = format!("{RECEIVE} 5000; {SEND} {PEER} 5001 3");
    let bundle = Bundle::tools().network(&pair.pod).script(&script);
    let inside = bundle.start(Runtime::Bulkhead, &["--config", config]);
    inside.wait_for_output("ready");
    let outside = pair.peer.start(&format!("{RECEIVE} 5001"));
    outside.wait_for_output("ready");
    let began = std::time::Instant::now();
    let sent = pair.peer.run(&format!("{SEND} {POD} 5000 3")).ok();
    assert!(began.elapsed() > least, "{:?}", began.elapsed());
    inside.wait_for_output(&sent);
    let began = std::time::Instant::now();
    let received = outside.finish().ok();
    assert!(began.elapsed() > least, "{:?}", began.elapsed());
    assert_eq!(
        inside.finish().ok(),
        format!("ready\n{sent}\n{}", received.trim_start_matches("ready\n"))
    );
    std::fs::remove_file(config).expect("it was written");
}
