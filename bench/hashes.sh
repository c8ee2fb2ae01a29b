#!/usr/bin/env bash
# Hash algorithms against each other and against PAGEMAP_SCAN: bench/hashes.sh [REGION-MIB [ROUNDS]] measures and plots into $BUILD/bench/results, or into
# $RESULTS.  bench/hashes.sh plot CSV SVG plots a table that is there.
set -euo pipefail
export LC_ALL=C
here=$(dirname "$0")
BUILD=${BUILD:-build}

plot() { gnuplot -e "table='$1'; picture='$2'" "$here/hashes.gp"; }
if [ "${1:-}" = plot ]; then
    plot "$2" "$3"
    exit 0
fi
results=${RESULTS:-$BUILD/bench/results}
mkdir -p "$results"
"$BUILD/bench/hashes" "$@" >"$results/hashes.csv"
plot "$results/hashes.csv" "$results/hashes.svg"
awk -F, '$1 == "speed" && $3 == 4096 { printf "  %-10s %8.2f GB/s in blocks of 4 KiB\n", $2, $4 }
         $1 == "full" { printf "  %-10s %8.1f ms to read and hash %d MiB\n", $2, $4, $3 / 1048576 }
         $1 == "detect" && $2 ~ /^scan/ { printf "  %-13s %9.3f ms with %g %% of the pages dirty\n", $2, $4, $3 }' "$results/hashes.csv"
echo "$results/hashes.csv $results/hashes.svg"
