#!/usr/bin/env bash
# Regions as network block devices, as the usual tools see them; and what must not happen.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"
PATH=/usr/bin:$PATH # nbdsh takes the first python3 that it finds

NBD='' DEVICE='' SIZE=$((64 << 20))
nbd_ready() {
    NBD=$(sed -n 's/^listening nbd \(127.*\)/\1/p' "$T/remote.out")
    [ -n "$NBD" ]
}
start() { # an agent whose region `disk` is $T/image
    start_remote "${1:-file:$STORE}" --nbd 127.0.0.1:0 --nbd "unix:$T/nbd.sock"
    poll 10 nbd_ready || fail "no line says where block devices are served"
    DEVICE=nbd://$NBD/disk
}
# 8 MiB of data, a hole, and 12345 bytes more at the end.
image() {
    head -c 8388608 /dev/urandom >"$T/image"
    truncate -s $((SIZE - 12345)) "$T/image"
    head -c 12345 /dev/urandom >>"$T/image"
}
imported() {
    image
    start "$@"
    memsync import "$T/image" disk >"$T/import.out" || fail "import: $(cat "$T/import.out")"
}
io() { timeout 60 qemu-io -f raw "$@" >"$T/io.out" 2>&1 || fail "qemu-io $*: $(cat "$T/io.out")"; }
epoch() { memsync ls | awk '$1 == "disk" { print $(NF - 2) }'; }
stored() { # after a clean stop the region's file is exact
    stop_remote
    same "$1" "$STORE/disk"
}
python() { timeout 60 /usr/bin/python3 "$TESTS/interop/nbdpeer.py" "$@" || fail "nbdpeer.py $*"; }

case_info() {
    requires nbdinfo
    imported
    timeout 20 nbdinfo "$DEVICE" >"$T/info"
    grep -q "export-size: $SIZE " "$T/info" && grep -q 'can_multi_conn: true' "$T/info" && grep -q 'is_read_only: false' "$T/info" || fail "$(cat "$T/info")"
    grep -q 'description: epoch 1 of ' "$T/info" || fail "no description: $(cat "$T/info")"
    memsync import "$T/image" more/disk >/dev/null
    timeout 20 nbdinfo --list "nbd+unix:///?socket=$T/nbd.sock" >"$T/info"
    grep -q 'export="disk"' "$T/info" && grep -q 'export="more/disk"' "$T/info" || fail "$(cat "$T/info")"
    timeout 20 nbdinfo --map "$DEVICE" >"$T/map"
    awk '$4 == "data" { d += $2 } $4 == "hole,zero" { h += $2 } END { exit !(d + h == '$SIZE' && d >= 8388608 + 12345 && d < 8388608 + 65536) }' "$T/map" ||
        fail "the map: $(cat "$T/map")"
    ! timeout 20 nbdinfo "nbd://$NBD/none" >"$T/info" 2>&1 || fail "a region that is not there was served"
    ! timeout 20 nbdinfo "nbd://$NBD/" >"$T/info" 2>&1 || fail "a default export, of two regions"
    memsync rm more/disk >/dev/null
    timeout 20 nbdinfo "nbd://$NBD/" | grep -q "export-size: $SIZE " || fail "the only region is no default export"
}

case_copy() {
    requires nbdcopy
    local store
    for store in "file:$STORE" mem:; do
        imported "$store"
        timeout 60 nbdcopy "$DEVICE" "$T/out"
        same "$T/image" "$T/out"
        head -c "$SIZE" /dev/urandom >"$T/new"
        timeout 60 nbdcopy --flush "$T/new" "nbd+unix:///disk?socket=$T/nbd.sock"
        timeout 60 nbdcopy --connections=1 "$DEVICE" "$T/out"
        same "$T/new" "$T/out"
        timeout 60 nbdcopy --synchronous "$DEVICE" "$T/out"
        same "$T/new" "$T/out"
        memsync export disk "$T/exported" >/dev/null
        same "$T/new" "$T/exported"
        stop_remote
    done
    rm -rf "$STORE"
    imported
    timeout 60 nbdcopy --flush "$T/new" "$DEVICE"
    stored "$T/new"
}

