#!/usr/bin/env bash
# Mirrored regions and what fails: the agent killed again and again, the link cut, the remote killed, the program killed with stores nobody has seen, all
# of it, and a second writer. What is synced is there; what is there is a whole epoch.
# cases
# timeout: 300
. "$(dirname "$0")/../lib.sh"

cases=(agent_killed link_cut remote_killed program_killed cut_killed all_killed all_lost loss_fail second_writer taken stale_reader writer_after_writer host_lost_sqlite_delete host_lost_sqlite_wal host_lost_lmdb)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }

far=$W/far
name=${far#/}
ROUNDS=${TEST_ROUNDS:+50}
ROUNDS=${ROUNDS:-5}
size=$((24 << 20))
program=$BUILD/tests/programs/mirrored
mirror() { shim MEMSYNC_REGIONS="$far=mirror${EXTRA:+,$EXTRA}" "$@"; }
setup() {
    start_remote
    head -c "$size" /dev/urandom >"$T/first"
    memsync import --force "$T/first" "$name" >"$T/import.out" 2>&1 || fail "import: $(cat "$T/import.out")"
}
# The same rounds on a local file are the model.
PROGRAM='' IN='' OUT=''
rounds_start() { # VARIABLE=VALUE...
    pipes rounds
    exec {IN}<>"$T/rounds.in" {OUT}<>"$T/rounds.out"
    LIMIT=280 mirror "$@" -- "$program" rounds "$far" <"$T/rounds.in" >"$T/rounds.out" 2>"$T/rounds.err" &
    PROGRAM=$!
    heard ready
}
heard() {
    local line
    read -r -t 60 -u "$OUT" line || fail "no answer within 60 s: $(cat "$T/rounds.err")"
    [ "$line" = "$*" ] || fail "'$line', not '$*': $(cat "$T/rounds.err")"
}
round() {
    say >&"$IN"
    heard "$1 0"
}
model() { # ROUNDS: $T/model is what the file is after so many
    local i
    cp "$T/first" "$T/model"
    for ((i = 0; i < $1; i++)); do say; done | "$program" rounds "$T/model" >"$T/model.out"
}
export_to() { memsync export "$name" "$1" >"$T/export.out" 2>&1; }
is_model() { export_to "$T/exported" && cmp -s "$T/model" "$T/exported"; }
ended() { # ROUNDS
    local code=0
    say q >&"$IN"
    wait "$PROGRAM" || code=$?
    [ "$code" = 0 ] || fail "the program ended with $code: $(cat "$T/rounds.err")"
    model "$1"
    poll 30 is_model || fail "the region is not what $1 rounds make of it: $(cmp "$T/model" "$T/exported" 2>&1 || true) $(cat "$T/export.out")"
}
kill_local() {
    local pid
    for pid in $(local_agents); do kill -KILL "$pid"; done
}
# The program's own process, below shim's timeout.
program_pid() { pgrep -n -f "^$program [a-z]* $far" || fail "where is the program?"; }

case $1 in
agent_killed)
    setup
    rounds_start
    for ((i = 1; i <= ROUNDS * 2; i++)); do
        round "$i"
        [ $((i % 2)) = 0 ] || kill_local
    done
    ended "$((ROUNDS * 2))"
    ;;
link_cut)
    setup
    start_relay
    rounds_start MEMSYNC_TIMEOUT=60s
    for ((i = 1; i <= ROUNDS; i++)); do
        relay down
        say >&"$IN"
        relay up
        heard "$i 0"
    done
    ended "$ROUNDS"
    ;;
remote_killed)
    setup
    LISTEN=$REMOTE
    rounds_start MEMSYNC_TIMEOUT=60s
    for ((i = 1; i <= ROUNDS; i++)); do
        say >&"$IN"
        kill_remote
        start_remote
        heard "$i 0"
    done
    ended "$ROUNDS"
    ;;
