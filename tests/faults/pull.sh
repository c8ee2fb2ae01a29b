#!/usr/bin/env bash
# Pulled regions and what fails: the agent killed again and again during a full read, the link cut. What is read is right, or it is not read: never zeros.
# cases
# timeout: 300
. "$(dirname "$0")/../lib.sh"

cases=(agent_killed_mapped agent_killed_read agent_killed_threads link_cut forked_orphan gone_over_exec fetch_timeout)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }

far=$W/far
ROUNDS=${TEST_ROUNDS:+50}
ROUNDS=${ROUNDS:-5}
size=$((200 << 20))
pull() { shim MEMSYNC_REGIONS="$far=pull,order=none${EXTRA:+,$EXTRA}" "$@"; }
setup() {
    start_remote
    head -c "$size" /dev/urandom >"$T/near"
    memsync import --force "$T/near" "${far#/}" >"$T/import.out" 2>&1 || fail "import: $(cat "$T/import.out")"
}
kill_local() {
    local pid
    for pid in $(local_agents); do kill -KILL "$pid"; done
}
has_local() { [ -n "$(local_agents)" ] || grep -qx done "$T/read"; }
# reading MODE: a slow reader in the background that says how far it is, so that the kills come in between.
reading() {
    pull -- "$BUILD/tests/programs/pulled" "$1" "$far" "$T/near" >"$T/read" 2>"$T/read.err" &
    READER=$!
}
at_least() { grep -qx done "$T/read" || [ "$(tail -n 1 "$T/read" 2>/dev/null | cut -d' ' -f1)" -ge "$1" ] 2>/dev/null; }
finished() {
    local code=0
    wait "$READER" || code=$?
    [ "$code" = 0 ] || fail "the reader ended with $code: $(cat "$T/read.err")"
    [ "$(tail -n 1 "$T/read")" = "done" ] || fail "the reader ended early: $(tail -n 1 "$T/read")"
}
kills() {
    local i
    setup
    reading "$1"
    for ((i = 1; i <= ROUNDS; i++)); do
        poll 60 at_least $((i * 90 / ROUNDS)) || fail "the reader stands at $(tail -n 1 "$T/read") of $((i * 90 / ROUNDS)) %: $(cat "$T/read.err")"
        poll 20 has_local || fail "no agent to kill"
        kill_local
    done
    finished
}

case $1 in
agent_killed_mapped) kills mapped ;;
agent_killed_read) kills reads ;;
agent_killed_threads) kills threads ;;
link_cut)
    setup
    start_relay
    reading mapped
    for ((i = 1; i <= ROUNDS; i++)); do
        poll 60 at_least $((i * 90 / ROUNDS)) || fail "the reader stands at $(tail -n 1 "$T/read")"
        relay down
        relay up
    done
    finished
    ;;
forked_orphan) # the parent is gone when the child reads, and then the agent
    setup
    reading orphan
    for ((i = 1; i <= ROUNDS; i++)); do
        poll 60 at_least $((i * 90 / ROUNDS)) || fail "the child stands at $(tail -n 1 "$T/read")"
        kill_local
    done
    poll 60 grep -qx done "$T/read" || fail "the child has not ended: $(tail -n 1 "$T/read") $(cat "$T/read.err")"
    ;;
gone_over_exec) # a program that is handed an open file whose epoch nobody has any more: an error, and why
    requires dash
    setup
    pipes gone
    # The shell between the two is none of ours, so that nobody keeps what was fetched.
    pull MEMSYNC_PROGRAMS=bash:cat -- bash -c 'exec 5<"$1"; exec dash -c "echo ready; read -r go; exec cat <&5"' - "$far" <>"$T/gone.in" >"$T/read" 2>"$T/read.err" &
    READER=$!
    poll 30 grep -q ready "$T/read" || fail "the reader is not ready: $(cat "$T/read.err")"
    kill_local
    kill_remote
    head -c 5000000 /dev/urandom >"$T/near"
    LISTEN=$REMOTE start_remote
    memsync import --force "$T/near" "${far#/}" >"$T/import.out" 2>&1 || fail "import: $(cat "$T/import.out")"
    say go >"$T/gone.in"
    ! wait "$READER" || fail "it is read"
    [ "$(cat "$T/read")" = ready ] || fail "it has read $(wc -c <"$T/read") bytes"
    grep -q 'cat: .*Stale file handle' "$T/read.err" || fail "cat says: $(cat "$T/read.err")"
    grep -q 'memsync: .*not kept any more' "$T/read.err" || fail "not said: $(cat "$T/read.err")"
    pull -- cat "$far" >"$T/read"
    same "$T/near" "$T/read"
    ;;
fetch_timeout) # an unfetchable page: SIGBUS for a load, EIO for a call, and a line
    setup
    start_relay
    pipes failing
    pull MEMSYNC_FETCH_TIMEOUT=500ms -- "$BUILD/tests/programs/pulled" failing "$far" "$T/near" <"$T/failing.in" >"$T/read" 2>"$T/read.err" &
    READER=$!
    exec 9>"$T/failing.in"
    poll 30 grep -q ready "$T/read" || fail "the reader is not ready: $(cat "$T/read.err")"
    relay down
    say go >&9
    wait "$READER" || fail "the reader failed: $(cat "$T/read.err")"
    grep -qx 'pread EIO' "$T/read" || fail "a call: $(cat "$T/read")"
    grep -qx 'load BUS' "$T/read" || fail "a load: $(cat "$T/read")"
    [ "$(grep -c memsync "$T/read.err")" -ge 1 ] || fail "nothing was said"
    ;;
esac
say "right, or not read"