case_qemu() {
    requires qemu-img qemu-io
    imported
    timeout 20 qemu-img info "$DEVICE" | grep -q "virtual size: 64 MiB" || fail "qemu-img info"
    timeout 60 qemu-img compare -f raw -F raw "$T/image" "$DEVICE" || fail "qemu-img compare"
    timeout 60 qemu-img map --output=json -f raw "$DEVICE" >"$T/map"
    grep -q '"zero": true' "$T/map" && grep -q '"data": true' "$T/map" || fail "qemu-img map: $(cat "$T/map")"
    cp "$T/image" "$T/model"
    local commands=(-c 'write -P 0x5a 4097 10000' -c 'write -P 1 -f 0 512' -c 'write -z 1M 1M' -c 'write -z -u 2M 1M' -c 'discard 4M 2M'
        -c 'write -P 7 5M 4k' -c 'aio_write -P 3 8M 1M' -c 'aio_write -P 4 9M 300k' -c aio_flush -c "write -P 9 $((SIZE - 3)) 3" -c flush)
    io "${commands[@]}" -c 'read -P 0x5a 4097 10000' -c 'read -P 0 1M 2M' -c 'read -P 7 5M 4k' -c 'read -P 3 8M 1M' "$DEVICE"
    # A raw file keeps what is discarded or not; ours reads as zeros.
    io "${commands[@]}" "$T/model"
    io -c 'write -z 4M 1M' -c "write -z $((5 * 1048576 + 4096)) $((1048576 - 4096))" "$T/model"
    timeout 60 qemu-img compare -f raw -F raw "$T/model" "$DEVICE" || fail "not what was written"
    timeout 20 qemu-img map --output=json -f raw "$DEVICE" | grep -q '"start": 2097152, "length": 1048576, .*"zero": true' || fail "no hole was made"
    # The writer's own state is mapped too.
    io -c 'write -z 3M 1M' -c 'write -P 1 3M 4k' -c 'map' "$DEVICE"
    timeout 60 qemu-img convert -n -f raw -O raw "$T/image" "$DEVICE"
    timeout 60 qemu-img convert -f raw -O qcow2 "$DEVICE" "$T/out.qcow2"
    timeout 60 qemu-img compare -f raw -F qcow2 "$T/image" "$T/out.qcow2" || fail "qemu-img convert"
    stored "$T/image"
}

case_fio() {
    requires fio
    fio --enghelp=nbd >/dev/null 2>&1 || skip "fio has no nbd engine"
    imported
    local rw
    for rw in randwrite write; do
        timeout 100 fio --name=v --ioengine=nbd --uri="$DEVICE" --rw=$rw --bs=4k --size=24M --iodepth=32 --fsync=100 --verify=crc32c --do_verify=1 \
            --verify_fatal=1 --randrepeat=1 >"$T/fio" 2>&1 || fail "$(tail -n 20 "$T/fio")"
    done
    timeout 100 fio --name=m --ioengine=nbd --uri="$DEVICE" --rw=randrw --bsrange=512-96k --size=24M --iodepth=16 --verify=crc32c --verify_fatal=1 >"$T/fio" 2>&1 ||
        fail "$(tail -n 20 "$T/fio")"
    memsync verify disk >"$T/verify" 2>&1 || true
}

