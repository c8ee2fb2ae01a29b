#!/usr/bin/env bash
# What goes over the wire for what changed: packed where that pays, and only where bytes leave this host.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

cases=(text/map text/write random/map random/write small import moved/map/file moved/map/memory moved/write/file moved/write/memory moved/write/here damaged/touch damaged/insert)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }
requires lz4
size=$((8 << 20))

# went STEP: how many bytes went for it; wire KIND HOW STEP... takes the steps
went() { sed -n "s/^$1 //p" "$T/went" | tail -n 1; }
wire() {
    shim -- /usr/bin/python3 "$TESTS/programs/lib/wire.py" "$BUILD/memsync" "$W/data" "$@" >"$T/went" 2>>"$T/program.err" || fail "the program: $(cat "$T/program.err")"
    cat "$T/went"
}
end_all() {
    stop_local
    stop_remote
    quiet "$T/program.err"
    same_tree
}
# at_most BYTES LIMIT WHAT
at_most() { [ "$1" -le "$2" ] || fail "$3: $1 bytes went, not at most $2"; }
at_least() { [ "$1" -ge "$2" ] || fail "$3: only $1 bytes went, not at least $2"; }
# What lz4 -1 makes of a file's blocks of as many bytes as a frame holds.
lz4_bytes() {
    local block total=0
    mkdir "$T/blocks"
    split -b 61440 "$1" "$T/blocks/"
    for block in "$T/blocks"/*; do
        total=$((total + $(lz4 -1 -c <"$block" 2>/dev/null | wc -c)))
    done
    rm -r "$T/blocks"
    say "$total"
}

case $1 in
text/* | random/*)
    IFS=/ read -r kind how <<<"$1"
    start_remote
    wire "$kind" "$how"
    if [ "$kind" = text ]; then
        lz4=$(lz4_bytes "$W/data")
        say "lz4 -1: $lz4"
        at_most "$lz4" $((size * 3 / 4)) "lz4 -1: this is no test"
        at_most "$(went make)" $((lz4 + size / 61440 * 60 + 4096)) text # 60 bytes a frame: its header and table
    else
        at_least "$(went make)" $size "random data"
        at_most "$(went make)" $((size + size / 100)) "random data"
    fi
    end_all
    # The same over a socket pair: not packed.
    rm "$W/data"
    REMOTE=file:$T/other wire "$kind" "$how"
    at_least "$(went make)" $size "a remote on this host"
    stop_local
    same "$W/data" "$T/other/${W#/}/data"
    ;;
small) # one page in which 64 bytes changed goes as its blocks
    start_remote
    wire text map touch touch
    at_most "$(went touch)" 600 "64 bytes"
    end_all
    ;;
moved/*) # random, so that packing cannot be what saves
    IFS=/ read -r _ how store <<<"$1"
    case $store in
    file) start_remote ;;
    memory) start_remote mem: ;;
    here) REMOTE=file:$T/other ;;
    esac
    wire random "$how" insert insert remove swap twice touch echo insert
    for step in insert remove swap twice; do
        at_most "$(went $step)" $((size / 20)) "$step"
    done
    at_most "$(went touch)" 600 "64 bytes after moves"
    at_most "$(went echo)" 6000 "a page that became another's new content" # which nothing has to move from yet
    stop_local
    case $store in
    file)
        stop_remote
        same_tree
        ;;
    memory)
        memsync export "${W#/}/data" "$T/exported" >/dev/null
        same "$W/data" "$T/exported"
        stop_remote
        ;;
    here) same "$W/data" "$T/other/${W#/}/data" ;;
    esac
    quiet "$T/program.err"
    ;;
damaged/*) # the remote finds that a page does not come out: whole pages go, and later ones rest on them again
    step=${1#*/}
    start_remote
    REPLICA=$(replica "$W/data") wire text map touch verify damage=1 "$step" touch "$step"
    at_most "$(went touch)" 600 "64 bytes after a damaged page"
    [ "$step" = touch ] || at_most "$(went insert)" $((size / 20)) "a moved page after a damaged one"
    end_all
    ;;
import)
    start_remote
    wire text write
    stop_local
    start_relay
    memsync import "$W/data" again >"$T/import.out" || fail "import: $(cat "$T/import.out")"
    relay count
    relay_heard 10 || fail "the relay does not answer"
    read -r _ up _ <<<"$HEARD"
    REMOTE=$DIRECT
    memsync export again "$T/again" >/dev/null
    at_most "$up" $((size * 3 / 4)) import
    same "$W/data" "$T/again"
    stop_remote
    ;;
*) fail "no case $1" ;;
esac
