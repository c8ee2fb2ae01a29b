#!/usr/bin/env bash
# Everyday programs give the same output, the same complaints, the same exit codes and the same files with the shim as without: with no rule at all, with a rule that
# matches nothing they touch, and with all of their files replicated.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

list() {
    local program rules
    for program in ls pipelines files text tar git python compile sqlite; do
        for rules in unset other tracked; do
            say "$program/$rules"
        done
    done
}

[ "${1:?a case, or list}" = list ] && { list; exit 0; }
IFS=/ read -r program rules <<<"$1"
case $program in
git) requires git ;;
python) requires /usr/bin/python3 ;;
compile) requires gcc make ar strip ;;
sqlite) requires sqlite3 ;;
text) requires perl ;;
esac

# run DIRECTORY COMMAND...: the shell itself is under the shim, and all that it starts.
run() {
    local code=0
    mkdir "$W/$1"
    (cd "$W/$1" && "${@:2}" bash "$TESTS/programs/lib/everyday.sh" "$program" >"$T/$1.out" 2>"$T/$1.err" </dev/null) || code=$?
    [ "$code" = 5 ] || fail "$1: the shell ended with $code: $(tail -n 5 "$T/$1.err")"
}
run native timeout 60
# A test whose own output differs from run to run would show nothing.
run again timeout 60
diff "$T/native.out" "$T/again.out" >&2 || fail "the programs differ from run to run without the shim"
diff "$T/native.err" "$T/again.err" >&2 || fail "the programs' complaints differ from run to run without the shim"
rm -r "$W/again"

start_remote
case $rules in
unset) run shim shim MEMSYNC_REGIONS= -- ;;
other) run shim shim MEMSYNC_REGIONS="$T/nothing/**" -- ;;
tracked) run shim shim MEMSYNC_REGIONS="$W/shim/**" -- ;;
esac
diff "$T/native.out" "$T/shim.out" | head -n 50 >"$T/diff"
[ ! -s "$T/diff" ] || fail "without (<) and with (>) the shim the programs print different things: $(cat "$T/diff")"
# That nothing is tracked may be said, and that is all.
grep -v '^memsync: MEMSYNC_REGIONS is not set' "$T/shim.err" >"$T/complaints" || true
diff "$T/native.err" "$T/complaints" >&2 || fail "without (<) and with (>) the shim the programs complain differently"
diff -r --no-dereference "$W/native" "$W/shim" >"$T/diff" 2>&1 || fail "the files left behind differ: $(head -n 20 "$T/diff")"
case $rules in
tracked)
    [ -S "$SOCKET" ] || fail "no agent was started: nothing was replicated"
    stop_local
    ;;
*) no_local_agents || fail "an agent was started although nothing matched" ;;
esac
