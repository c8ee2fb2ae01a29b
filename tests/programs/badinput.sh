#!/usr/bin/env bash
# What goes wrong before anything is replicated: one line that says what, on what, why and what to try, and the program runs on to its own exit code.
# cases
# timeout: 60
. "$(dirname "$0")/../lib.sh"
python=/usr/bin/python3

cases=(strategy rule rule_mode ack_unknown timeout_unknown unreachable unreachable_fail unreachable_block remote_unparsable
    remote_not_built other_writer foreign_lineage foreign_initial_push name_dots name_clash unreadable store_locked no_rules other_program
    agent_missing)
for strategy in fuse nbd ublk cuse kmod; do
    cases+=("not_built_$strategy")
done
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }

# A program that maps, stores, syncs and says how the sync went: "synced" or the errno's name. It always exits with 0.
program() { # FILE SEED
    local file=$1 seed=$2
    shift 2
    shim "$@" -- $python -c '
import errno, mmap, os, random, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
os.ftruncate(fd, 65536)
m = mmap.mmap(fd, 65536)
m[:] = random.Random(sys.argv[2]).randbytes(65536)
try:
    m.flush()
    print("synced")
except OSError as e:
    print(errno.errorcode[e.errno])
m[5] = 1
' "$file" "$seed" >"$T/program.out" 2>"$T/program.err" || fail "the program ended with $?: $(cat "$T/program.err")"
}
said() { [ "$(cat "$T/program.out")" = "$1" ] || fail "the program's msync: $(cat "$T/program.out"), not $1"; }
# One line of ours, and it has each of these words.
one_line() {
    local lines word
    lines=$(grep -c . "$T/program.err" || true)
    [ "$lines" = 1 ] || fail "$lines lines on stderr instead of 1: $(cat "$T/program.err")"
    for word; do
        grep -qiF -- "$word" "$T/program.err" || fail "the line does not say '$word': $(cat "$T/program.err")"
    done
}
other_user_of_store() { # another machine, as it were: its own identity, its own local agent
    SOCKET=$T/other.sock XDG_STATE_HOME=$T/other-state "$@"
}
# The first writer's lease has ended: it lives for 10 s after the last that was heard of its agent.
not_leased() {
    memsync ls --json >"$T/ls.out" 2>&1 || fail "ls: $(cat "$T/ls.out")"
    ! grep -qE '"leased": *(true|1)' "$T/ls.out"
}
closed_port() { # a port that nobody listens at: bound once and given back
    $python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print("127.0.0.1:%d" % s.getsockname()[1])'
}

case $1 in
strategy)
    start_remote
    program "$W/a" 1 MEMSYNC_STRATEGY=telepathy
    one_line telepathy MEMSYNC_STRATEGY uffd hash inotify
    said synced
    ;;
not_built_*)
    start_remote
    program "$W/a" 1 MEMSYNC_STRATEGY="${1#not_built_}"
    one_line "${1#not_built_}" "not built"
    said synced
    ;;
rule)
    start_remote
    program "$W/a" 1 MEMSYNC_REGIONS="$W/**,colour=red"
    one_line colour MEMSYNC_REGIONS
    said synced
    ;;
rule_mode)
    start_remote
    program "$W/a" 1 MEMSYNC_REGIONS="$W/**=sideways"
    one_line sideways push
    said synced
    ;;
ack_unknown)
    start_remote
    program "$W/a" 1 MEMSYNC_ACK=maybe
    one_line maybe MEMSYNC_ACK durable
    said synced
    ;;
timeout_unknown)
    start_remote
    program "$W/a" 1 MEMSYNC_TIMEOUT=soon
    one_line soon MEMSYNC_TIMEOUT
    said synced
    ;;
no_rules)
    start_remote
    program "$W/a" 1 MEMSYNC_REGIONS=
    one_line MEMSYNC_REGIONS
    said synced
    [ ! -e "$(replica "$W/a")" ] || fail "something was replicated"
    ;;
other_program) # not one of MEMSYNC_PROGRAMS: nothing happens at all
    start_remote
    program "$W/a" 1 MEMSYNC_PROGRAMS='*/postgres'
    [ ! -s "$T/program.err" ] || fail "said: $(cat "$T/program.err")"
    [ ! -e "$(replica "$W/a")" ] && no_local_agents || fail "something was replicated, or an agent started"
    ;;
unreachable)
    REMOTE=$(closed_port)
    program "$W/a" 1 MEMSYNC_TIMEOUT=1s
    one_line "$REMOTE" refused
    said synced
    ;;
unreachable_fail)
    REMOTE=$(closed_port)
    program "$W/a" 1 MEMSYNC_TIMEOUT=500ms MEMSYNC_ON_LOSS=fail
    one_line "$REMOTE" refused
    said EIO
    ;;
