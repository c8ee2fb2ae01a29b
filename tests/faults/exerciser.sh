#!/usr/bin/env bash
# Random operations on two files and their mappings, against a shadow copy: what the program sees, and at every check what the remote has.
# cases
# timeout: 1800
#
# A case is MODE/STRATEGY/PLACE/REMOTE/INTERVAL: as in programs/replicate.sh, and MEMSYNC_INTERVAL.
#   push     what is stored and written is at the remote, as the shadow has it
#   pull     what only reads; pull/ORDER[/RESIDENT]
#   mirror   as push; mirror/ORDER[/RESIDENT]
#   crash    agents, or the program, are killed at some operation: the replica has the state of one sync point, not older than the last acknowledged one;
#            crash/mirror/ORDER: over a mirror
#
# TEST_OPS, TEST_SEED: how many operations and which, to repeat a run; the seed is printed. TEST_ROUNDS=200 makes it 100000.
# TEST_FAULTS: of crash, only these. TEST_ACK=async shows that the check of crash can fail: what was acknowledged is then lost in kills of the remote.
# "exerciser.sh shrink CASE": with both of them, finds few operations that still fail, by leaving others out.
. "$(dirname "$0")/../lib.sh"

cases=(push/uffd/disk push/hash/disk push/inotify/disk push/auto/memory push/auto/disk/mem push/uffd/memory/file push/auto/disk/file push/auto/disk/hub
    push/uffd/disk/agent/10ms push/auto/memory/agent/off
    pull/fault pull/linear pull/recorded pull/none pull/fault/4M pull/linear/4M mirror/fault mirror/none mirror/fault/4M mirror/none/4M
    crash/uffd/disk crash/hash/disk crash/auto/memory crash/mirror/fault)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }
exerciser=$BUILD/tests/faults/exerciser
rounds=${TEST_ROUNDS:-20}
operations=${TEST_OPS:-$((rounds * 500 / (rounds < 200 ? 5 : 1)))}
seed=${TEST_SEED:-$((SRANDOM % 1000000))}
RANDOM=$seed

if [ "$1" = shrink ]; then
    # A list of numbers; halves, quarters, ... of it are left out as long as it still fails.
    seq 1 "$operations" >"$T/list"
    fails() { ! TEST_KEEP=$1 TEST_OPS=$operations TEST_SEED=$seed bash "$0" "$2" >"$T/shrink.out" 2>&1; }
    fails "$T/list" "$2" || fail "it does not fail: $(cat "$T/shrink.out")"
    parts=2
    while [ "$parts" -le "$(wc -l <"$T/list")" ]; do
        left=''
        for ((part = parts; part >= 1; part--)); do
            lines=$(wc -l <"$T/list")
            split -n "l/$part/$parts" "$T/list" >"$T/part"
            grep -vxFf "$T/part" "$T/list" >"$T/fewer" || true
            if [ -s "$T/fewer" ] && [ "$(wc -l <"$T/fewer")" -lt "$lines" ] && fails "$T/fewer" "$2"; then
                mv "$T/fewer" "$T/list"
                left=yes
            fi
        done
        say "$(wc -l <"$T/list") operations" >&2
        [ -n "$left" ] || parts=$((parts * 2))
    done
    cp "$T/list" "${TMPDIR:-/tmp}/exerciser.keep"
    fails "$T/list" "$2" || true
    cat "$T/shrink.out"
    say "TEST_KEEP=${TMPDIR:-/tmp}/exerciser.keep TEST_OPS=$operations TEST_SEED=$seed $0 $2"
    exit 0
fi

IFS=/ read -r mode strategy place remote interval <<<"$1"
say "TEST_SEED=$seed TEST_OPS=$operations $0 $1"
options=(every=500 ${TEST_KEEP:+keep="$TEST_KEEP"} ${TEST_EVERY:+every="$TEST_EVERY"})
[ "$place" = memory ] && work_in_memory
[ "$place" = memory ] && options+=(without=zero,collapse,insert) # which tmpfs has not

