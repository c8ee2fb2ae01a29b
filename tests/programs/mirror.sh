#!/usr/bin/env bash
# Programs that write to mirrored regions: each does and says what it does and says of a local file, and when it has ended the region is that file.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

cases=(calls sources errors maps forks execs locks streams appends threads transfers tools redirects python numpy create remove lmdb sqlite_memory sqlite_delete
    sqlite_truncate sqlite_persist sqlite_wal sqlite_shared two_programs reader hidden refused no_protection)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }

# There is no $W/far on this disk: what is opened below it is the remote's. The same files lie in $T/near.
mkdir "$T/near"
near=$T/near
far=$W/far
put() { memsync import --force "$near/$1" "${far#/}/$1" >"$T/import.out" 2>&1 || fail "import $1: $(cat "$T/import.out")"; }
random() { head -c "$2" /dev/urandom >"$near/$1"; }
ORDER=fault
mirror() { shim MEMSYNC_REGIONS="$far/**=mirror,order=$ORDER" MEMSYNC_LOG_FILE="$T/said.err" "$@"; }
# both COMMAND...: FAR in it stands for the mirrored directory, and for the local one in the run that it is compared with.
both() {
    local code=0 expected=0
    "${@//FAR/$near}" >"$T/expected" 2>&1 || expected=$?
    mirror -- "${@//FAR/$far}" >"$T/got" 2>"$T/got.err" || code=$?
    cat "$T/got.err" >>"$T/got"
    sed -i "s,$far,$near,g" "$T/got"
    diff "$T/expected" "$T/got" >&2 || fail "$*: mirrored it says otherwise"
    [ "$code" = "$expected" ] || fail "$*: exit $code, not $expected"
    quiet_mirror
}
quiet_mirror() { [ ! -s "$T/said.err" ] || fail "$(cat "$T/said.err")"; }
# What the remote has of FILE is what the local one has.
replicated() {
    local file
    for file; do
        memsync export "${far#/}/$file" "$T/exported" >"$T/export.out" 2>&1 || fail "export $file: $(cat "$T/export.out")"
        same "$near/$file" "$T/exported"
        rm "$T/exported"
    done
}
absent() { ! memsync export "${far#/}/$1" "$T/exported" >"$T/export.out" 2>&1 || fail "there is a region $1"; }
nothing_local() { [ ! -e "$far" ] || fail "$far is on the disk: $(find "$far")"; }
here() { mkdir -p "$far"; } # for what is this host's: locks

start_remote
random f 3000001
put f

case $1 in
calls | sources | errors | maps | forks | execs | locks | streams | appends | threads | transfers)
    cp "$near/f" "$T/f"
    ORDER=none # nothing comes but what is asked for
    both "$BUILD/tests/programs/mirrored" "$1" FAR/f
    replicated f
    # Again, of what that has left: nothing of it is here.
    stop_local
    both "$BUILD/tests/programs/mirrored" calls FAR/f
    replicated f
    stop_local
    cp "$T/f" "$near/f"
    ORDER=fault
    both cp "$T/f" FAR/f
    both "$BUILD/tests/programs/mirrored" "$1" FAR/f
    replicated f
    nothing_local
    ;;
tools)
    both dd if=/dev/zero of=FAR/f bs=1000 count=7 seek=11 conv=notrunc status=none
    replicated f
    both dd if="$BUILD/memsync" of=FAR/f bs=12345 seek=100 count=5 conv=notrunc,fsync status=none
    replicated f
    both dd if="$BUILD/memsync" of=FAR/f bs=4k count=3 status=none
    replicated f
    both truncate -s 1234567 FAR/f
    replicated f
    both truncate -s -1000 FAR/f
    replicated f
    random g 2000003
    mv "$near/g" "$T/g"
    both cp "$T/g" FAR/f
    replicated f
    both cp --sparse=always "$T/g" FAR/f
    replicated f
    both bash -c 'tee -a FAR/f <"$1" >/dev/null' - "$T/g"
    replicated f
    both sort -o FAR/f "$BUILD/memsync"
    replicated f
    both fallocate -l 5000000 FAR/f
    replicated f
    both shred -n 1 --random-source="$BUILD/memsync" -s 100000 FAR/f
    replicated f
    both stat -c '%s %F %h' FAR/f
    nothing_local
    ;;
