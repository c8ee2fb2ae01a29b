#!/usr/bin/env bash
# A hub with three replicas: whatever becomes of one of them, of the hub, or of all, the program goes on within the bound, and in the end all replicas have
# the same, which is what the program has.
# cases
# timeout: 300
. "$(dirname "$0")/../lib.sh"

cases=(killed stopped durable throttled joiner large foreign ahead evened unlinked hub_killed all_down lost_in_bulk fan_out held bad_urls)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }

BOUND_MS=1250 # HUB_WAIT_MS and HUB_HOLD_MS
SLACK_MS=1000 # of a busy machine
writer=$BUILD/tests/faults/epochwriter
declare -A address pid

agent_says() { [ -s "$T/$1.out" ] && grep -q '^listening wire' "$T/$1.out"; }
# start_agent NAME STORE [OPTION...]: at the address that it had before, if it had one.
start_agent() {
    local name=$1 store=$2
    : >"$T/$name.out"
    MEMSYNC_LOG=info "$BUILD/memsync-agent" --listen "${address[$name]:-127.0.0.1:0}" --store "$store" --state "$T/state.$name" "${@:3}" >"$T/$name.out" 2>>"$T/$name.err" &
    pid[$name]=$!
    poll 20 agent_says "$name" || fail "$name did not say that it listens"
    address[$name]=$(sed -n 's/^listening wire //p' "$T/$name.out" | head -n 1)
}
kill_agent() {
    kill -KILL "${pid[$1]}"
    wait "${pid[$1]}" 2>/dev/null || true
}
stop_agent() {
    local code=0
    kill -TERM "${pid[$1]}"
    poll 30 gone "${pid[$1]}" || fail "$1 did not end within 30 s of SIGTERM"
    wait "${pid[$1]}" || code=$?
    [ "$code" = 0 ] || fail "$1 ended with $code"
}
store_of() { case $1 in c) say mem: ;; *) say "file:$T/store.$1" ;; esac; }
start_replicas() {
    local one
    for one; do start_agent "$one" "$(store_of "$one")"; done
}
start_hub() { # ADDRESS...
    local all
    all=$(IFS=,; say "$*")
    HUB=hub:$all
    start_agent hub "$HUB"
    REMOTE=${address[hub]}
}
ls_of() { MEMSYNC_REMOTE=$1 "$BUILD/memsync" ls --json 2>/dev/null; }
# name, lineage and epoch of every region
what_of() { ls_of "$1" | /usr/bin/python3 -c '
import json, sys
d = json.load(sys.stdin)
for r in d["regions"] if isinstance(d, dict) else d:
    print(r["name"], r.get("lineage"), r["epoch"], r["size"])'; }
same_lists() {
    local first one what
    first=$(what_of "${address[$1]}") && [ -n "$first" ] || return 1
    for one; do
        what=$(what_of "${address[$one]}") && [ "$what" = "$first" ] || return 1
    done
}
# All of them have the same, byte for byte, and it is what the program has.
all_same() {
    local one file name
    poll 60 same_lists "$@" || fail "not the same: $(for one; do say "--- $one"; what_of "${address[$one]}"; done; tail -n 5 "$T/hub.err")"
    for one; do
        for file in a b c; do
            name=${W#/}/$file
            MEMSYNC_REMOTE=${address[$one]} "$BUILD/memsync" export "$name" "$T/export" --force >/dev/null 2>"$T/export.err" ||
                { rm -f "$T/export"; MEMSYNC_REMOTE=${address[$one]} "$BUILD/memsync" export "$name" "$T/export" >/dev/null 2>"$T/export.err"; } ||
                fail "$one: $file: $(cat "$T/export.err")"
            same "$W/$file" "$T/export"
            rm -f "$T/export"
        done
    done
}

# The program: its acknowledgements with the time at which they came.
start_program() { # VARIABLE=VALUE...
    rm -f "$T/stop"
    LIMIT=200 shim MEMSYNC_ON_LOSS=block "$@" -- "$writer" write "$W" mdf 2>>"$T/program.err" | /usr/bin/python3 -u -c '
import sys, time
for line in sys.stdin:
    print(int(time.monotonic() * 1000), line, end="", flush=True)' >"$T/said" &
    program=$!
    poll 20 has_acks 5 || fail "the program does not get on: $(cat "$T/program.err" "$T/said"; tail -n 5 "$T/hub.err")"
}
acks() { grep -c ' acked' "$T/said" || true; }
has_acks() { [ "$(acks)" -ge "$1" ]; }
more_acks() { # COUNT [SECONDS]
    local want=$(($(acks) + $1))
    poll "${2:-30}" has_acks "$want" || fail "nothing more was acknowledged: $(tail -n 2 "$T/said"; tail -n 20 "$T/hub.err")"
}
end_program() {
    touch "$T/stop"
    wait "$program" || fail "the program ended with $?: $(tail -n 3 "$T/said")"
    ! grep -q failed "$T/said" || fail "a sync point failed: $(grep -m 1 failed "$T/said")"
    stop_local
}
# The longest time between two acknowledgements, in ms.
longest() { awk '/acked/ { if (n && $1 - n > m) m = $1 - n; n = $1 } END { print m + 0 }' "$T/said"; }
bounded() {
    local ms
    ms=$(longest)
    say "$(acks) sync points, the longest $ms ms"
    [ "$ms" -le $((BOUND_MS + SLACK_MS)) ] || fail "a sync point took $ms ms; the bound is $BOUND_MS"
}
hub_says() { grep -q "$1" "$T/hub.err"; }
is_in() { # REPLICA: its last word is that it is in
    grep -F "${address[$1]}" "$T/hub.err" | grep -v 'is in$\|connected$' | tail -n 1 | grep -q 'is in again\|: in (\| in (' ; }

killed() {
    start_replicas a b c
    start_hub "${address[a]}" "${address[b]}" "${address[c]}"
    start_program
    local one
    for one in a b c; do
        kill_agent "$one"
        more_acks 30
        start_agent "$one" "$(store_of "$one")"
        poll 30 is_in "$one" || fail "$one did not come in again: $(tail "$T/hub.err")"
        more_acks 30
    done
    end_program
    bounded
    all_same a b c hub
}

# It is there, and silent: the one wait that the bound is about.
stopped() {
    start_replicas a b c
    start_hub "${address[a]}" "${address[b]}" "${address[c]}"
    start_program
    local one
    for one in a b c; do
        kill -STOP "${pid[$one]}"
        more_acks 30
        kill -CONT "${pid[$one]}"
        poll 30 is_in "$one" || fail "$one did not come in again: $(tail "$T/hub.err")"
    done
    end_program
    bounded
    [ "$(longest)" -ge 900 ] || fail "nobody was waited for"
    all_same a b c hub
}

throttled() {
    local rss=0 now
    start_replicas a b c
    REMOTE=${address[b]}
    start_relay --rate 40000
    start_hub "${address[a]}" "$REMOTE" "${address[c]}"
    start_program
    poll 30 hub_says "is out" || fail "the slow one was never left behind: $(tail "$T/hub.err")"
    local until=$((SECONDS + 12))
    while [ $SECONDS -lt $until ]; do
        more_acks 20
        now=$(sed -n 's/^VmRSS:[[:space:]]*\([0-9]*\).*/\1/p' "/proc/${pid[hub]}/status")
        [ "$now" -le "$rss" ] || rss=$now
    done
    end_program
    bounded
    say "memory of the hub: $rss KiB at most"
    [ "$rss" -le $((200 << 10)) ] || fail "the hub took $rss KiB"
    all_same a b c hub
}

joiner() {
    start_replicas a c
    start_agent b "$(store_of b)" # for an address
    kill_agent b
    rm -rf "$T/store.b"
    start_hub "${address[a]}" "${address[b]}" "${address[c]}"
    start_program
    more_acks 50
    start_agent b "$(store_of b)"
    poll 30 is_in b || fail "the new one did not come in: $(tail "$T/hub.err")"
    more_acks 20
    end_program
    bounded
    all_same a b c hub
}

foreign() {
    start_replicas a b c
    head -c 300000 /dev/urandom >"$T/other"
    MEMSYNC_REMOTE=${address[b]} "$BUILD/memsync" import "$T/other" "${W#/}/a" >/dev/null
    kill_agent b
    start_hub "${address[a]}" "${address[b]}" "${address[c]}"
    start_program
    start_agent b "$(store_of b)" # comes late
    poll 30 hub_says "${address[b]} takes no part" || fail "the foreign one was not refused: $(tail "$T/hub.err")"
    more_acks 20
    stop_agent hub
    : >"$T/hub.err"
    start_agent hub "$HUB" # is there when the hub starts
    more_acks 20
    poll 30 hub_says "${address[b]} takes no part" || fail "the foreign one was not refused at the start: $(tail "$T/hub.err")"
    MEMSYNC_REMOTE=${address[b]} "$BUILD/memsync" export "${W#/}/a" "$T/there" >/dev/null
    same "$T/other" "$T/there"
    MEMSYNC_REMOTE=${address[b]} "$BUILD/memsync" rm "${W#/}/a" >/dev/null
    poll 30 is_in b || fail "b did not come in when the way was free: $(tail "$T/hub.err")"
    end_program
    all_same a b c hub
}

# What was acknowledged is on every one that is in, the slower one too.
durable() {
    start_replicas a b
    REMOTE=${address[b]}
    start_relay --delay 30
    start_hub "${address[a]}" "$REMOTE"
    start_program
    more_acks 20
    kill_agent hub
    kill_agent b
    local acked at
    acked=$(awk '/ acked/ { n = $3 } END { print n + 0 }' "$T/said")
    "$BUILD/memsync" recover "$T/store.b" >/dev/null
    at=$("$writer" check "$T/store.b$W") || fail "the replica is not an epoch"
    [ "$at" -ge "$acked" ] || fail "b is at epoch $at, but $acked was acknowledged"
}

# A file of one line, synced.
write_file() { # NAME TEXT
    shim -- /usr/bin/python3 -c '
import os, sys
f = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.pwrite(f, sys.argv[2].encode() * 3000, 0)
os.fsync(f)' "$W/$1" "$2" 2>>"$T/program.err"
    stop_local
}
restart_hub() { # REPLICA...
    local one all=()
    for one; do all+=("${address[$one]}"); done
    start_agent hub "hub:$(IFS=,; say "${all[*]}")"
}

# A hub that starts without the newest replica goes on from what there is; that one is then ahead, and refused, and left as it is.
ahead() {
    start_replicas a b
    start_hub "${address[a]}" "${address[b]}"
    write_file x one
    stop_agent hub
    restart_hub b
    write_file x two
    stop_agent hub
    kill_agent b
    restart_hub a b
    poll 20 same_lists a hub || fail "the hub does not go on with a"
    start_agent b "$(store_of b)"
    poll 20 hub_says "${address[b]} takes no part.*ahead" || fail "b was not refused: $(tail "$T/hub.err")"
    MEMSYNC_REMOTE=${address[b]} "$BUILD/memsync" export "${W#/}/x" "$T/there" >/dev/null
    same "$W/x" "$T/there"
    MEMSYNC_REMOTE=${address[b]} "$BUILD/memsync" rm "${W#/}/x" >/dev/null
    poll 30 is_in b || fail "b did not come in when the way was free: $(tail "$T/hub.err")"
    same_lists a b hub || fail "a and b are not the same"
}

# Each of two replicas is ahead in one region: a hub that starts has the newest of both, on both.
evened() {
    start_replicas a b
    start_hub "${address[a]}" "${address[b]}"
    write_file x one
    write_file y one
    stop_agent hub
    restart_hub a
    write_file x two
    stop_agent hub
    restart_hub b
    write_file y two
    write_file z one
    stop_agent hub
    restart_hub a b
    poll 20 same_lists a b hub || fail "not the same: $(for one in a b; do what_of "${address[$one]}"; done; tail -n 20 "$T/hub.err")"
    stop_agent hub
    for one in a b; do
        stop_agent "$one"
        same_tree "$T/store.$one$W"
    done
}

# Far more than is ever kept: a replica that goes and comes back during it, and one that then lacks little of much.
large() {
    start_replicas a b c
    start_hub "${address[a]}" "${address[b]}" "${address[c]}"
    stepper_start "$W/big" $((200 << 20)) MEMSYNC_ON_LOSS=block
    stepped s 0 $((200 << 20)) 7
    step_begin m
    poll 20 has_bytes || fail "nothing comes to the hub"
    kill_agent b
    start_agent b "$(store_of b)"
    step_answer 100 || fail "the large sync point was not answered: $(tail "$T/hub.err")"
    poll 60 is_in b || fail "b did not come in after the large epoch: $(tail "$T/hub.err")"
    local bytes
    kill_agent b
    stepped r 26 1
    stepped m
    start_agent b "$(store_of b)"
    poll 60 is_in b || fail "b did not come in: $(tail "$T/hub.err")"
    bytes=$(sed -n "s/.*${address[b]}: brought up to date in .* ms, \([0-9]*\) bytes/\1/p" "$T/hub.err" | tail -n 1)
    say "26 pages of 200 MiB: $bytes bytes"
    [ "$bytes" -ge $((26 * 4096)) ] && [ "$bytes" -le 200000 ] || fail "that is not 26 pages"
    kilobytes=$(sed -n 's/^VmHWM:[[:space:]]*\([0-9]*\).*/\1/p' "/proc/${pid[hub]}/status")
    say "memory of the hub: $kilobytes KiB at most"
    [ "$kilobytes" -le $((150 << 10)) ] || fail "the hub took $kilobytes KiB"
    stepper_end
    stop_local
    same_lists a b c hub || fail "not the same"
    for one in a b c; do
        MEMSYNC_REMOTE=${address[$one]} "$BUILD/memsync" verify "${W#/}/big" --file "$W/big" >&2 || fail "$one differs"
    done
}
has_bytes() { [ "$(du -sk "$T/store.a" | cut -f 1)" -gt $((50 << 10)) ]; } # the journal takes 32 MiB

# What was removed and replaced while one was away is removed and replaced there, too.
unlinked() {
    start_replicas a b c
    start_hub "${address[a]}" "${address[b]}" "${address[c]}"
    /usr/bin/python3 -c 'for n in "xyz": open("'"$W"'/" + n, "w").write(n * 5000)'
    shim -- /usr/bin/python3 -c '
import os, sys
w = sys.argv[1]
fds = [os.open(w + "/" + n, os.O_RDWR) for n in "xyz"]
for f in fds: os.pwrite(f, b"first", 0); os.fsync(f)' "$W"
    stop_local
    same_lists a b c || fail "not the same to begin with"
    kill_agent b
    shim -- /usr/bin/python3 -c '
import os, sys
w = sys.argv[1]
f = os.open(w + "/x", os.O_RDWR); os.pwrite(f, b"second", 0); os.fsync(f)
os.unlink(w + "/y")
f = os.open(w + "/new", os.O_RDWR | os.O_CREAT); os.pwrite(f, b"new" * 3000, 0); os.fsync(f)
os.rename(w + "/new", w + "/z"); os.fsync(f)' "$W" 2>>"$T/program.err"
    stop_local
    start_agent b "$(store_of b)"
    poll 30 same_lists a b c || fail "not the same: $(for one in a b c; do what_of "${address[$one]}"; done; tail "$T/hub.err")"
    stop_agent hub
    for one in a b; do
        stop_agent "$one"
        same_tree "$T/store.$one$W"
    done
}

hub_killed() {
    start_replicas a b c
    start_hub "${address[a]}" "${address[b]}" "${address[c]}"
    start_program
    local i
    for i in 1 2 3 4 5; do
        more_acks $((RANDOM % 40 + 5))
        kill_agent hub
        start_agent hub "$HUB"
        more_acks 5
    done
    end_program
    all_same a b c hub
    for i in a b; do
        stop_agent "$i"
        [ "$("$writer" check "$T/store.$i$W")" = "$("$writer" check "$W")" ] || fail "$i is not at the program's epoch"
    done
}

all_down() {
    start_replicas a b c
    start_agent d "file:$T/store.d"
    start_hub "${address[a]}" "${address[b]}" "${address[d]}"
    start_program
    local one
    more_acks 20
    for one in a b d; do kill_agent "$one"; done
    poll 20 hub_says "0 of 3 replicas are in" || fail "the hub does not see that all are gone"
    for one in d b a; do start_agent "$one" "file:$T/store.$one"; done
    more_acks 20 60
    end_program
    all_same a b d hub
}

# The only one goes while a large epoch is on its way, and the writer waits for room in its window: it is told, too.
lost_in_bulk() {
    start_agent a mem:
    REMOTE=${address[a]}
    start_relay --rate 2000
    start_hub "$REMOTE"
    head -c $((64 << 20)) /dev/urandom >"$T/bulk"
    memory() { sed -n 's/^VmRSS:[[:space:]]*\([0-9]*\).*/\1/p' "/proc/${pid[hub]}/status"; }
    local base import
    base=$(memory)
    MEMSYNC_REMOTE=$REMOTE "$BUILD/memsync" import "$T/bulk" bulk >"$T/import" 2>&1 &
    import=$!
    full() { [ "$(memory)" -gt $((base + 14000)) ]; } # nearly a window
    poll 10 full || fail "the hub does not take a window ahead"
    kill_agent a
    start_agent a mem:
    poll 30 gone "$import" || fail "the writer waits for ever: $(tail -n 5 "$T/hub.err")"
    ! wait "$import" || fail "a lost epoch was acknowledged"
    grep -q "no replica of this hub is in" "$T/import" || fail "it was not told why: $(cat "$T/import")"
}

# The local agent does it all by itself.
fan_out() {
    start_replicas a b c
    REMOTE=hub:${address[a]},${address[b]},${address[c]}
    start_program
    kill_agent a
    more_acks 30
    start_agent a "$(store_of a)"
    more_acks 30
    memsync ls >"$T/ls.out" 2>&1 || fail "memsync ls --remote $REMOTE: $(cat "$T/ls.out")"
    grep -q "${W#/}/a" "$T/ls.out" || fail "memsync ls --remote $REMOTE: $(cat "$T/ls.out")"
    end_program
    bounded
    all_same b c
    memsync verify "${W#/}/a" --file "$W/a" >&2 || fail "memsync verify of $REMOTE"
    head -c 100000 /dev/urandom >"$T/other"
    memsync import "$T/other" other >"$T/import.out" 2>&1 || fail "memsync import: $(cat "$T/import.out")"
    poll 10 same_lists b c || fail "b and c have not the same after an import"
    MEMSYNC_REMOTE=${address[c]} "$BUILD/memsync" verify other --file "$T/other" >&2 || fail "the import is not at c"
    memsync rm other >&2 || fail "memsync rm"
    ! ls_of "${address[b]}" | grep -q other || fail "memsync rm has left a copy"
    start_hub "${address[a]}" "${address[b]}" "${address[c]}" # a may have come too late for the one that has left
    all_same a b c hub
}

# Two hubs over the same replicas: one writes, the other's writers are told who.
held() {
    start_replicas a b
    start_hub "${address[a]}" "${address[b]}"
    start_program
    start_agent hub2 "hub:${address[a]},${address[b]}"
    head -c 5000 /dev/urandom >"$T/other"
    if MEMSYNC_REMOTE=${address[hub2]} "$BUILD/memsync" import "$T/other" "${W#/}/a" >"$T/import.out" 2>&1; then
        fail "the second hub's import was taken: $(cat "$T/import.out")"
    fi
    grep -qi 'writ\|lease' "$T/import.out" || fail "it does not say why: $(cat "$T/import.out")"
    more_acks 20
    end_program
    all_same a b hub
}

bad_urls() {
    local url
    for url in hub: hub:nonsense hub:127.0.0.1:1,127.0.0.1:1 hub:127.0.0.1:1,; do
        ! "$BUILD/memsync-agent" --listen 127.0.0.1:0 --store "$url" 2>"$T/url.err" || fail "$url was taken"
        grep -q 'hub:' "$T/url.err" || fail "$url: $(cat "$T/url.err")"
    done
    # A hub of nobody: it listens, and says why it cannot list.
    start_agent hub hub:127.0.0.1:1
    ! MEMSYNC_REMOTE=${address[hub]} "$BUILD/memsync" ls 2>"$T/ls.err" || fail "a hub of nobody lists"
    grep -q 'no replica of this hub is in' "$T/ls.err" || fail "ls: $(cat "$T/ls.err")"
    ! MEMSYNC_REMOTE=${address[hub]} "$BUILD/memsync" import "$T/url.err" x 2>"$T/ls.err" || fail "a hub of nobody imports"
    grep -q 'no replica of this hub is in' "$T/ls.err" || fail "import: $(cat "$T/ls.err")"
    stop_agent hub
}

"$1"