program_killed) # what it has stored is the agent's to publish
    setup
    for ((i = 1; i <= 2; i++)); do
        EXTRA=interval=off
        mirror -- "$program" stores "$far" >"$T/stores" 2>"$T/stores.err" &
        PROGRAM=$!
        poll 30 grep -q stored "$T/stores" || fail "it has not stored: $(cat "$T/stores.err")"
        kill -KILL "$(program_pid)"
        wait "$PROGRAM" 2>/dev/null || true
        cp "$T/first" "$T/model"
        "$program" stores "$T/model" >"$T/stores" &
        poll 30 grep -q stored "$T/stores" || fail "no model"
        kill -KILL $!
        poll 30 is_model || fail "what a killed program has stored is not at the remote: $(cmp "$T/model" "$T/exported" 2>&1 || true)"
        cp "$T/model" "$T/first"
        : >"$T/stores"
    done
    mirror -- cmp "$far" "$T/model" || fail "read again it is something else"
    ;;
cut_killed) # of a page that was not fetched, only what was before the cut is left, although nobody knows of the cut any more
    setup
    EXTRA=interval=off,order=none
    mirror -- /usr/bin/python3 -c 'import mmap, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
map = mmap.mmap(fd, 8192)
os.ftruncate(fd, (8 << 20) + 5000)
os.ftruncate(fd, 9 << 20)
map[0] = 1
print("cut", os.getpid(), flush=True)
time.sleep(600)' "$far" >"$T/cuts" 2>"$T/cuts.err" &
    PROGRAM=$!
    poll 30 grep -q cut "$T/cuts" || fail "it has not cut: $(cat "$T/cuts.err")"
    kill -KILL "$(cut -d" " -f2 "$T/cuts")"
    wait "$PROGRAM" 2>/dev/null || true
    head -c $(((8 << 20) + 5000)) "$T/first" >"$T/model"
    truncate -s $((9 << 20)) "$T/model"
    printf '\1' | dd of="$T/model" conv=notrunc status=none
    poll 30 is_model || fail "the cut is not at the remote: $(cmp "$T/model" "$T/exported" 2>&1 || true)"
    ;;
all_killed) # program and agent: what was not synced is gone, the rest is an epoch
    setup
    rounds_start
    for ((i = 1; i <= 3; i++)); do round "$i"; done
    say >&"$IN"
    kill -KILL "$(program_pid)" $(local_agents)
    wait "$PROGRAM" 2>/dev/null || true
    model 3
    if ! is_model; then
        model 4
        is_model || fail "the region is neither 3 rounds nor 4"
    fi
    cp "$T/model" "$T/first"
    rounds_start
    for ((i = 1; i <= 3; i++)); do round "$i"; done
    ended 3
    ;;
all_lost) # the link is away for longer than the time-out, then the agent as well
    setup
    start_relay
    rounds_start MEMSYNC_TIMEOUT=500ms
    round 1
    relay down
    round 2
    round 3
    kill_local
    relay up
    round 4
    ended 4
    ;;
loss_fail)
    setup
    start_relay
    rounds_start MEMSYNC_TIMEOUT=500ms MEMSYNC_ON_LOSS=fail
    round 1
    relay down
    say >&"$IN"
    heard "2 -1 EIO"
    relay up
    n=3
    until say >&"$IN" && read -r -t 30 -u "$OUT" line && [ "$line" = "$n 0" ]; do
        n=$((n + 1))
        [ "$n" -lt 100 ] || fail "sync points fail after the link came back: $line"
        sleep 0.1
    done
    ended "$n"
    ;;