case_shell() {
    requires nbdsh
    imported
    timeout 60 nbdsh -u "$DEVICE" -c - >"$T/shell" 2>&1 <<'PY' || fail "$(cat "$T/shell")"
def refused(number, f):
    try:
        f()
    except nbd.Error as e:
        assert e.errno == number, (e.errno, number)
        return
    raise AssertionError("not refused")
h.set_strict_mode(0)
size = h.get_size()
h.pwrite(b'a' * 100, 1000)
assert h.pread(100, 1000) == b'a' * 100, "a writer reads what it wrote"
h.pwrite(b'b' * 10, 1050, nbd.CMD_FLAG_FUA)
assert h.pread(100, 1000, nbd.CMD_FLAG_DF) == b'a' * 50 + b'b' * 10 + b'a' * 40
h.zero(20, 1000)
h.trim(20, 1080)
h.zero(65536, 131072, nbd.CMD_FLAG_NO_HOLE)
h.zero(65536, 131072 + 65536, nbd.CMD_FLAG_FAST_ZERO)
refused("ENOTSUP", lambda: h.zero(65536, 131072, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO))
assert h.pread(100, 1000) == bytes(20) + b'a' * 30 + b'b' * 10 + b'a' * 20 + bytes(20)
h.flush()
h.cache(1 << 20, 0)
refused("EINVAL", lambda: h.pread(1, size))
refused("EINVAL", lambda: h.pread(2, size - 1))
refused("ENOSPC", lambda: h.pwrite(b'xx', size - 1))
refused("EINVAL", lambda: h.trim(2, size - 1))
refused("EINVAL", lambda: h.pread(1, 0, 1 << 15))
assert h.pread(1, size - 1) is not None, "the connection lives"
seen = []
h.pread_structured(1 << 20, 16 << 20, lambda data, offset, status, err: seen.append(status))
assert nbd.READ_HOLE in seen, seen
big = h.pread(32 << 20, 0)
assert len(big) == 32 << 20
handles = [h.aio_pread(nbd.Buffer(4096), i * 8192) for i in range(1000)]
while h.aio_in_flight():
    h.poll(-1)
for x in handles:
    assert h.aio_command_completed(x)
h.pwrite(bytes(range(256)) * (32 << 12), 0)
h.shutdown()
PY
    timeout 60 nbdsh -c 'h.set_handshake_flags(0)' -c 'h.set_request_structured_replies(False)' -c "h.connect_uri('$DEVICE')" \
        -c 'assert h.pread(512, 0) == bytes(range(256)) * 2 and not h.can_df()' -c 'assert len(h.pread(3 << 20, 4096)) == 3 << 20' -c 'h.pwrite(b"x", 0)' -c 'h.flush()' ||
        fail "simple replies"
    timeout 60 nbdsh -c 'h.set_opt_mode(True)' -c "h.connect_uri('nbd://$NBD')" -c 'h.set_export_name("disk"); h.opt_info(); assert h.get_size() == 64 << 20' \
        -c 'names = []; h.opt_list(lambda n, d: names.append(n)); assert names == ["disk"], names' -c 'h.opt_abort()' || fail "options"
}

case_fuse() {
    requires nbdfuse
    [ -c /dev/fuse ] || { say "SKIP: there is no /dev/fuse"; exit 77; }
    imported
    mkdir "$T/mnt"
    nbdfuse "$T/mnt/disk" "$DEVICE" 2>"$T/fuse.err" &
    mounted+=("$T/mnt")
    fused() { mountpoint -q "$T/mnt" && [ -s "$T/mnt/disk" ]; }
    poll 10 fused || { mounted=(); say "SKIP: no FUSE mounts here: $(head -n 1 "$T/fuse.err")"; exit 77; }
    same "$T/image" "$T/mnt/disk"
    printf hello | dd of="$T/mnt/disk" bs=1 seek=70000 conv=notrunc,fsync status=none
    printf hello | dd of="$T/image" bs=1 seek=70000 conv=notrunc status=none
    fusermount3 -u "$T/mnt" || umount "$T/mnt"
    mounted=()
    timeout 60 nbdcopy "$DEVICE" "$T/out"
    same "$T/image" "$T/out"
}

