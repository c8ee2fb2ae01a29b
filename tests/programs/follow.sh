#!/usr/bin/env bash
# Readers that follow a region while another host writes it: each sees whole epochs only, and never goes back.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

cases=(epochs slow bounded two killed cut lost replaced)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }

paged=$BUILD/tests/programs/paged
start_remote
far=$W/far
pages=200 epochs=${EPOCHS:-40}
mkdir "$T/near"
"$paged" make "$T/near/f" $pages
# The writer is another host: an agent of its own, with an identity of its own.
writer() { SOCKET=$T/writer.sock shim XDG_STATE_HOME="$T/writer.state" MEMSYNC_INTERVAL=off MEMSYNC_REGIONS="$T/near/*,name=f" -- "$@"; }
reader() { shim MEMSYNC_REGIONS="$far/**=pull,follow,name=f${more:-}" MEMSYNC_LOG_FILE="$T/said.err" -- "$@"; }
published() { memsync ls --json 2>/dev/null | grep -q '"f"'; }
writer "$paged" publish "$T/near/f" 0 0
poll 10 published || fail "nothing was published"
# Each of the readers has seen several.
saw() { # FILE LEAST
    local n
    while read -r n; do
        [ "$n" -ge "$2" ] || fail "a reader saw $n epochs: $(cat "$1")"
    done <"$1"
    [ -s "$1" ] || fail "no reader has said anything"
}
view() {
    memsync status --json >"$T/status" || true
    /usr/bin/python3 -c 'import json, sys
for v in json.load(open(sys.argv[1]))["views"]:
    print(v["follows"], v["epoch"], v["fetched"])' "$T/status"
}

case $1 in
epochs)
    reader "$paged" follow "$far/f" "$epochs" 3 >"$T/seen" &
    follower=$!
    poll 10 eval '[ -n "$(view)" ]' || fail "nothing is open"
    writer "$paged" publish "$T/near/f" "$epochs" 100
    wait $follower || fail "exit $?"
    saw "$T/seen" 4
    view
    # What is the same in both is not fetched again: a quarter of it changes each time.
    read -r follows epoch fetched <<<"$(view | tail -n 1)"
    [ "$follows" = True ] && [ "$epoch" -gt "$epochs" ] && [ "$fetched" -lt $((epochs * pages * 4096 / 2)) ] || fail "status: $(cat "$T/status")"
    ;;
slow) # answers are always under way when the epoch changes
    start_relay --delay 20 --rate 1000000
    reader "$paged" follow "$far/f" "$epochs" 3 >"$T/seen" &
    follower=$!
    poll 10 eval '[ -n "$(view)" ]' || fail "nothing is open"
    REMOTE=$DIRECT writer "$paged" publish "$T/near/f" "$epochs" 100
    wait $follower || fail "exit $?"
    saw "$T/seen" 4
    ;;
bounded)
    more=,resident=4M
    reader "$paged" follow "$far/f" "$epochs" 3 >"$T/seen" &
    follower=$!
    poll 10 eval '[ -n "$(view)" ]' || fail "nothing is open"
    writer "$paged" publish "$T/near/f" "$epochs" 100
    wait $follower || fail "exit $?"
    saw "$T/seen" 4
    ;;
two)
    reader "$paged" follow "$far/f" "$epochs" 2 >"$T/seen1" &
    one=$!
    reader "$paged" follow "$far/f" "$epochs" 2 >"$T/seen2" &
    two=$!
    poll 10 eval 'grep -q "\"programs\": 2" <(memsync status --json)' || fail "two do not share it"
    writer "$paged" publish "$T/near/f" "$epochs" 50
    wait $one && wait $two || fail "one of them"
    saw "$T/seen1" 2
    saw "$T/seen2" 2
    ;;
killed)
    reader "$paged" follow "$far/f" "$epochs" 3 >"$T/seen" &
    follower=$!
    poll 10 eval '[ -n "$(view)" ]' || fail "nothing is open"
    writer "$paged" publish "$T/near/f" "$epochs" 100 &
    for _ in 1 2 3; do
        before=$(view | cut -d' ' -f2)
        poll 10 eval '[ "$(view | cut -d" " -f2)" -gt "${before:-0}" ]' || fail "it does not follow: $(view)"
        pid=$(/usr/bin/python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["pid"])' "$T/status")
        kill -9 "$pid"
        poll 10 eval '[ -n "$(view)" ]' || fail "no agent took over"
    done
    wait $follower || fail "exit $?"
    ;;
cut)
    start_relay
    reader "$paged" follow "$far/f" "$epochs" 3 >"$T/seen" &
    follower=$!
    poll 10 eval '[ -n "$(view)" ]' || fail "nothing is open"
    REMOTE=$DIRECT writer "$paged" publish "$T/near/f" "$epochs" 100 &
    for _ in 1 2 3; do
        before=$(view | cut -d' ' -f2)
        poll 10 eval '[ "$(view | cut -d" " -f2)" -gt "${before:-0}" ]' || fail "it does not follow: $(view)"
        relay down
        relay up
    done
    wait $follower || fail "exit $?"
    ;;
lost) # the link is down for so long that the remote has given the epoch back
    start_relay
    reader "$paged" follow "$far/f" "$epochs" 3 >"$T/seen" &
    follower=$!
    poll 10 eval '[ -n "$(view)" ]' || fail "nothing is open"
    relay down
    REMOTE=$DIRECT writer "$paged" publish "$T/near/f" "$epochs" 0
    from=$SECONDS
    poll 20 eval '[ $((SECONDS - from)) -gt 11 ]'
    relay up
    wait $follower || fail "exit $?"
    ;;
replaced) # it stays what it is, and says so
    pipes wait
    exec 7<>"$T/wait.in"
    reader /usr/bin/python3 -c 'import hashlib, sys
f = open(sys.argv[1], "rb")
f.read(1)
print("open", flush=True)
sys.stdin.readline()
f.seek(0)
print(hashlib.sha256(f.read()).hexdigest())' "$far/f" <"$T/wait.in" >"$T/got" &
    follower=$!
    poll 10 grep -q open "$T/got" || fail "not open"
    memsync rm --force f >&2 || fail "rm: $?"
    "$paged" make "$T/other" $pages 3
    memsync import "$T/other" f >&2 || fail "import: $?"
    poll 10 grep -q "another file of that name" "$T/said.err" || fail "nothing was said: $(cat "$T/said.err")"
    echo >&7
    wait $follower || fail "exit $?"
    [ "$(tail -n 1 "$T/got")" = "$(sha256sum <"$T/near/f" | cut -d' ' -f1)" ] || fail "it is another file"
    reader "$paged" check "$far/f" >"$T/version"
    [ "$(cat "$T/version")" = 3 ] || fail "opened again it is not the new one"
    ;;
esac
