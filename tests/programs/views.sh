#!/usr/bin/env bash
# The agent's half of pull: a program that speaks the control protocol itself opens, maps and reads remote regions.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

cases=(sizes orders private threads holes shares none looks epochs exact advice punched forks fetch eager recorded unmapped
    cut restarted gone_epoch fetch_timeout agent_killed open_waits leaves lingers unprivileged)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }

AGENT_PID=''
start_agent() {
    "$BUILD/memsync-agent" --socket "$SOCKET" --state "$T/state-local" >"$T/agent.out" 2>>"$T/agent.err" &
    AGENT_PID=$!
}
kill_agent() {
    kill -KILL "$AGENT_PID"
    wait "$AGENT_PID" 2>/dev/null || true
}
# Viewers by number: viewer N [OPTION...], then ask N LINE, whose answer is in $ANSWER and $MORE.
declare -A in out
viewer() {
    local a b n=$1
    shift
    pipes "v$n"
    exec {a}<>"$T/v$n.in" {b}<>"$T/v$n.out"
    in[$n]=$a out[$n]=$b
    "$BUILD/tests/programs/viewer" "$SOCKET" "$REMOTE" "$@" <"$T/v$n.in" >"$T/v$n.out" 2>>"$T/viewer$n.err" &
    read -r -t 20 -u "$b" ANSWER MORE || fail "the viewer did not start"
    [ "$ANSWER" != none ] || skip "there is no userfaultfd here"
}
begin() { say "${*:2}" >&"${in[$1]}"; }
answered() { read -r -t "${2:-30}" -u "${out[$1]}" ANSWER MORE; }
ask() {
    begin "$@"
    answered "$1" || fail "'${*:2}' was not answered within 30 s"
}
does() { # must be 0
    ask "$@"
    [ "$ANSWER" = 0 ] || fail "'${*:2}': $ANSWER $MORE"
}
says() { # N RESULT LINE...
    ask "$1" "${@:3}"
    [ "$ANSWER" = "$2" ] || fail "'${*:3}': $ANSWER $MORE, not $2"
}
random_file() { head -c "$2" /dev/urandom >"$T/$1"; }
put() { memsync import --force "$T/$1" "$1" >"$T/import.out" 2>&1 || fail "import: $(cat "$T/import.out")"; }
setup() { # FILE SIZE
    start_remote
    random_file "$1" "$2"
    put "$1"
    start_agent
}
status_of() { memsync status --json >"$T/status.json" || true; }

case $1 in
sizes)
    start_remote
    start_agent
    viewer 1
    n=0
    for size in 0 1 4095 4096 4097 262144 262145 1048576 5000001; do
        n=$((n + 1))
        random_file "f$size" $size
        put "f$size"
        does 1 open $n fault "f$size"
        [ "${MORE% *}" = $size ] || fail "size $size is told as $MORE"
        [ $size = 0 ] && continue
        does 1 map $n $n 0 $size shared
        does 1 check $n "$T/f$size" 0 forward
    done
    ;;
orders)
    setup f 12000001
    viewer 1
    n=0
    for order in fault linear recorded none; do
        for how in forward backward random:7; do
            n=$((n + 1))
            does 1 open $n $order f
            does 1 map $n $n 0 12000001 shared
            does 1 check $n "$T/f" 0 $how
            does 1 close $n
            kill_agent # so that the next one begins with nothing
            start_agent
            poll 10 grep -q resumed "$T/viewer1.err" || fail "the viewer found no agent"
            : >"$T/viewer1.err"
        done
    done
    ;;
private)
    setup f 6000000
    viewer 1
    does 1 open 1 none f
    does 1 map 1 1 0 6000000 private
    does 1 map 2 1 4096 2000000 private
    does 1 check 2 "$T/f" 4096 backward
    does 1 check 1 "$T/f" 0 forward
    ;;
threads)
    setup f 40000000
    viewer 1
    does 1 open 1 fault f
    does 1 map 1 1 0 40000000 shared
    does 1 map 2 1 0 40000000 shared
    does 1 check 1 "$T/f" 0 threads:16
    does 1 check 2 "$T/f" 0 threads:3
    ;;
holes)
    start_remote
    random_file f 70000
    truncate -s 30M "$T/f"
    head -c 5000 /dev/urandom >>"$T/f"
    put f
    start_agent
    viewer 1
    does 1 open 1 fault f
    does 1 map 1 1 0 $((30 * 1048576 + 5000)) shared
    does 1 check 1 "$T/f" 0 backward
    ;;
