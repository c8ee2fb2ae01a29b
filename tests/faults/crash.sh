#!/usr/bin/env bash
# Kills and cuts at random: whatever goes, and whenever, the replica is exactly one epoch of the program, across all its files, and not older than the last
# one that was acknowledged under ack=durable.
# cases
# timeout: 1800
#
# TEST_ACK=async shows that the check can fail: what was acknowledged is then lost in kills of the remote.
# TEST_ROUNDS: how many (20). TEST_SEED: of the random choices, to repeat a run as far as chance allows; printed.
. "$(dirname "$0")/../lib.sh"

cases=(epochs epochs_hash lmdb sqlite_wal sqlite_rollback)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }
kind=$1
rounds=${TEST_ROUNDS:-20}
[ "$kind" = epochs ] || rounds=$(((rounds + 3) / 4))
seed=${TEST_SEED:-$((SRANDOM % 100000))}
RANDOM=$seed
say "seed $seed, $rounds rounds of $kind"

writer=$BUILD/tests/faults/epochwriter
python=/usr/bin/python3
strategy=auto
ack=${TEST_ACK:-durable}
case $kind in
epochs | epochs_hash)
    check() { "$writer" check "$1"; }
    [ "$kind" = epochs_hash ] && strategy=hash
    ;;
lmdb)
    requires_python lmdb
    check() { $python "$TESTS/programs/workload.py" check_lmdb "$1"; }
    ;;
sqlite_*) check() { $python "$TESTS/programs/workload.py" check_sqlite "$1"; } ;;
esac
command_of() {
    case $kind in
    epochs*) say "$writer" write "$W" "$1" ;;
    lmdb) say $python "$TESTS/programs/workload.py" crash_lmdb "$W" ;;
    sqlite_*) say $python "$TESTS/programs/workload.py" "crash_${kind#sqlite_}" "$W" ;;
    esac
}
acked() { { say 0; sed -n 's/^acked //p' "$T/said" "$T/said.before" 2>/dev/null; } | sort -n | tail -n 1; }
acks() { grep -c '^acked' "$T/said" || true; }
has_acks() { [ "$(acks)" -ge "$1" ]; }
writer_pid() { sed -n 's/^pid //p' "$T/said" | head -n 1; }

# The replica, looked at as a copy: opening a database may change it.
check_replica() {
    local at least=${1:?the last acknowledged epoch, or 0}
    rm -rf "$T/copy"
    mkdir -p "$T/copy" "$(replica "$W")"
    cp -r "$(replica "$W")" "$T/copy/"
    at=$(check "$T/copy/$(basename "$W")") || fail "round $round ($fault): the replica is not an epoch"
    [ "$at" -ge "$least" ] || fail "round $round ($fault): the replica is at epoch $at, but $least was acknowledged"
    EPOCH=$at
}
recover() {
    "$BUILD/memsync" recover "$STORE" >"$T/recover.out" 2>&1 || fail "round $round ($fault): memsync recover: $(cat "$T/recover.out")"
}
restart_remote() { LISTEN=$ADDRESS start_remote; }
more_acks() { # the program goes on after the fault
    local want=$(($(acks) + 3))
    poll 30 has_acks "$want" || fail "round $round ($fault): nothing was acknowledged in 30 s after it; program: $(tail -n 3 "$T/said"); status: $(memsync status 2>&1 | head -n 20)"
}
end_program() {
    touch "$T/stop"
    wait "$program" || fail "round $round ($fault): the program ended with $?"
    rm "$T/stop"
}
kill_program() {
    kill -KILL "$(writer_pid)" 2>/dev/null || fail "round $round ($fault): the program is gone: $(tail -n 3 "$T/said" "$T/program.err")"
    wait "$program" 2>/dev/null || true
}
kill_local() {
    local pid
    for pid in $(local_agents); do
        kill -KILL "$pid" 2>/dev/null || true
    done
}
# After a kill of the program: either the remote ends in order, or it too is killed and recovered.
settle() {
    local least
    least=$(acked)
    if ((RANDOM % 2)); then
        stop_local
        stop_remote
    else
        kill_remote
        recover
    fi
    check_replica "$least"
    no_local_agents || kill_local
    [ -n "$REMOTE_PID" ] || restart_remote
    # The next round starts from what the replica has: in place, so that the files stay the same files.
    [[ $kind != epochs* ]] || continue_from_replica
}
continue_from_replica() {
    local file
    for file in a b c; do
        if [ "$EPOCH" -gt 0 ]; then
            cat "$(replica "$W/$file")" >"$W/$file"
        else
            rm -f "$W/$file"
        fi
    done
}

