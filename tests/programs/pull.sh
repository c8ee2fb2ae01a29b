#!/usr/bin/env bash
# Programs on pulled regions: each says what it says of the local file, and nothing but memory holds the region here.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

cases=(sums tools stdio redirects stats paths waits python numpy buffers locked shared many eager forks lmdb sqlite ripgrep git refused rules orders far_orders)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }

# There is no $W/far on this disk: what is opened below it is the remote's. The same files lie in $T/near.
mkdir "$T/near"
near=$T/near
far=$W/far
put() { memsync import --force "$near/$1" "${far#/}/$1" >"$T/import.out" 2>&1 || fail "import $1: $(cat "$T/import.out")"; }
random() { head -c "$2" /dev/urandom >"$near/$1"; }
pull() { shim MEMSYNC_REGIONS="$far/**=pull" MEMSYNC_LOG_FILE="$T/said.err" "$@"; }
# both COMMAND...: FAR in it stands for the pulled directory, and for the local one in the run that it is compared with.
both() {
    local code=0 expected=0
    "${@//FAR/$near}" >"$T/expected" 2>&1 || expected=$?
    pull -- "${@//FAR/$far}" >"$T/got" 2>"$T/got.err" || code=$?
    cat "$T/got.err" >>"$T/got"
    sed -i "s,$far,$near,g" "$T/got"
    cmp "$T/expected" "$T/got" >&2 || fail "$*: pulled it says: $(head -c 2000 "$T/got" | cat -v)"
    [ "$code" = "$expected" ] || fail "$*: exit $code, not $expected"
}
nothing_local() {
    [ ! -e "$far" ] || fail "$far is on the disk"
    [ ! -s "$T/said.err" ] || fail "$(cat "$T/said.err")"
}
start_remote
sizes="0 1 4095 4096 100001 20000000"
for size in $sizes; do
    random "$size" "$size"
    put "$size"
done
# What lines are for.
seq 1 200000 >"$near/lines"
put lines

case $1 in
sums)
    for size in $sizes; do
        both sha256sum "FAR/$size"
        both cat "FAR/$size"
        pull -- cp "$far/$size" "$T/copy"
        same "$near/$size" "$T/copy"
        rm "$T/copy" # cp gave it the mode of what is read-only
        pull -- dd if="$far/$size" of="$T/copy" bs=12345 status=none
        same "$near/$size" "$T/copy"
    done
    ;;
tools)
    requires xxd file perl
    both head -c 12345 FAR/20000000
    both tail -c 12345 FAR/20000000
    both tail -n 5 FAR/lines
    both wc FAR/lines
    both grep -c 77 FAR/lines
    both sort -rn FAR/lines
    both od -A d -t x1 -j 19999000 FAR/20000000
    both cmp FAR/20000000 "$near/20000000"
    both cmp FAR/100001 FAR/20000000
    both diff FAR/lines "$near/lines"
    both xxd -s -100 FAR/20000000
    both awk '{ n += $1 } END { print n }' FAR/lines
    both perl -ne 'print if /99999/' FAR/lines
    both sed -n '/^1999/p' FAR/lines
    both gzip -c FAR/100001
    both tac FAR/lines
    both shuf --random-source=FAR/20000000 FAR/lines
    both bash -c 'mapfile -t all <FAR/lines; echo "${#all[@]} ${all[777]}"'
    ;;
stdio)
    for size in $sizes; do
        both "$BUILD/tests/programs/pulled" stdio "FAR/$size"
    done
    both "$BUILD/tests/programs/pulled" stdio FAR/lines
    ;;
redirects)
    both bash -c 'sha256sum <FAR/20000000'
    both bash -c 'wc <FAR/lines'
    both bash -c 'sort -n <FAR/lines | tail -n 1'
    # The offset is the open file's, whoever reads, over fork and exec.
    both bash -c 'exec 5<FAR/lines; head -c 100 <&5 | tail -c 10; dd bs=10 count=3 status=none <&5; read -r line <&5; echo "$line"; (exec cat <&5) | md5sum'
    both bash -c 'while read -r a; do [ "$a" = 300 ] && break; done <FAR/lines; echo $a'
    both bash -c '{ read -r a; read -r b; echo "$a $b"; cat | md5sum; } <FAR/lines'
    both bash -c 'cat /dev/stdin <FAR/100001 | md5sum; cat /proc/self/fd/0 <FAR/100001 | md5sum'
    both "$BUILD/tests/programs/pulled" stdin FAR/lines
    both bash -c '"$0" stdin FAR/lines <FAR/100001' "$BUILD/tests/programs/pulled"
    ;;