shares) # two programs, and two views in one of them: fetched once
    setup f 20000000
    viewer 1
    viewer 2
    does 1 open 1 linear f
    does 1 open 2 linear f
    does 2 open 9 linear f
    does 1 map 1 1 0 20000000 shared
    does 1 map 2 2 0 20000000 private
    does 2 map 1 9 0 20000000 shared
    begin 1 check 1 "$T/f" 0 threads:4
    does 2 check 1 "$T/f" 0 backward
    answered 1
    [ "$ANSWER" = 0 ] || fail "check: $ANSWER $MORE"
    does 1 check 2 "$T/f" 0 forward
    status_of
    python3 - "$T/status.json" <<'END' || fail "status: $(cat "$T/status.json")"
import json, sys
views = json.load(open(sys.argv[1]))['views']
assert len(views) == 1, views
v = views[0]
assert v['size'] == 20000000 and v['resident'] == 20000000 and v['programs'] == 3 and v['fetched'] < 21500000, v
END
    ;;
none) # nothing comes that was not asked for, but for the beginning
    setup f 20000000
    viewer 1
    does 1 open 1 none f
    does 1 map 1 1 0 20000000 shared
    ask 1 peek 1 9000000
    ask 1 peek 1 9004096
    ask 1 data 1
    [ "${MORE% *}" = $((61440 + 8192)) ] || fail "$MORE bytes were fetched for two pages"
    ;;
looks)
    mkdir "$T/a"
    setup a/f 5000
    viewer 1
    does 1 look a/f
    [ "$MORE" = 5000 ] || fail "look: $MORE"
    says 1 -2 look a/g
    says 1 -2 open 1 fault a/g
    says 1 -2 look a
    ;;
epochs) # who has it open goes on at its epoch, also over a lost link
    start_remote
    start_relay
    start_agent
    name=${W#/}/f
    write() { # SIZE
        random_file f "$1"
        shim -- dd if="$T/f" of="$W/f" bs=1M conv=fsync 2>"$T/dd.err" || fail "$(cat "$T/dd.err")"
    }
    write 9000000
    viewer 1
    viewer 2
    does 1 open 1 none "$name"
    first=${MORE#* }
    does 1 map 1 1 0 9000000 shared
    cp "$T/f" "$T/old"
    write 7000000
    does 2 open 1 none "$name"
    [ "${MORE% *}" = 7000000 ] && [ "${MORE#* }" -gt "$first" ] || fail "the newest is not what was opened: $MORE after $first"
    does 2 map 1 1 0 7000000 shared
    ask 1 peek 1 5000000
    relay down
    relay up
    does 1 check 1 "$T/old" 0 forward
    does 2 check 1 "$T/f" 0 forward
    ;;
exact) # RESUME without a memfd: that epoch, or ESTALE
    setup f 900000
    viewer 1
    does 1 open 1 none f
    cp "$T/f" "$T/old"
    random_file f 900000
    put f
    does 1 exact 2 1
    does 1 map 2 2 0 900000 shared
    does 1 check 2 "$T/old" 0 backward
    does 1 close 1
    does 1 close 2
    kill_agent
    start_agent
    poll 10 grep -q resumed "$T/viewer1.err" || fail "the viewer found no agent"
    does 1 exact 3 1 # its pin is kept for a while
    does 1 close 3
    kill_remote
    LISTEN=$REMOTE start_remote
    kill_agent
    start_agent
    resumed_twice() { [ "$(grep -c resumed "$T/viewer1.err")" = 2 ]; }
    poll 10 resumed_twice || fail "the viewer found no agent"
    says 1 -116 exact 4 1
    ;;
advice)
    setup f 30000000
    viewer 1
    does 1 open 1 none f
    does 1 map 1 1 0 30000000 shared
    does 1 advise 1 1 0 30000000
    does 1 advise 1 2 15000000 100
    does 1 advise 1 3 15000000 4096
    does 1 advise 1 3 0 9223372036854775807
    does 1 check 1 "$T/f" 0 random:5
    ;;
