#!/usr/bin/env bash
# A link, a remote, an agent or a program that goes: what the program sees, what is said, and that all is there in the end.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

cases=(continue fail block silent remote_killed remote_late agent_killed agent_killed_idle agent_stopped program_killed cut_in_bulk timer timer_off async_order)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }
size=$((1 << 20))

status_is() { # 0: all well, 1: something is not
    local code=0
    memsync status >"$T/status.out" 2>&1 || code=$?
    [ "$code" = "$1" ]
}
replica_is_local() {
    cmp -s "$W/data" "$(replica "$W/data")"
}
end_all() {
    stepper_end
    stop_local
    [ -z "$DIRECT" ] || REMOTE=$DIRECT
    stop_remote
    same_tree
}
lines_of_ours() { grep -c memsync "$T/program.err" || true; }

start_remote
case $1 in
continue)
    start_relay
    stepper_start "$W/data" $size MEMSYNC_TIMEOUT=1s
    stepped s 0 100000 1
    stepped m
    relay down
    stepped s 50000 100000 2
    stepped m
    [ "$TOOK" -lt 8000000 ] || fail "msync took $TOOK us although MEMSYNC_TIMEOUT is 1s"
    poll 5 status_is 1 || fail "status does not say that the region is degraded: $(cat "$T/status.out")"
    grep -q degraded "$T/status.out" || fail "status: $(cat "$T/status.out")"
    stepped s 150000 100000 3
    stepped m
    [ "$TOOK" -lt 500000 ] || fail "a second msync took $TOOK us: a link that is known to be down is not waited for"
    [ "$(lines_of_ours)" = 1 ] || fail "$(lines_of_ours) lines about one loss: $(cat "$T/program.err")"
    relay up
    poll 20 status_is 0 || fail "it did not catch up: $(cat "$T/status.out")"
    stepped s 250000 1000 4
    stepped m
    end_all
    ;;
fail)
    start_relay
    stepper_start "$W/data" $size MEMSYNC_TIMEOUT=500ms MEMSYNC_ON_LOSS=fail
    stepped s 0 100000 1
    stepped m
    relay down
    stepped s 0 100 2
    step m
    [ "$ANSWER" = EIO ] || fail "msync without a link: $ANSWER, not EIO"
    step d
    [ "$ANSWER" = EIO ] || fail "fdatasync without a link: $ANSWER, not EIO"
    relay up
    synced() {
        step m
        [ "$ANSWER" = 0 ]
    }
    poll 30 synced || fail "msync fails still: $ANSWER"
    end_all
    ;;
block)
    start_relay
    stepper_start "$W/data" $size MEMSYNC_TIMEOUT=300ms MEMSYNC_ON_LOSS=block
    stepped s 0 100000 1
    stepped m
    relay down
    stepped s 0 100 2
    step_begin m
    ! step_answer 2 || fail "msync returned without a link: $ANSWER"
    relay up
    step_answer 30 || fail "msync did not return after the link was back"
    [ "$ANSWER" = 0 ] || fail "msync after the link was back: $ANSWER"
    # Acknowledged: on the remote's disk, whatever happens to it now.
    REMOTE=$DIRECT
    kill_remote
    "$BUILD/memsync" recover "$STORE" || fail "recover"
    same "$W/data" "$(replica "$W/data")"
    LISTEN=$DIRECT start_remote
    end_all
    ;;
silent) # a link that says nothing is as lost as one that is cut
    start_relay
    stepper_start "$W/data" $size MEMSYNC_TIMEOUT=1s
    stepped s 0 100000 1
    stepped m
    relay hang
    stepped s 0 100 2
    stepped m
    [ "$TOOK" -ge 900000 ] && [ "$TOOK" -lt 8000000 ] || fail "msync took $TOOK us with MEMSYNC_TIMEOUT=1s"
    relay go
    poll 30 status_is 0 || fail "it did not catch up: $(cat "$T/status.out")"
    end_all
    ;;
remote_killed)
    stepper_start "$W/data" $size MEMSYNC_TIMEOUT=60s
    stepped s 0 500000 1
    stepped m
    kill_remote
    stepped s 400000 500000 2
    step_begin m
    LISTEN=$REMOTE start_remote
    step_answer 30 || fail "msync across a restart of the remote did not return"
    [ "$ANSWER" = 0 ] || fail "msync across a restart of the remote: $ANSWER"
    stepped w 100 100000 3
    stepped d
    end_all
    ;;
