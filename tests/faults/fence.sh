#!/usr/bin/env bash
# A writer that was cut off for longer than its lease, and finds that another has written meanwhile: its sync points fail, it is told once, and nothing of it
# reaches the region again.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

cases=(replaced held)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }
start_remote
start_relay
region=${W#/}/data
stepper_start "$W/data" 65536 MEMSYNC_TIMEOUT=500ms
stepped s 0 10000 1
stepped m
relay down
head -c 65536 /dev/urandom >"$T/other"
# The lease ends 10 s after its connection. The tool is another writer: it gives the lease back when it is done.
taken() { memsync import --force --remote "$DIRECT" "$T/other" "$region" >"$T/import.out" 2>&1; }
poll 40 taken || fail "the lease of the lost writer did not end: $(cat "$T/import.out")"
if [ "$1" = held ]; then # or another agent that stays
    mkdir "$T/work2"
    pipes hold
    (
        SOCKET=$T/agent2.sock REMOTE=$DIRECT
        shim XDG_STATE_HOME="$T/state2" MEMSYNC_REGIONS="$T/work2/**,name=$region,initial=push" -- \
            bash -c 'exec 9>"$0"; cat "$1" >&9; sync "$0"; echo there; read -r _' "$T/work2/data" "$T/other" <"$T/hold.in" >"$T/hold.out"
    ) &
    exec {HOLD_IN}<>"$T/hold.in" {HOLD_OUT}<>"$T/hold.out"
    read -r -t 30 -u "$HOLD_OUT" _ || fail "the second writer did not start"
fi
relay up
fenced() {
    step s 20000 100 2
    step m
    [ "$ANSWER" = EIO ]
}
poll 30 fenced || fail "msync says $ANSWER although another has the region"
memsync status >"$T/status.out" && fail "status says that all is well"
grep -q "fenced" "$T/status.out" || fail "not fenced: $(cat "$T/status.out")"
memsync export --remote "$DIRECT" "$region" "$T/exported" >/dev/null || fail "the region is gone"
cmp "$T/exported" "$T/other" || fail "the lost writer's stores are in the other's region"
[ "$(grep -c fenced "$T/program.err")" = 1 ] || fail "not said once: $(cat "$T/program.err")"
# However long the link is lost, and although nothing is behind.
[ "$(grep -c "no link" "$T/program.err")" = 1 ] || fail "the lost link was not said once: $(cat "$T/program.err")"
! grep -q "caught up" "$T/program.err" || fail "it says that all arrived: $(cat "$T/program.err")"
[ "$1" = replaced ] || say done >&"$HOLD_IN"
stepper_end