WHERE=$W # the files are
PROGRAM='' PROGRAM_PID='' IN='' OUT=''
exerciser_start() { # VARIABLE=VALUE... -- OPTION...
    local variables=()
    while [ "$1" != -- ]; do
        variables+=("$1")
        shift
    done
    shift
    pipes exerciser
    exec {IN}<>"$T/exerciser.in" {OUT}<>"$T/exerciser.out"
    LIMIT=1700 shim "${variables[@]}" -- "$exerciser" run "$WHERE" "$seed" "$operations" "${options[@]}" "$@" \
        <"$T/exerciser.in" >"$T/exerciser.out" 2>>"$T/program.err" &
    PROGRAM=$!
    says
    [ "$WORD" = pid ] || fail "the program did not start: $(cat "$T/program.err")"
    PROGRAM_PID=$NUMBER
}
# What it says next, in $WORD and $NUMBER; "end" when it has ended, by itself.
says() {
    local until=$((SECONDS + ${SAYS_LIMIT:-120}))
    local line='' part ended=''
    while ! IFS= read -r -t 0.2 -u "$OUT" part; do
        line+=$part
        if [ -n "$ended" ]; then
            WORD=end
            return
        fi
        gone "$PROGRAM" && ended=yes # what it said before is read first
        [ "$SECONDS" -lt "$until" ] || fail "it says nothing for ${SAYS_LIMIT:-120} s; status: $(memsync status 2>&1 | head -n 20)"
    done
    read -r WORD NUMBER <<<"$line$part"
}
go_on() { say go >&"$IN"; }
exerciser_end() {
    local code=0
    wait "$PROGRAM" || code=$?
    exec {IN}>&- {OUT}>&-
    [ "$code" = "${1:-0}" ] || fail "the program ended with $code: $(tail -n 30 "$T/program.err")"
}
# Answers its checks until it ends.
follow() {
    local i
    while says; [ "$WORD" != end ]; do
        [ "$WORD" = check ] || fail "it said '$WORD'"
        for i in 0 1; do
            rm -f "$T/remote/$i" # export asks for a name that is free
            memsync export "${WHERE#/}/$i" "$T/remote/$i" >"$T/export.out" 2>&1 || fail "export at operation $NUMBER: $(cat "$T/export.out")"
        done
        go_on
    done
    exerciser_end
}
mkdir "$T/remote"

case $mode in
push)
    case ${remote:-agent} in
    agent) start_remote ;;
    mem) start_remote mem: ;;
    file) REMOTE=file:$STORE ;;
    hub)
        start_remote "file:$STORE"
        first=$REMOTE
        mv "$T/remote.out" "$T/first.out"
        start_remote "file:$T/second"
        second=$REMOTE
        mv "$T/remote.out" "$T/second.out"
        start_remote "hub:$first,$second"
        ;;
    esac
    exerciser_start MEMSYNC_STRATEGY="$strategy" MEMSYNC_INTERVAL="${interval:-1s}" -- remote="$T/remote"
    follow
    quiet "$T/program.err"
    for i in 0 1; do
        memsync verify "${W#/}/$i" >"$T/verify.out" 2>&1 || fail "verify: $(cat "$T/verify.out")"
    done
    stop_local
    case ${remote:-agent} in
    agent)
        stop_remote
        same_tree
        ;;
    file) same_tree ;;
    esac
    ;;
pull | mirror)
    WHERE=$W/far
    start_remote
    mkdir "$T/start"
    # With a bound, files that are larger than that: it is 4 MiB at least.
    size=60
    [ -z "$place" ] || { size=240; options+=(max=8388608); }
    for i in 0 1; do
        head -c $((RANDOM * size + 1)) /dev/urandom >"$T/start/$i"
        memsync import "$T/start/$i" "${WHERE#/}/$i" >"$T/import.out" 2>&1 || fail "import: $(cat "$T/import.out")"
    done
    if [ "$mode" = pull ]; then
        options+=(read=1)
    else
        options+=(mirror=1 without=collapse,insert,remove remote="$T/remote")
    fi
    exerciser_start MEMSYNC_REGIONS="$WHERE/**=$mode,order=$strategy${place:+,resident=$place}" -- start="$T/start"
    follow
    quiet "$T/program.err"
    [ ! -e "$WHERE" ] || fail "$WHERE is on the disk"
    ;;
