#!/usr/bin/env bash
# Every command of the tool, against real agents: what it does, what it says, and its exit code: 0 done, 1 not so, 2 usage, 3 could not be done.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

cases=(run run_refuses status degraded diverged refused doctor ls export export_sparse import import_names verify rm recover sync watch stop file_store not_built usage help)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }

# gives CODE ARGUMENT...: memsync with these ends so; what it says is in $T/out and $T/err.
gives() {
    local code=0
    memsync "${@:2}" >"$T/out" 2>"$T/err" </dev/null || code=$?
    [ "$code" = "$1" ] || fail "memsync ${*:2}: exit code $code, not $1: $(cat "$T/out" "$T/err")"
}
# An error is one line that begins with the command.
says() { grep -q -- "$1" "$T/err" || fail "no '$1' in what it says: $(cat "$T/err")"; }
shows() { grep -q -- "$1" "$T/out" || fail "no '$1' in its output: $(cat "$T/out")"; }
# json EXPRESSION: true of what was printed, which is J.
json() {
    /usr/bin/python3 -c 'import json, sys; J = json.load(open(sys.argv[1])); sys.exit(0 if eval(sys.argv[2]) else 1)' "$T/out" "$1" ||
        fail "not so: $1: $(cat "$T/out")"
}
status_is() { # CODE STATE
    local code=0
    memsync status >"$T/out" 2>&1 || code=$?
    [ "$code" = "$1" ] && grep -qE "^${W#/}/data +$2 " "$T/out"
}
leased() { memsync ls --json >"$T/out" && /usr/bin/python3 -c 'import json, sys; sys.exit(0 if any(r["leased"] for r in json.load(sys.stdin)) else 1)' <"$T/out"; }
free() { ! leased; }
exported() { # is the region at the remote what the file is here
    memsync export "$region" "$T/exported" >/dev/null 2>&1 && cmp -s "$W/data" "$T/exported"
}
size=$((1 << 20)) region=${W#/}/data
random() { head -c "$2" /dev/urandom >"$1"; }

start_remote
case $1 in
run)
    for code in 0 7 255; do
        gives "$code" run --region "$W/**" -- sh -c "exit $code"
    done
    gives 137 run --region "$W/**" -- sh -c 'kill -KILL $$'
    # Before what is preloaded already, and the rest of the environment as it was.
    other=$(ldd /usr/bin/python3 | sed -n 's/.*libm\.so[^ ]* => \([^ ]*\).*/\1/p')
    [ -n "$other" ] || skip "no second library to preload"
    LD_PRELOAD=$other gives 0 run --region "$W/**" --ack received -- sh -c 'echo "$LD_PRELOAD $MEMSYNC_ACK $MEMSYNC_REGIONS $MEMSYNC_STRATEGY"'
    [ "$(cat "$T/out")" = "$BUILD/libmemsync_preload.so:$other received $W/** " ] || fail "the program's variables: $(cat "$T/out")"
    cat >"$T/app.py" <<'PROGRAM'
import mmap, sys
f = open(sys.argv[1], "w+b")
f.truncate(8192)
m = mmap.mmap(f.fileno(), 8192)
m[5000] = 1
m.flush()
PROGRAM
    gives 0 run --region "$W/**" --explain -- /usr/bin/python3 "$T/app.py" "$W/data"
    says "$W/data matches the rule $W/\*\*: region $region"
    says "$W/data: 8192 bytes mapped for writing, tracked by"
    gives 0 run --region "$W/none=none;$W/**" --strategy hash --explain -- /usr/bin/python3 "$T/app.py" "$W/hashed"
    says "$W/hashed: .*hash"
    gives 0 run --region "$W/**" -- /usr/bin/python3 "$T/app.py" "$W/data2"
    [ ! -s "$T/err" ] || fail "it speaks without --explain: $(cat "$T/err")"
    stop_local
    stop_remote
    same_tree
    ;;
run_refuses) # before the program starts
    program=(-- touch "$T/started")
    gives 2 run --region 'relative/*' "${program[@]}"
    says "relative/\*.*absolute path"
    gives 2 run --region "$W/**=sideways" "${program[@]}"
    gives 2 run --region "$W/**,colour=red" "${program[@]}"
    gives 2 run --region "$W/**" --strategy magic "${program[@]}"
    gives 3 run --region "$W/**" --strategy fuse "${program[@]}"
    says "not built"
    gives 2 run --region "$W/**" --ack maybe "${program[@]}"
    gives 2 run --region "$W/**"
    gives 3 run --region "$W/**" -- "$T/no-such-program"
    says "$T/no-such-program cannot be run"
    [ ! -e "$T/started" ] || fail "the program was started all the same"
    ;;
