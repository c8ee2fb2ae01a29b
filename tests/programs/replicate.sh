#!/usr/bin/env bash
# Real programs under the shim: after a clean stop of the remote its files are the local ones, byte for byte, and the program's own reader opens them.
# cases
# timeout: 120
#
# A case is PROGRAM/STRATEGY/PLACE[/REMOTE[/ACK]]: PLACE is disk or memory (where the program's files are), REMOTE is agent (the default) or file (a store
# that the local agent commits to itself).
. "$(dirname "$0")/../lib.sh"

python=/usr/bin/python3
here=$TESTS/programs
bin=$BUILD/tests/programs
programs=(mmap_flush mmap_resize mmap_noflush numpy_flush numpy_noflush lmdb_writemap lmdb_default lmdb_nosync lmdb_async mdb_load
    sqlite_rollback sqlite_rollback_mmap sqlite_wal sqlite_wal_mmap sqlite_two_writers fio_verify editor_python)

list() {
    local program strategy case
    for program in "${programs[@]}"; do
        for strategy in uffd hash inotify auto; do
            say "$program/$strategy/disk"
        done
        say "$program/auto/memory"
    done
    for program in mmap_flush numpy_noflush lmdb_writemap sqlite_wal; do
        say "$program/auto/disk/file"
    done
    for case in durable received async; do
        say "lmdb_writemap/auto/disk/agent/$case"
        say "sqlite_rollback/uffd/disk/agent/$case"
    done
}
[ "${1:?a case, or list}" = list ] && { list; exit 0; }
IFS=/ read -r program strategy place remote ack <<<"$1"
remote=${remote:-agent}

[ "$place" = memory ] && work_in_memory
if [ "$remote" = file ]; then
    REMOTE=file:$STORE
else
    start_remote
fi
run() {
    shim MEMSYNC_STRATEGY="$strategy" MEMSYNC_ACK="${ack:-durable}" -- "$@" 2>>"$T/program.err" || fail "$* ended with $?"
}

# ---- what runs, and how its result is opened

check_lmdb() {
    mdb_dump -a "$1/db" >"$T/dump.local" || fail "mdb_dump on the local database"
    mdb_dump -a "$2/db" >"$T/dump.replica" || fail "mdb_dump on the replica"
    same "$T/dump.local" "$T/dump.replica"
}
check_sqlite() {
    local side
    for side in "$1" "$2"; do
        [ "$(sqlite3 "$side/db" 'pragma integrity_check')" = ok ] || fail "integrity_check on $side/db"
        sqlite3 "$side/db" .dump >"$T/dump.$(basename "$side").$RANDOM"
    done
    cmp "$T"/dump.* || fail "the two databases hold different things"
}

load_by_mdb() {
    requires mdb_load mdb_dump
    $python -c 'for i in range(1500): print("key%d\nvalue %d %s" % (i, i * 7919 % 3001, "x" * (i % 300)))' >"$T/load.txt"
    mkdir "$W/db"
    run mdb_load -T -f "$T/load.txt" "$W/db"
    run mdb_load -T -f <(printf 'key5\nanother\nzzz\nlast\n') "$W/db"
}
sqlite_script() {
    say "pragma mmap_size=$2; pragma journal_mode=$1; pragma synchronous=full;"
    say "create table if not exists t(id integer primary key, body blob);"
    local i
    for i in 1 2 3 4 5 6 7 8; do
        say "begin; with recursive c(x) as (select 1 union all select x+1 from c where x<200) insert into t(body) select randomblob(1500) from c; commit;"
        say "update t set body = randomblob(300) where id % 17 = $i; delete from t where id % 13 = $i;"
        say "begin; delete from t; rollback;"
    done
    say "pragma mmap_size=0; vacuum; insert into t(body) values(randomblob(99999));"
}
run_sqlite() {
    requires sqlite3
    sqlite_script "$1" "$2" >"$T/script.sql"
    # What the last process leaves behind is checkpointed by it; a second one finds the database as it is and goes on.
    run sqlite3 -batch "$W/db" ".read $T/script.sql" >"$T/sqlite.out"
    run sqlite3 -batch "$W/db" ".read $T/script.sql" >"$T/sqlite.out"
}
two_writers() {
    run $python "$here/workload.py" two_writers "$W" &
    local first=$!
    run $python "$here/workload.py" two_writers "$W" &
    wait "$first" && wait $! || fail "a writer failed"
}
run_fio() {
    requires fio
    run fio --name=verify --directory="$W" --ioengine=mmap --rw=randwrite --bs=4k --size=8m --verify=crc32c --do_verify=1 --verify_fatal=1 --verify_state_save=0 \
        --fsync=64 --thread --output="$T/fio.out"
}
read_fio() {
    fio --name=verify --directory="$2" --ioengine=mmap --rw=randwrite --bs=4k --size=8m --verify=crc32c --verify_only --verify_fatal=1 --verify_state_save=0 \
        --thread --output="$T/fio2.out" || fail "fio does not find what it wrote in the replica: $(cat "$T/fio2.out")"
}
save_like_an_editor() {
    run $python - "$W" <<'PY'
import os, sys, tempfile
where = sys.argv[1]
for i in range(6):
    fd, name = tempfile.mkstemp(dir=where, prefix=".save-")
    with os.fdopen(fd, "wb") as f:
        f.write(os.urandom(20000 + i * 3000))
        f.flush()
        os.fsync(f.fileno())
    os.replace(name, where + "/document")
PY
}

check() { :; }
case $program in
numpy_*) requires_python numpy ;;
lmdb_*) requires_python lmdb; requires mdb_dump ;;
esac
case $program in
mmap_* | numpy_*) run $python "$here/workload.py" "$program" "$W" ;;
lmdb_*)
    run $python "$here/workload.py" "$program" "$W"
    check() { check_lmdb "$@"; }
    ;;
mdb_load)
    load_by_mdb
    check() { check_lmdb "$@"; }
    ;;
sqlite_two_writers)
    requires sqlite3
    two_writers
    check() { check_sqlite "$@"; }
    ;;
sqlite_*)
    journal=${program#sqlite_}
    size=0
    [[ $program == *_mmap ]] && size=100000000
    journal=${journal%_mmap}
    run_sqlite "${journal/rollback/delete}" "$size"
    check() { check_sqlite "$@"; }
    ;;
fio_verify)
    run_fio
    check() { read_fio "$@"; }
    ;;
editor_python) save_like_an_editor ;;
*) fail "no such program in the table: $program" ;;
esac

stop_local
[ "$remote" = file ] || stop_remote
quiet "$T/program.err"
same_tree
replica_dir=$(replica "$W")
case $program in
numpy_*)
    [ "$($python "$here/workload.py" read_numpy "$W")" = "$($python "$here/workload.py" read_numpy "$replica_dir")" ] || fail "numpy reads something else"
    ;;
esac
check "$W" "$replica_dir"