# Readers see what is durable, writers their own; one client writes at a time, and gives way when it goes.
case_writers() {
    requires nbdsh
    imported
    timeout 100 nbdsh -c "unix = 'nbd+unix:///disk?socket=$T/nbd.sock'; tcp = '$DEVICE'" -c - >"$T/shell" 2>&1 <<'PY' || fail "$(cat "$T/shell")"
import os, sys
a, b, c = nbd.NBD(), nbd.NBD(), nbd.NBD()
a.connect_uri(unix); b.connect_uri(unix); c.connect_uri(tcp)
old = bytes(a.pread(10, 0))
a.pwrite(b'0123456789', 0)
assert a.pread(10, 0) == b'0123456789'
assert b.pread(10, 0) == b'0123456789', "another connection of the same process"
assert c.pread(10, 0) == old, "a reader follows what is durable"
try:
    c.pwrite(b'x', 0)
    raise SystemExit("two clients write")
except nbd.Error as e:
    assert e.errno == "EPERM", e.errno
b.flush()
assert c.pread(10, 0) == b'0123456789', "one connection's FLUSH is for all"
b.pwrite(b'b', 1)
a.flush()
a.shutdown()
assert c.pread(10, 0) == b'0b23456789'
b.shutdown()
import time
until = time.time() + 10
while True: # it gives way as soon as it has gone
    try:
        c.pwrite(b'c', 2)
        break
    except nbd.Error as e:
        assert e.errno == "EPERM" and time.time() < until, e.errno
c.flush()
assert c.pread(10, 0) == b'0bc3456789'
PY
}

# What another agent's program writes is read, and not written.
case_followed() {
    requires nbdinfo nbdsh
    start
    stepper_start "$W/disk" 1048576
    stepped s 5000 100 1
    stepped m
    DEVICE=nbd://$NBD${W}/disk
    timeout 20 nbdinfo "$DEVICE" | grep -q 'is_read_only: true' || fail "a region that a program writes is not read-only"
    timeout 20 nbdcopy "$DEVICE" "$T/out"
    same "$W/disk" "$T/out"
    stepper_end
    stop_local
}

case_durable() { # killed after FLUSH was answered, and at any other time
    requires nbdsh
    imported
    local round
    for round in $(seq "${TEST_ROUNDS:-5}"); do
        timeout 60 nbdsh -u "$DEVICE" -c "pid, n = $REMOTE_PID, $round" -c - >"$T/shell" 2>&1 <<'PY' || fail "$(cat "$T/shell")"
import os, signal
block = bytes([n]) * 65536
for i in range(300):
    h.pwrite(block, i * 65536)
h.flush()
h.pwrite(bytes([n]), 40 << 20, nbd.CMD_FLAG_FUA)
for i in range(100): # not asked to be kept: all, none or some of these, in their order
    h.pwrite(b'later' * 1000, (41 << 20) + i * 5000)
os.kill(pid, signal.SIGKILL)
PY
        kill_remote
        rm -f "$T/nbd.sock"
        start
        timeout 60 nbdsh -u "$DEVICE" -c "n = $round" -c 'assert h.pread(300 * 65536, 0) == bytes([n]) * (300 * 65536) and h.pread(1, 40 << 20) == bytes([n]), "lost"' \
            -c 'import functools' -c 'there = [h.pread(5000, (41 << 20) + i * 5000) == b"later" * 1000 for i in range(100)]' -c 'assert there == sorted(there, reverse=True), there' ||
            fail "round $round: what FLUSH had answered is not there, or later writes are there without earlier ones"
    done
}

