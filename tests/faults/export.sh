#!/usr/bin/env bash
# A region is exported while its program goes from epoch to epoch: what comes out is one of them, whole, and never goes back.
# timeout: 120
. "$(dirname "$0")/../lib.sh"

writer=$BUILD/tests/faults/epochwriter
start_remote
shim -- "$writer" write "$W" mdf >"$T/said" 2>"$T/program.err" &
program=$!
acked() { sed -n 's/^acked //p' "$T/said" | tail -n 1; }
beyond() { [ "$(acked)" -gt "$1" ]; }
acked_some() { [ -n "$(acked)" ]; }
poll 30 acked_some || fail "no epoch was acknowledged"
mkdir "$T/out"
last=0
for i in $(seq 30); do
    least=$(acked)
    name=$(printf 'a\nb\nc\n' | sed -n "$((i % 3 + 1))p")
    rm -f "$T/out/$name"
    memsync export "${W#/}/$name" "$T/out/$name" >"$T/export.out" 2>&1 || fail "export $i of $name: $(cat "$T/export.out")"
    at=$("$writer" file "$T/out" "$name") || fail "export $i of $name is no epoch"
    [ "$at" -ge "$least" ] || fail "export $i is at epoch $at, but $least was acknowledged before it"
    [ "$at" -ge "$last" ] || fail "export $i is at epoch $at, the one before at $last"
    last=$at
    poll 30 beyond "$at" || fail "the program stands still"
done
memsync verify "${W#/}/a" >"$T/verify.out" 2>&1 || true # may differ while the program runs; must not disturb
touch "$T/stop"
wait $program || fail "the program ended with $?"
memsync verify "${W#/}/a" >"$T/verify.out" 2>&1 || fail "verify, after the program ended: $(cat "$T/verify.out")"
stop_local
stop_remote
quiet "$T/program.err"
same_tree