stats)
    for size in $sizes; do
        both stat -c '%s %F %h' "FAR/$size"
        both stat -L -c '%s %F' "FAR/$size"
    done
    both bash -c '[ -e FAR/1 ] && [ -f FAR/1 ] && [ -r FAR/1 ] && [ -s FAR/1 ] && [ ! -L FAR/1 ] && [ ! -x FAR/1 ] && echo so'
    both bash -c '[ -s FAR/0 ] || echo empty; [ -e FAR/none ] || echo none'
    both ls FAR/none
    both cat FAR/none
    # A symbolic link to it, and its name below directories that are not there.
    ln -s "$far/100001" "$W/link"
    ln -s "$near/100001" "$near/link"
    pull -- cat "$W/link" >"$T/got"
    same "$near/100001" "$T/got"
    [ "$(pull -- stat -L -c %s "$W/link")" = 100001 ] || fail "stat through a link"
    rm "$W/link"
    mtime=$(pull -- stat -c %Y "$far/1")
    [ $((mtime - $(date +%s))) -lt 100 ] && [ $(($(date +%s) - mtime)) -lt 100 ] || fail "the time of last change is $mtime"
    ;;
paths)
    both "$BUILD/tests/programs/pulled" paths FAR/100001
    both /usr/bin/python3 -c 'import os; print(os.path.realpath("FAR/1"), os.listxattr("FAR/1"), os.readlink("/proc/self/fd/%d" % os.open("FAR/1", 0)))'
    both realpath -m FAR/1
    both readlink FAR/1
    pull -- ls -l "$far/1" "$far/100001" >"$T/got" 2>&1 || fail "ls -l: $(cat "$T/got")"
    [ "$(wc -l <"$T/got")" = 2 ] && grep -q '^-r--r--r-- .* 100001 ' "$T/got" || fail "ls -l says: $(cat "$T/got")"
    ;;
waits)
    both "$BUILD/tests/programs/pulled" waits FAR/lines
    both bash -c 'while read -t 5 -r a; do [ "$a" = 300 ] && break; done <FAR/lines; echo $a'
    both /usr/bin/python3 -c 'import select
f = open("FAR/lines")
print(select.select([f], [f], [f], 5) == ([f], [f], []))
try:
    select.epoll().register(f)
except PermissionError as e:
    print(e)'
    ;;
locked)
    requires_root "to lock memory"
    pull() { shim MEMSYNC_REGIONS="$far/**=pull,order=none" MEMSYNC_LOG_FILE="$T/said.err" "$@"; }
    pull -- "$BUILD/tests/programs/pulled" locked "$far/20000000" "$near/20000000"
    ;;
shared) # programs that map one region: its bytes come once, from the moment it is opened
    pipes opened
    pull -- /usr/bin/python3 -c 'import sys
f = open(sys.argv[1], "rb")
print("open", flush=True)
sys.stdin.readline()' "$far/20000000" <>"$T/opened.in" >"$T/opened" &
    poll 20 grep -q open "$T/opened" || fail "it is not opened"
    view() { # KEY: of the region in status
        memsync status --json >"$T/status.json" || true
        /usr/bin/python3 -c 'import json, sys
v = [v for v in json.load(open(sys.argv[1]))["views"] if v["size"] == 20000000]
print(*[v[0][key] if len(v) == 1 else v for key in sys.argv[2:]])' "$T/status.json" "$@"
    }
    whole() { [ "$(view resident)" = 20000000 ]; }
    poll 30 whole || fail "untouched, it has come to $(view resident)"
    both sha256sum FAR/20000000
    pull -- "$BUILD/tests/programs/pulled" maps "$far/20000000" "$near/20000000" &
    maps=$!
    pull -- "$BUILD/tests/programs/pulled" fork "$far/20000000" "$near/20000000" || fail "fork"
    wait "$maps" || fail "maps"
    read -r fetched programs <<<"$(view fetched programs)"
    [ "$fetched" -lt 21500000 ] && [ "$programs" = 1 ] || fail "fetched $fetched bytes, for $programs programs still"
    ;;
