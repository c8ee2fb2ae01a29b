#!/usr/bin/env bash
# Runs the tests: every unit test binary, every script, every case of a script that lists cases ("SCRIPT list").
#
#   tests/run.sh [unit|programs|faults|interop|fuzz|vm|long|PATH[:CASE]]...    (unit programs faults interop fuzz when none is named)
#
# BUILD=DIR: what to test. JOBS=N: how many at once (2). TIMEOUT=S for each (120). One line a test, the output of those that failed, and the totals.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 3
export BUILD=${BUILD:-build}
JOBS=${JOBS:-2}
TIMEOUT=${TIMEOUT:-120}
out=$(mktemp -d "${TMPDIR:-/tmp}/memsync-run.XXXXXX")
trap 'rm -rf "$out"' EXIT
# An interrupted run ends its tests too, and each of them its agents.
trap 'kill -TERM $(jobs -p) 2>/dev/null; wait; exit 130' INT TERM

names=() commands=() limits=()
add() {
    names+=("$1")
    limits+=("$2")
    commands+=("$3")
}
add_script() {
    local script=$1 only=${2:-} name limit item
    name=${script#tests/}
    limit=$(sed -n 's/^# timeout: \([0-9]*\)$/\1/p' "$script")
    if grep -q '^# cases$' "$script"; then
        only=${only:-$(bash "$script" list 2>/dev/null)}
        for item in ${only:-list}; do # a list that cannot be had fails as a test
            add "$name $item" "${limit:-$TIMEOUT}" "bash $script $item"
        done
    else
        add "$name" "${limit:-$TIMEOUT}" "bash $script"
    fi
}
add_folder() {
    local script
    for script in "tests/$1"/*.sh; do
        [ -e "$script" ] && add_script "$script"
    done
}
add_unit() {
    local program
    for program in "$BUILD"/tests/unit/*; do
        [ -f "$program" ] && [ -x "$program" ] && add "unit/$(basename "$program")" "$TIMEOUT" "$program"
    done
}
for what in "${@:-unit}" $([ $# = 0 ] && echo programs faults interop fuzz); do
    case $what in
    unit) add_unit && add_folder unit ;;
    programs | faults | interop | fuzz | vm) add_folder "$what" ;;
    long)
        export TEST_ROUNDS=200
        TIMEOUT=3600
        add_folder faults
        ;;
    *.sh:*) add_script "${what%%:*}" "${what#*:}" ;;
    *.sh) add_script "$what" ;;
    *)
        if [ -x "$what" ]; then
            add "$what" "$TIMEOUT" "$what"
        else
            echo "run.sh: no such test: $what (unit, programs, faults, interop, fuzz, vm, long, or a path)" >&2
            exit 2
        fi
        ;;
    esac
done

one() {
    local start=$EPOCHREALTIME code
    # In a process group of its own, and told to end before it is killed, so that its agents go with it.
    timeout -k 20 "${limits[$1]}" ${commands[$1]} >"$out/$1.log" 2>&1 </dev/null
    code=$?
    awk -v a="$start" -v b="$EPOCHREALTIME" -v c="$code" 'BEGIN { printf "%d %.1f\n", c, b - a }' >"$out/$1.tmp"
    mv "$out/$1.tmp" "$out/$1.done"
}
passed=0 failed=0 skipped=0 failures=()
report() {
    local code seconds
    read -r code seconds <"$out/$1.done"
    case $code in
    0)
        passed=$((passed + 1))
        printf 'ok    %-60s %6ss\n' "${names[$1]}" "$seconds"
        ;;
    77)
        skipped=$((skipped + 1))
        printf 'skip  %-60s %s\n' "${names[$1]}" "$(grep -h SKIP "$out/$1.log" | tail -n 1)"
        # What skips for want of a package fails by itself under CI (lib.sh); what is left wants a kernel or a machine that this is not.
        ;;
    *)
        failed=$((failed + 1))
        failures+=("${names[$1]}")
        [ "$code" = 124 ] || [ "$code" = 137 ] && code="time-out after ${limits[$1]} s"
        printf 'FAIL  %-60s %6ss  (%s)\n' "${names[$1]}" "$seconds" "$code"
        sed 's/^/      | /' "$out/$1.log" | tail -n 60
        ;;
    esac
}
next=0 running=()
while [ "$next" -lt "${#names[@]}" ] || [ "${#running[@]}" -gt 0 ]; do
    while [ "$next" -lt "${#names[@]}" ] && [ "${#running[@]}" -lt "$JOBS" ]; do
        one "$next" &
        running+=("$next")
        next=$((next + 1))
    done
    wait -n 2>/dev/null
    left=()
    for index in "${running[@]}"; do
        if [ -e "$out/$index.done" ]; then report "$index"; else left+=("$index"); fi
    done
    running=("${left[@]}")
done
[ "${#failures[@]}" = 0 ] || printf 'failed: %s\n' "${failures[@]}"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] && [ "$((passed + skipped))" -gt 0 ] && [ "${#failures[@]}" = 0 ]