unreachable_block) # stands still until the remote is there, then all is
    LISTEN=$(closed_port)
    REMOTE=$LISTEN
    program "$W/a" 1 MEMSYNC_TIMEOUT=300ms MEMSYNC_ON_LOSS=block &
    blocked=$!
    poll 10 test -s "$W/a" || fail "the program did not start"
    poll 10 grep -qF "$REMOTE" "$T/program.err" || fail "nothing was said about the remote"
    [ ! -s "$T/program.out" ] && alive $blocked || fail "msync returned: $(cat "$T/program.out")"
    start_remote
    wait $blocked || fail "the program failed"
    said synced
    stop_local
    stop_remote
    same "$W/a" "$(replica "$W/a")"
    ;;
remote_unparsable)
    REMOTE=nonsense
    program "$W/a" 1 MEMSYNC_TIMEOUT=1s
    one_line nonsense
    said synced
    ;;
remote_not_built)
    REMOTE=s3://bucket/prefix
    program "$W/a" 1 MEMSYNC_TIMEOUT=1s
    one_line s3: "not built"
    said synced
    ;;
other_writer)
    start_remote
    # The first writer still runs, and has the lease.
    mkfifo "$T/go"
    shim MEMSYNC_REGIONS="$W/**,name=shared/%b" -- $python -c '
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 8192)
m = mmap.mmap(fd, 8192); m[:] = b"first wr" * 1024; m.flush(); print("ready", flush=True); open(sys.argv[2]).read()
' "$W/a" "$T/go" >"$T/first.out" &
    first=$!
    poll 20 grep -q ready "$T/first.out" || fail "the first writer did not start"
    mkdir "$T/work2"
    other_user_of_store program "$T/work2/a" 2 MEMSYNC_REGIONS="$T/work2/**,name=shared/%b" MEMSYNC_TIMEOUT=2s
    one_line shared/a writer
    said synced
    echo >"$T/go"
    wait $first || fail "the first writer failed"
    stop_local
    stop_remote
    same "$W/a" "$STORE/shared/a"
    ;;
foreign_lineage) # an empty new file on a new host must not wipe the only good copy
    start_remote
    program "$W/a" 1 MEMSYNC_REGIONS="$W/**,name=%b"
    stop_local
    poll 20 not_leased || fail "the lease does not end: $(cat "$T/ls.out")"
    mkdir "$T/work2"
    other_user_of_store program "$T/work2/a" 2 MEMSYNC_REGIONS="$T/work2/**,name=%b" MEMSYNC_TIMEOUT=2s
    one_line " a" lineage initial=
    said synced
    stop_remote
    same "$W/a" "$STORE/a"
    ;;
foreign_initial_push) # unless a person says so
    start_remote
    program "$W/a" 1 MEMSYNC_REGIONS="$W/**,name=%b"
    stop_local
    poll 20 not_leased || fail "the lease does not end: $(cat "$T/ls.out")"
    mkdir "$T/work2"
    SOCKET=$T/other.sock
    XDG_STATE_HOME=$T/other-state
    program "$T/work2/a" 2 MEMSYNC_REGIONS="$T/work2/**,name=%b,initial=push"
    quiet "$T/program.err"
    said synced
    stop_local
    stop_remote
    same "$T/work2/a" "$STORE/a"
    ;;
name_dots)
    start_remote
    program "$W/a" 1 MEMSYNC_REGIONS="$W/**,name=../../escaped/%b"
    one_line "../../escaped" ".."
    said synced
    [ ! -e "$T/escaped" ] && [ ! -e "$T/../escaped" ] || fail "a file was written outside the store"
    ;;
name_clash)
    start_remote
    program "$W/a" 1 MEMSYNC_REGIONS="$W/**,name=x"
    quiet "$T/program.err"
    program "$W/b" 2 MEMSYNC_REGIONS="$W/**,name=x/y" MEMSYNC_TIMEOUT=2s
    one_line x/y "cannot both be regions"
    said synced
    stop_local
    stop_remote
    same "$W/a" "$STORE/x"
    ;;
unreadable) # opened for writing only by one who may not read it
    if [ "$(id -u)" = 0 ]; then # root may read every file
        as_nobody "$0" unreadable
        exit
    fi
    start_remote
    : >"$W/a"
    chmod 200 "$W/a"
    shim -- sh -c 'exec >>"$1"; echo text' sh "$W/a" 2>"$T/program.err" || fail "the program ended with $?"
    one_line "$W/a" permission
    ;;
agent_missing) # the library was copied without the rest
    REMOTE=127.0.0.1:1
    cp "$BUILD/libmemsync_preload.so" "$T/alone.so"
    PRELOAD=$T/alone.so
    program "$W/a" 1 MEMSYNC_TIMEOUT=1s
    one_line memsync-agent install
    said synced
    ;;
store_locked) # one agent a directory
    start_remote
    code=0
    "$BUILD/memsync-agent" --listen 127.0.0.1:0 --store "file:$STORE" >"$T/second.out" 2>"$T/program.err" || code=$?
    [ "$code" = 3 ] || fail "a second agent on the store ended with $code, not 3"
    one_line "$STORE"
    ;;
*) fail "no such case: $1" ;;
esac