punched)
    setup f 3000000
    viewer 1
    does 1 open 1 fault f
    does 1 map 1 1 0 3000000 shared
    does 1 check 1 "$T/f" 0 forward
    does 1 punch 1 1003520 901120
    does 1 check 1 "$T/f" 0 forward
    ;;
forks)
    setup f 3000000
    viewer 1
    does 1 open 1 none f
    does 1 map 1 1 0 3000000 shared
    does 1 fork 1
    does 1 check 1 "$T/f" 0 forward
    ;;
fetch)
    setup f 25000001
    viewer 1
    does 1 open 1 none f
    does 1 fetch 1 0 1 "$T/f"
    does 1 fetch 1 10000000 5000 "$T/f"
    does 1 fetch 1 25000000 1000 "$T/f"
    does 1 fetch 1 30000000 1000 "$T/f"
    does 1 fetch 1 3 24000000 "$T/f"
    does 1 open 2 fault f
    does 1 fetch 2 0 25000001 "$T/f"
    ;;
eager) # a program without userfaultfd has it all when open returns
    setup f 25000001
    viewer 1 no-uffd
    does 1 open 1 none f
    ask 1 data 1
    [ "${MORE% *}" -ge 25000001 ] || fail "only $MORE bytes are there"
    does 1 map 1 1 0 25000001 shared
    does 1 check 1 "$T/f" 0 forward
    says 1 -2 look g
    grep -q "fetched whole" "$T/viewer1.err" || fail "nothing was said"
    ;;
recorded) # what the last run touched first comes first, over a line on which the rest would take a quarter of a minute
    start_remote
    random_file f 30000000
    put f
    start_relay --rate 2000000
    start_agent
    viewer 1
    does 1 open 1 recorded f
    does 1 map 1 1 0 30000000 shared
    ask 1 peek 1 25000000
    ask 1 peek 1 21000000
    does 1 fetch 1 28000000 5000 "$T/f"
    says 1 0 has 1 20000000
    does 1 close 1
    saved() { [ -n "$(find "$T/state-local/orders" -type f ! -name '*.new' 2>/dev/null)" ]; }
    poll 10 saved || fail "no order was kept"
    kill_agent
    start_agent
    viewer 2
    does 2 open 1 recorded f
    all_there() {
        local at
        for at in 25000000 21000000 28000000; do
            ask 2 has 1 $at
            [ "$ANSWER" = 1 ] || return 1
        done
    }
    poll 5 all_there || fail "what was touched is not there"
    says 2 0 has 1 15000000
    ;;
unmapped) # a range that is given up in part
    setup f 8000000
    viewer 1
    does 1 open 1 none f
    does 1 map 1 1 0 8000000 shared
    does 1 unmap 1 4096000 3907584
    does 1 map 2 1 4096 7990000 private
    does 1 check 1 "$T/f" 0 random:9
    does 1 check 2 "$T/f" 4096 forward
    ;;
cut) # faults wait, and go on
    start_remote
    random_file f 30000000
    put f
    start_relay
    start_agent
    viewer 1
    does 1 open 1 none f
    does 1 map 1 1 0 30000000 shared
    begin 1 check 1 "$T/f" 0 threads:4
    for _ in 1 2 3 4 5; do
        relay down
        ! answered 1 0.2 || break
        relay up
        ! answered 1 0.1 || break
    done
    [ "$ANSWER" = 0 ] && fail "it was over before anything was cut"
    relay up
    answered 1 60 || fail "the check did not end"
    [ "$ANSWER" = 0 ] || fail "check: $ANSWER $MORE"
    ;;
restarted) # the remote comes back with the same epoch, though without its pins
    setup f 12000000
    viewer 1
    does 1 open 1 none f
    does 1 map 1 1 0 12000000 shared
    ask 1 peek 1 5000000
    kill_remote
    begin 1 check 1 "$T/f" 0 threads:3
    LISTEN=$REMOTE start_remote
    answered 1 60 || fail "the check did not end"
    [ "$ANSWER" = 0 ] || fail "check: $ANSWER $MORE"
    ;;
