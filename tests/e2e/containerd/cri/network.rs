//! A pod's network as CNI has made it, seen from its containers, from the host and by containerd.

use std::fs;
use std::process::Command;

use bulkhead_tests::cri::Cri;
use bulkhead_tests::cri::messages::{
    PodSandboxRequest, PodSandboxStatsResponse, PodSandboxStatusResponse,
};
use bulkhead_tests::run;

use super::{Pod, connect, handlers, private_pids};
use crate::eventually;

impl Pod<'_> {
    fn request(&self) -> PodSandboxRequest {
        PodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        }
    }

    fn address(&self) -> String {
        let answer: PodSandboxStatusResponse = self.cri.ok("PodSandboxStatus", &self.request());
        answer.status.network.ip.clone()
    }

    /// Bytes that containerd says eth0 has received and sent.
    fn counters(&self) -> (u64, u64) {
        let answer: PodSandboxStatsResponse = self.cri.ok("PodSandboxStats", &self.request());
        let usage = answer.stats.linux.network.default_interface.clone();
        let usage = usage.unwrap_or_default();
        assert_eq!(usage.name, "eth0");
        (usage.rx_bytes.value, usage.tx_bytes.value)
    }
}

/// A script on the host, or in the namespace that CNI has filled last.
fn host(script: &str) -> (bool, String) {
    let ran = run(Command::new("sh").args(["-c", script]));
    (ran.status == 0, ran.text())
}

fn only_namespace() -> String {
    let listed = fs::read_dir("/var/run/netns").expect("CNI made it");
    let names = listed.map(|entry| entry.expect("listed").file_name());
    let mut names = names.filter_map(|name| name.into_string().ok());
    let name = names.find(|name| name.starts_with("cni-"));
    name.expect("the pod's")
}

#[test]
fn a_pod_has_the_network_that_cni_made() {
    let cri: Cri = connect();
    for &handler in handlers() {
        let pod = Pod::start(&cri, handler, private_pids());
        let address = pod.address();
        let first = pod.container("while true; do echo answer | nc -l -p 80; done", &[]);
        let second = pod.container("sleep 1000", &[]);
        // As busybox' ip shows it: the pod's address, and a way to others.
        let (code, text) = pod.exec(
            &second,
            "ip -4 addr show eth0; ip route; cat /sys/class/net/eth0/mtu",
        );
        assert_eq!(code, 0, "{handler}");
        assert!(
            text.contains(&format!("inet {address}/")),
            "{handler} {text}"
        );
        assert!(
            text.contains("10.88.0.0/16 via 10.88.0.1"),
            "{handler} {text}"
        );
        assert!(text.ends_with("1500"), "{handler} {text}");
        // Containers of a pod share it.
        eventually("the other container answers", || {
            pod.exec(&second, "nc -w 5 127.0.0.1 80 </dev/null").1 == "answer"
        });
        // The host and the pod reach each other.
        let (reached, _) = host(&format!("ping -q -c2 -W5 {address}"));
        assert!(reached, "{handler} {address}");
        eventually("the host is answered", || {
            host(&format!("nc -w 5 {address} 80 </dev/null")).1 == "answer"
        });
        assert_eq!(
            pod.exec(&second, "ping -q -c2 -W5 10.88.0.1 >/dev/null; echo $?")
                .1,
            "0",
            "{handler}"
        );
        // kubectl port-forward dials localhost in the pod's namespace.
        let inside = format!("ip netns exec {}", only_namespace());
        eventually("localhost is answered", || {
            host(&format!("{inside} nc -w 5 127.0.0.1 80 </dev/null")).1 == "answer"
        });
        assert!(
            !host(&format!("{inside} nc -w 5 -z 127.0.0.1 81")).0,
            "{handler}: nobody listens there"
        );
        // What containerd counts is what went through.
        let before = pod.counters();
        assert!(host(&format!("ping -q -c100 -i0.01 -s1000 {address}")).0);
        let after = pod.counters();
        for passed in [after.0 - before.0, after.1 - before.1] {
            assert!(
                (100_000..200_000).contains(&passed),
                "{handler} {before:?} {after:?}"
            );
        }
        let _ = first;
        pod.remove();
    }
}

#[test]
fn two_pods_reach_each_other() {
    let cri = connect();
    for &handler in handlers() {
        let pods = [(); 2].map(|()| Pod::start(&cri, handler, private_pids()));
        let script = "while true; do hostname | nc -l -p 7777; done";
        let inside = pods.each_ref().map(|pod| pod.container(script, &[]));
        for (from, to) in [(0, 1), (1, 0)] {
            let ask = format!("nc -w 5 {} 7777 </dev/null", pods[to].address());
            eventually("the other pod answers", || {
                pods[from].exec(&inside[from], &ask).1 == "podname"
            });
        }
        for pod in pods {
            pod.remove();
        }
    }
}
