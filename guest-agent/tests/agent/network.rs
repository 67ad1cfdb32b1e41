//! The pod's network is the agent's own network namespace, which here is one that has nothing but lo.

use bulkhead_agent_protocol::agent;
use bulkhead_agent_protocol::agent::namespaces::Kind;

use crate::guest::{Guest, context, status};

/// RTM_NEWLINK: lo goes up. RTM_NEWADDR: 10.9.8.7/32 on lo. Indices as in agent.proto.
fn requests() -> Vec<Vec<u8>> {
    let message = |kind: u16, body: &[u8]| {
        let mut bytes = (16 + body.len() as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    };
    let up = libc::IFF_UP as u8;
    vec![
        message(
            libc::RTM_NEWLINK,
            &[0, 0, 0, 0, 1, 0, 0, 0, up, 0, 0, 0, up, 0, 0, 0],
        ),
        message(
            libc::RTM_NEWADDR,
            &[2, 32, 0, 0, 1, 0, 0, 0, 8, 0, 2, 0, 10, 9, 8, 7],
        ),
    ]
}

/// lo goes up, with an address more, and a sysctl is set.
pub fn network(devices: u32, sysctl: (&str, &str)) -> agent::Network {
    agent::Network {
        devices,
        requests: requests(),
        sysctls: [(sysctl.0.to_owned(), sysctl.1.to_owned())].into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn members_of_the_pod_are_in_its_network_and_others_are_not() {
    let guest = Guest::before_sandbox().await;
    let request = agent::StartSandboxRequest {
        version: bulkhead_agent_protocol::PROTOCOL_VERSION,
        seed: vec![0; bulkhead_agent_protocol::SEED],
        network: Some(network(0, ("net.ipv4.ip_default_ttl", "77"))).into(),
        ..Default::default()
    };
    guest
        .client
        .start_sandbox(context(), &request)
        .await
        .unwrap();
    let again = network(0, ("net.ipv4.ip_default_ttl", "78"));
    guest
        .client
        .configure_network(context(), &again)
        .await
        .unwrap();
    let pods = std::fs::read_link(format!("/proc/{}/ns/net", guest.pid())).expect("the agent runs");
    let script = "readlink /proc/self/ns/net; cat /proc/sys/net/ipv4/ip_default_ttl; ip addr show lo; ls /sys/class/net";
    let spec = |id: &str, kind: Kind| {
        let mut spec = guest.spec(id, script);
        spec.namespaces.as_mut().unwrap().network = kind.into();
        spec
    };
    let member = guest.run("member", spec("member", Kind::SANDBOX)).await;
    let lines: Vec<&str> = member.text().lines().collect();
    assert_eq!(lines[..2], [pods.to_str().unwrap(), "78"]);
    assert!(member.text().contains("10.9.8.7/32"), "{}", member.text());
    let other = guest.run("other", spec("other", Kind::NEW)).await;
    assert_ne!(other.text().lines().next().unwrap(), pods.to_str().unwrap());
    assert!(
        !other.text().contains("10.9.8.7") && other.text().contains("127.0.0.1/8"),
        "{}",
        other.text()
    );

    // What a member sets is set for the pod, and its exec processes are in the pod's network as well.
    let mut sets = spec("sets", Kind::SANDBOX);
    sets.sysctls
        .insert("net.ipv4.ip_default_ttl".to_owned(), "79".to_owned());
    let _streams = guest.sleeper("sets", sets).await;
    let exec = guest
        .run_exec("sets", "e", crate::guest::shell(script))
        .await;
    let lines: Vec<&str> = exec.text().lines().collect();
    assert_eq!(lines[..2], [pods.to_str().unwrap(), "79"]);
    guest.end("sets").await;
}

#[tokio::test]
async fn devices_that_are_missing_and_sysctls_of_others_are_named() {
    let guest = Guest::start().await;
    let ttl = ("net.ipv4.ip_default_ttl", "77");
    let call = async |network| status(guest.client.configure_network(context(), &network).await);
    let (code, text) = call(network(2, ttl)).await;
    assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION);
    assert_eq!(
        text,
        "the pod's network has 2 devices, but the machine has 0"
    );
    let (code, text) = call(network(0, ("kernel.hostname", "x"))).await;
    assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
    assert!(
        text.contains("\"kernel.hostname\" is no sysctl of the network"),
        "{text}"
    );
    let (code, text) = call(network(0, ("net.ipv4.conf.eth9.forwarding", "1"))).await;
    assert_eq!(code, ttrpc::Code::INTERNAL);
    assert!(
        text.contains("cannot set sysctl net.ipv4.conf.eth9.forwarding"),
        "{text}"
    );
    let mut unknown = network(0, ttl);
    unknown.requests[1][20] = 2;
    let (code, text) = call(unknown).await;
    assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
    assert!(
        text.contains("request 2 of the pod's network (RTM_NEWADDR 10.9.8.7/32)"),
        "{text}"
    );
}
