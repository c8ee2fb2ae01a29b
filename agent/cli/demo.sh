#!/usr/bin/env bash
# make demo: an unmodified program's LMDB database is replicated to a second agent while it runs, compared, and read back from there by page faults. BUILD=DIR: where the parts are.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(realpath "${BUILD:-build}")
for variable in $(compgen -e MEMSYNC_ || true); do unset "$variable"; done

work=$(realpath "$(mktemp -d "${TMPDIR:-/tmp}/memsync-demo.XXXXXX")")
export MEMSYNC_AGENT=$work/agent.sock XDG_STATE_HOME=$work/state
remote_pid='' app=''
cleanup() {
    [ -z "$app" ] || kill "$app" 2>/dev/null || true
    "$build/memsync" stop >/dev/null 2>&1 || true
    [ -z "$remote_pid" ] || kill "$remote_pid" 2>/dev/null || true
    wait
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

heading() { printf '\n\033[1m%s\033[0m\n' "$*"; }
plain() { printf '\n%s\n' "$*"; }
[ -t 1 ] || heading() { plain "$@"; }
show() { # what runs, with the temporary directory's name left out, and what it says
    printf '$ %s\n' "$*" | sed "s|$build/||g; s|$work|.|g"
    "$@" 2>&1 | sed "s|$work|.|g; s|${work#/}|.|g"
}
fail() {
    echo "demo: $*" >&2
    exit 1
}
await() { # until COMMAND succeeds, 10 s at most
    local until=$((SECONDS + 10))
    until "$@" 2>/dev/null; do
        [ "$SECONDS" -lt "$until" ] || fail "waited in vain for: $*"
        read -rt 0.02 <> <(:) || true
    done
}

heading "1. A second agent: where the replica goes"
printf '$ memsync-agent --listen 127.0.0.1:0 --store file:./replica\n'
"$build/memsync-agent" --listen 127.0.0.1:0 --store "file:$work/replica" >"$work/remote.out" &
remote_pid=$!
listening() { grep -q '^listening wire 127' "$work/remote.out"; }
await listening
cat "$work/remote.out" | sed "s|$work|.|g"
remote=$(sed -n 's/^listening wire \(127[^ ]*\).*/\1/p' "$work/remote.out")

heading "2. A program that knows nothing of it"
mkdir "$work/db"
cat >"$work/app.py" <<'PROGRAM'
import lmdb, os, sys
env = lmdb.open(sys.argv[1], map_size=16 << 20, writemap=True)
for t in range(20):
    with env.begin(write=True) as txn:
        for i in range(50):
            txn.put(b"key %04d.%02d" % (t, i), os.urandom(100))
print("20 transactions committed, 1000 records")
if len(sys.argv) > 2:
    sys.stdout.flush()
    sys.stdin.readline()
PROGRAM
sed -n '2,6p' "$work/app.py" | sed 's/^/    /'
cat <<COMMAND
\$ LD_PRELOAD=libmemsync_preload.so MEMSYNC_REMOTE=$remote MEMSYNC_REGIONS=\$PWD/db/data.mdb,name=db python3 app.py ./db
COMMAND
mkfifo "$work/in"
LD_PRELOAD=$build/libmemsync_preload.so MEMSYNC_REMOTE=$remote MEMSYNC_REGIONS="$work/db/data.mdb,name=db" \
    /usr/bin/python3 "$work/app.py" "$work/db" wait <"$work/in" >"$work/app.out" &
app=$!
exec 9>"$work/in"
committed() { grep -q committed "$work/app.out" || ! kill -0 "$app"; }
await committed
cat "$work/app.out"
grep -q committed "$work/app.out" || fail "the program has failed"

heading "3. It is still running: what is where, and is it the same?"
show "$build/memsync" status
printf '\n'
show "$build/memsync" ls --remote "$remote"
printf '\n'
show "$build/memsync" verify db --remote "$remote" | tee "$work/verify.out"
grep -q '^same: ' "$work/verify.out" || fail "memsync verify found a difference"
echo >&9
exec 9>&-
wait "$app" || fail "the program has failed"
app=

heading "4. And back: the region at a path where there is no file"
cat <<COMMAND
\$ LD_PRELOAD=libmemsync_preload.so MEMSYNC_REMOTE=$remote MEMSYNC_REGIONS=\$PWD/there.mdb=pull,name=db mdb_dump -n there.mdb
COMMAND
LD_PRELOAD=$build/libmemsync_preload.so MEMSYNC_REMOTE=$remote MEMSYNC_REGIONS="$work/there.mdb=pull,name=db" mdb_dump -n "$work/there.mdb" >"$work/dumped" ||
    fail "mdb_dump of the pulled region has failed"
[ ! -e "$work/there.mdb" ] || fail "there is a file"
records() { sed -n '/^HEADER=END/,/^DATA=END/p' | sha256sum; }
[ "$(records <"$work/dumped")" = "$(mdb_dump "$work/db" | records)" ] || fail "the pulled region's records differ"
printf '%s records, the same; nothing of it is on this disk:\n' "$(grep -c '^ 6b6579' "$work/dumped")"
printf '$ ls there.mdb\n%s\n' "$(cd "$work" && LC_ALL=C ls there.mdb 2>&1)"

heading "5. Both agents stopped: the replica is a plain file"
"$build/memsync" stop >/dev/null
kill "$remote_pid"
wait "$remote_pid" || fail "the remote agent has failed"
remote_pid=
(cd "$work" && sha256sum db/data.mdb replica/db) | tee "$work/sums"
[ "$(cut -d' ' -f1 "$work/sums" | uniq | wc -l)" = 1 ] || fail "the replica differs"
count=$(mdb_dump -n "$work/replica/db" | grep -c '^ 6b6579') || fail "mdb_dump cannot read the replica"
[ "$(mdb_dump -n "$work/replica/db" | records)" = "$(mdb_dump "$work/db" | records)" ] || fail "the replica's records differ"
printf '$ mdb_dump -n replica/db\n%s records, the same as in the original\n' "$count"