redirects)
    both bash -c 'cat "$1" >FAR/f' - "$BUILD/memsync"
    replicated f
    both bash -c 'seq 1 10000 >>FAR/f; seq 5 >>FAR/f'
    replicated f
    both bash -c '(seq 1 1000; exec sort -n "$1") >FAR/f 2>&1' - "$0"
    replicated f
    both bash -c 'exec 5<>FAR/f; head -c 100 <&5 | md5sum; seq 1 100 >&5; cat <&5 | md5sum'
    replicated f
    both bash -c 'echo line >FAR/f; printf "%s\n" a b >>FAR/f; { echo one; seq 3; echo two; } >>FAR/f; echo back; while read -r a; do echo "got $a"; done <FAR/f'
    replicated f
    both bash -c 'awk "BEGIN { for (i = 0; i < 30000; i++) print i }" >FAR/f; wc -l <FAR/f'
    replicated f
    nothing_local
    ;;
python)
    both /usr/bin/python3 -c 'import mmap, os, hashlib
f = open("FAR/f", "r+b")
m = mmap.mmap(f.fileno(), 0)
m[100:105] = b"hello"
m[2999990:] = b"the end at "
print(m.find(b"hello"), m.flush(), hashlib.sha256(m).hexdigest())
f.seek(4090); f.write(b"across a page"); f.flush()
print(m[4088:4105])
m.resize(3500000)
m[3400000] = 7
m.move(0, 100000, 5000)
print(len(m), os.fstat(f.fileno()).st_size, f.seek(0, 2), f.tell())
f.truncate(200000)
m.close()
print(f.write(b"x" * 10), os.pread(f.fileno(), 20, 199995))
os.ftruncate(f.fileno(), 123456); os.fsync(f.fileno())
print(os.posix_fallocate(f.fileno(), 0, 150000), os.path.getsize("FAR/f"))
with open("FAR/f", "a") as a: a.write("a line\n"); print(a.tell())
with open("FAR/f", "rb") as r: print(hashlib.sha256(r.read()).hexdigest())'
    replicated f
    before=$(date +%s)
    mtime=$(mirror -- /usr/bin/python3 -c 'import os, sys
f = os.open(sys.argv[1], os.O_WRONLY); os.write(f, b"1"); print(int(os.fstat(f).st_mtime), int(os.stat(sys.argv[1]).st_mtime))' "$far/f")
    for m in $mtime; do [ "$m" -ge "$before" ] || fail "after a write, the time of last change is $mtime, not $before or later"; done
    nothing_local
    ;;
numpy)
    requires_python numpy
    random n 8000000
    put n
    both /usr/bin/python3 -c 'import numpy
a = numpy.memmap("FAR/n", dtype="u4", mode="r+")
a[::1000] += 5
a[1000000:1500000] = numpy.arange(500000)
a.flush()
print(a.sum(dtype="u8"))
b = numpy.memmap("FAR/new", dtype="f8", mode="w+", shape=(300, 300))
b[:] = numpy.eye(300)
b.flush()
c = numpy.memmap("FAR/n", dtype="u1", mode="c")
c[:] = 0'
    replicated n new
    nothing_local
    ;;
create) # what is not there comes to be
    both bash -c 'seq 1 1000 >FAR/new; cat FAR/new | md5sum; stat -c %s FAR/new'
    both touch FAR/empty
    both cp "$BUILD/memsync" FAR/deeper
    both /usr/bin/python3 -c 'import os
f = os.open("FAR/excl", os.O_RDWR | os.O_CREAT | os.O_EXCL)
print(os.write(f, b"made"), os.path.exists("FAR/excl"), os.stat("FAR/excl").st_size)
try: os.open("FAR/excl", os.O_RDWR | os.O_CREAT | os.O_EXCL)
except OSError as e: print(e.errno)
try: os.open("FAR/none", os.O_RDWR)
except OSError as e: print(e.errno)'
    replicated new empty deeper excl
    absent none
    nothing_local
    ;;
