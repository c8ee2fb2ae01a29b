#!/usr/bin/env bash
# Installs the Debian packages that a target needs, and only those that are missing:  tests/deps.sh [build|demo|check|bench|vm]...   (build, demo and check when none is named)
set -euo pipefail

build="gcc libc6-dev make pkg-config libssl-dev libuv1-dev libxxhash-dev liblz4-dev libffi-dev libjansson-dev"
demo="python3-lmdb lmdb-utils"
check="openssl libcmocka-dev clang libclang-rt-14-dev lz4 python3-lmdb python3-numpy lmdb-utils sqlite3 fio ripgrep git libpython3.11-testsuite strace rsync procps util-linux iproute2 qemu-utils libnbd-bin python3-libnbd nbdkit xxd file"
bench="gnuplot-nox nbdkit libnbd-bin fuse3"
vm="qemu-system-x86 busybox-static cpio kmod xz-utils e2fsprogs nbd-client"

wanted=()
for what in "${@:-build}" $([ $# -gt 0 ] || echo demo check); do
    case $what in
    build) read -ra more <<<"$build" ;;
    demo) read -ra more <<<"$demo" ;;
    check) read -ra more <<<"$check" ;;
    bench) read -ra more <<<"$bench" ;;
    vm) read -ra more <<<"$vm" ;;
    *)
        echo "deps.sh: there is nothing called $what; build, demo, check, bench and vm there are" >&2
        exit 2
        ;;
    esac
    wanted+=("${more[@]}")
done

if ! command -v dpkg-query >/dev/null; then
    echo "deps.sh: this is no Debian: install what stands for these packages by hand: ${wanted[*]}" >&2
    exit 0
fi
missing=()
for package in "${wanted[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing+=("$package")
done
[ "${#missing[@]}" -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "deps.sh: these packages are missing, and neither root nor sudo is at hand: apt-get install ${missing[*]}" >&2
        exit 3
    fi
    as_root=(sudo)
fi
echo "installing: ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" >"$log" 2>&1; }
# Package lists may be missing or old: they are fetched when the first try fails.
apt install -y --no-install-recommends "${missing[@]}" || {
    apt update && apt install -y --no-install-recommends "${missing[@]}"
} || {
    tail -n 20 "$log" >&2
    echo "deps.sh: apt-get could not install: ${missing[*]} (see above)" >&2
    exit 3
}