many) # regions and processes at once: each has its own bytes, and is fetched once, but for what is waited for and was on its way
    for i in {1..12}; do
        random "many$i" $((300000 * i + i))
        put "many$i"
    done
    (cd "$near" && sha256sum many*) >"$T/sums"
    pids=()
    for i in {1..6}; do
        (cd "$T" && pull -- /usr/bin/python3 -c 'import hashlib, mmap, os, sys, threading
far, expected, seed = sys.argv[1], dict(reversed(line.split()) for line in open(sys.argv[2])), int(sys.argv[3])
right = []
def one(name, mapped):
    f = open(os.path.join(far, name), "rb")
    data = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) if mapped else f.read()
    if hashlib.sha256(data).hexdigest() == expected[name]:
        right.append(name)
names = sorted(expected, key=lambda n: hash((n, seed)))
threads = [threading.Thread(target=one, args=(n, (i + seed) % 2)) for i, n in enumerate(names)]
for t in threads: t.start()
for t in threads: t.join()
sys.exit(0 if sorted(right) == sorted(expected) else "right: %s" % right)' "$far" "$T/sums" "$i") &
        pids+=("$!")
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || fail "one has read something else"
    done
    memsync status --json >"$T/status.json" || true
    /usr/bin/python3 -c 'import json, sys
views = json.load(open(sys.argv[1]))["views"]
assert len(views) == 12, len(views)
assert all(v["fetched"] < v["size"] + (2 << 20) for v in views), views' "$T/status.json" || fail "more was fetched than there is: $(cat "$T/status.json")"
    ;;
eager) # no userfaultfd: all of it is fetched before the open returns, and one line says so where that is waited for
    pull -- cat "$far/1" >"$T/got" # starts an agent that has it; the second is started by a program that has not
    for agent in with without; do
        for what in 'sha256sum FAR' 'cat FAR' 'pulled maps FAR NEAR' 'pulled fork FAR NEAR'; do
            what=${what//NEAR/$near/20000000}
            what=${what/#pulled/$BUILD/tests/programs/pulled}
            ${what/FAR/$near/20000000} >"$T/expected"
            pull -- "$BUILD/tests/programs/pulled" without ${what/FAR/$far/20000000} >"$T/got" 2>"$T/got.err" || fail "$what: $(cat "$T/got.err")"
            sed -i "s,$far,$near,g" "$T/got"
            cmp "$T/expected" "$T/got" >&2 || fail "$what, agent $agent"
            [ "$(cat "$T/said.err" "$T/got.err" | wc -l)" -le 1 ] || fail "$what: said: $(cat "$T/said.err" "$T/got.err")"
            cat "$T/said.err" >>"$T/said"
            : >"$T/said.err"
        done
        grep -q 'fetched whole' "$T/said" || fail "nothing was said, agent $agent"
        rm "$T/said"
        stop_local
    done
    ;;
python)
    both /usr/bin/python3 -c 'import os, mmap, hashlib, shutil
assert os.path.exists("FAR/100001") and not os.path.exists("FAR/no") and os.path.isfile("FAR/1")
f = open("FAR/100001", "rb")
m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
print(len(m), hashlib.sha256(m).hexdigest(), f.read(10), f.seek(-5, 2), f.read(), os.fstat(f.fileno()).st_size)
c = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
before = hashlib.sha256(c).hexdigest()
c[4096:8192] = b"x" * 4096
print(before, hashlib.sha256(c).hexdigest(), hashlib.sha256(m).hexdigest())
print(os.pread(f.fileno(), 7, 99999), os.preadv(f.fileno(), [bytearray(3), bytearray(5)], 99996))
print(sum(1 for _ in open("FAR/lines")), open("FAR/lines").read()[-20:])
d = os.dup(f.fileno()); os.lseek(d, 77, 0); print(f.fileno() != d, os.read(f.fileno(), 9), os.lseek(d, 0, 1))
f.close(); print(os.read(d, 4))'
    pull -- /usr/bin/python3 -c 'import shutil, sys; shutil.copyfile(sys.argv[1], sys.argv[2])' "$far/20000000" "$T/copy"
    same "$near/20000000" "$T/copy"
    ;;
numpy)
    requires_python numpy
    both /usr/bin/python3 -c 'import numpy
a = numpy.memmap("FAR/20000000", dtype="u4", mode="r")
print(a.size, a.sum(dtype="u8"), a[123456], a[::-4096].sum(dtype="u8"))
c = numpy.memmap("FAR/20000000", dtype="u4", mode="c")
c[5] = 1
print(c[:10], numpy.fromfile("FAR/100001", dtype="u1").sum())'
    ;;
