#!/usr/bin/env bash
# Everything again as an ordinary user without capabilities, for whom the kernel keeps userfaultfd's kernel mode shut (vm.unprivileged_userfaultfd=0).
# cases
# timeout: 180
. "$(dirname "$0")/../lib.sh"

list() {
    local what
    for what in mmap_flush numpy_noflush lmdb_writemap lmdb_default sqlite_wal_mmap sqlite_two_writers; do
        say "replicate.sh:$what/uffd/disk"
        say "replicate.sh:$what/auto/memory"
    done
    for what in mapops/move mapops/closefrom mapops/handler mapops/removed sizes/mixed rename/editor exits/exec-self forks/all many/all stdio/sync; do
        say "plain.sh:$what/uffd/disk"
        say "plain.sh:$what/hash/disk"
    done
    for what in sums stdio python paths waits buffers forks shared many eager orders refused redirects; do
        say "pull.sh:$what"
    done
    for what in calls maps forks execs streams python lmdb sqlite_wal; do
        say "mirror.sh:$what"
    done
    say badinput.sh:foreign_lineage
}
[ "${1:?a case, or list}" = list ] && { list; exit 0; }
script=$(dirname "$0")/${1%%:*}
[ "$(cat /proc/sys/vm/unprivileged_userfaultfd 2>/dev/null || say 0)" = 0 ] || say "note: vm.unprivileged_userfaultfd is 1 here" >&2
if [ "$(id -u)" = 0 ]; then
    as_nobody "$script" "${1#*:}"
else
    bash "$script" "${1#*:}"
fi