status)
    gives 0 status
    shows "nothing is tracked"
    gives 0 status --json
    json 'J["regions"] == []'
    stepper_start "$W/data" $size
    stepped s 0 100000 1
    stepped m
    poll 10 status_is 0 synced || fail "status: $(cat "$T/out")"
    gives 0 status --json
    json "J['pid'] == $(local_agents)"
    json "len(J['regions']) == 1 and len(J['programs']) == 1"
    json "J['regions'][0]['name'] == '$region' and J['regions'][0]['path'] == '$W/data' and J['regions'][0]['size'] == $size"
    json "J['regions'][0]['state'] == 'synced' and J['regions'][0]['epoch'] >= 1 and J['regions'][0]['epoch'] == J['regions'][0]['remote_epoch']"
    # 17 bytes a page; the blocks of the first 25 pages, and whatever else was stored to
    json "J['regions'][0]['hash_bytes'] == $size // 4096 * 17 and 4096 <= J['regions'][0]['block_bytes'] <= $size // 32"
    json "J['block_bytes_most'] >= 1 << 20"
    gives 0 status
    shows MEMORY
    gives 0 status --json
    json "J['remotes'][0]['address'] == '$REMOTE' and J['remotes'][0]['state'] == 'up' and J['remotes'][0]['bytes_out'] > 100000"
    stepper_end
    ;;
degraded)
    stepper_start "$W/data" $size MEMSYNC_TIMEOUT=500ms
    stepped s 0 100000 1
    stepped m
    poll 10 status_is 0 synced || fail "status: $(cat "$T/out")"
    kill_remote
    poll 10 status_is 1 degraded || fail "status, without a link and with nobody who waits: $(cat "$T/out")"
    stepped s 0 100000 2
    stepped m
    poll 10 status_is 1 degraded || fail "status: $(cat "$T/out")"
    grep -q "^$region: degraded.*: no link for " "$T/out" || fail "it does not say why: $(cat "$T/out")"
    gives 1 status --json
    json "J['regions'][0]['state'] == 'degraded' and 'no link' in J['regions'][0]['reason']"
    json "J['remotes'][0]['state'] != 'up' and J['regions'][0]['lag_seconds'] > 0"
    MEMSYNC_TIMEOUT=1s gives 3 sync
    says "not at the remote yet"
    LISTEN=$REMOTE start_remote
    poll 20 status_is 0 synced || fail "it did not catch up: $(cat "$T/out")"
    stepper_end
    ;;
diverged | sync)
    stepper_start "$W/data" $size MEMSYNC_INTERVAL=off
    stepped s 0 300000 1
    stepped m
    cp "$W/data" "$T/synced"
    stepped s 200000 300000 2
    if [ "$1" = sync ]; then # of a program that runs
        gives 0 sync "$region"
        exported || fail "memsync sync returned, and the remote has something else"
        stepped s 1000 1000 3
        gives 0 sync
        exported || fail "memsync sync returned, and the remote has something else"
        gives 3 sync no/such
        says "no region of this name"
        gives 2 sync a/../b
        cp "$W/data" "$T/synced"
        stepped s 600000 300000 4
    fi
    kill -KILL "$STEPPER_PID"
    wait "$STEPPER" || true
    poll 10 status_is 1 diverged || fail "status after the program was killed: $(cat "$T/out")"
    grep -q "^$region: diverged" "$T/out" || fail "no line about it: $(cat "$T/out")"
    gives 0 export "$region" "$T/before"
    same "$T/synced" "$T/before"
    gives 0 sync
    poll 5 status_is 0 synced || fail "status after memsync sync: $(cat "$T/out")"
    exported || fail "the remote has something else after memsync sync"
    stop_local
    gives 3 sync
    says "no agent is running"
    ;;
refused) # the remote has another region of this name
    random "$T/file" 5000
    gives 0 import "$T/file" "$region"
    stepper_start "$W/data" $size
    stepped s 0 100000 1
    stepped m
    poll 10 status_is 1 refused || fail "status: $(cat "$T/out")"
    grep -q "^$region: refused since 2.*initial=push" "$T/out" || fail "no reason, or no way out of it: $(cat "$T/out")"
    stepper_end
    gives 0 export "$region" "$T/copy"
    same "$T/file" "$T/copy"
    ;;
