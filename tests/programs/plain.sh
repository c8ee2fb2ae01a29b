#!/usr/bin/env bash
# The plain C programs under the shim, a case a fact: the replica is the local tree byte for byte, and both are what the program leaves without the shim.
# cases
# timeout: 120
#
# A case is PROGRAM/CASE/STRATEGY/PLACE, as in replicate.sh.
. "$(dirname "$0")/../lib.sh"
bin=$BUILD/tests/programs

list() {
    local program case
    [ -x "$bin/mapops" ] || fail "$bin/mapops is not built (make tests)"
    for program in stdio rename sizes exits mapops; do
        for case in $("$bin/$program" list); do
            [[ $program/$case =~ ^(exits/again|mapops/part)$ ]] && continue # second halves of others
            say "$program/$case/uffd/disk"
            say "$program/$case/hash/disk"
            say "$program/$case/auto/memory"
        done
    done
    for case in $("$bin/stdio" list); do
        say "stdio/$case/inotify/disk"
    done
    for program in forks many; do
        for case in uffd/disk hash/disk inotify/disk auto/memory; do
            say "$program/all/$case"
        done
    done
    # Hashing reads all of a file, holes too: 6 GiB of it are seconds, once.
    say big/all/uffd/disk
    say big/all/auto/memory
    say big/all/hash/memory
}
[ "${1:?a case, or list}" = list ] && { list; exit 0; }
IFS=/ read -r program case strategy place <<<"$1"
[ "$place" = memory ] && work_in_memory

arguments=()
[ "$case" = all ] || arguments=("$case")
regions="$W/**"
# Editors write beside the file; here only the file itself is asked for.
[ "$program/$case" = rename/editor-hidden ] && regions="$W/work/document"
if [ "$program/$case" = mapops/library ]; then
    requires "${CC:-cc}"
    export MAPSLIB=$T/mapslib.so
    "${CC:-cc}" -std=gnu17 -D_GNU_SOURCE -shared -fPIC -o "$MAPSLIB" "$TESTS/programs/lib/mapslib.c"
fi

# First without the shim, in a place of its own.
native=$W/../native
[ "$place" = memory ] && native=$(mktemp -d /dev/shm/memsync-test.XXXXXX) && extra_dirs+=("$native")
mkdir -p "$native/work"
timeout 60 "$bin/$program" "${arguments[@]}" "$native/work" || fail "without the shim the program ended with $?"

start_remote
mkdir "$W/work"
shim MEMSYNC_STRATEGY="$strategy" MEMSYNC_REGIONS="$regions" -- "$bin/$program" "${arguments[@]}" "$W/work" 2>"$T/program.err" ||
    fail "under the shim the program ended with $?"
stop_local
stop_remote
quiet "$T/program.err"

[ "$program" != many ] || [ "$(tracked_files "$W/work" | wc -l)" = 100 ] || fail "not 100 files"
if [ "$program" = big ]; then # only where there is data; and the holes stay holes
    for other in "$native/work/big" "$(replica "$W/work/big")"; do
        /usr/bin/python3 "$TESTS/same_sparse.py" "$W/work/big" "$other" || fail "$other differs"
        used=$(du -k "$other" | cut -f 1)
        [ "$used" -lt 65536 ] || fail "$other takes $used KiB"
    done
    exit 0
fi
if [ "$program/$case" != mapops/handler ]; then # how often it is interrupted is chance
    diff -r "$native/work" "$W/work" >&2 || fail "under the shim the program did something else"
fi
W=$W/work
same_tree