second_writer)
    setup
    rounds_start
    round 1
    other() { SOCKET=$T/agent2.sock mirror XDG_STATE_HOME="$T/state2" "$@"; }
    code=0
    other -- bash -c 'exec 5<>"$1"' - "$far" 2>"$T/refused" || code=$?
    [ "$code" != 0 ] || fail "a second host opens it for writing"
    grep -q 'busy' "$T/refused" || fail "it is refused with: $(cat "$T/refused")"
    grep -q "$(hostname)" "$T/refused" || fail "who holds it is not said: $(cat "$T/refused")"
    model 1
    other -- cat "$far" >"$T/got"
    same "$T/model" "$T/got"
    round 2
    ended 2
    # Now that the first is gone, and its lease.
    memsync stop >"$T/stop.out" 2>&1 || fail "stop: $(cat "$T/stop.out")"
    opens() { other -- dd if=/dev/zero of="$far" bs=10 count=1 conv=notrunc status=none 2>"$T/refused"; }
    poll 30 opens || fail "the lease is not given back: $(cat "$T/refused")"
    dd if=/dev/zero of="$T/model" bs=10 count=1 conv=notrunc status=none
    poll 30 is_model || fail "the second writer's bytes are not there"
    ;;
taken) # fenced: somebody took it by force while the link was away
    setup
    start_relay
    rounds_start MEMSYNC_TIMEOUT=500ms
    round 1
    relay down
    round 2
    head -c 1000 /dev/urandom >"$T/other"
    took() { memsync import --force --remote "$DIRECT" "$T/other" "$name" >"$T/import.out" 2>&1; }
    poll 40 took || fail "the lease of the lost writer did not end: $(cat "$T/import.out")"
    relay up
    n=3
    until say >&"$IN" && read -r -t 30 -u "$OUT" line && [ "$line" = "$n -1 EIO" ]; do
        n=$((n + 1))
        [ "$n" -lt 200 ] || fail "msync says $line although another has the region"
        sleep 0.1
    done
    memsync export --remote "$DIRECT" "$name" "$T/exported" >"$T/export.out" 2>&1 || fail "export: $(cat "$T/export.out")"
    same "$T/other" "$T/exported"
    ;;
stale_reader) # it has what was there, until it writes itself: then that must be what the others have left
    setup
    pipes reader
    exec {RI}<>"$T/reader.in" {RO}<>"$T/reader.out"
    mirror -- /usr/bin/python3 -c 'import os, sys, fcntl, errno, time
r = os.open(sys.argv[1], os.O_RDONLY)
fcntl.lockf(r, fcntl.LOCK_SH)
a = os.pread(r, 5000000, 1000)
print("open", flush=True)
sys.stdin.readline()
until = time.time() + 30
while True: # the tool gives its lease back once it is gone
    try: w = os.open(sys.argv[1], os.O_RDWR)
    except OSError as e:
        if e.errno != errno.EBUSY or time.time() > until: raise
        time.sleep(0.05)
    else: break
print("other" if os.pread(w, 5000000, 1000) != a else "same", flush=True)
os.pwrite(w, b"mine", 2000000)
os.fsync(w)' "$far" <"$T/reader.in" >"$T/reader.out" 2>"$T/reader.err" &
    PROGRAM=$!
    read -r -t 30 -u "$RO" line || fail "it does not open: $(cat "$T/reader.err")"
    head -c "$size" /dev/urandom >"$T/model"
    memsync import --force "$T/model" "$name" >"$T/import.out" 2>&1 || fail "import: $(cat "$T/import.out")"
    say >&"$RI"
    read -r -t 30 -u "$RO" line || fail "it does not write: $(cat "$T/reader.err")"
    [ "$line" = other ] || fail "it reads what was there before"
    wait "$PROGRAM" || fail "it fails: $(cat "$T/reader.err")"
    printf mine | dd of="$T/model" bs=1 seek=2000000 conv=notrunc status=none
    poll 30 is_model || fail "what it wrote is not there, or not onto what the other had left"
    ;;