doctor)
    gives 0 doctor --remote "$REMOTE" "$W"
    shows "^good  remote  *$REMOTE answers"
    gives 0 doctor --json "$W"
    json 'all(set(c) == {"check", "verdict", "found", "advice"} and c["verdict"] in ("good", "note") for c in J)'
    json '{"kernel", "tracking", "strategy auto", "local agent", "remote"} <= {c["check"] for c in J}'
    gives 1 doctor --json --remote 127.0.0.1:1 "$W"
    json '[c["check"] for c in J if c["verdict"] == "bad"] == ["remote"]'
    gives 1 doctor "$W" "$T/nowhere"
    shows "^bad .*$T/nowhere"
    [ -z "$(ls -A "$W")" ] || fail "it leaves something: $(ls -A "$W")"
    ;;
ls)
    gives 0 ls
    [ ! -s "$T/out" ] || fail "an empty store lists: $(cat "$T/out")"
    random "$T/file" 12345
    gives 0 import "$T/file" some/region
    stepper_start "$W/data" $size
    stepped s 0 100000 1
    stepped m
    gives 0 ls
    shows "^$region  *1.0 MiB .*$(hostname)\$"
    shows '^some/region  *12 KiB .*-$'
    gives 0 ls --json
    json "sorted((r['name'], r['size'], r['leased']) for r in J) == sorted([('$region', $size, True), ('some/region', 12345, False)])"
    stepper_end
    gives 3 ls --remote 127.0.0.1:1
    says "127.0.0.1:1 cannot be reached"
    gives 3 ls --remote nonsense
    ;;
export) # one epoch, whole, while a program goes from one to the next
    writer=$BUILD/tests/faults/epochwriter
    shim -- "$writer" write "$W" mdf >"$T/said" 2>"$T/program.err" &
    writer_pid=$!
    acked() { grep -c '^acked' "$T/said" >/dev/null; }
    poll 30 acked || fail "no epoch was acknowledged"
    mkdir "$T/exports"
    for i in 1 2 3; do
        least=$(sed -n 's/^acked //p' "$T/said" | tail -n 1)
        say "what was there before" >"$T/exports/a"
        gives 0 export "${W#/}/a" "$T/exports/a"
        at=$("$writer" file "$T/exports" a) || fail "what was exported is no epoch"
        [ "$at" -ge "$least" ] || fail "epoch $at was exported after $least was acknowledged"
    done
    touch "$T/stop"
    wait $writer_pid || fail "the program ended with $?"
    gives 0 export "${W#/}/a" "$T/exports/a"
    same "$W/a" "$T/exports/a"
    say untouched >"$T/kept"
    gives 1 export no/such "$T/kept"
    says "no such region"
    [ "$(cat "$T/kept")" = untouched ] || fail "an export that failed has replaced its file"
    gives 3 export "${W#/}/a" "$T/no/such/directory"
    gives 2 export ../a "$T/kept"
    [ -z "$(find "$T" -name '*.tmp-*')" ] || fail "it leaves $(find "$T" -name '*.tmp-*')"
    ;;
export_sparse)
    truncate -s 300M "$W/data"
    stepper_start "$W/data" $((300 << 20))
    stepped s 0 5000 1
    stepped s 200000000 100000 2
    stepped m
    stepper_end
    gives 0 export "$region" "$T/copy"
    shows "$region: epoch .*(314572800 bytes)"
    [ "$(stat -c %s "$T/copy")" = 314572800 ] || fail "its size: $(stat -c %s "$T/copy")"
    [ "$(du -k "$T/copy" | cut -f1)" -lt 1024 ] || fail "zero pages take room: $(du -k "$T/copy")"
    same "$W/data" "$T/copy"
    ;;
import)
    random "$T/file" 3000001
    gives 0 import "$T/file" some/region
    gives 0 verify some/region --file "$T/file"
    shows "^same: 733 pages, epoch 1\$"
    random "$T/other" 500000
    gives 3 import "$T/other" some/region
    says "exists already.*--force"
    gives 0 export some/region "$T/copy"
    same "$T/file" "$T/copy"
    gives 0 import --force "$T/other" some/region
    gives 0 export some/region "$T/copy"
    same "$T/other" "$T/copy"
    stepper_start "$W/data" $size
    stepped s 0 100000 1
    stepped m
    gives 3 import --force "$T/other" "$region"
    says "being written by"
    exported || fail "an import that was refused has changed the region"
    stepper_end
    gives 3 import "$T/no-such-file" x
    gives 3 import "$T" x
    stop_remote
    same "$T/other" "$STORE/some/region"
    ;;
