#!/usr/bin/env bash
# The remote's disk is full: that is said clearly, the program runs on, and all is there once there is room.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

[ "${1:?a case, or list}" = list ] && { printf 'continue\nfail\nfirst_attach\n'; exit 0; }
if [ -z "${IN_NAMESPACE:-}" ]; then
    requires_root "a small file system of its own"
    private=(-m)
    unshare -m true 2>/dev/null || private+=(--propagation unchanged) # a chroot's root is no mount to be made private
    IN_NAMESPACE=1 unshare "${private[@]}" bash "$0" "$1"
    exit
fi
mkdir -p "$STORE"
# Room for the journal (32 MiB), the region, and a large epoch beside it until it is applied.
mount -t tmpfs -o size=192m tmpfs "$STORE"
mounted+=("$STORE")

start_remote
size=$((48 << 20))
fill_up() { head -c 400000000 /dev/zero >"$STORE/filler" 2>/dev/null || true; }
status_is() {
    local code=0
    memsync status >"$T/status.out" 2>&1 || code=$?
    [ "$code" = "$1" ]
}
clear_error() {
    grep -qiE 'full|no space' "$T/program.err" "$T/remote.err" || fail "nobody said that the disk is full: $(cat "$T/program.err" "$T/remote.err")"
    grep -qiE 'full|no space' "$T/program.err" || fail "the program's user is not told that the disk is full: $(cat "$T/program.err")"
}
case $1 in
continue)
    stepper_start "$W/data" $size MEMSYNC_TIMEOUT=2s
    stepped s 0 1000000 1
    stepped m
    fill_up
    stepped s 1000000 40000000 2
    stepped m
    clear_error
    poll 10 status_is 1 || fail "status says that all is well"
    stepped s 0 1000 3
    stepped m
    rm "$STORE/filler"
    poll 40 status_is 0 || fail "it did not catch up when there was room: $(cat "$T/status.out")"
    stepped s 0 1000 4
    stepped m
    ;;
fail)
    stepper_start "$W/data" $size MEMSYNC_TIMEOUT=2s MEMSYNC_ON_LOSS=fail
    stepped s 0 1000000 1
    stepped m
    fill_up
    stepped s 1000000 40000000 2
    step m
    [ "$ANSWER" = EIO ] || fail "msync with a full disk at the remote: $ANSWER, not EIO"
    rm "$STORE/filler"
    synced() {
        step m
        [ "$ANSWER" = 0 ]
    }
    poll 40 synced || fail "msync fails still: $ANSWER"
    ;;
first_attach)
    fill_up
    head -c $size /dev/urandom >"$W/data"
    stepper_start "$W/data" $size MEMSYNC_TIMEOUT=2s
    stepped m
    clear_error
    rm "$STORE/filler"
    poll 40 status_is 0 || fail "it did not catch up when there was room: $(cat "$T/status.out")"
    ;;
*) fail "no such case: $1" ;;
esac
stepper_end
stop_local
stop_remote
rm -f "$STORE/filler"
same_tree
