#!/usr/bin/env bash
# Regions that are larger than what may be here of them: every page is right whenever it is looked at, and there are never
# more of them in memory than the bound.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

cases=(random stores walks shared killed cut small race long)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }

paged=$BUILD/tests/programs/paged
seed=$RANDOM
say "seed $seed"
mib=${MIB:-256} bound=${BOUND:-16} ops=${OPS:-16000}
start_remote
far=$W/far
"$paged" make "$T/made" $((mib * 256))
memsync import "$T/made" "${far#/}/big" >"$T/import.out" || fail "$(cat "$T/import.out")"
rm "$T/made"
pull() { shim MEMSYNC_REGIONS="$far/**=pull,resident=${bound}M${order:+,order=$order}" MEMSYNC_LOG_FILE="$T/said.err" "$@"; }
# The agent's memory that is behind the view, in MiB, as the kernel counts it.
held() {
    local fd blocks most=0
    for fd in /proc/"$(local_agents)"/fd/*; do
        case $(readlink "$fd") in
        "/memfd:memsync:big"*) blocks=$(stat -L -c %b "$fd") && [ "$blocks" -gt "$most" ] && most=$blocks ;;
        esac
    done
    say $((most / 2048))
}
# watched COMMAND...: runs it; meanwhile the bound holds, with what little faults may have beyond it.
watched() {
    local most=0 now
    "$@" &
    local pid=$!
    while alive $pid; do
        now=$(held 2>/dev/null || say 0)
        [ "$now" -le "$most" ] || most=$now
        sleep 0.05
    done
    wait $pid || fail "$*: exit $?"
    say "at most $most MiB were here"
    [ "$most" -gt $((bound / 2)) ] || fail "only $most MiB were ever here"
    [ "$most" -le $((bound + 2)) ] || fail "$most MiB were here, of $bound"
}
evicted() {
    memsync status --json >"$T/status" || true
    /usr/bin/python3 -c 'import json, sys
v = [v for v in json.load(open(sys.argv[1]))["views"] if v["name"].endswith("/big")][0]
print({k: v[k] for k in ("resident", "bound", "evicted", "fetched", "faults")})
bound = int(sys.argv[2]) << 20
assert v["bound"] == bound and v["resident"] <= bound + (1 << 20) and v["evicted"] >= int(sys.argv[3]) << 20, v' "$T/status" "$bound" "$1" ||
        fail "status: $(cat "$T/status")"
}

case $1 in
random)
    watched pull -- "$paged" random "$far/big" "$ops" 4 "$seed"
    evicted 500
    order=none
    watched pull -- "$paged" random "$far/big" $((ops / 4)) 3 "$seed"
    ;;
stores) # a mirror: what is stored goes out before its pages go
    mirror() { shim MEMSYNC_REGIONS="$far/**=mirror,resident=${bound}M,order=$order" MEMSYNC_LOG_FILE="$T/said.err" "$@"; }
    mib=${MIB:-64}
    for order in none fault; do
        "$paged" make "$T/made" $((mib * 256))
        memsync import --force "$T/made" "${far#/}/$order/big" >"$T/import.out" || fail "$(cat "$T/import.out")"
        mirror -- "$paged" store "$far/$order/big" $((ops * 4)) 3 "$seed" "$T/expected"
        evicted 16
        memsync export "${far#/}/$order/big" "$T/exported" >"$T/export.out" || fail "$(cat "$T/export.out")"
        same "$T/expected" "$T/exported"
        rm "$T/exported"
        stop_local
    done
    ;;
walks)
    watched pull -- "$paged" walk "$far/big"
    watched pull -- "$paged" check "$far/big"
    evicted $((mib - bound - 1))
    ;;
shared) # two programs, of which one is not bounded: it has its own pages; two that are share them
    pull -- "$paged" random "$far/big" "$ops" 2 "$seed" &
    first=$!
    pull -- "$paged" random "$far/big" "$ops" 2 "$((seed + 1))" &
    second=$!
    shim MEMSYNC_REGIONS="$far/**=pull" MEMSYNC_LOG_FILE="$T/said.err" -- "$paged" check "$far/big" >"$T/version"
    wait $first && wait $second || fail "one of them"
    [ "$(cat "$T/version")" = 0 ] || fail "version $(cat "$T/version")"
    ;;
killed)
    pull -- "$paged" random "$far/big" "$ops" 3 "$seed" &
    reader=$!
    kills=0
    for _ in 1 2 3; do
        poll 10 eval '[ -n "$(local_agents)" ] || ! alive $reader' || fail "no agent"
        sleep 0.3
        alive $reader || break
        kill -9 "$(local_agents)"
        kills=$((kills + 1))
    done
    wait $reader || fail "exit $?"
    [ $kills -gt 0 ] || fail "the reader was done before anything was killed"
    ;;
cut)
    start_relay
    pull -- "$paged" random "$far/big" "$ops" 3 "$seed" &
    reader=$!
    for _ in 1 2 3; do
        sleep 0.3
        relay down
        sleep 0.1
        relay up
    done
    wait $reader || fail "exit $?"
    ;;
race) # most of what is read is there, and goes while it is read
    mib=6 bound=4
    "$paged" make "$T/made" $((mib * 256))
    memsync import "$T/made" "${far#/}/half" >"$T/import.out" || fail "$(cat "$T/import.out")"
    pull -- "$paged" random "$far/half" $((ops * 2)) 4 "$seed"
    pull -- "$paged" transfers "$far/half" "$ops" 4 "$seed"
    ;;
long) # calls that read more than may be here, by two programs
    bound=4
    for bs in 8M 3M 1000000; do
        pull -- dd if="$far/big" bs=$bs status=none | sha256sum >"$T/one" &
        pull -- dd if="$far/big" bs=$bs status=none | sha256sum >"$T/two"
        wait $! || fail "exit $?"
        same "$T/one" "$T/two"
    done
    memsync export "${far#/}/big" "$T/plain" >/dev/null && sha256sum <"$T/plain" >"$T/plain.sum"
    same "$T/plain.sum" "$T/one"
    pull -- "$paged" check "$far/big"
    ;;
small) # less than can be kept to is taken as that
    bound=4
    watched pull -- "$paged" random "$far/big" $((ops / 4)) 4 "$seed"
    shim MEMSYNC_REGIONS="$far/**=pull,resident=1" MEMSYNC_LOG_FILE="$T/said.err" -- "$paged" random "$far/big" 1000 4 "$seed"
    evicted 1
    ;;
esac
[ ! -s "$T/said.err" ] || [ "$1" = killed ] || [ "$1" = cut ] || fail "$(cat "$T/said.err")"
