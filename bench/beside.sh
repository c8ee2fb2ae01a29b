#!/usr/bin/env bash
# Demand reads and small sync points beside bulk, over a line of its own between two network namespaces: bench/beside.sh LINE SECONDS [one].
#
#   LINE   1gbit: a gigabit line, with the queue that the kernel gives a network card by default (pfifo_fast)
#          25, 40, ...: a line of that many milliseconds there and back, and no other limit than the machine
#   one    the connection keeps to one socket, for comparison
#
# Prints what bench/beside does: "WHAT METRIC VALUE" lines. 77 where there are no user namespaces, or no tun devices.
set -euo pipefail
BUILD=$(realpath "${BUILD:-build}")
line=${1:?a line} seconds=${2:?seconds} one=${3:-}
if [ "${BESIDE_INSIDE:-}" = "" ]; then
    unshare -rn true 2>/dev/null || { echo "SKIP: user namespaces cannot be made here"; exit 77; }
    [ -w /dev/net/tun ] || { echo "SKIP: no /dev/net/tun"; exit 77; }
    BESIDE_INSIDE=1 exec unshare -rn "$0" "$@"
fi

T=$(mktemp -d "${TMPDIR:-/tmp}/memsync-beside.XXXXXX")
mine=()
end() {
    kill "${mine[@]}" 2>/dev/null || true
    wait || true
    rm -rf "$T"
}
trap end EXIT
soon() { # COMMAND...: succeeds within 10 s
    local until=$((SECONDS + 10))
    until "$@"; do
        [ "$SECONDS" -lt "$until" ] || { echo "beside.sh: never came: $*" >&2; exit 3; }
        sleep 0.02
    done
}
there() { nsenter -t "$other" -n "$@"; }
apart() { [ "$(readlink "/proc/$other/ns/net")" != "$(readlink /proc/self/ns/net)" ]; }

unshare -n sleep 600 &
other=$!
mine+=("$other")
soon apart
if [ "$line" = 1gbit ]; then
    ip link add far0 type veth peer name away0
    ip link set away0 netns "$other"
    ip addr add 10.77.0.1/24 dev far0
    there ip addr add 10.77.0.2/24 dev away0
    ip link set far0 up
    there ip link set away0 up
    tc qdisc add dev far0 root handle 1: tbf rate 1gbit burst 128k limit 1m
    tc qdisc add dev far0 parent 1:1 handle 2: pfifo_fast
    there tc qdisc add dev away0 root handle 1: tbf rate 1gbit burst 128k limit 1m
    there tc qdisc add dev away0 parent 1:1 handle 2: pfifo_fast
else
    mkfifo "$T/ends"
    "$BUILD/bench/far" "$other" "$(awk -v ms="$line" 'BEGIN { print ms / 2 }')" <"$T/ends" >"$T/far" 2>"$T/far.err" &
    mine+=("$!")
    exec 9>"$T/ends"
    soon grep -qs ready "$T/far"
fi
nsenter -t "$other" -n "$BUILD/memsync-agent" --listen 10.77.0.2:0 --store mem: --insecure >"$T/agent" 2>"$T/agent.err" &
mine+=("$!")
soon grep -qs listening "$T/agent"
"$BUILD/bench/beside" "$(awk '/listening wire/ { print $3 }' "$T/agent")" "$seconds" $one
