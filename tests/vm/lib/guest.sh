#!/usr/bin/env bash
# guest.sh [-t SECONDS] 6.1|6.12 COMMAND [ARGUMENT...]: runs the command as root in a guest with that kernel, in the current directory, and ends as it did.
#
# The guest sees this machine's files as they are, and what it writes is gone with it, but for what it puts into /run/guest, which is $GUEST_SHARE (or
# nowhere). Its console is our output. TMPDIR, BUILD, CI, TRACE and KEEP go along. Emulated by software: /dev/kvm is there on machines where it does not work.
# 77 when there is no emulator, or no such kernel to be had; under CI that is an error.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
limit=100
if [ "$1" = -t ]; then
    limit=$2
    shift 2
fi
version=$1
shift
skip() {
    echo "SKIP: $*"
    [ "${CI:-}" = true ] && exit 1
    exit 77
}
for program in qemu-system-x86_64 busybox cpio modprobe xz; do
    PATH=$PATH:/sbin:/usr/sbin command -v "$program" >/dev/null || skip "$program is not installed (tests/deps.sh vm)"
done
tree=$("$here/kernel.sh" "$version") || {
    code=$?
    [ "$code" = 77 ] && skip "$tree"
    exit "$code"
}
work=$(mktemp -d "${TMPDIR:-/tmp}/memsync-guest.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
# Made anew when its recipe has changed.
initramfs=$tree/initramfs.$(cat "$here/init" "$here/initramfs.sh" | sha256sum | cut -c 1-16)
[ -e "$initramfs" ] || PATH=$PATH:/sbin:/usr/sbin "$here/initramfs.sh" "$tree" "$initramfs"
share=${GUEST_SHARE:-$work/share}
mkdir -p "$share"
{
    printf 'export PATH=%q HOME=/root LC_ALL=C TMPDIR=/run/tmp GUEST=%q BUILD=%q CI=%q TRACE=%q KEEP=\n' "$PATH:/sbin:/usr/sbin" "$version" "${BUILD:-build}" "${CI:-}" "${TRACE:-}"
    printf '[ -n "$CI" ] || unset CI\n[ -n "$TRACE" ] || unset TRACE\nunset KEEP\ncd %q && exec' "$PWD"
    printf ' %q' "$@"
    echo
} >"$share/command"
timeout -k 5 $((limit + 30)) qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max -smp 2 -m "${GUEST_MEMORY:-1024}" -nographic -nodefaults -serial stdio -no-reboot \
    -kernel "$tree"/boot/vmlinuz-* -initrd "$initramfs" -append "console=ttyS0 panic=-1 loglevel=4 mitigations=off limit=$limit" \
    -virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap \
    -virtfs local,path="$share",mount_tag=guest,security_model=none </dev/null 2>&1 |
    tr -d '\r' | tee "$work/console" | sed -u '1,/VMTEST-START$/d; /^VMTEST-EXIT=/,$d' || true
grep -q "VMTEST-START\$" "$work/console" || tail -n 30 "$work/console"

exit "$(sed -n 's/^VMTEST-EXIT=\([0-9]*\)$/\1/p' "$work/console" | tail -n 1 | grep . || echo 125)"
