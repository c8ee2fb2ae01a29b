#!/usr/bin/env bash
# memsync-agent as a program: options, exit codes, what it prints, how it ends.
# timeout: 60
. "$(dirname "$0")/../lib.sh"
agent=$BUILD/memsync-agent

# says CODE WORD... -- ARGUMENTS: exits with the code, and one line on stderr has every word
says() {
    local code=$1 words=() got=0 word
    shift
    while [ "$1" != -- ]; do words+=("$1") && shift; done
    shift
    timeout 10 "$agent" "$@" >"$T/out" 2>"$T/err" || got=$?
    [ "$got" = "$code" ] || fail "memsync-agent $*: exit $got, not $code: $(cat "$T/err")"
    for word in "${words[@]}"; do
        grep -qF -- "$word" "$T/err" || fail "memsync-agent $*: the message does not say '$word': $(cat "$T/err")"
    done
}
says 0 -- --version
grep -q '^memsync-agent [0-9]' "$T/out" || fail "--version prints $(cat "$T/out")"
says 0 -- --help
for option in listen store socket linger state insecure tls cert-dir psk-file grants; do
    grep -q -- "--$option" "$T/out" || fail "--help does not tell of --$option"
done
says 2 'nothing to do' --
says 2 unrecognized --help -- --telepathy
says 2 'requires an argument' -- --listen
says 2 --store -- --listen 127.0.0.1:0
says 2 nonsense HOST:PORT -- --listen nonsense --store mem:
says 2 70000 -- --listen 127.0.0.1:70000 --store mem:
says 2 tape: file:DIR -- --listen 127.0.0.1:0 --store tape:
says 2 twice -- --store mem: --store mem: --listen 127.0.0.1:0
says 2 nobody -- --store mem:
says 2 --socket -- --listen 127.0.0.1:0 --store mem: --linger
says 2 leftover -- --listen 127.0.0.1:0 --store mem: leftover
for url in s3://bucket/x redis://h:1/0 dir:/x; do
    says 3 "$url" 'not built' -- --listen 127.0.0.1:0 --store "$url"
done
says 2 --store -- --nbd 127.0.0.1:0
says 2 nonsense HOST:PORT -- --nbd nonsense --store mem:
says 3 'no TLS is built' --nbd --insecure -- --nbd 0.0.0.0:0 --store mem:
says 3 'without TLS' 0.0.0.0:0 --psk-file --insecure -- --listen 0.0.0.0:0 --store mem:
says 3 'without TLS' -- --listen '[::]:0' --store mem:
says 3 /proc/x --state -- --listen 127.0.0.1:0 --store mem: --state /proc/x
says 3 /dev/null/x -- --listen 127.0.0.1:0 --store file:/dev/null/x

# start ARGUMENTS: in the background, until it has said where it listens; its output in $T/out, its number in $pid
start() {
    "$agent" "$@" >"$T/out" 2>"$T/err" &
    pid=$!
    poll 20 grep -q "^listening" "$T/out" || fail "memsync-agent $* does not listen: $(cat "$T/err")"
}
ends() { # by signal $1, with 0
    local code=0
    kill "-$1" "$pid"
    wait "$pid" || code=$?
    [ "$code" = 0 ] || fail "ended by SIG$1 with $code: $(cat "$T/err")"
}
start --listen 127.0.0.1:0 --listen "unix:$T/wire" --store "file:$STORE"
poll 5 grep -qx "listening wire unix:$T/wire" "$T/out" || fail "no line for the second listener"
grep -qxE 'listening wire 127\.0\.0\.1:[1-9][0-9]*' "$T/out" || fail "no real port: $(cat "$T/out")"
poll 5 test -S "$STORE/.memsync/wire.sock" || fail "no socket in the store"
[ "$(stat -c %a "$STORE/.memsync/wire.sock" "$T/wire" | sort -u)" = 600 ] || fail "others could use the sockets"
port=$(sed -n 's/^listening wire 127.0.0.1://p' "$T/out")
says 3 "127.0.0.1:$port" 'in use' -- --listen "127.0.0.1:$port" --store mem:
says 3 "$STORE" -- --listen 127.0.0.1:0 --store "file:$STORE"
identity=$(cat "$XDG_STATE_HOME/memsync/identity")
ends TERM
[ ! -e "$T/wire" ] && [ ! -e "$STORE/.memsync/wire.sock" ] || fail "sockets are left behind"

start --listen 127.0.0.1:0 --store "file:$STORE"
kill -KILL "$pid"
wait "$pid" 2>/dev/null || true
[ -S "$STORE/.memsync/wire.sock" ] || fail "the killed agent's socket is gone: what is replaced below?"
start --listen 127.0.0.1:0 --store "file:$STORE" --socket "$T/control"
poll 5 grep -qx "listening control $T/control" "$T/out" || fail "no control socket"
[ "$(cat "$XDG_STATE_HOME/memsync/identity")" = "$identity" ] || fail "another identity after a restart"
says 3 "$T/control" 'another agent' -- --listen 127.0.0.1:0 --store mem: --socket "$T/control"
ends INT

# A killed one that still has its lock: waited for, but not for ever.
flock "$T/control.lock" sleep 1 &
poll 5 eval '! flock -n "$T/control.lock" true' || fail "nobody holds the lock"
start --listen 127.0.0.1:0 --store mem: --socket "$T/control"
poll 10 grep -qx "listening control $T/control" "$T/out" || fail "no control socket after the lock was free"
ends INT

start --listen 0.0.0.0:0 --insecure --store mem:
grep -qE '^listening wire 0\.0\.0\.0:[1-9]' "$T/out" || fail "$(cat "$T/out")"
kill -TERM "$pid" # a second one changes nothing
ends TERM
say "as told"
