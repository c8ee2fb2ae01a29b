#!/usr/bin/env bash
# What is found by comparing hash trees, and what that costs: bytes both ways, and reading here. The remote, or the agent, forgets what it knew.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

cases=(lost_epochs unchanged while_it_stores program_killed agent_killed shorter longer emptied holes link_cut cut_catch_up neighbours)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }
size=$((64 << 20)) pages=$(((64 << 20) / 4096))
log=$T/agent.log

start() { # [VARIABLE=VALUE...]
    stepper_start "$W/data" "$size" MEMSYNC_TIMEOUT=60s MEMSYNC_INTERVAL=off MEMSYNC_LOG=info MEMSYNC_LOG_FILE="$log" "$@"
}
# The remote loses its last epochs: it goes on from a copy of its store. remember before, forget after they were committed.
remember() {
    stop_remote
    cp -a --sparse=always "$STORE" "$T/remembered"
    LISTEN=$REMOTE start_remote
}
forget() {
    kill_remote
    rm -rf "$STORE"
    mv "$T/remembered" "$STORE"
}
end_all() {
    stepper_end
    stop_local
    [ -z "$DIRECT" ] || REMOTE=$DIRECT
    stop_remote
    same_tree
}
reconciled() { grep -c ' reconciled ' "$log" || true; }
is_reconciled() { [ "$(reconciled)" -gt "${1:-0}" ]; }
# The last comparison: $DIFFER pages of $OF, $OUT and $IN bytes.
cost() {
    read -r DIFFER OF OUT IN < <(sed -n 's/.* reconciled .*: \([0-9]*\) of \([0-9]*\) pages differ, \([0-9]*\) bytes out, \([0-9]*\) bytes in.*/\1 \2 \3 \4/p' "$log" | tail -n 1)
}
read_by_agent() { sed -n 's/^rchar: //p' "/proc/$(local_agents)/io"; }

start_remote
case $1 in
lost_epochs) # 26 scattered pages are not there any more: only they are found, and nothing is read here but they
    start
    stepped s 0 $size 1
    stepped m
    remember
    stepped r 26 7
    stepped m
    before=$(read_by_agent)
    forget
    LISTEN=$REMOTE start_remote
    poll 30 is_reconciled || fail "not compared"
    cost
    [ "$DIFFER" -gt 20 ] && [ "$DIFFER" -le 26 ] || fail "$DIFFER pages differ, not 26"
    [ $((OUT + IN)) -le 40000 ] || fail "$OUT bytes out, $IN bytes in"
    stepped m
    [ $(($(read_by_agent) - before)) -lt $((4 << 20)) ] || fail "$(($(read_by_agent) - before)) bytes were read here"
    end_all
    ;;
unchanged) # a new agent knows nothing: it reads the file, and asks for one node
    start
    stepped s 0 $size 1
    stepped m
    kill -KILL $(local_agents)
    stepped m
    poll 30 is_reconciled || fail "not compared"
    cost
    [ "$DIFFER" = 0 ] && [ "$OF" = $pages ] || fail "$DIFFER of $OF pages differ"
    [ "$OUT" -le 2000 ] && [ "$IN" -le 2000 ] || fail "$OUT bytes out, $IN bytes in"
    stepped s 5000 10000 2
    stepped m
    end_all
    ;;
while_it_stores) # thousands of sync points go on while the remote forgets and is compared, twice
    start
    stepped s 0 $size 1
    stepped m
    for round in 1 2; do
        stop_remote
        cp -a --sparse=always "$STORE" "$T/remembered"
        LISTEN=$REMOTE start_remote
        stepped r 500 "$round"
        stepped m
        step_begin n 1500 "$round"
        [ "$round" = 1 ] || kill -KILL $(local_agents)
        forget
        LISTEN=$REMOTE start_remote
        step_answer 60 && [ "$ANSWER" = 0 ] || fail "sync points: ${ANSWER:-no answer}"
        is_reconciled $((round - 1)) || fail "not compared in round $round"
    done
    end_all
    ;;
program_killed) # its agent with it: what was stored and not synced is found by who opens the file next
    start
    stepped s 0 $size 1
    stepped m
    stepped r 26 7
    kill -KILL "$STEPPER_PID" $(local_agents)
    wait "$STEPPER" || true
    start
    stepped m
    cost
    [ "$DIFFER" -gt 20 ] && [ "$DIFFER" -le 26 ] || fail "$DIFFER pages differ, not 26"
    [ $((OUT + IN)) -le 40000 ] || fail "$OUT bytes out, $IN bytes in"
    end_all
    ;;
