#!/usr/bin/env bash
# Tests of this machine's own suite, run again in guests with older kernels: a boot for each.  VM=6.1 tests/vm/programs.sh list
#
# To run any other there:  tests/vm/lib/guest.sh 6.1 tests/run.sh tests/programs/replicate.sh:lmdb_default/hash/disk     (emulated: about ten times slower)
# cases
# timeout: 240
set -euo pipefail
cd "$(dirname "$0")/../.."

everywhere="tests/programs/replicate.sh:mmap_flush/auto/disk tests/unit/exports.sh"
case ${1:-list} in
list) printf '%s\n' ${VM:-6.1 6.12} ;;
6.1) exec tests/vm/lib/guest.sh -t 190 6.1 tests/run.sh $everywhere build/tests/unit/test_track tests/programs/replicate.sh:lmdb_writemap/softdirty/disk ;;
6.12) exec tests/vm/lib/guest.sh -t 150 6.12 tests/run.sh $everywhere ;;
*)
    echo "programs.sh: no guest called $1" >&2
    exit 2
    ;;
esac