case_full() { # a full disk is an error of FLUSH, and the server lives
    requires nbdsh
    requires_root "a small file system"
    mkdir "$T/small"
    mount -t tmpfs -o size=96m none "$T/small" || { say "SKIP: no mounts here"; exit 77; }
    mounted+=("$T/small")
    STORE=$T/small/store
    start
    truncate -s 200M "$T/image"
    memsync import "$T/image" disk >/dev/null
    timeout 60 nbdsh -u "$DEVICE" -c - >"$T/shell" 2>&1 <<'PY' || fail "$(cat "$T/shell")"
failed = None
try:
    for i in range(200):
        h.pwrite(b'x' * (1 << 20), i << 20)
    h.flush()
except nbd.Error as e:
    failed = e.errno
assert failed == "ENOSPC", failed
assert h.pread(1, 0) == b'x'
PY
    alive "$REMOTE_PID" || fail "the server died of a full disk"
    timeout 60 nbdsh -u "$DEVICE" -c 'h.pread(1, 0)' || fail "it does not serve any more"
}

case_refilled() { # ... and goes on with the same client once there is room: nothing that was answered is lost
    requires nbdsh
    requires_root "a small file system"
    mkdir "$T/small"
    mount -t tmpfs -o size=160m none "$T/small" || { say "SKIP: no mounts here"; exit 77; }
    mounted+=("$T/small")
    STORE=$T/small/store
    start
    truncate -s 200M "$T/image"
    memsync import "$T/image" disk >/dev/null
    head -c 70M /dev/zero >"$T/small/filler"
    timeout 60 nbdsh -u "$DEVICE" -c "filler, uri = '$T/small/filler', '$DEVICE'" -c - >"$T/shell" 2>&1 <<'PY' || fail "$(cat "$T/shell")"
import os, random, time
blocks = [random.Random(i).randbytes(1 << 20) for i in range(90)]
full = 0
def trying(f):
    global full
    until = time.time() + 20
    while True:
        try:
            return f()
        except nbd.Error as e:
            assert e.errno == "ENOSPC" and time.time() < until, e
            full += 1
            if full == 3: # twice in vain
                os.unlink(filler)
            time.sleep(0.02)
for i, block in enumerate(blocks):
    trying(lambda: h.pwrite(block, i << 20))
trying(h.flush)
assert full >= 3, "the disk was not full"
other = nbd.NBD()
other.connect_uri(uri)
for peer in h, other:
    for i, block in enumerate(blocks):
        assert peer.pread(1 << 20, i << 20) == block, i
PY
}