writer_after_writer) # one after the other, by different agents: each sees what the last has left
    setup
    cp "$T/first" "$T/model"
    opens() { mirror XDG_STATE_HOME="$T/state$((i % 2))" -- truncate -s +0 "$far" >"$T/got.err" 2>&1; }
    for ((i = 0; i < 4; i++)); do
        SOCKET=$T/agent$((i % 2)).sock
        poll 30 opens || fail "the lease does not end: $(cat "$T/got.err")"
        mirror XDG_STATE_HOME="$T/state$((i % 2))" -- "$program" calls "$far" >"$T/got" 2>"$T/got.err"
        "$program" calls "$T/model" >"$T/expected"
        cmp "$T/expected" "$T/got" >&2 || fail "round $i says otherwise: $(cat "$T/got.err")"
        memsync stop >"$T/stop.out" 2>&1 || fail "stop: $(cat "$T/stop.out")"
        poll 30 is_model || fail "round $i has left something else"
    done
    ;;
host_lost_*) # a database in the middle of its commits, and the host is gone: another one opens it, with its journal, and all that was committed is there
    requires_python lmdb
    how=${1#host_lost_}
    start_remote
    mkdir "$far" "$T/hosts" # for what is a host's own: locks, -shm
    far=$far/db
    cat >"$T/commits.py" <<'END'
import sqlite3, sys, lmdb
how, path, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
if how == 'lmdb':
    e = lmdb.open(path, subdir=False, map_size=64 << 20)
    with e.begin() as t:
        have = [int(k) for k, _ in t.cursor()]
        good = all(v == k * 100 for k, v in t.cursor())
else:
    c = sqlite3.connect(path, timeout=60, isolation_level=None)
    c.execute('pragma journal_mode=' + how.split('_')[1])
    c.execute('pragma synchronous=full')
    c.execute('pragma cache_size=20')
    c.execute('create table if not exists t(n integer primary key, b blob)')
    have = [r[0] for r in c.execute('select distinct n / 50 from t')]
    counts = [r[0] for r in c.execute('select count(*) from t group by n / 50')]
    good = c.execute('pragma integrity_check').fetchone()[0] == 'ok' and all(n == 50 for n in counts)
n = max(have, default=-1) + 1
print('found', n, 'good' if good and have == list(range(n)) and n >= last else 'BAD', flush=True)
while True:
    if how == 'lmdb':
        with e.begin(write=True) as t:
            t.put(b'%08d' % n, b'%08d' % n * 100)
    else:
        c.execute('begin')
        for i in range(50):
            c.execute('insert into t values(?, ?)', (n * 50 + i, b'x' * 2000))
        c.execute('commit')
    n += 1
    print(n, flush=True)
END
    last=0
    for ((i = 1; i <= 3; i++)); do
        SOCKET=$T/hosts/$i.sock
        rm -f "$(dirname "$far")"/* # the other host's disk has none of it
        host() { shim XDG_STATE_HOME="$T/hosts/$i" MEMSYNC_REGIONS="$far=mirror,name=db/all" -- /usr/bin/python3 "$@"; }
        opens() { host -c 'import os, sys; os.open(sys.argv[1], os.O_RDWR)' "$far" 2>"$T/opens.err"; }
        [ "$i" = 1 ] || poll 40 opens || fail "the lease of the lost host does not end: $(cat "$T/opens.err")"
        : >"$T/commits"
        host "$T/commits.py" "$how" "$far" "$last" >"$T/commits" 2>"$T/commits.err" &
        PROGRAM=$!
        poll 60 grep -q found "$T/commits" || fail "host $i cannot open it: $(cat "$T/commits.err")"
        grep -q good "$T/commits" || fail "host $i, after commit $last: $(head -n 1 "$T/commits")"
        committed() { [ "$(wc -l <"$T/commits")" -gt 30 ]; }
        poll 60 committed || fail "it does not commit: $(cat "$T/commits.err")"
        kill -KILL "$(pgrep -n -f "$T/commits.py")" $(local_agents)
        wait "$PROGRAM" 2>/dev/null || true
        last=$(tail -n 1 "$T/commits")
    done
    ;;
esac
say "what was synced is there"
