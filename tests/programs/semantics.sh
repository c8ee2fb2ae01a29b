#!/usr/bin/env bash
# Return values, errno and effects of every hooked call, on good and bad arguments, are the kernel's: the same lines come from a program without the shim, with it
# and no rule that matches, and with its files replicated.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

list() {
    local program rules place
    for program in semantics semantics_maps; do
        for place in disk memory; do
            for rules in none other uffd hash auto; do
                say "$program/$rules/$place"
            done
        done
    done
}
[ "${1:?a case, or list}" = list ] && { list; exit 0; }
IFS=/ read -r program rules place <<<"$1"
[ "$place" = memory ] && work_in_memory
bin=$BUILD/tests/programs/$program
[ -x "$bin" ] || fail "$bin is not built (make tests)"

mkdir "$W/native" "$W/shim"
timeout 60 "$bin" "$W/native" >"$T/native.out" 2>"$T/native.err" || fail "without the shim the program ended with $?"
[ "$(wc -l <"$T/native.out")" -gt 100 ] || fail "the table of calls is too short to be all of it"

start_remote mem:
case $rules in
none) settings=(MEMSYNC_REGIONS=) ;;
other) settings=(MEMSYNC_REGIONS="$T/nothing/**") ;;
*) settings=(MEMSYNC_REGIONS="$W/shim/**" MEMSYNC_STRATEGY="$rules") ;;
esac
shim "${settings[@]}" -- "$bin" "$W/shim" >"$T/shim.out" 2>"$T/program.err" || fail "under the shim the program ended with $?"
diff "$T/native.out" "$T/shim.out" >&2 || fail "without (<) and with (>) the shim the calls differ"
diff -r "$W/native" "$W/shim" >&2 || fail "the files left behind differ"

case $rules in
none) ;; # that nothing is tracked is said once
other)
    quiet "$T/program.err"
    no_local_agents || fail "an agent was started although nothing matched"
    ;;
*)
    quiet "$T/program.err"
    [ -S "$SOCKET" ] || fail "no agent was started: nothing was replicated"
    stop_local
    ;;
esac