remote_late) # not there when the program starts, nor when it ends
    address=$REMOTE
    stop_remote
    stepper_start "$W/data" $size MEMSYNC_TIMEOUT=500ms
    stepped s 0 500000 1
    stepped m
    stepper_end
    LISTEN=$address start_remote
    caught_up() { replica_is_local || memsync sync >/dev/null 2>&1 && replica_is_local; }
    poll 30 caught_up || fail "what was synced without a remote did not come when it was there"
    stop_local
    stop_remote
    same_tree
    ;;
agent_killed)
    stepper_start "$W/data" $size
    stepped s 0 300000 1
    stepped m
    stepped s 200000 300000 2
    kill -KILL $(local_agents)
    stepped s 300000 300000 3
    stepped m
    stepped w 900000 1000 4
    stepped d
    [ -n "$(local_agents)" ] || fail "no new agent was started"
    stepped s 5000 10 5
    end_all
    ;;
agent_killed_idle) # nothing is synced after: the exit has to find it out
    stepper_start "$W/data" $size
    stepped s 0 300000 1
    stepped m
    stepped s 200000 300000 2
    stepped w 900000 1000 4
    kill -KILL $(local_agents)
    poll 5 no_local_agents
    stepped s 300000 300000 3
    end_all
    ;;
agent_stopped) # by a person, while the program runs on
    stepper_start "$W/data" $size
    stepped s 0 300000 1
    memsync stop || fail "memsync stop: $?"
    poll 20 no_local_agents || fail "the agent did not end"
    same "$W/data" "$(replica "$W/data")"
    stepped s 200000 300000 2
    stepped m
    end_all
    ;;
program_killed) # its unsynced stores are in the file, and not in the replica until somebody says so
    stepper_start "$W/data" $size MEMSYNC_INTERVAL=off
    stepped s 0 300000 1
    stepped m
    cp "$W/data" "$T/synced"
    stepped s 200000 300000 2
    kill -KILL "$STEPPER_PID"
    wait "$STEPPER" || true
    cmp -s "$W/data" "$T/synced" && fail "the stores are not in the file: nothing is tested"
    poll 10 status_is 1 || fail "status does not say that the region is diverged: $(cat "$T/status.out")"
    grep -q diverged "$T/status.out" || fail "status: $(cat "$T/status.out")"
    memsync export "${W#/}/data" "$T/exported" || fail "export: $?"
    same "$T/synced" "$T/exported"
    memsync sync || fail "memsync sync: $?"
    memsync export "${W#/}/data" "$T/exported2" || fail "export: $?"
    same "$W/data" "$T/exported2"
    stop_local
    stop_remote
    same_tree
    ;;
cut_in_bulk) # the first transfer of a large file, cut again and again in the middle
    start_relay
    head -c 60000000 /dev/urandom >"$W/data"
    relay cut 5000000
    stepper_start "$W/data" 60000000 MEMSYNC_TIMEOUT=60s
    step_begin m
    for bytes in 20000000 1000000 40000000; do
        relay_heard 30 || fail "the relay was not used"
        relay cut $bytes
    done
    step_answer 60 && [ "$ANSWER" = 0 ] || fail "msync: ${ANSWER:-no answer}"
    relay cut 100000000000
    end_all
    ;;
timer) # dirty for MEMSYNC_INTERVAL with no sync point: published
    stepper_start "$W/data" $size MEMSYNC_INTERVAL=300ms
    stepped s 0 300000 1
    exported() { memsync export "${W#/}/data" "$T/exported" >/dev/null 2>&1 && cmp -s "$W/data" "$T/exported"; }
    poll 10 exported || fail "not published by the timer"
    end_all
    ;;
timer_off)
    stepper_start "$W/data" $size MEMSYNC_INTERVAL=off
    stepped s 0 1000 1
    stepped m
    stepped s 0 300000 2
    exported() { memsync export "${W#/}/data" "$T/exported" >/dev/null 2>&1 && cmp -s "$W/data" "$T/exported"; }
    ! poll 2 exported || fail "published although MEMSYNC_INTERVAL is off"
    end_all
    ;;
async_order) # 200 acknowledged at once, all there at the end
    stepper_start "$W/data" $size MEMSYNC_ACK=async
    for i in $(seq 200); do
        stepped s $((i * 5000)) 5000 "$i"
        stepped m $((i * 5000 / 4096 * 4096)) 8192
    done
    end_all
    ;;
*) fail "no such case: $1" ;;
esac