remove)
    random g 50000
    put g
    both rm FAR/g
    absent g
    both bash -c '[ -e FAR/g ] || echo gone; seq 10 >FAR/g; cat FAR/g'
    replicated g
    both /usr/bin/python3 -c 'import os
f = os.open("FAR/g", os.O_RDWR)
os.unlink("FAR/g")
print(os.path.exists("FAR/g"), os.write(f, b"unseen"), os.pread(f, 100, 0))
g = os.open("FAR/g", os.O_RDWR | os.O_CREAT)
print(os.write(g, b"another"), os.pread(f, 7, 0), os.pread(g, 7, 0))
try: os.unlink("FAR/none")
except OSError as e: print(e.errno)'
    replicated g
    nothing_local
    ;;
lmdb)
    requires mdb_dump
    requires_python lmdb
    mkdir "$near/db"
    here
    mkdir "$far/db" # for lock.mdb, which is this host's
    script='import lmdb, sys, hashlib
how = eval(sys.argv[2])
with lmdb.open(sys.argv[1], map_size=64 << 20, **how) as e:
    for round in range(5):
        with e.begin(write=True) as t:
            for i in range(round, 20000, 3):
                t.put(b"%08d" % i, b"%d" % round * (i % 150))
            for i in range(0, 20000, 7):
                t.delete(b"%08d" % i)
    e.sync(True)
    with e.begin() as t:
        print(t.stat()["entries"], hashlib.sha256(b"".join(k + v for k, v in t.cursor())).hexdigest())'
    for how in '{}' '{"writemap": True}' '{"sync": False}' '{"writemap": True, "map_async": True}'; do
        both /usr/bin/python3 -c "$script" FAR/db "$how"
        memsync export "${far#/}/db/data.mdb" "$T/data.mdb" >"$T/export.out" 2>&1 || fail "export: $(cat "$T/export.out")"
        mdb_dump "$near/db" >"$T/expected"
        mdb_dump -n "$T/data.mdb" >"$T/got"
        cmp <(grep -v mapsize "$T/expected") <(grep -v mapsize "$T/got") >&2 || fail "$how: the remote's database holds something else"
        rm "$T/data.mdb"
    done
    both mdb_dump FAR/db
    [ "$(find "$far" -type f)" = "$far/db/lock.mdb" ] || fail "on the disk: $(find "$far" -type f)"
    ;;
