//! localhost of the pod's namespace on the host reaches who listens in the guest, as it does under runc (`kubectl port-forward`).

use std::io::Write;
use std::time::{Duration, Instant};

use super::*;

/// Connects to localhost in the pod's namespace and says a word; what comes back, or why nothing does.
fn ask(pair: &Pair, to: &str, port: u16) -> String {
    let script = format!(
        "python3 -c 'import socket
try:
  s=socket.create_connection((\"{to}\",{port}),60); s.sendall(b\"word\"); s.shutdown(1); print(s.makefile().read())
except OSError as e: print(type(e).__name__)'"
    );
    pair.pod.run(&script).text()
}

/// Waits until the listener on port 8000 is reached: under Bulkhead that takes a moment.
#[track_caller]
fn reached(pair: &Pair, to: &str) {
    let reached = || ask(pair, to, 8000) == "WORD";
    eventually("the listener is reached", reached, String::new);
}

/// Echoes one connection after the other, in upper case.
fn serve(listen: &str) -> String {
    format!(
        "python3 -c '{UNTIL_EOF}import socket
s={listen}; print(\"ready\",flush=True)
while True:
  c,_=s.accept(); c.sendall(c.makefile(\"rb\").read().upper()); c.close()'"
    )
}

#[test]
fn who_listens_in_the_guest_is_reached_and_nobody_else() {
    let listeners = [
        ("socket.create_server((\"127.0.0.1\",8000))", true, false),
        ("socket.create_server((\"\",8000))", true, false),
        (
            "socket.create_server((\"::1\",8000),family=socket.AF_INET6)",
            false,
            true,
        ),
        (
            "socket.create_server((\"::\",8000),family=socket.AF_INET6)",
            false,
            true,
        ),
        (
            "socket.create_server((\"\",8000),family=socket.AF_INET6,dualstack_ipv6=True)",
            true,
            true,
        ),
    ];
    for runtime in BOTH {
        for (listen, ipv4, ipv6) in listeners {
            let pair = Pair::new();
            let inside = pair.start(runtime, &serve(listen));
            inside.started.wait_for_output("ready");
            let open = if ipv4 { "127.0.0.1" } else { "::1" };
            reached(&pair, open);
            for (to, reached) in [("127.0.0.1", ipv4), ("::1", ipv6)] {
                let wanted = if reached {
                    "WORD"
                } else {
                    "ConnectionRefusedError"
                };
                assert_eq!(ask(&pair, to, 8000), wanted, "{runtime:?} {listen} {to}");
                assert_eq!(
                    ask(&pair, to, 8001),
                    "ConnectionRefusedError",
                    "{runtime:?}"
                );
            }
            inside.finish().ok();
        }
    }
}

#[test]
fn a_port_opens_and_closes_with_its_listener() {
    let pair = Pair::new();
    let script = "python3 -c 'import socket,sys
print(\"ready\",flush=True)
for line in sys.stdin:
  s=socket.create_server((\"\",8080)); print(\"open\",line.strip(),flush=True)
  sys.stdin.readline(); s.close(); print(\"closed\",line.strip(),flush=True)'";
    let mut inside = pair.start(Runtime::Bulkhead, script);
    let mut stdin = inside.started.stdin();
    inside.started.wait_for_output("ready");
    let mut probe = pair.pod.start(
        "python3 -c 'import socket,time,sys
def up():
  try: socket.create_connection((\"127.0.0.1\",8080),60).close(); return True
  except OSError: return False
for line in sys.stdin:
  t=time.monotonic(); want=line.strip()==\"up\"
  while up()!=want and time.monotonic()<t+120: time.sleep(0.002)
  print(\"took\",int((time.monotonic()-t)*1000),flush=True)'",
    );
    let mut ask = probe.stdin();
    let mut times = Vec::new();
    for round in 0..5 {
        for (step, word, want) in [(0, "open", "up"), (1, "closed", "down")] {
            writeln!(stdin, "{round}").expect("it reads");
            inside.started.wait_for_output(&format!("{word} {round}"));
            writeln!(ask, "{want}").expect("it reads");
            let line = probe.line(2 * round + step);
            let took: u64 = line
                .split_once(' ')
                .expect("two words")
                .1
                .parse()
                .expect("a number");
            times.push(Duration::from_millis(took));
        }
    }
    times.sort();
    println!("{times:?}");
    // Nobody polls: on a quiet machine most take less than 200 ms, and on a busy one the best less than a second. None is missed.
    assert!(times[1] < Duration::from_secs(1), "{times:?}");
    assert!(times[9] < Duration::from_secs(30), "{times:?}");
    drop((ask, stdin));
    inside.finish().ok();
}

#[test]
fn a_stream_through_localhost_is_intact_and_closes_both_ways() {
    let pair = Pair::new();
    let inside = pair.start(
        Runtime::Bulkhead,
        &serve("socket.create_server((\"\",8000))"),
    );
    inside.started.wait_for_output("ready");
    reached(&pair, "127.0.0.1");
    let script = "python3 -c 'import socket,hashlib,threading
s=socket.create_connection((\"127.0.0.1\",8000)); b=bytes(97+i%26 for i in range(1<<20))*8
threading.Thread(target=lambda:(s.sendall(b),s.shutdown(1))).start()
print(s.makefile(\"rb\").read()==b.upper())'";
    let began = Instant::now();
    assert_eq!(pair.pod.run(script).ok(), "True");
    println!("8 MiB there and back in {:?}", began.elapsed());
    // Another one still works: nothing is kept.
    for _ in 0..50 {
        assert_eq!(ask(&pair, "127.0.0.1", 8000), "WORD");
    }
    inside.finish().ok();
}
