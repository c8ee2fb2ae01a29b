#!/usr/bin/env bash
# Exports of foreign block device servers as remotes: programs unchanged, bytes compared with the server's own file.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

FAR=$T/far SERVER=''
mkdir "$FAR"
REMOTE="nbd+unix:///disk?socket=$T/nbd.sock"

answers() { timeout 5 nbdinfo --size "nbd+unix:///disk?socket=$T/nbd.sock" >/dev/null 2>&1; }
serve() { # COMMAND...: a server on $T/nbd.sock
    rm -f "$T/nbd.sock"
    "$@" >"$T/server.err" 2>&1 &
    SERVER=$!
    poll 10 answers || fail "the server does not answer: $*"
}
kit() { serve nbdkit -f -U "$T/nbd.sock" "$@"; }
qemu() { serve qemu-nbd -t -x disk -k "$T/nbd.sock" -e 8 --cache=writeback "$@"; }
unserve() {
    kill -KILL "$SERVER" 2>/dev/null || true
    wait "$SERVER" 2>/dev/null || true
}
image() { head -c $((24 << 20)) /dev/urandom >"$T/image"; cp "$T/image" "$T/before"; }
bytes() { timeout 60 nbdcopy --request-size=65536 "$REMOTE" - >"$T/there"; }
view() { shim MEMSYNC_REGIONS="$FAR/**=$1" -- "${@:2}"; }

