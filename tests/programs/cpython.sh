#!/usr/bin/env bash
# CPython's own test of its mmap module passes: without the shim, with it and no rule, and with its files replicated.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

list() { printf '%s\n' native other uffd hash auto; }
[ "${1:?a case, or list}" = list ] && { list; exit 0; }
python=/usr/bin/python3
requires $python
$python -c 'import test.test_mmap' 2>/dev/null || skip "CPython's test suite is not installed (make deps: libpython3.11-testsuite)"

# Its files are in a directory of its own below this one. The tests that need gigabytes of disk are not among those that run.
command=($python -m test --tempdir="$W" --timeout 60 -v test_mmap)
case $1 in
native) ;;
other) settings=(MEMSYNC_REGIONS="$T/nothing/**") ;;
*) settings=(MEMSYNC_STRATEGY="$1") ;;
esac
[ "$1" = native ] || start_remote mem:
if [ "$1" = native ]; then
    "${command[@]}" >"$T/test.out" 2>"$T/test.err" || fail "test_mmap fails without the shim: $(tail -n 30 "$T/test.out" "$T/test.err")"
else
    shim "${settings[@]}" -- "${command[@]}" >"$T/test.out" 2>"$T/test.err" ||
        fail "test_mmap fails under the shim: $(grep -E -A 15 '^(ERROR|FAIL):' "$T/test.out" "$T/test.err" || tail -n 40 "$T/test.out")"
fi
grep -q 'result: SUCCESS' "$T/test.out" || fail "test_mmap did not say that it passed: $(tail -n 20 "$T/test.out")"
ran=$(sed -n 's/^Ran \([0-9]*\) tests.*/\1/p' "$T/test.out" "$T/test.err" | head -n 1)
[ "${ran:-0}" -ge 20 ] || fail "only ${ran:-no} tests ran"
quiet "$T/test.err"
case $1 in
native) ;;
other) no_local_agents || fail "an agent was started although nothing matched" ;;
*)
    [ -S "$SOCKET" ] || fail "no agent was started: nothing was replicated"
    stop_local
    ;;
esac