crash)
    # Without what leaves more than one state possible: nobody waits for MS_ASYNC, and a thread that stores during a sync point is there in part.
    without=async,race
    from=()
    [ "$place" = memory ] && without+=,zero,collapse,insert
    regions=$W/**
    start_remote
    ADDRESS=$REMOTE
    if [ "$strategy" = mirror ]; then
        WHERE=$W/far
        regions=$WHERE/**=mirror,order=$place
        strategy=auto
        without+=,collapse,insert,remove
        mkdir "$T/start"
        for i in 0 1; do
            head -c $((RANDOM * 60 + 1)) /dev/urandom >"$T/start/$i"
            memsync import "$T/start/$i" "${WHERE#/}/$i" >"$T/import.out" 2>&1 || fail "import: $(cat "$T/import.out")"
        done
        from=(start="$T/start" mirror=1)
    fi
    options=(without="$without")
    operations=${TEST_OPS:-600}
    first=$seed
    rounds=$(((rounds + 3) / 4))
    find_state() { # what the replica has, looked at while the remote is stopped
        rm -rf "$T/replica"
        mkdir -p "$T/replica"
        cp "$(replica "$WHERE")"/[01] "$T/replica/" 2>/dev/null || true
        cp "$T/progress" "$T/progress.then"
        FOUND=$("$exerciser" find "$WHERE" "$seed" "$operations" "${options[@]}" "${from[@]}" replica="$T/replica" progress="$T/progress.then" 2>"$T/found.out") ||
            fail "round $round ($fault, pause=$pause, seed $seed): the replica is no state of the program: $(<"$T/found.out")"
    }
    recover() { "$BUILD/memsync" recover "$STORE" >"$T/recover.out" 2>&1 || fail "round $round ($fault): memsync recover: $(cat "$T/recover.out")"; }
    kill_local() {
        local pid
        for pid in $(local_agents); do
            kill -KILL "$pid" 2>/dev/null || true
        done
    }
    read -ra faults <<<"${TEST_FAULTS:-program local remote local_remote program_local program_remote}"
    for ((round = 1; round <= rounds; round++)); do
        fault=${faults[RANDOM % ${#faults[@]}]}
        seed=$((first + round))
        pause=$((RANDOM % (operations - 50) + 1))
        delay=0.00$((RANDOM % 10))
        REMOTE=$ADDRESS
        rm -f "$T/progress"
        exerciser_start MEMSYNC_REGIONS="$regions" MEMSYNC_STRATEGY="$strategy" MEMSYNC_INTERVAL=off MEMSYNC_ON_LOSS=block MEMSYNC_TIMEOUT=3s MEMSYNC_ACK="${TEST_ACK:-durable}" -- "${from[@]}" pause=$pause progress="$T/progress"
        says
        [ "$WORD" = at ] || fail "round $round: it said '$WORD'"
        go_on
        sleep "$delay"
        case $fault in
        local*) kill_local ;;
        program*) kill -KILL "$PROGRAM_PID" 2>/dev/null || true ;;
        esac
        case $fault in
        program_local) kill_local ;;
        *remote)
            kill_remote
            recover
            find_state
            LISTEN=$ADDRESS start_remote
            ;;
        esac
        if [[ $fault == program* ]]; then
            wait "$PROGRAM" 2>/dev/null || true
            exec {IN}>&- {OUT}>&-
            stop_local
            stop_remote
            find_state
        else
            says
            [ "$WORD" = end ] || fail "round $round: it said '$WORD'"
            exerciser_end
            stop_local
            stop_remote
            find_state
            [ "$WHERE" != "$W" ] || same_tree
        fi
        say "round $round: $fault at $pause: state $FOUND"
        rm -rf "$T/start"
        mkdir "$T/start"
        if [ "$WHERE" = "$W" ]; then
            cp "$W/0" "$W/1" "$T/start/"
            from=(start="$T/start")
        else
            cp "$T/replica"/[01] "$T/start/"
        fi
        LISTEN=$ADDRESS start_remote
    done
    ;;
*) fail "no such mode: $mode" ;;
esac
say "$operations operations"