import_names)
    random "$T/file" 5000
    gives 0 import "$T/file" a
    gives 3 import "$T/file" a/b
    says "a/b and a cannot both be regions"
    gives 0 import "$T/file" b/c
    gives 3 import "$T/file" b
    for name in ../x a/../b /x x/ x//y . .memsync/x "$(printf '%0256d' 0)"; do
        gives 2 import "$T/file" "$name"
        says "is no name for a region"
    done
    gives 0 import "$T/file" "$(printf '%0255d' 0)"
    gives 0 ls --json
    json "sorted(r['name'] for r in J) == sorted(['a', 'b/c', '0' * 255])"
    [ ! -e "$T/x" ] || fail "a name has left the store"
    ;;
verify)
    stepper_start "$W/data" $size
    stepped s 0 $size 1
    stepped m
    gives 0 verify "$region"
    shows "^same: 256 pages, epoch"
    stepped s 300000 5000 2 # not synced: it is published first
    gives 0 verify "$region"
    stepper_end
    stop_local
    gives 3 verify "$region"
    says "--file"
    gives 0 verify --json --file "$W/data" "$region"
    json 'J["same"] is True and J["different_pages"] == [] and J["size"] == J["remote_size"]'
    # One page of the file here, by a program that nobody sees.
    printf x | dd of="$W/data" bs=1 seek=$((7 * 4096 + 5)) conv=notrunc status=none
    gives 1 verify --file "$W/data" "$region"
    shows "^different: pages 7 (epoch"
    gives 1 verify --json --file "$W/data" "$region"
    json 'J["same"] is False and J["different_pages"] == [7]'
    # Another content at the remote, then another size.
    cp "$W/data" "$T/file"
    printf xyz | dd of="$T/file" bs=1 seek=$((20 * 4096 - 1)) conv=notrunc status=none
    poll 15 free || fail "the lease is held still"
    gives 0 import --force "$T/file" "$region"
    gives 1 verify --file "$W/data" "$region"
    shows "^different: pages 19-20 (epoch 1,"
    say more >>"$W/data"
    gives 1 verify --file "$W/data" "$region"
    shows "^different: 1048581 bytes here, 1048576 there; pages 19-20"
    gives 1 verify --file "$W/data" no/such
    gives 3 verify --file "$W/nowhere" "$region"
    ;;
rm)
    stepper_start "$W/data" $size
    stepped s 0 100000 1
    stepped m
    gives 3 rm "$region"
    says "being written by.*--force"
    exported || fail "it was removed or changed all the same"
    stepper_end
    stop_local
    poll 15 free || fail "the lease is held still"
    gives 0 rm "$region"
    gives 1 rm "$region"
    says "no region"
    gives 1 export "$region" "$T/copy"
    gives 2 rm ../x
    [ ! -e "$(replica "$W/data")" ] || fail "the plain file is there still"
    # By force, from under a writer.
    stepper_start "$W/other" $size
    stepped s 0 100000 1
    stepped m
    gives 0 rm --force "${W#/}/other"
    gives 1 export "${W#/}/other" "$T/copy"
    stepper_end
    ;;
recover)
    stepper_start "$W/data" 8000000 MEMSYNC_INTERVAL=off MEMSYNC_TIMEOUT=500ms
    for i in 1 2 3; do
        stepped s 0 8000000 "$i"
        stepped m
    done
    kill_remote
    gives 0 recover "$STORE"
    shows "$STORE: 1 regions, the files are exact"
    same "$W/data" "$(replica "$W/data")"
    gives 0 recover "file:$STORE" # again: nothing to do
    same "$W/data" "$(replica "$W/data")"
    LISTEN=$REMOTE start_remote
    gives 3 recover "$STORE"
    says "in use by another agent"
    gives 3 recover "$T"
    says "is no store"
    stepper_end
    ;;