buffers) # pages nobody has touched, given to the kernel
    pull() { shim MEMSYNC_REGIONS="$far/**=pull,order=none" MEMSYNC_LOG_FILE="$T/said.err" "$@"; }
    both "$BUILD/tests/programs/pulled" buffers FAR/20000000
    both /usr/bin/python3 -c 'import os, mmap, socket, hashlib, tempfile
f = open("FAR/20000000", "rb")
m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
v = memoryview(m)
t = tempfile.TemporaryFile()
out = t.fileno()
print(os.write(out, v[10000001:15000001]), os.pwrite(out, v[19999000:], 5000000), os.writev(out, [v[5000000:5000100], v[7:9]]))
print(hashlib.sha256(os.pread(out, 6000000, 0)).hexdigest())
a, b = socket.socketpair()
print(a.send(v[17000000:17001000]), b.recv(1000) == v[17000000:17001000])
p = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE)
g = open("FAR/100001", "rb", 0)
print(g.readinto(memoryview(p)[12000000:12100000]), hashlib.sha256(p).hexdigest())
print(os.preadv(g.fileno(), [memoryview(p)[3000000:3000100], memoryview(p)[4000000:4000100]], 5), hashlib.sha256(p).hexdigest())'
    ;;
forks)
    both "$BUILD/tests/programs/pulled" fork FAR/20000000 "$near/20000000"
    both "$BUILD/tests/programs/pulled" fork FAR/lines "$near/lines"
    ;;
lmdb)
    requires mdb_dump
    requires_python lmdb
    mkdir "$near/db"
    /usr/bin/python3 -c 'import lmdb, sys
with lmdb.open(sys.argv[1], map_size=64 << 20) as e, e.begin(write=True) as t:
    for i in range(50000):
        t.put(b"%08d" % i, b"v" * (i % 200))' "$near/db"
    put db/data.mdb
    mkdir -p "$far/db" # for the lock, which is this host's
    both mdb_dump FAR/db
    both mdb_stat -a FAR/db
    both /usr/bin/python3 -c 'import lmdb
with lmdb.open("FAR/db", readonly=True, lock=False) as e, e.begin() as t:
    print(t.stat()["entries"], t.get(b"00012345"), sum(len(v) for _, v in t.cursor()))'
    rm -r "$far"
    ;;
sqlite)
    requires sqlite3
    sqlite3 "$near/a.db" 'create table t(a integer primary key, b text); with recursive n(i) as (select 1 union all select i + 1 from n where i < 100000)
        insert into t select i, hex(i * 7919) from n; create index b on t(b);'
    put a.db
    both sqlite3 'FAR/a.db' 'select count(*), sum(length(b)), max(b) from t; pragma integrity_check'
    both sqlite3 'FAR/a.db' 'pragma mmap_size=100000000; select * from t where b > "F" order by b limit 50'
    both sqlite3 -readonly 'FAR/a.db' 'select * from t where a % 9999 = 0'
    ! pull -- sqlite3 "$far/a.db" 'insert into t values(0, 0)' 2>"$T/refused" || fail "an insert succeeds"
    grep -q 'readonly database' "$T/refused" || fail "an insert: $(cat "$T/refused")"
    ;;
ripgrep)
    requires rg
    both rg --mmap -c 77 FAR/lines
    both rg --mmap -n '^19999' FAR/lines
    both rg --no-mmap -c 77 FAR/lines
    ;;
