#!/bin/sh
# The network's workload, in a guest whose eth0 is up: one line "NAME VALUE UNIT" each. $1 is the peer, which serves iperf3.
set -eu
peer=$1
tcp() {
    iperf3 --client "$peer" --time 4 --omit 1 --json $2 | jq -r --arg name "$1" '"\($name) \(.end.sum_received.bits_per_second / 8388608) MiB/s"'
}
udp() {
    iperf3 --client "$peer" --time 4 --udp --length 64 --bitrate 0 --json $2 |
        jq -r --arg name "$1" '"\($name) \((.end.sum.packets - .end.sum.lost_packets) / .end.sum.seconds) pkt/s"'
}
ping -q -c 3 "$peer" >/dev/null
tcp tcp-out ""
tcp tcp-in --reverse
udp udp64-out ""
udp udp64-in --reverse
ping -q -c 200 -i 0.01 "$peer" | sed -n 's:.*= [0-9.]*/\([0-9.]*\)/.*:ping \1 ms:p'
