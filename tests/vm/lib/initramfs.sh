#!/usr/bin/env bash
# initramfs.sh TREE OUT: what a guest boots with: busybox, the modules that we use with those they need, and init.
# Everything else, programs and tests, is this machine's root directory, which the guest sees read-only under a layer of memory (init).
set -euo pipefail
export LC_ALL=C

tree=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
modules="virtio_pci 9p 9pnet_virtio overlay nbd ext4 crc32c_generic crc32c_intel loop sch_netem sch_tbf veth cuse fuse ublk_drv" # crc32c_generic: ext4 asks for it by name
version=$(basename "$tree"/lib/modules/*)
root=$(mktemp -d "${TMPDIR:-/tmp}/memsync-initramfs.XXXXXX")
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"
mkdir -p "$root"/{bin,dev,proc,sys,tmp,host,upper,root}
cp "$(command -v busybox)" "$root/bin/busybox"
cp "$here/init" "$root/init"
chmod 755 "$root/init"
for module in $modules; do
    modprobe -d "$tree" -S "$version" --show-depends "$module" 2>/dev/null | awk '$1 == "insmod" { print $2 }' || true # ublk_drv: not in 6.1
done | sort -u | while read -r file; do
    to=$root/lib/modules/$version/${file##*/lib/modules/"$version"/}
    mkdir -p "$(dirname "$to")"
    case $file in
    *.xz) xz -dc "$file" >"${to%.xz}" ;;
    *) cp "$file" "$to" ;;
    esac
done
cp "$tree/lib/modules/$version"/modules.{order,builtin,builtin.modinfo} "$root/lib/modules/$version/"
depmod -b "$root" "$version"
(cd "$root" && find . | cpio -o -H newc --quiet -R 0:0 | gzip -1) >"$out.$$"
mv "$out.$$" "$out"
