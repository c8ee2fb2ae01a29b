#!/usr/bin/env bash
# strategy=inotify: what its events let the clock publish, what they cannot tell of, and that every sync point makes up for it.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

cases=(outsider stores_wait let_go unmapped_hash unmapped_inotify no_watches no_instances)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }
size=$((1 << 20))

start() { stepper_start "$W/data" $size MEMSYNC_STRATEGY=inotify MEMSYNC_REGIONS="$W/**,group=g" "$@"; }
replica_has() { cmp -s "$W/$1" "$(replica "$W/$1")"; }
written_outside() { printf '%s' "$2" | dd of="$W/$1" conv=notrunc status=none; }
tracked_by() {
    memsync status --json >"$T/status.json" || true
    grep -q "\"tracker\": *\"$1\"" "$T/status.json" || fail "status does not say that $1 finds changes: $(cat "$T/status.json")"
}
end_all() {
    stop_local
    [ -z "$DIRECT" ] || REMOTE=$DIRECT
    stop_remote
    quiet "$T/program.err"
    same_tree
}

start_remote
case $1 in
outsider) # a program without the shim writes by a call: the clock's capture has a reason to look
    start MEMSYNC_INTERVAL=100ms
    stepped s 0 100000 1
    stepped m
    tracked_by inotify
    written_outside data 'somebody else was here'
    poll 20 replica_has data || fail "what another program wrote was not published"
    stepper_end
    end_all
    ;;
stores_wait) # a second file of the group shows that the clock did look after the store, and had no event of it
    start MEMSYNC_INTERVAL=100ms
    stepped s 0 100000 1
    stepped m
    poll 20 replica_has data || fail "a synced store was not published"
    mkfifo "$T/hold"
    shim MEMSYNC_STRATEGY=inotify MEMSYNC_REGIONS="$W/**,group=g" MEMSYNC_INTERVAL=100ms -- \
        bash -c 'exec 9>>"$0"; echo opened >&9; read -r _ <"$1"' "$W/marker" "$T/hold" 2>>"$T/program.err" &
    holder=$!
    poll 20 replica_has marker || fail "the second file was not published"
    poll 20 replica_has data || fail "the two files settled with data out of step"
    stepped s 4096 5000 2
    written_outside marker 'now!'
    poll 20 replica_has marker || fail "what another program wrote was not published"
    ! replica_has data || fail "a store was published although nothing can have told of it"
    stepped m
    poll 20 replica_has data || fail "a synced store was not published"
    stepped s 9000 5000 3
    stepped a # does not wait, and is asked for all the same
    poll 20 replica_has data || fail "a store was not published after MS_ASYNC"
    say done >"$T/hold"
    wait "$holder" || fail "the second program failed"
    stepped s 70000 5000 4
    stepper_end u
    end_all
    ;;
let_go) # a sync point that was not waited for is owed a look as good as its own
    start_relay
    start MEMSYNC_TIMEOUT=500ms
    stepped s 0 100000 1
    stepped m
    relay down
    stepped s 50000 100000 2
    stepped m
    stepped s 150000 100000 3
    stepped m
    relay up
    poll 30 replica_has data || fail "the stores of a degraded time did not arrive"
    stepper_end
    : >"$T/program.err" # the loss was said
    end_all
    ;;
unmapped_*) # a mapping that goes while the link is down, on a file system without time stamps for stores
    work_in_memory
    start_relay
    stepper_start "$W/data" $size MEMSYNC_STRATEGY="${1#unmapped_}" MEMSYNC_TIMEOUT=500ms MEMSYNC_INTERVAL=off
    stepped s 0 100000 1
    stepped m
    relay down
    stepped s 50000 100000 2
    stepped m
    stepped s 300000 100000 3
    stepper_end u
    relay up
    : >"$T/program.err" # the loss was said
    end_all
    ;;
no_*) # said once, and everything is found by hashing
    limit=max_inotify_${1#no_}
    unshare -U -r sh -c "echo 0 >/proc/sys/user/$limit" 2>/dev/null || { say "SKIP: no user namespace with a limit of its own here (a chroot has none)"; exit 77; }
    shim MEMSYNC_STRATEGY=inotify -- unshare -U -r sh -c 'echo 0 >"$1" && shift && exec "$@"' sh "/proc/sys/user/$limit" \
        /usr/bin/python3 "$TESTS/programs/workload.py" mmap_flush "$W" 2>>"$T/program.err" || fail "the program failed"
    [ "$(grep -c memsync "$T/program.err")" = 1 ] || fail "not one line: $(cat "$T/program.err")"
    grep -q "strategy inotify.*not possible.*max_user_${1#no_}.*hashing" "$T/program.err" || fail "the line is: $(cat "$T/program.err")"
    : >"$T/program.err"
    end_all
    ;;
*) fail "no such case: $1" ;;
esac
