//! Messages that are not what they say.

use protobuf::Message as _;

use super::*;

fn refusal(message: Vec<u8>) -> String {
    let wanted = agent::Network {
        requests: vec![message],
        ..Default::default()
    };
    let error = translated(&wanted, &Interfaces(vec![7])).unwrap_err();
    crate::error::chain(&error)
}

#[test]
fn a_foreign_type_is_refused_by_its_name() {
    for (kind, name) in [
        (libc::RTM_DELLINK, "RTM_DELLINK"),
        (libc::RTM_SETLINK, "RTM_SETLINK"),
        (libc::RTM_GETRULE, "RTM_GETRULE"),
        (libc::RTM_NEWQDISC, "RTM_NEWQDISC"),
        (3, "message type 3"),
        (u16::MAX, "message type 65535"),
    ] {
        let error = refusal(Message::new(kind, 0, &[0; 16]).finish());
        assert!(
            error.contains(&format!("{name} does not describe a network")),
            "{error}"
        );
    }
}

#[test]
fn an_unknown_interface_is_refused() {
    let unknown = [
        address(3, &v4("10.0.0.1"), 8),
        link(0, true),
        neighbour(u32::MAX, &v4("10.0.0.1"), &[0; 6]),
        inet(0, 0, 0).with(libc::RTA_OIF, &3u32.to_ne_bytes()),
        inet(0, 0, 0).with(libc::RTA_IIF, &3u32.to_ne_bytes()),
        inet(0, 0, 0).with(libc::RTA_MULTIPATH, &next_hop(3, "10.0.0.1")),
    ];
    for message in unknown {
        let error = refusal(message.finish());
        assert!(error.contains("it names interface"), "{error}");
    }
    let error = refusal(address(3, &v4("10.0.0.1"), 8).finish());
    assert_eq!(
        error,
        "request 1 of the pod's network (RTM_NEWADDR 10.0.0.1/8) cannot be made: it names interface 3, but 1 is lo and the \
         1 devices begin at 2"
    );
}

#[test]
fn a_next_hop_without_an_interface_stays_one() {
    let message = inet(0, 0, 0)
        .with(libc::RTA_MULTIPATH, &next_hop(0, "10.0.0.1"))
        .finish();
    let request = Request::new(&message, &Interfaces(Vec::new())).unwrap();
    assert_eq!(request.message, message);
}

#[test]
fn a_cut_message_is_refused_wherever_it_is_cut() {
    let hops = [next_hop(FIRST, "10.1.0.1"), next_hop(FIRST, "10.2.0.1")].concat();
    let whole = inet(16, 0, 0)
        .with(libc::RTA_DST, &v4("10.9.0.0"))
        .with(libc::RTA_MULTIPATH, &hops)
        .finish();
    for length in 0..whole.len() {
        let mut cut = whole[..length].to_owned();
        // As it is, and with the length that it has.
        assert!(refusal(cut.clone()).contains("malformed"));
        if length >= 4 {
            cut[..4].copy_from_slice(&(length as u32).to_ne_bytes());
            let attributes_end = [28, 36].contains(&length);
            assert!(
                attributes_end || refusal(cut).contains("malformed"),
                "{length}"
            );
        }
    }
}

#[test]
fn an_interface_index_that_is_cut_off_is_refused() {
    let error = refusal(inet(0, 0, 0).with(libc::RTA_OIF, &[2, 0]).finish());
    assert!(error.contains("cut off"), "{error}");
}

/// Any network, and any message of one: it is refused, or as long as it came.
fn network(data: &[u8]) {
    let interfaces = Interfaces(vec![7, 9]);
    request::describe(data);
    if let Ok(request) = Request::new(data, &interfaces) {
        assert_eq!(request.message.len(), data.len());
    }
    let Ok(network) = agent::Network::parse_from_bytes(data) else {
        return;
    };
    if let Ok(requests) = translated(&network, &interfaces) {
        assert_eq!(requests.len(), network.requests.len());
    }
    if let Ok(sysctls) = ordered(&network) {
        assert!(sysctls.iter().all(|(_, name, _)| name.starts_with("net")));
        assert!(sysctls.is_sorted());
    }
}

#[test]
fn fuzz_agent_network() {
    bulkhead_fuzz::run("agent_network", network);
}