# Two replicas behind a hub that serves them: what is said at its NBD side when one goes, all go, and they come back.
declare -A AT PID
replica_ready() { grep -q '^listening wire' "$T/$1.out"; }
replica() { # NAME
    : >"$T/$1.out"
    "$BUILD/memsync-agent" --listen "${AT[$1]:-127.0.0.1:0}" --store "file:$T/store.$1" --state "$T/state.$1" >"$T/$1.out" 2>>"$T/$1.err" &
    PID[$1]=$!
    poll 20 replica_ready "$1" || fail "replica $1 did not start"
    AT[$1]=$(sed -n 's/^listening wire //p' "$T/$1.out")
}
kill_replica() {
    kill -KILL "${PID[$1]}"
    wait "${PID[$1]}" 2>/dev/null || true
}
case_hub() {
    requires nbdsh nbdinfo nbdcopy qemu-io
    replica a
    replica b
    image
    start "hub:${AT[a]},${AT[b]}"
    memsync import "$T/image" disk >"$T/import.out" || fail "import: $(cat "$T/import.out")"
    timeout 20 nbdinfo --list "nbd://$NBD" | grep -q 'export="disk"' || fail "no list"
    timeout 20 nbdinfo "nbd://$NBD/" | grep -q "export-size: $SIZE " || fail "the only region is no default export"
    ! timeout 20 nbdinfo "nbd://$NBD/none" >"$T/info" 2>&1 || fail "a region that is not there was served"
    timeout 60 nbdcopy "$DEVICE" "$T/out"
    same "$T/image" "$T/out"
    head -c "$SIZE" /dev/urandom >"$T/image"
    timeout 60 nbdcopy --flush "$T/image" "$DEVICE"
    timeout 60 nbdcopy "$DEVICE" "$T/out"
    same "$T/image" "$T/out"
    io -c 'write -P 0x5a 4097 10000' -c 'read -P 0x5a 4097 10000' -c flush -c 'read -P 0x5a 4097 10000' -c 'write -z 1M 1M' -c 'read -P 0 1M 1M' "$DEVICE"
    mkfifo "$T/ask" "$T/told"
    exec 3<>"$T/ask" 4<>"$T/told"
    timeout 100 nbdsh -u "$DEVICE" -c "ask, told = open('$T/ask', 'w'), open('$T/told')" -c - >"$T/shell" 2>&1 <<'PY' &
import time
def please(text):
    print(text, file=ask, flush=True)
    assert told.readline() == "done\n"
def failing(f):
    begun = time.time()
    try:
        f()
    except nbd.Error as e:
        assert e.errno == "EIO", e.errno
        assert time.time() - begun < 20, "it hung"
        return
    raise AssertionError("with no replica")
def patient(f):
    until = time.time() + 30
    while True:
        try:
            return f()
        except nbd.Error as e:
            assert time.time() < until and h.aio_is_ready(), e
            time.sleep(0.1)
h.pwrite(b'1' * 4096, 0)
h.flush()
please("kill a")
patient(lambda: h.pwrite(b'2' * 4096, 4096))
patient(h.flush)
assert h.pread(8192, 0) == b'1' * 4096 + b'2' * 4096
please("kill b")
failing(lambda: h.pread(4096, 1 << 20))
def both():
    h.pwrite(b'3' * 4096, 8192)
    h.flush()
failing(both)
assert h.aio_is_ready(), "the connection was dropped"
please("start both")
patient(lambda: h.pread(4096, 1 << 20))
patient(both)
assert h.pread(12288, 0) == b'1' * 4096 + b'2' * 4096 + b'3' * 4096
PY
    local shell=$! what=none one
    while [ "$what" != start ] && read -r -t 60 -u 3 what one; do
        case $what in kill) kill_replica "$one" ;; start) replica b; replica a ;; esac
        say done >&4
    done
    wait "$shell" || fail "$(cat "$T/shell")"
    stop_remote
    kill_replica a
    kill_replica b
}

case_hostile() {
    imported
    python "$NBD" handshake
    python "$NBD" hostile
    python "$NBD" flood
    timeout 20 nbdinfo --size "$DEVICE" | grep -qx "$SIZE" || fail "it does not serve any more"
    local peak
    peak=$(awk '/VmHWM/ { print $2 }' "/proc/$REMOTE_PID/status")
    [ "${ASAN_OPTIONS:+asan}" ] || [ "$peak" -lt 700000 ] || fail "the server took $peak KiB"
    stored "$T/image"
}

case_listen() {
    local code=0
    "$BUILD/memsync-agent" --nbd 0.0.0.0:0 --store mem: >"$T/out" 2>&1 || code=$?
    [ "$code" = 3 ] && grep -q insecure "$T/out" || fail "an address that others reach: $code, $(cat "$T/out")"
    code=0
    "$BUILD/memsync-agent" --nbd 127.0.0.1:0 >"$T/out" 2>&1 || code=$?
    [ "$code" = 2 ] || fail "no store: $code, $(cat "$T/out")"
    code=0
    "$BUILD/memsync-agent" --nbd here --store mem: >"$T/out" 2>&1 || code=$?
    [ "$code" = 2 ] || fail "no address: $code, $(cat "$T/out")"
    "$BUILD/memsync-agent" --nbd 0.0.0.0:0 --insecure --store mem: >"$T/remote.out" 2>"$T/remote.err" &
    REMOTE_PID=$!
    poll 10 grep -q '^listening nbd 0.0.0.0:' "$T/remote.out" || fail "--insecure: $(cat "$T/remote.err")"
    stop_remote
}

cases="info copy qemu fio shell fuse writers followed durable full refilled hub hostile listen"
[ "${1:?a case, or list}" = list ] && { printf '%s\n' $cases; exit 0; }
"case_$1"