git)
    requires git
    git init -q "$near/repo"
    for i in 1 2 3; do
        seq "$i" 30000 >"$near/repo/file$i"
        git -C "$near/repo" add .
        git -C "$near/repo" -c user.name=n -c user.email=e commit -qm "$i"
    done
    git -C "$near/repo" gc -q
    # The directory is here, its packs are names only: what is in them is the remote's.
    cp -r "$near/repo" "$W/repo"
    for pack in "$near"/repo/.git/objects/pack/*; do
        put "repo/.git/objects/pack/$(basename "$pack")"
        chmod u+w "$W/repo/.git/objects/pack/$(basename "$pack")"
        : >"$W/repo/.git/objects/pack/$(basename "$pack")"
    done
    ! git -C "$W/repo" log -1 >/dev/null 2>&1 || fail "git needs no packs?"
    for command in 'log --stat' 'fsck --full' 'cat-file --batch-all-objects --batch-check' 'show HEAD~1:file2'; do
        git -C "$near/repo" $command >"$T/expected" 2>&1
        shim MEMSYNC_REGIONS="$W/repo/.git/objects/pack/*=pull,name=${far#/}/repo/.git/objects/pack/%b" -- git -C "$W/repo" $command >"$T/got" 2>&1 ||
            fail "git $command: $(cat "$T/got")"
        cmp "$T/expected" "$T/got" >&2 || fail "git $command says otherwise: $(head -c 1000 "$T/got")"
    done
    rm -rf "$W/repo"
    ;;
refused)
    for command in ': >FAR/1' ': >>FAR/1' ': >FAR/new' 'rm FAR/1' 'mv FAR/1 FAR/2' "mv $T/near/1 FAR/2" 'truncate -s 5 FAR/1' 'touch FAR/new'; do
        ! pull -- bash -c "${command//FAR/$far}" 2>"$T/refused" || fail "'$command' succeeds"
        grep -q 'Read-only file system' "$T/refused" || fail "'$command': $(cat "$T/refused")"
    done
    pull -- "$BUILD/tests/programs/pulled" refused "$far/100001"
    ;;
rules)
    # A local file of the name is hidden, a directory is not.
    mkdir -p "$far/100001.d"
    say local >"$far/100001"
    pull -- cat "$far/100001" >"$T/got"
    same "$near/100001" "$T/got"
    pull -- stat -c %F "$far/100001.d" >"$T/got"
    grep -qx directory "$T/got" || fail "a local directory is $(cat "$T/got")"
    [ "$(cat "$far/100001")" = local ] || fail "the local file has changed"
    pull -- ls "$far" | grep -qx 100001 || fail "the directory's list"
    rm -r "$far"
    # MEMSYNC_PROGRAMS leaves others alone: for them there is nothing.
    ! pull MEMSYNC_PROGRAMS=nothing -- cat "$far/1" 2>"$T/none" || fail "read by a program that is not meant"
    grep -q 'No such file' "$T/none" || fail "$(cat "$T/none")"
    # One that is not meant inherits a descriptor: it must fail, not read zeros.
    ! pull MEMSYNC_PROGRAMS=bash -- bash -c "cat <$far/100001" >"$T/got" 2>"$T/none" || fail "cat without the shim reads"
    [ ! -s "$T/got" ] || fail "it has read $(wc -c <"$T/got") bytes"
    ! pull -- bash -c "LD_PRELOAD= cat <$far/100001" >"$T/got" 2>"$T/none" || fail "cat without the library reads"
    [ ! -s "$T/got" ] || fail "it has read $(wc -c <"$T/got") bytes"
    ;;
orders)
    for order in fault linear recorded none; do
        for time in first second; do
            shim MEMSYNC_REGIONS="$far/**=pull,order=$order" -- sha256sum "$far/20000000" | cut -d' ' -f1 >"$T/got"
            [ "$(cat "$T/got")" = "$(sha256sum <"$near/20000000" | cut -d' ' -f1)" ] || fail "order=$order, $time time"
        done
        shim MEMSYNC_REGIONS="$far/**=pull,order=$order" -- "$BUILD/tests/programs/pulled" maps "$far/20000000" "$near/20000000"
    done
    ;;
far_orders) # what a long path has room for is more of a recorded order's small reads than a server takes at once
    random long 40000000
    put long
    stop_local
    start_relay --delay 20
    cat >"$T/scattered.py" <<'END'
import os, sys, concurrent.futures
fd = os.open(sys.argv[1], os.O_RDONLY)
with concurrent.futures.ThreadPoolExecutor(32) as threads:
    list(threads.map(lambda at: os.pread(fd, 1, at), range(0, 40000000, 65536)))
END
    pull MEMSYNC_REGIONS="$far/**=pull,order=recorded" -- python3 "$T/scattered.py" "$far/long"
    stop_local
    pull MEMSYNC_REGIONS="$far/**=pull,order=recorded" -- sha256sum "$far/long" | cut -d' ' -f1 >"$T/got"
    [ "$(cat "$T/got")" = "$(sha256sum <"$near/long" | cut -d' ' -f1)" ] || fail "$(cat "$T/said.err")"
    ;;
esac
nothing_local
say "as on the local file"