watch) # nothing is preloaded here
    random "$W/data" 100000
    MEMSYNC_INTERVAL=200ms gives 0 watch "$W/data"
    shows "^watching $W/data as $region at $REMOTE"
    poll 20 exported || fail "the file did not arrive"
    printf 'a change' | dd of="$W/data" bs=1 seek=50000 conv=notrunc status=none
    poll 20 exported || fail "a change did not arrive"
    /usr/bin/python3 -c 'import mmap, sys; f = open(sys.argv[1], "r+b"); m = mmap.mmap(f.fileno(), 0); m[12345] ^= 1' "$W/data"
    poll 20 exported || fail "a store through a mapping did not arrive"
    random "$T/more" 50000
    cat "$T/more" >>"$W/data"
    poll 20 exported || fail "what was appended did not arrive"
    gives 0 verify "$region"
    random "$W/second" 5000
    gives 0 watch --name other/name "$W/second"
    MEMSYNC_INTERVAL=off gives 2 watch "$W/data"
    gives 2 watch --name ../x "$W/data"
    gives 3 watch "$W"
    says "no regular file"
    gives 3 watch "$W/nowhere"
    stop_local
    gives 0 export other/name "$T/copy"
    same "$W/second" "$T/copy"
    stop_remote
    same "$W/data" "$(replica "$W/data")"
    ;;
stop) # with what no sync point has published yet
    gives 0 stop
    shows "no agent is running"
    stepper_start "$W/data" $size MEMSYNC_INTERVAL=off
    agent=$(local_agents)
    stepped s 0 300000 1
    gives 0 stop
    shows "agent $agent has stopped"
    exported || fail "what the program had stored is not at the remote"
    gone "$agent" || fail "it runs still"
    stepped s 200000 300000 2
    stepped m
    [ -n "$(local_agents)" ] || fail "the program's next sync point started no other agent"
    exported || fail "what was synced after it is not at the remote"
    stepper_end
    ;;
file_store) # served by nobody: an agent is started for as long as the command takes
    stop_remote
    random "$T/file" 100000
    REMOTE=file:$T/shelf
    gives 3 ls
    says "no store at $T/shelf"
    gives 0 import "$T/file" x
    gives 0 ls
    shows '^x  *98 KiB'
    gives 0 verify --file "$T/file" x
    gives 0 export x "$T/copy"
    same "$T/file" "$T/copy"
    no_agents() { [ -z "$(our_agents)" ]; }
    poll 10 no_agents || fail "the agent is there still"
    same "$T/file" "$T/shelf/x"
    # Served by the local agent of a program.
    stepper_start "$W/data" $size
    stepped s 0 100000 1
    stepped m
    gives 0 verify "$region"
    gives 0 export "$region" "$T/copy"
    same "$W/data" "$T/copy"
    gives 0 rm x
    stepper_end
    stop_local
    same "$W/data" "$T/shelf/$region"
    ;;
not_built)
    for command in top promote migrate; do
        gives 3 $command
        says "^memsync $command: not built"
        gives 3 $command some words
    done
    ;;
usage)
    gives 2
    gives 2 no-such-command
    says 'no command "no-such-command"'
    for words in 'run' 'status x' 'status --force' 'ls x' 'ls --remote' 'ls --bogus' 'export x' 'export a b c' 'import x' 'import a b --json' 'verify' 'verify a b' \
        'rm' 'recover' 'recover a b' 'sync a b' 'watch' 'watch a b' 'stop x' 'stop --json' 'doctor --force'; do
        gives 2 $words
        [ -s "$T/err" ] && [ ! -s "$T/out" ] || fail "memsync $words: an error belongs on standard error, and says something"
    done
    REMOTE=''
    for words in 'ls' 'export a b' 'import a b' 'rm a' "watch $TESTS/lib.sh"; do
        gives 2 $words
        says 'no remote.*MEMSYNC_REMOTE'
    done
    ;;
help)
    gives 0 --help
    overview=$(cat "$T/out")
    gives 0 --version
    shows '^memsync [0-9]'
    commands=$(sed -n 's/^  \([a-z]*\) .*/\1/p' <<<"$overview")
    [ "$(wc -w <<<"$commands")" = 16 ] || fail "commands: $commands"
    for command in $commands; do
        gives 0 "$command" --help
        shows "^usage: memsync $command"
        [ "$(wc -l <"$T/out")" -ge 3 ] || fail "memsync $command --help says nothing"
        [ ! -s "$T/err" ] || fail "memsync $command --help: $(cat "$T/err")"
    done
    # What nobody could read was not done.
    code=0
    memsync status >/dev/full 2>"$T/err" || code=$?
    [ "$code" = 3 ] || fail "status, whose output cannot be written: exit code $code"
    ;;
*) fail "no such case: $1" ;;
esac
