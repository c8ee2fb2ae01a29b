#!/usr/bin/env bash
# How many sockets a connection with bulk comes to have: one for bulk, more where a long line makes the buffers of one too small; and
# that what is urgent does not wait for bulk.
# cases
# timeout: 60
. "$(dirname "$0")/../lib.sh"

cases=(long_line short_line beside_bulk)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }

value() { awk -v name="$1" '$1 " " $2 == name { print $3 }' "$T/said"; }
measure() { # LINE SECONDS: in namespaces of its own
    local code=0
    "$TESTS/../bench/beside.sh" "$@" >"$T/said" 2>"$T/said.err" || code=$?
    [ "$code" != 77 ] || { cat "$T/said"; exit 77; }
    [ "$code" = 0 ] || fail "$(cat "$T/said" "$T/said.err")"
}
sockets() { # AT-LEAST AT-MOST
    local n
    n=$(value "sockets count")
    [ "$n" -ge "$1" ] && [ "$n" -le "$2" ] || fail "$n sockets, not $1 to $2: $(cat "$T/said")"
}

case $1 in
long_line)
    measure 60 5
    sockets 3 5
    ;;
short_line)
    measure 1gbit 4
    sockets 2 2
    ;;
beside_bulk) # under a millisecond more on a line that is full of bulk
    measure 1gbit 3
    for what in read sync; do
        [ "$(value "${what}_busy p50_us")" -le $(($(value "${what}_idle p50_us") + 1000)) ] || fail "$(cat "$T/said")"
    done
    ;;
esac