gone_epoch) # the remote comes back with another: what was not fetched is poisoned, what was stays
    setup f 12000000
    viewer 1
    does 1 open 1 none f
    does 1 map 1 1 0 12000000 shared
    does 1 map 2 1 0 12000000 private
    ask 1 peek 1 5000000
    byte=$ANSWER
    kill_agent
    kill_remote
    LISTEN=$REMOTE start_remote
    random_file f 12000000
    put f
    start_agent
    says 1 -14 peek 1 6000000
    says 1 -14 peek 2 6000000
    says 1 "$byte" peek 1 5000000
    says 1 "$byte" peek 2 5000000
    says 1 -5 fetch 1 7000000 1 "$T/f"
    ask 1 data 1
    [ "${MORE#* }" = -116 ] || fail "struct view: failed is $MORE"
    does 1 map 3 1 0 12000000 shared
    says 1 -14 peek 3 6000000
    says 1 "$byte" peek 3 5000000
    does 1 look f
    grep -q "notice: /f: .*cannot be read any more" "$T/viewer1.err" || fail "nothing was said: $(cat "$T/viewer1.err")"
    does 1 open 2 none f
    does 1 map 4 2 0 12000000 shared
    does 1 check 4 "$T/f" 0 forward
    ;;
fetch_timeout)
    start_remote
    random_file f 12000000
    put f
    start_relay
    start_agent
    viewer 1
    viewer 2
    does 1 open 1 none f 700
    does 2 open 1 none f
    does 1 map 1 1 0 12000000 shared
    does 2 map 1 1 0 12000000 shared
    relay down
    begin 2 check 1 "$T/f" 0 forward
    says 1 -14 peek 1 6000000
    ask 1 data 1
    [ "${MORE#* }" = -110 ] || fail "struct view: failed is $MORE"
    ! answered 2 0.2 || fail "who waits for ever was answered: $ANSWER $MORE"
    relay up
    answered 2 || fail "the check did not end"
    [ "$ANSWER" = 0 ] || fail "check: $ANSWER $MORE"
    ;;
agent_killed)
    setup f 60000000
    viewer 1
    does 1 open 1 none f
    does 1 map 1 1 0 60000000 shared
    does 1 map 2 1 0 60000000 private
    begin 1 check 1 "$T/f" 0 threads:2
    kills=0
    for _ in $(seq "${TEST_ROUNDS:-5}"); do
        ! answered 1 0.05 || break
        kill_agent
        kills=$((kills + 1))
        start_agent
        count=$kills
        resumed() { [ "$(grep -c resumed "$T/viewer1.err")" -ge "$count" ]; }
        poll 20 resumed || fail "the viewer was not taken over"
    done
    [ $kills -ge 3 ] || fail "it was over after $kills kills"
    [ "$ANSWER" = 0 ] && [ -n "$MORE" ] && ! say "$ANSWER $MORE" | grep -q "0 -1" && fail "check: $ANSWER $MORE"
    answered 1 90 || fail "the check did not end"
    [ "$ANSWER $MORE" = "0 -1" ] || fail "check: $ANSWER $MORE"
    does 1 check 2 "$T/f" 0 forward
    say "$kills kills"
    ;;
open_waits) # for the link, as long as HELLO says
    start_remote
    random_file f 100000
    put f
    start_relay
    relay down
    start_agent
    viewer 1
    begin 1 open 1 fault f
    ! answered 1 0.3 || fail "open without a link: $ANSWER $MORE"
    relay up
    answered 1 || fail "open was not answered"
    [ "$ANSWER" = 0 ] || fail "open: $ANSWER"
    ;;
leaves) # a program that is killed in a call for what cannot come does not keep the agent
    start_remote
    random_file f 3000000
    put f
    start_relay
    start_agent
    viewer 1
    pid=$MORE
    does 1 open 1 none f
    relay down
    begin 1 fetch 1 2000000 5000 "$T/f"
    ! answered 1 0.2 || fail "fetch without a link: $ANSWER"
    kill -KILL "$pid"
    kill -TERM "$AGENT_PID"
    poll 5 gone "$AGENT_PID" || fail "the agent does not leave"
    ;;
unprivileged) # userfaultfd of user mode only
    requires_root "to become somebody else"
    as_nobody "$0" threads
    as_nobody "$0" agent_killed
    ;;
lingers) # a view that nobody has is there a while longer, for whoever comes next
    setup f 8000000
    viewer 1
    does 1 open 1 linear f
    does 1 fetch 1 0 8000000 "$T/f"
    does 1 close 1
    viewer 2
    does 2 open 1 none f
    ask 2 data 1
    [ "${MORE% *}" -ge 8000000 ] || fail "only $MORE bytes were there still"
    ;;
esac