agent_killed) # between stores: what the dead agent had seen and not sent is found
    start
    stepped s 0 $size 1
    stepped m
    stepped r 40 3
    kill -KILL $(local_agents)
    stepped r 40 4
    stepped w 1000000 10000 5
    stepped m
    cost
    [ "$DIFFER" -le 90 ] || fail "$DIFFER pages differ"
    end_all
    ;;
shorter | longer | emptied) # the file, than what the remote remembers of it
    start
    case $1 in longer) stepped z 1000001 ;; esac
    stepped s 0 1000001 1
    stepped m
    remember
    case $1 in
    shorter) stepped z 5001 ;;
    longer) stepped z $size && stepped s 1000000 3000000 2 ;;
    emptied) stepped z 0 ;;
    esac
    stepped d
    forget
    LISTEN=$REMOTE start_remote
    poll 30 is_reconciled || fail "not compared"
    stepped z $size
    stepped s 4000000 10 3
    stepped m
    end_all
    ;;
holes) # where there was data once, and the other way
    start
    stepped s 0 3000000 1
    stepped m
    remember
    stepped z 1000000
    stepped z $size
    stepped s 40000000 1000000 2
    stepped m
    forget
    LISTEN=$REMOTE start_remote
    poll 30 is_reconciled || fail "not compared"
    stepped m
    cost
    [ "$DIFFER" -gt 700 ] && [ "$DIFFER" -le 740 ] || fail "$DIFFER pages differ"
    end_all
    ;;
link_cut) # in the middle of comparing, again and again
    start_relay
    start
    stepped s 0 $size 1
    stepped m
    REMOTE=$DIRECT
    stop_remote
    cp -a --sparse=always "$STORE" "$T/remembered"
    LISTEN=$DIRECT start_remote
    stepped r 2000 7
    stepped m
    kill_remote
    relay down
    rm -rf "$STORE"
    mv "$T/remembered" "$STORE"
    LISTEN=$DIRECT start_remote
    relay cut 400
    relay up
    for bytes in 600 1000 3000 10000 30000; do
        relay_heard 30 || fail "the relay was not used"
        relay cut $bytes
    done
    relay_heard 30 || fail "the relay was not used"
    relay cut 100000000000
    stepped m
    is_reconciled || fail "not compared"
    end_all
    ;;
cut_catch_up) # an epoch too large to be kept: what was sent of it is lost, and nothing is read twice but what it was about
    size=$((160 << 20)) pages=$(((160 << 20) / 4096))
    start_relay
    start
    stepped s 0 $size 1
    stepped m
    stepped s 0 $((100 << 20)) 2
    before=$(read_by_agent)
    relay cut 90000000
    step_begin m
    relay_heard 30 || fail "the relay was not used"
    relay cut 100000000000
    step_answer 60 && [ "$ANSWER" = 0 ] || fail "msync: ${ANSWER:-no answer}"
    is_reconciled || fail "not compared"
    cost
    [ "$DIFFER" -ge $((64 << 8)) ] && [ "$DIFFER" -le $((100 << 8)) ] || fail "$DIFFER pages differ"
    end_all
    ;;
neighbours) # of a region that is in doubt: compared too, and unread
    shim MEMSYNC_INTERVAL=off MEMSYNC_LOG=info MEMSYNC_LOG_FILE="$log" -- /usr/bin/python3 - "$W" "$T" <<'PY' &
import mmap, os, sys, time
work, t = sys.argv[1:]
maps = []
for i in range(120):
    fd = os.open(f"{work}/{i}", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, 40960 + i)
    m = mmap.mmap(fd, 40960 + i)
    m[:10000] = bytes([i + 1]) * 10000
    maps.append(m)
for m in maps:
    m.flush()
open(f"{t}/one", "w").close()
while not os.path.exists(f"{t}/two"):
    time.sleep(0.02)
maps[3][5000:5005] = b"hello"
maps[3].flush()
open(f"{t}/three", "w").close()
while not os.path.exists(f"{t}/four"):
    time.sleep(0.02)
maps[4][5000:5005] = b"hello"
for m in maps:
    m.flush()
PY
    program=$!
    poll 30 test -e "$T/one" || fail "the program did not begin"
    remember
    touch "$T/two"
    poll 30 test -e "$T/three" || fail "the program did not go on"
    forget
    LISTEN=$REMOTE start_remote
    poll 30 is_reconciled 119 || fail "$(reconciled) of 120 regions were compared"
    [ "$(grep -c 'reconciled.*: 0 of 1[01] pages' "$log")" = 119 ] || fail "$(grep reconciled "$log" | grep -v ': 0 of')"
    touch "$T/four"
    wait "$program" || fail "the program"
    stop_local
    stop_remote
    same_tree
    ;;
*) fail "no such case: $1" ;;
esac
