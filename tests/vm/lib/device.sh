#!/usr/bin/env bash
# In a guest: regions attached as /dev/nbdN, over netlink and by ioctl; mapped, with a file system, with the agent killed under them; and nbd-client's own way.
. tests/lib.sh

MIB=$((1 << 20))
agent() { # [COMMAND...] before it
    : >"$T/remote.out"
    env MEMSYNC_LOG=info "$@" "$BUILD/memsync-agent" --listen "unix:$T/wire.sock" --nbd "unix:$T/nbd.sock" --store "file:$STORE" --socket "$SOCKET" \
        >"$T/remote.out" 2>>"$T/remote.err" &
    REMOTE_PID=$!
    poll 20 agent_listens || fail "the agent does not listen"
    REMOTE=unix:$T/wire.sock
}
agent_listens() { grep -q '^listening control' "$T/remote.out"; }
refused() { # CODE PATTERN COMMAND...: it ends so, and says so in one line
    local code=0 want=$1 pattern=$2
    shift 2
    own "$@" >"$T/refused" 2>&1 || code=$?
    [ "$code" = "$want" ] || fail "memsync $*: exit code $code, not $want: $(cat "$T/refused")"
    [ "$(wc -l <"$T/refused")" = 1 ] && grep -q -- "$pattern" "$T/refused" || fail "memsync $* says: $(cat "$T/refused")"
}
own() { MEMSYNC_AGENT="$SOCKET" "$BUILD/memsync" "$@"; } # no remote: the agent's own store
connected() { [ -e "/sys/block/${1#/dev/}/pid" ]; }
free() { ! connected "$1"; }
# What the remote has is what it has committed: asked over the wire, not of the plain file.
exported() { memsync export disk "$T/copy" >"$T/export.out" 2>&1 || fail "export: $(cat "$T/export.out")"; }
at_remote() { # OFFSET TEXT
    exported
    [ "$(dd if="$T/copy" bs=1 skip="$1" count="${#2}" status=none)" = "$2" ] || fail "the remote does not have '$2' at $1"
}
attach() { # DEVICE [OPTION...]
    DEV=$(own attach "${@:2}" disk "$1" 2>"$T/attach.err") || fail "attach $*: $(cat "$T/attach.err")"
    [ -b "$DEV" ] || fail "attach $* answers $DEV, which is no device"
    connected "$DEV" || fail "$DEV is not connected"
}
detach() {
    memsync detach "$1" 2>"$T/detach.err" || fail "detach $1: $(cat "$T/detach.err")"
    poll 5 free "$1" || fail "$1 is connected after it was detached"
}
no_devices() { ! memsync status --json | grep -q '"device"'; }

mapped() {
    [ "$(blockdev --getsize64 "$DEV")" = $((32 * MIB)) ] || fail "$DEV has $(blockdev --getsize64 "$DEV") bytes"
    cmp "$T/image" "$DEV" || fail "$DEV does not read as the region"
    memsync status | grep -q "^$DEV .*disk *$" || fail "status does not show $DEV: $(memsync status)"
    "$BUILD/tests/programs/blockmap" "$DEV" $((5 * MIB + 77)) "stored by $1" || fail "blockmap: $?"
    at_remote $((5 * MIB + 77)) "stored by $1"
}
file_system() {
    mkfs.ext4 -q -F "$DEV" || fail "mkfs.ext4"
    mkdir -p "$T/mnt"
    mount "$DEV" "$T/mnt" || fail "mount"
    mounted+=("$T/mnt")
    cp tests/lib.sh "$T/mnt/file"
    head -c 3000000 /dev/urandom | tee "$T/random" >"$T/mnt/random"
    sync -f "$T/mnt/file"
    exported
    e2fsck -fp "$T/copy" >"$T/fsck.out" 2>&1 || [ $? = 1 ] || fail "e2fsck of what the remote has: $(cat "$T/fsck.out")" # replays its journal
    debugfs -R "dump /file $T/dumped" "$T/copy" 2>/dev/null
    same tests/lib.sh "$T/dumped"
    debugfs -R "dump /random $T/dumped" "$T/copy" 2>/dev/null
    same "$T/random" "$T/dumped"
    refused 3 "is mounted" detach "$DEV"
    umount "$T/mnt"
    mounted=()
}
killed() {
    local was=$DEV
    "$BUILD/tests/programs/blockmap" "$DEV" 4096 "kept over a kill" || fail "blockmap: $?"
    kill_remote
    echo 1 >/proc/sys/vm/drop_caches
    blockdev --flushbufs "$was" 2>/dev/null || true
    ! dd if="$was" of=/dev/null bs=4096 count=1 skip=5000 iflag=direct 2>"$T/dd.err" || fail "reading succeeds with the agent gone"
    grep -q "Input/output error\|No such device\|No medium" "$T/dd.err" || [ ! -s "$T/dd.err" ] || free "$was" || fail "reading fails with: $(cat "$T/dd.err")"
    agent "$@"
    attach auto
    [ "$DEV" = "$was" ] || poll 5 free "$was" || fail "$was is still connected"
    "$BUILD/tests/programs/blockmap" "$DEV" 4096 | grep -q "^kept over a kill" || fail "what was flushed before the kill is not there"
}

requires mkfs.ext4 e2fsck debugfs nbd-client
head -c $((32 * MIB)) /dev/urandom >"$T/image"
agent
memsync import "$T/image" disk >/dev/null 2>"$T/import.err" || fail "import: $(cat "$T/import.err")"
[ -d /sys/module/nbd ] || refused 3 "load its module" attach disk auto
modprobe nbd nbds_max=4 || fail "modprobe nbd"
refused 1 "no such region" attach nothing auto
refused 2 "no device for it" attach disk /dev/sda
refused 1 "is not connected" detach /dev/nbd1
stop_remote

for way in netlink ioctl; do
    # The family of netlink is there in the first network namespace only, in 6.1.
    as=(env)
    [ "$way" = netlink ] || as=(unshare -n)
    rm -rf "$STORE"
    agent "${as[@]}"
    memsync import "$T/image" disk >/dev/null 2>"$T/import.err" || fail "import: $(cat "$T/import.err")"
    attach /dev/nbd2
    [ "$DEV" = /dev/nbd2 ] || fail "attach /dev/nbd2 answers $DEV"
    backend=$(cat /sys/block/nbd2/backend 2>/dev/null || true)
    # Later kernels have the family in every namespace.
    case $way/$backend/${GUEST:-} in netlink/memsync* | ioctl//6.1 | ioctl/*/6.12) ;; *) fail "$way: the device's backend is '$backend'" ;; esac
    refused 3 "is in use" attach disk /dev/nbd2
    mapped "$way"
    file_system
    detach /dev/nbd2
    poll 5 no_devices || fail "status shows a device that is gone"
    attach auto --read-only
    ! "$BUILD/tests/programs/blockmap" "$DEV" 0 "refused" 2>/dev/null || fail "a read-only device was written to"
    detach "$DEV"
    attach auto
    killed "${as[@]}"
    stop_remote # detaches
    poll 5 free "$DEV" || fail "$DEV is connected after its agent has ended"
    say "$way: attached, mapped, mounted, killed, detached"
done

# A region at a remote: the local agent, which has no store, is started by attach, and serves it over a hub of one.
agent
rm -f "$T/other.sock"
other() { MEMSYNC_AGENT="$T/other.sock" MEMSYNC_REMOTE="$REMOTE" "$BUILD/memsync" "$@"; }
DEV=$(other attach disk auto 2>"$T/attach.err") || fail "attach at a remote: $(cat "$T/attach.err")"
"$BUILD/tests/programs/blockmap" "$DEV" 4096 | grep -q "^kept over a kill" || fail "$DEV is not the remote's region"
"$BUILD/tests/programs/blockmap" "$DEV" $((6 * MIB)) "over a hub" || fail "blockmap: $?"
at_remote $((6 * MIB)) "over a hub"
other status | grep -q "^$DEV .*disk *$REMOTE" || fail "status does not show $DEV: $(other status)"
code=0
other attach nothing auto >"$T/refused" 2>&1 || code=$?
[ "$code" = 1 ] && grep -q "no such region at" "$T/refused" || fail "attach of what is not there: $code, $(cat "$T/refused")"
detach "$DEV"
other stop >/dev/null || fail "the local agent does not stop"
say "remote: attached over a hub"

nbd-client -unix "$T/nbd.sock" /dev/nbd3 -N disk -b 512 >"$T/nbd-client.out" 2>&1 || fail "nbd-client: $(cat "$T/nbd-client.out")"
poll 5 connected /dev/nbd3 || fail "nbd-client did not connect"
"$BUILD/tests/programs/blockmap" /dev/nbd3 8192 "by nbd-client" || fail "blockmap: $?"
at_remote 8192 "by nbd-client"
nbd-client -d /dev/nbd3 >/dev/null
poll 5 free /dev/nbd3 || fail "nbd-client -d"
nbd-client -unix "$T/nbd.sock" /dev/nbd3 -N disk -g -b 512 >"$T/nbd-client.out" 2>&1 || fail "nbd-client -g: $(cat "$T/nbd-client.out")"
poll 5 connected /dev/nbd3 || fail "nbd-client -g did not connect"
"$BUILD/tests/programs/blockmap" /dev/nbd3 8192 | grep -aq "^by nbd-client" || fail "nbd-client -g reads something else"
nbd-client -d /dev/nbd3 >/dev/null
poll 5 free /dev/nbd3 || fail "nbd-client -d"
stop_remote
say "nbd-client: GO and EXPORT_NAME"