sqlite_memory | sqlite_delete | sqlite_truncate | sqlite_persist | sqlite_wal)
    requires sqlite3
    mode=${1#sqlite_}
    here # sqlite opens the directory, and keeps -shm there
    both sqlite3 FAR/a.db "pragma journal_mode=$mode; pragma synchronous=full; create table t(a integer primary key, b text); create index b on t(b);"
    for i in 1 2 3; do
        both sqlite3 FAR/a.db "pragma journal_mode=$mode; begin; with recursive n(i) as (select $i union all select i + 3 from n where i < 20000) insert or replace into t
            select i, hex(i * 7919) from n; commit; begin; delete from t; rollback; update t set b = b || 'x' where a % 10 = $i; select count(*), sum(length(b)) from t;
            pragma integrity_check"
    done
    both sqlite3 FAR/a.db 'select count(*), max(b), min(b) from t where b > "5"; vacuum; pragma integrity_check; select count(*) from t'
    stop_local
    both sqlite3 FAR/a.db 'select count(*), sum(length(b)) from t; pragma integrity_check'
    for file in a.db a.db-journal a.db-wal; do
        if memsync export "${far#/}/$file" "$T/$file" >"$T/export.out" 2>&1; then :; fi
    done
    sqlite3 "$near/a.db" .dump >"$T/expected"
    sqlite3 "$T/a.db" .dump >"$T/got"
    cmp "$T/expected" "$T/got" >&2 || fail "the remote's database holds something else"
    [ -z "$(find "$far" -type f ! -name '*-shm')" ] || fail "on the disk: $(find "$far" -type f)"
    ;;
sqlite_shared) # processes at once: their locks hold
    requires sqlite3
    here
    for mode in delete wal; do
        mirror -- sqlite3 "$far/s$mode.db" "pragma journal_mode=$mode; create table t(who, n)" >"$T/out" 2>&1 || fail "$(cat "$T/out")"
        pids=()
        for who in 1 2 3; do
            mirror -- bash -c 'for ((i = 0; i < 15; i++)); do sqlite3 -cmd ".timeout 60000" "$1" "insert into t select $2, count(*) from t where who = $2"; done' - \
                "$far/s$mode.db" $who >"$T/$who.out" 2>&1 &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do wait "$pid" || fail "an inserter failed: $(cat "$T"/?.out)"; done
        [ ! -s "$T/1.out" ] && [ ! -s "$T/2.out" ] && [ ! -s "$T/3.out" ] || fail "an inserter said: $(cat "$T"/?.out)"
        mirror -- sqlite3 "$far/s$mode.db" 'select who, count(*), max(n) from t group by who; pragma integrity_check' >"$T/got"
        printf '%s\n' '1|15|14' '2|15|14' '3|15|14' ok >"$T/expected"
        diff "$T/expected" "$T/got" >&2 || fail "journal_mode=$mode: rows are lost"
    done
    quiet_mirror
    ;;
two_programs) # see what the other has written at once: they share the pages
    both bash -c 'seq 1 100000 >FAR/f; exec 5<>FAR/f; (seq 200000 200100 >>FAR/f); tail -n 3 FAR/f; head -c 5 <&5; dd if=/dev/zero of=FAR/f bs=1 count=3 seek=10 conv=notrunc status=none
        head -c 10 <&5 | od -c; truncate -s 20 FAR/f; wc -c <FAR/f; cat <&5 | od -c'
    replicated f
    ;;
reader) # one that may only read sees it by another rule, too
    mirror -- bash -c 'seq 1 1000 >"$1"' - "$far/f"
    seq 1 1000 >"$near/f"
    shim MEMSYNC_REGIONS="$far/**=pull" -- cat "$far/f" >"$T/got"
    same "$near/f" "$T/got"
    mirror -- cat "$far/f" >"$T/got"
    same "$near/f" "$T/got"
    quiet_mirror
    ;;
hidden) # around the library nothing is written, nor lost
    for command in 'LD_PRELOAD= dd if=/dev/zero bs=10 count=1 status=none >FAR/f' 'exec 5<>FAR/f; LD_PRELOAD= cat <&5'; do
        mirror -- bash -c "${command//FAR/$far}" >"$T/got" 2>&1 || true
        [ "$(grep -c '' "$T/got")" -ge 1 ] || fail "'$command' says nothing"
        [ "${command#*>FAR}" = "$command" ] || : >"$near/f"
        replicated f
    done
    ;;
refused)
    random g 10
    put g
    for command in 'mv FAR/f FAR/h' 'mv FAR/f /tmp/' "mv $T/near/f FAR/f" 'ln FAR/f FAR/h'; do
        ! mirror -- bash -c "${command//FAR/$far}" >"$T/refused" 2>&1 || fail "'$command' succeeds"
    done
    replicated f g
    ;;
no_protection) # a strategy that cannot do it
    ! shim MEMSYNC_REGIONS="$far/**=mirror,strategy=hash" -- bash -c 'exec 5<>"$1"' - "$far/f" 2>"$T/refused" || fail "it is opened for writing"
    grep -q 'Operation not supported' "$T/refused" || fail "$(cat "$T/refused")"
    grep -q 'only under uffd' "$T/refused" || fail "$(cat "$T/refused")"
    shim MEMSYNC_REGIONS="$far/**=mirror,strategy=hash" -- cat "$far/f" >"$T/got"
    same "$near/f" "$T/got"
    ;;
esac
say "as on the local file"