: >"$T/said.before"
start_remote
ADDRESS=$REMOTE
start_relay
RELAYED=$REMOTE
all_faults=(program local remote link program_local program_remote local_remote all link_link)
for ((round = 1; round <= rounds; round++)); do
    fault=${all_faults[RANDOM % ${#all_faults[@]}]}
    ways=$(printf 'm\nmd\nmdf\nd\nf\n' | sed -n "$((RANDOM % 5 + 1))p")
    # A database takes an error of its sync point for the end; our epochs go on.
    loss=block
    [[ $kind == epochs* ]] && ((RANDOM % 2)) && loss=fail
    wanted=$((RANDOM % 25 + 1))
    REMOTE=$RELAYED
    : >"$T/said"
    read -ra words <<<"$(command_of "$ways")"
    LIMIT=600 shim MEMSYNC_STRATEGY=$strategy MEMSYNC_ACK=$ack MEMSYNC_INTERVAL=off MEMSYNC_ON_LOSS=$loss MEMSYNC_TIMEOUT=3s -- "${words[@]}" \
        >"$T/said" 2>>"$T/program.err" &
    program=$!
    poll 30 has_acks "$wanted" || fail "round $round: $wanted epochs were not acknowledged in 30 s; program: $(tail -n 3 "$T/said")"
    # Anywhere within an epoch: these take some milliseconds.
    sleep "0.0$((RANDOM % 30 + 10))"
    case $fault in
    program)
        kill_program
        settle
        ;;
    program_local)
        kill_local
        kill_program
        settle
        ;;
    program_remote)
        kill -KILL "$REMOTE_PID"
        kill_program
        least=$(acked)
        kill_remote
        recover
        check_replica "$least"
        restart_remote
        settle
        ;;
    all)
        kill_local
        kill -KILL "$REMOTE_PID"
        kill_program
        least=$(acked)
        kill_remote
        recover
        check_replica "$least"
        restart_remote
        settle
        ;;
    remote)
        kill_remote
        least=$(acked)
        recover
        check_replica "$least"
        restart_remote
        more_acks
        ;;
    local)
        kill_local
        more_acks
        ;;
    local_remote)
        kill_local
        kill_remote
        least=$(acked)
        recover
        check_replica "$least"
        restart_remote
        more_acks
        ;;
    link)
        relay cut $((RANDOM * 4))
        relay_heard 30 || fail "round $round: the link was not used"
        more_acks
        ;;
    link_link)
        for _ in 1 2 3 4; do
            relay cut $((RANDOM / 2))
            relay_heard 30 || fail "round $round: the link was not used"
        done
        more_acks
        ;;
    esac
    if alive "$program"; then
        end_program
        stop_local
        stop_remote
        check_replica "$(acked)"
        [[ $kind == epochs* ]] && same_tree
        restart_remote
    fi
    cat "$T/said" >>"$T/said.before"
    say "round $round: $fault ($loss, $ways): epoch $EPOCH, acknowledged $(acked)"
done
REMOTE=$ADDRESS

# The check itself must be able to fail.
if [[ $kind == epochs* ]] && [ "$EPOCH" -gt 0 ]; then
    printf x | dd of="$T/copy/$(basename "$W")/b" bs=1 seek=$((RANDOM + 5000)) conv=notrunc status=none
    ! check "$T/copy/$(basename "$W")" >/dev/null 2>&1 || fail "a changed byte was not noticed: the check is no check"
fi
