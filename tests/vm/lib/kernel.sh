#!/usr/bin/env bash
# kernel.sh 6.1|6.12: Debian's kernel of that version, unpacked for guests and installed nowhere: prints the directory that has its boot/ and lib/modules/.
# Fetched by apt once, with package lists of its own, and kept under ${XDG_CACHE_HOME:-~/.cache}/memsync-kernels. 77 when it cannot be had.
set -euo pipefail
export LC_ALL=C

version=$1
case $version in
6.1) suite=bookworm ;;
6.12) suite=bookworm-backports ;;
*)
    echo "kernel.sh: no kernel $version: 6.1 and 6.12 there are" >&2
    exit 2
    ;;
esac
cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/memsync-kernels
tree=$cache/$version
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9 # one fetches, others wait for it
if [ ! -e "$tree/complete" ]; then
    rm -rf "$tree" "$tree.new"
    mkdir -p "$tree.new"/apt/lists/partial "$tree.new"/apt/archives/partial
    cd "$tree.new"
    site=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' 2>/dev/null | head -n 1)
    echo "deb ${site:-http://deb.debian.org/debian/} $suite main" >apt/sources.list
    own=(-qq -o Dir::Etc::sourcelist="$PWD/apt/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$PWD/apt/lists" -o Dir::Cache="$PWD/apt"
        -o APT::Sandbox::User= -o APT::Update::Error-Mode=any -o Acquire::Languages=none)
    {
        apt-get "${own[@]}" update &&
            package=$(apt-cache "${own[@]}" depends -t "$suite" linux-image-amd64 | sed -n "s/^ *Depends: \(linux-image-$version\.[^ ]*\)$/\1/p" | head -n 1) &&
            [ -n "$package" ] && apt-get "${own[@]}" -t "$suite" download "$package" && dpkg -x "$package"_*.deb .
    } >apt/log 2>&1 || {
        echo "Debian's kernel $version could not be fetched: $(tail -n 1 apt/log)"
        exit 77
    }
    rm -rf ./*.deb apt usr/share
    [ -d lib ] || ln -s usr/lib lib
    rm -rf lib/modules/*/kernel/{sound,drivers/{gpu,media,iio,scsi,staging,infiniband,net/ethernet,net/wireless}} # two thirds of it
    depmod -b "$PWD" "$(basename lib/modules/*)"
    touch complete
    mv "$tree.new" "$tree"
fi
echo "$tree"