read_all() {
    view pull sha256sum "$FAR/v" >"$T/sum"
    [ "$(cut -d' ' -f1 <"$T/sum")" = "$(sha256sum <"$T/before" | cut -d' ' -f1)" ] || fail "other bytes are read"
    stop_local
}
STORES="
import mmap, sys
f = open(sys.argv[1], 'r+b')
m = mmap.mmap(f.fileno(), 0)
for at in (5, 4096 * 7 + 1, len(m) // 2, len(m) - 3):
    m[at:at + 3] = b'abc'
m.flush()
m.close()
"
change() { /usr/bin/python3 -c "$STORES" "$1"; }
mirror_changes() {
    change "$T/before"
    view mirror /usr/bin/python3 -c "$STORES" "$FAR/v"
    stop_local
    bytes
    same "$T/before" "$T/there"
}
push_all() {
    head -c $((20 << 20)) /dev/urandom >"$W/f"
    truncate -s $((24 << 20)) "$W/f"
    shim MEMSYNC_REGIONS="$W/f=push,initial=push" -- /usr/bin/python3 -c "$STORES" "$W/f"
    stop_local
    bytes
    same "$W/f" "$T/there"
}
everything() {
    read_all
    mirror_changes
    push_all
}

case_nbdkit_file() {
    requires nbdkit nbdcopy
    image
    kit file "$T/image"
    everything
}
case_simple_replies() {
    requires nbdkit nbdcopy
    image
    kit --no-sr file "$T/image"
    everything
}
case_large_blocks() {
    requires nbdkit nbdcopy
    image
    kit --filter=blocksize-policy file "$T/image" blocksize-minimum=8192 blocksize-preferred=8192 blocksize-maximum=64k \
        blocksize-error-policy=error
    everything
}
# More connections are offered than are let in.
case_few_connections() {
    requires nbdkit nbdcopy
    image
    kit --filter=limit file "$T/image" limit=2
    read_all
}
case_qemu_raw() {
    requires qemu-nbd nbdcopy
    image
    qemu -f raw "$T/image"
    everything
}
case_qemu_qcow2() {
    requires qemu-nbd qemu-img nbdcopy
    image
    qemu-img convert -O qcow2 "$T/image" "$T/q"
    qemu -f qcow2 "$T/q"
    everything
}
case_sparse() {
    requires nbdkit nbdcopy
    kit --filter=log sparse-random 1G seed=7 percent=0.1 logfile="$T/log"
    timeout 60 nbdcopy "$REMOTE" - | sha256sum | cut -d' ' -f1 >"$T/expected"
    : >"$T/log"
    LIMIT=30 view pull sha256sum "$FAR/v" | cut -d' ' -f1 >"$T/sum"
    same "$T/expected" "$T/sum"
    /usr/bin/python3 -c "
import re, sys
read = sum(int(m[1], 16) for m in re.finditer(r' Read id=\d+ offset=0x\w+ count=0x(\w+)', open(sys.argv[1]).read()))
print(read >> 20, 'MiB read')
sys.exit(not 0 < read < 128 << 20)" "$T/log" || fail "the holes are read"
}
case_read_only() {
    requires nbdkit nbdcopy
    image
    kit -r file "$T/image"
    read_all
    ! view mirror /usr/bin/python3 -c "$STORES" "$FAR/v" 2>"$T/refused" || fail "a read-only export is written to"
    grep -q 'for reading only' "$T/refused" || fail "it is not said why: $(cat "$T/refused")"
    same "$T/before" "$T/image"
}
case_too_large() {
    requires nbdkit nbdcopy
    image
    kit file "$T/image"
    truncate -s $((25 << 20)) "$W/f"
    shim MEMSYNC_TIMEOUT=3 MEMSYNC_REGIONS="$W/f=push,initial=push" -- /usr/bin/python3 -c "$STORES" "$W/f" \
        2>"$T/refused" || true
    memsync status >"$T/status" || true
    grep -q "no atomic epochs" "$T/status" || fail "it is not said that there are no epochs: $(cat "$T/status")"
    grep -q 'holds 25165824 bytes' "$T/status" "$T/refused" || fail "it is not said that it does not fit: $(cat "$T/status" "$T/refused")"
}
# The server dies, again and again, while an epoch of 16 MiB is written: what is under way is lost, and with it all that it
# has answered and not flushed, which is in the cache of that server and in no file. The client says it again to the next.
case_server_restarts() {
    requires nbdkit nbdcopy
    head -c $((24 << 20)) /dev/urandom >"$T/image"
    cp "$T/image" "$T/before"
    local slow=(--filter=log --filter=delay --filter=cache file "$T/image" logfile="$T/log" cache=writeback wdelay=20ms)
    kit "${slow[@]}"
    view mirror /usr/bin/python3 -c "
import mmap, sys
f = open(sys.argv[1], 'r+b')
m = mmap.mmap(f.fileno(), 0)
m[:4] = b'once'
m.flush()
open(sys.argv[2], 'w').close()
for at in range(0, 16 << 20, 8192):
    m[at + 100:at + 105] = b'again'
m.flush()
" "$FAR/v" "$T/first" &
    local program=$! kills asked answered
    poll 20 test -e "$T/first" || fail "the first epoch is not through"
    : >"$T/log"
    for kills in 1 2 3; do
        poll 20 answered_some || fail "no writes at kill $kills: $(tail -n 3 "$T/log")"
        unserve
        asked=$(grep -c ' Write ' "$T/log") answered=$(grep -c '\.\.\.Write ' "$T/log") || true
        say "kill $kills: $asked writes asked for, $answered answered"
        : >"$T/log"
        kit "${slow[@]}"
    done
    unserve
    kit file "$T/image"
    wait "$program" || fail "the program failed"
    /usr/bin/python3 -c "
import sys
f = open(sys.argv[1], 'r+b')
f.write(b'once')
for at in range(0, 16 << 20, 8192):
    f.seek(at + 100)
    f.write(b'again')
" "$T/before"
    stop_local
    bytes
    same "$T/before" "$T/there"
    same "$T/before" "$T/image"
}
answered_some() { [ "$(grep -c '\.\.\.Write ' "$T/log")" -ge 100 ]; }
# The agent dies while it writes an epoch; the next one compares, and the program's bytes win.
case_agent_killed() {
    requires qemu-nbd nbdcopy
    image
    qemu -f raw "$T/image"
    view mirror /usr/bin/python3 -c "
import mmap, sys, os
f = open(sys.argv[1], 'r+b')
m = mmap.mmap(f.fileno(), 0)
open(sys.argv[2], 'w').close()
for at in range(0, len(m), 8192):
    m[at:at + 4] = b'kill'
m.flush()
" "$FAR/v" "$T/first" 2>>"$T/program.err" &
    local program=$! agent
    poll 20 test -e "$T/first" || fail "the program does not begin"
    agent=$(local_agents)
    poll 20 changed || fail "nothing is written"
    kill -KILL $agent
    wait "$program" || fail "the program failed: $(cat "$T/program.err")"
    /usr/bin/python3 -c "
import mmap, sys
f = open(sys.argv[1], 'r+b')
m = mmap.mmap(f.fileno(), 0)
for at in range(0, len(m), 8192):
    m[at:at + 4] = b'kill'
" "$T/before"
    stop_local
    bytes
    same "$T/before" "$T/there"
}
changed() { ! cmp -s "$T/before" "$T/image"; }
# An agent of its own over the export, for others.
case_store() {
    requires nbdkit nbdcopy
    image
    kit file "$T/image"
    start_remote "nbd+unix:///disk?socket=$T/nbd.sock"
    memsync ls >"$T/ls"
    grep -q disk "$T/ls" || fail "it is not listed: $(cat "$T/ls")"
    memsync export disk "$T/exported" >"$T/export.out" || fail "export: $(cat "$T/export.out")"
    same "$T/before" "$T/exported"
    stop_remote
}

cases="nbdkit_file simple_replies large_blocks few_connections qemu_raw qemu_qcow2 sparse read_only too_large server_restarts agent_killed store"
[ "${1:?a case, or list}" = list ] && { printf '%s\n' $cases; exit 0; }
"case_$1"
