//! What a container with CAP_NET_ADMIN makes for itself: queueing disciplines, interfaces, rules, sets, IPsec.

use super::*;

/// Name and command. Each leaves nothing that hinders the next one.
const MADE: [(&str, &str); 47] = [
    // Queueing disciplines, their classes and filters.
    (
        "netem",
        "tc qdisc add dev lo root netem delay 1ms && ping -q -c1 -W5 127.0.0.1 && tc qdisc del dev lo root",
    ),
    (
        "tbf",
        "tc qdisc add dev v0 root tbf rate 1mbit burst 32kbit latency 400ms && tc qdisc del dev v0 root",
    ),
    (
        "htb",
        "tc qdisc add dev v0 root handle 1: htb default 10 && tc class add dev v0 parent 1: classid 1:10 htb rate 1mbit && tc qdisc del dev v0 root",
    ),
    (
        "hfsc",
        "tc qdisc add dev v0 root handle 1: hfsc && tc qdisc del dev v0 root",
    ),
    (
        "prio",
        "tc qdisc add dev v0 root handle 1: prio && tc filter add dev v0 parent 1: basic match 'meta(priority eq 6)' classid 1:1 && tc qdisc del dev v0 root",
    ),
    (
        "red",
        "tc qdisc add dev v0 root red limit 1000000 avpkt 1000 bandwidth 10mbit && tc qdisc del dev v0 root",
    ),
    (
        "sfq",
        "tc qdisc add dev v0 root sfq perturb 10 && tc qdisc del dev v0 root",
    ),
    (
        "drr",
        "tc qdisc add dev v0 root handle 1: drr && tc qdisc del dev v0 root",
    ),
    (
        "codel",
        "tc qdisc add dev v0 root codel && tc qdisc del dev v0 root",
    ),
    (
        "fq_codel",
        "tc qdisc add dev v0 root fq_codel && tc qdisc del dev v0 root",
    ),
    (
        "fq",
        "tc qdisc add dev v0 root fq && tc qdisc del dev v0 root",
    ),
    (
        "cake",
        "tc qdisc add dev v0 root cake bandwidth 10mbit && tc qdisc del dev v0 root",
    ),
    (
        "ingress",
        "tc qdisc add dev v0 ingress && tc filter add dev v0 parent ffff: protocol ip u32 match u32 0 0 action mirred egress redirect dev v1 && tc qdisc del dev v0 ingress",
    ),
    (
        "clsact",
        "tc qdisc add dev v0 clsact && tc filter add dev v0 ingress protocol ip flower dst_ip 192.0.2.1 action drop && tc filter add dev v0 egress matchall action pedit ex munge ip ttl set 9 && tc qdisc del dev v0 clsact",
    ),
    (
        "police",
        "tc qdisc add dev v0 ingress && tc filter add dev v0 parent ffff: matchall action police rate 1mbit burst 10k conform-exceed drop && tc qdisc del dev v0 ingress",
    ),
    (
        "fw",
        "tc qdisc add dev v0 root handle 1: htb && tc filter add dev v0 parent 1: protocol ip handle 7 fw classid 1:1 && tc qdisc del dev v0 root",
    ),
    (
        "ifb",
        "ip link add ifb7 type ifb && ip link set ifb7 up && ip link del ifb7",
    ),
    // Interfaces.
    (
        "vlan",
        "ip link add link v0 name v0.5 type vlan id 5 && ip link set v0.5 up && ip link del v0.5",
    ),
    (
        "bridge vlan",
        "ip link add b0 type bridge vlan_filtering 1 && ip link del b0",
    ),
    (
        "bond",
        "ip link add bond7 type bond mode active-backup && ip link del bond7",
    ),
    (
        "vrf",
        "ip link add vrf7 type vrf table 77 && ip link set v1 master vrf7 && ip link del vrf7",
    ),
    (
        "wireguard",
        "ip link add wg0 type wireguard && ip address add 10.77.0.1/24 dev wg0 && ip link set wg0 up && ip link del wg0",
    ),
    (
        "ipip",
        "ip link add t0 type ipip remote 192.0.2.1 local 192.0.2.2 && ip link del t0",
    ),
    (
        "gre",
        "ip link add t0 type gre remote 192.0.2.1 local 192.0.2.2 ttl 9 && ip link del t0",
    ),
    (
        "gretap",
        "ip link add t0 type gretap remote 192.0.2.1 local 192.0.2.2 && ip link del t0",
    ),
    (
        "sit",
        "ip link add t0 type sit remote 192.0.2.1 local 192.0.2.2 && ip link del t0",
    ),
    (
        "ip6tnl",
        "ip link add t0 type ip6tnl remote fd00::1 local fd00::2 && ip link del t0",
    ),
    (
        "ip6gre",
        "ip link add t0 type ip6gre remote fd00::1 local fd00::2 && ip link del t0",
    ),
    (
        "vti",
        "ip link add t0 type vti remote 192.0.2.1 local 192.0.2.2 key 7 && ip link del t0",
    ),
    (
        "vxlan",
        "ip link add t0 type vxlan id 7 dstport 4789 && ip link del t0",
    ),
    (
        "geneve",
        "ip link add t0 type geneve id 7 remote 192.0.2.1 && ip link del t0",
    ),
    // Rules.
    (
        "recent",
        "iptables -A INPUT -p tcp --dport 22 -m recent --name ssh --update --seconds 60 --hitcount 4 -j DROP && iptables -F",
    ),
    (
        "hashlimit",
        "iptables -A INPUT -m hashlimit --hashlimit-above 5/sec --hashlimit-mode srcip --hashlimit-name h -j DROP && iptables -F",
    ),
    (
        "connlimit",
        "iptables -A INPUT -p tcp --syn -m connlimit --connlimit-above 9 -j REJECT && iptables -F",
    ),
    (
        "string",
        "iptables -A INPUT -m string --algo bm --string evil -j DROP && iptables -F",
    ),
    (
        "length, ttl, dscp",
        "iptables -t mangle -A POSTROUTING -m length --length 0:99 -m ttl --ttl-gt 1 -m dscp --dscp 0 -j DSCP --set-dscp 10 && iptables -t mangle -F",
    ),
    (
        "iprange, mac, time",
        "iptables -A INPUT -m iprange --src-range 192.0.2.1-192.0.2.9 -m mac --mac-source 02:00:00:00:00:01 -m time --timestart 01:00 -j DROP && iptables -F",
    ),
    (
        "nflog, nfqueue",
        "iptables -A INPUT -j NFLOG && iptables -A INPUT -j NFQUEUE --queue-num 1 --queue-bypass && iptables -F",
    ),
    (
        "netmap, tee",
        "iptables -t nat -A PREROUTING -d 192.0.2.0/24 -j NETMAP --to 198.51.100.0/24 && iptables -t nat -F && iptables -t mangle -A PREROUTING -j TEE --gateway 192.0.2.1 && iptables -t mangle -F",
    ),
    (
        "policy",
        "iptables -A FORWARD -m policy --dir in --pol ipsec -j ACCEPT && iptables -F",
    ),
    (
        "rpfilter",
        "iptables -t raw -A PREROUTING -m rpfilter --invert -j DROP && iptables -t raw -F",
    ),
    (
        "ip6tables",
        "ip6tables -A INPUT -m frag --fragid 7 -j DROP && ip6tables -A INPUT -m rt -j DROP && ip6tables -F",
    ),
    (
        "nft netdev",
        "nft add table netdev t && nft 'add chain netdev t c { type filter hook ingress device v0 priority 0; }' && nft delete table netdev t",
    ),
    (
        "nft flow table",
        "nft add table inet t && nft 'add flowtable inet t f { hook ingress priority 0; devices = { v0 }; }' && nft delete table inet t",
    ),
    (
        "ipset",
        "ipset create s hash:ip && ipset add s 192.0.2.1 && iptables -A INPUT -m set --match-set s src -j DROP && iptables -F && ipset destroy s && ipset create n hash:net,port && ipset destroy n",
    ),
    // IPsec.
    (
        "xfrm state",
        "ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 7 reqid 1 mode tunnel aead 'rfc4106(gcm(aes))' 0x000102030405060708090a0b0c0d0e0f10111213 128 && ip xfrm policy add src 192.0.2.1/32 dst 192.0.2.2/32 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel && ip xfrm state flush && ip xfrm policy flush",
    ),
    (
        "xfrm interface",
        "ip link add x0 type xfrm dev lo if_id 7 && ip link del x0",
    ),
];

#[test]
fn a_container_with_cap_net_admin_makes_what_it_makes_on_a_host() {
    let mut script = "ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up; ip link set lo up\n".to_string();
    for (name, command) in MADE {
        script += &format!(
            "{{ {command}; }} >/dev/null 2>/tmp/said; echo \"{name}: $? $(tr '\\n' ' ' </tmp/said)\"\n"
        );
    }
    // What a driver would put there without being asked.
    script += "ip -o link show | cut -d: -f2 | tr -d ' \\n'\n";
    for runtime in BOTH {
        let bundle = Bundle::tools()
            .capabilities(&["CAP_NET_ADMIN", "CAP_NET_RAW"])
            .script(&script);
        let ran = bundle.run_with(runtime, &[]);
        let said = ran.ok();
        let failed: Vec<_> = MADE
            .iter()
            .filter(|(name, _)| {
                !said
                    .lines()
                    .any(|line| line.starts_with(&format!("{name}: 0")))
            })
            .collect();
        assert!(failed.is_empty(), "{runtime:?} {failed:#?}\n{said}");
        if runtime == Runtime::Bulkhead {
            assert_eq!(said.lines().last(), Some("lov1@v0v0@v1"), "{said}");
        }
    }
}
