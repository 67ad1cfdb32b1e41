//! The network of `bulkhead run`: interfaces of a namespace that somebody has set up with `ip`. Each case runs under runc, too: what
//! runc fails is a bad test.

mod cni;
mod ends;
mod features;
mod hooks;
mod kinds;
mod localhost;
mod same;
mod traffic;

use bulkhead_tests::{Bundle, Netns, Ran, Runtime, Started, eventually, must, run};

/// Ours and the control.
const BOTH: [Runtime; 2] = [Runtime::Runc, Runtime::Bulkhead];

/// Python that ends its program when standard input does: pid 1 of a container has no other end that a test could ask for.
const UNTIL_EOF: &str = "import os,socket,sys,threading
socket.setdefaulttimeout(200)
threading.Thread(target=lambda:(sys.stdin.read(),os._exit(0)),daemon=True).start()
";

/// A pod's namespace with eth0, and a peer at the other end of the wire that is its router.
struct Pair {
    pod: Netns,
    peer: Netns,
}

const POD: &str = "192.168.50.2";
const PEER: &str = "192.168.50.1";
const POD6: &str = "fd50::2";
const PEER6: &str = "fd50::1";

impl Pair {
    fn new() -> Pair {
        let (pod, peer) = (Netns::new(), Netns::new());
        pod.wire("eth0", &peer, "peer0");
        pod.address("eth0", &[&format!("{POD}/24"), &format!("{POD6}/64")]);
        peer.address("peer0", &[&format!("{PEER}/24"), &format!("{PEER6}/64")]);
        pod.ip(&format!("route add default via {PEER}"));
        pod.ip(&format!("route add default via {PEER6}"));
        Pair { pod, peer }
    }

    fn mtu(self, mtu: u32) -> Pair {
        self.pod.ip(&format!("link set eth0 mtu {mtu}"));
        self.peer.ip(&format!("link set peer0 mtu {mtu}"));
        self
    }

    /// A script in a container of the pod, to its end.
    fn run(&self, runtime: Runtime, script: &str) -> Ran {
        self.start(runtime, script).finish()
    }

    fn start(&self, runtime: Runtime, script: &str) -> Inside {
        let bundle = Bundle::tools()
            .network(&self.pod)
            .capabilities(&["CAP_NET_ADMIN"])
            .script(script);
        let started = bundle.start(runtime, &[]);
        Inside { started, bundle }
    }
}

/// A container that runs, and its bundle.
struct Inside {
    started: Started,
    #[allow(dead_code)] // held for its directory
    bundle: Bundle,
}

impl Inside {
    fn finish(self) -> Ran {
        self.started.finish()
    }
}
